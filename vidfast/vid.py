"""VIDLoss: the drop-in replacement of the class that distillation repositories share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vidfast import dispatch, reference
from vidfast._torch import any_global_hook
from vidfast.arguments import DTYPES, check_initial_variance, check_options
from vidfast.fused_regressor import fused_nll
from vidfast.nll import gaussian_nll

_POOL: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def match_spatial(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both features at the smaller size of the two along every spatial axis, by adaptive average pooling.

    (B, C, *spatial) each, with 0 to 3 spatial axes; only a side that is larger somewhere is pooled.

    :raises ValueError: the numbers of axes or the batch sizes differ.
    """
    if student.dim() != teacher.dim() or student.dim() < 2 or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            "student and teacher features must be (B, C, *spatial) with one batch and number of axes, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    size = [min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)]

    def pooled(x: Tensor) -> Tensor:
        if list(x.shape[2:]) == size:
            return x
        if len(size) not in _POOL:
            raise ValueError(f"features of different size can have 1 to 3 spatial axes, got {tuple(x.shape)}")
        out: Tensor = _POOL[len(size)](x, size)
        return out

    return pooled(student), pooled(teacher)


# From this size of its widest activation on, a stack of 1x1 convolutions is faster in channels_last on the CPU: oneDNN
# need not reorder it, and reordering takes fresh memory (docs/kernel-notes.md, "Regressors").
_LARGE_ACTIVATION = 16 << 20


def lay_out_for(regressor: nn.Module, student: Tensor) -> Tensor:
    """`student` in the memory format in which a stack of 1x1 convolutions runs faster; its values are the same.

    That is channels_last for large fp32 maps on the CPU; anything else is handed back as it came. The gradient
    arrives in the format that the regressor was given, which autograd accepts from anybody.

    :param regressor: what will be applied to it; the widest convolution directly inside decides.
    :param student: (B, C, H, W), or any other tensor, which is handed back.
    """
    if student.dim() != 4 or not student.is_cpu or student.dtype != torch.float32:
        return student
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return student
    widths = [part.out_channels for part in regressor.children() if type(part) is nn.Conv2d]
    positions = student.shape[0] * student.shape[2] * student.shape[3]
    if len(widths) < 2 or 4 * positions * max(widths) < _LARGE_ACTIVATION:
        return student
    return student.contiguous(memory_format=torch.channels_last)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody's hook sees, and may keep, what goes into the module or a part of it or comes out.

    A backward hook counts: what it wraps cannot be written over. So does a hook for all modules.
    """
    return any_global_hook() or any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in module.modules()
    )


class VIDLoss(nn.Module):
    """VID-I for one pair of layers: a regressor of three 1x1 convolutions and the Gaussian NLL of equation 5.

    The constructor and the checkpoint keys (`log_scale`, `regressor.{0,2,4}.weight`) are those of the VIDLoss
    that distillation repositories share; checkpoints that call the parameter `soft_plus_param` or `alpha` load
    too. Differing spatial sizes are pooled to the smaller along each axis.

    :param num_input_channels: the student feature's channels.
    :param num_mid_channel: the regressor's hidden width (the paper: twice the target's channels).
    :param num_target_channels: C, the teacher feature's channels.
    :param init_pred_var: the initial variance of every channel.
    :param weight: a factor of the loss; in here it costs nothing.
    :param reduction: "mean", "sum" or "batchmean", as in :func:`vidfast.gaussian_nll`.
    :param inplace: the gradient is written over the regressor's output, and its ReLUs over their inputs, which
        nothing is allocated for. On the CPU in fp32 the regressor and the loss are computed a few samples at a time,
        gradients included, and their activations are never whole (:mod:`vidfast.fused_regressor`). Whoever keeps
        such a tensor would find other values in it; a regressor with hooks is therefore left alone.
    :raises ValueError: init_pred_var <= eps, or an unknown name.
    """

    log_scale: nn.Parameter

    def __init__(
        self,
        num_input_channels: int,
        num_mid_channel: int,
        num_target_channels: int,
        init_pred_var: float = 5.0,
        eps: float = 1e-5,
        *,
        weight: float = 1.0,
        reduction: str = "mean",
        inplace: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_input_channels", num_input_channels),
            ("num_mid_channel", num_mid_channel),
            ("num_target_channels", num_target_channels),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        check_options(eps, reduction, weight, inplace=inplace)
        if reduction == "none":
            raise ValueError("reduction must be 'mean', 'sum' or 'batchmean', got 'none'")
        dispatch.check_name(backend)
        self.regressor = nn.Sequential(
            nn.Conv2d(num_input_channels, num_mid_channel, 1, bias=False),
            nn.ReLU(inplace),
            nn.Conv2d(num_mid_channel, num_mid_channel, 1, bias=False),
            nn.ReLU(inplace),
            nn.Conv2d(num_mid_channel, num_target_channels, 1, bias=False),
        )
        self._rectifiers = tuple(part for part in self.regressor if isinstance(part, nn.ReLU))
        alpha = check_initial_variance("init_pred_var", init_pred_var, eps)
        self.log_scale = nn.Parameter(torch.full((num_target_channels,), alpha, dtype=torch.float32))
        self.num_input_channels = num_input_channels
        self.num_target_channels = num_target_channels
        self.inplace = inplace
        self.eps = eps
        self.weight = weight
        self.reduction = reduction
        self.backend = backend

    @property
    def variance(self) -> Tensor:
        """(C,) softplus(log_scale) + eps."""
        return reference.variance(self.log_scale, self.eps)

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        """The loss, a scalar (fp64 if the teacher's feature or the regressor is, else fp32), detached from the teacher.

        :param student_feature: (B, num_input_channels, *spatial), 0 to 3 spatial axes, any floating dtype.
        :param teacher_feature: (B, num_target_channels, *spatial), likewise.
        :raises ValueError: channels, batch or number of axes do not fit.
        """
        for name, x, channels in (
            ("student_feature", student_feature, self.num_input_channels),
            ("teacher_feature", teacher_feature, self.num_target_channels),
        ):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
            if x.dtype not in DTYPES:
                raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
            if x.dim() < 2 or x.shape[1] != channels:
                raise ValueError(f"{name} must be (B, {channels}, *spatial), got {tuple(x.shape)}")
        student, teacher = match_spatial(student_feature, teacher_feature.detach())
        dtype = next(self.regressor.parameters()).dtype
        # autocast casts what goes into a convolution, but not from or to fp64
        cast = torch.float64 in (student.dtype, dtype) or not torch.is_autocast_enabled(student.device.type)
        if cast and student.dtype != dtype:
            student = student.to(dtype)
        inplace = self.inplace and not is_watched(self.regressor)
        if inplace:
            fused = fused_nll(
                self.regressor,
                student,
                teacher,
                self.log_scale,
                eps=self.eps,
                reduction=self.reduction,
                weight=self.weight,
                backend=self.backend,
            )
            if fused is not None:
                return fused
        if student.dim() != 4:  # a 1x1 convolution does not mind how positions are arranged
            student = student.flatten(2).unsqueeze(-1) if student.dim() > 2 else student[:, :, None, None]
            teacher = teacher.flatten(2).unsqueeze(-1) if teacher.dim() > 2 else teacher[:, :, None, None]
        for rectifier in self._rectifiers:
            if rectifier.inplace != inplace:
                rectifier.inplace = inplace
        mean = self.regressor(lay_out_for(self.regressor, student))
        return gaussian_nll(
            mean,
            teacher,
            self.log_scale,
            eps=self.eps,
            reduction=self.reduction,
            weight=self.weight,
            # mean is the output of our own convolution, which does not read it in backward
            inplace=inplace,
            backend=self.backend,
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        key = prefix + "log_scale"
        for other in ("soft_plus_param", "alpha"):
            if key not in state_dict and prefix + other in state_dict:
                state_dict[key] = state_dict.pop(prefix + other)
        saved = state_dict.get(key)
        if isinstance(saved, Tensor) and saved.dim() != 1 and saved.numel() == self.log_scale.numel():
            state_dict[key] = saved.reshape(-1)  # stored as (1, C, 1, 1) by some
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, weight={self.weight}, reduction={self.reduction!r}, backend={self.backend!r}"
