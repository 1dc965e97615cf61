"""VIDLoss: the drop-in replacement of the class that distillation repositories share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor, nn

from vidfast import backends, reference
from vidfast.arguments import (
    SCALAR_REDUCTIONS,
    BackendName,
    ScalarReduction,
    as_weight,
    check_initial_variance,
    check_options,
    check_size,
    inverse_softplus,
    number_of,
)
from vidfast.layers import weight_dtype
from vidfast.nll import Weighted, adopt_variances
from vidfast.pooling import match_masked
from vidfast.pooling import match_spatial as match_spatial
from vidfast.raw import DTYPES
from vidfast.regressor import regressed_nll


def _check_reduction(reduction: ScalarReduction) -> ScalarReduction:
    if reduction not in SCALAR_REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'batchmean', got {reduction!r}")
    return reduction


class VIDLoss(Weighted):
    """VID-I for one pair of layers: a regressor of three 1x1 convolutions and the Gaussian NLL of equation 5.

    The constructor, the call and the checkpoint keys (`log_scale`, `regressor.{0,2,4}.weight`) are those of the
    VIDLoss that distillation repositories share; checkpoints that call the parameter `soft_plus_param` or `alpha` load
    too. Differing spatial sizes are pooled to the smaller along each axis, before the regressor, which may be exchanged
    for one of your own: `regressor` is a module from the student's feature to the teacher's shape.
    For tokens (B, L, D) there are :func:`vidfast.vid_head` and the Distiller's VID with `channel_dim=-1`.

    Args:
        num_input_channels: The student feature's channels.
        num_mid_channel: The regressor's hidden width (the paper: twice the target's channels).
        num_target_channels: C, the teacher feature's channels.
        init_pred_var: The initial variance of every channel.
        eps: What softplus(log_scale) is raised by to a variance.
        weight: A factor of the loss; in here it costs nothing. A number, or a tensor of one element on the features'
            device, as in :func:`vidfast.gaussian_nll`.
        reduction: "mean", "sum" or "batchmean", as in :func:`vidfast.gaussian_nll`.
        inplace: The gradient is written over the regressor's output, and its ReLUs over their inputs, which nothing
            is allocated for. On the CPU, in fp32, bf16 and fp16, the regressor and the loss are computed some
            positions at a time, gradients included, and their activations are never whole (:mod:`vidfast.head`).
            Where a hook or a mode of torch's sees them, or the regressor is one of your own that may return what it
            was given, nothing is written over (:mod:`vidfast.regressor`).
        backend: As in :func:`vidfast.gaussian_nll`.
        device: Where the parameters are made; None: torch's default.
        dtype: Of the parameters; None: torch's default.

    Raises:
        TypeError: A number or flag is something else.
        ValueError: A width is below 1, init_pred_var <= eps, or a name is unknown.
    """

    log_scale: nn.Parameter
    regressor: nn.Module

    def __init__(
        self,
        num_input_channels: SupportsIndex,
        num_mid_channel: SupportsIndex,
        num_target_channels: SupportsIndex,
        init_pred_var: float = 5.0,
        eps: float = 1e-5,
        *,
        weight: float | Tensor = 1.0,
        reduction: ScalarReduction = "mean",
        inplace: bool = True,
        backend: BackendName = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        widths = [
            check_size(name, value)
            for name, value in (
                ("num_input_channels", num_input_channels),
                ("num_mid_channel", num_mid_channel),
                ("num_target_channels", num_target_channels),
            )
        ]
        eps, _ = check_options(eps, reduction, number_of(weight), inplace=inplace)
        backends.check_name(backend)
        self.init_pred_var = check_initial_variance("init_pred_var", init_pred_var, eps)
        self.num_input_channels, hidden, self.num_target_channels = widths
        made: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.regressor = nn.Sequential(
            nn.Conv2d(self.num_input_channels, hidden, 1, **made),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1, **made),
            nn.ReLU(),
            nn.Conv2d(hidden, self.num_target_channels, 1, **made),
        )
        self.inplace = inplace
        self.eps = eps
        self._weight = as_weight(weight)
        self.reduction: ScalarReduction = _check_reduction(reduction)
        self.backend: BackendName = backend
        self.log_scale = nn.Parameter(torch.empty(self.num_target_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets every variance to `init_pred_var`. The regressor's layers have a `reset_parameters` of their own."""
        with torch.no_grad():
            self.log_scale.fill_(inverse_softplus(self.init_pred_var - self.eps))

    @property
    def variance(self) -> Tensor:
        """(C,) softplus(log_scale) + eps."""
        return reference.variance(self.log_scale, self.eps)

    if TYPE_CHECKING:  # nn.Module's own is Any

        def __call__(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
            """The loss; see `forward`."""
            ...

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss, a scalar (fp64 if the teacher's feature or the regressor is, else fp32), detached from the teacher.

        Over an empty batch "sum" is 0 and "mean" is NaN (0 with a mask), as torch's own losses are; the gradients are
        0.

        Args:
            input: The student's feature, (B, num_input_channels, *spatial), 0 to 3 spatial axes, any floating dtype.
            target: The teacher's feature, (B, num_target_channels, *spatial), likewise.
            mask: A weight of 0 or more for each position, as in :func:`vidfast.gaussian_nll`, of the size at which the
                loss is computed or of at least that of both features: where maps are pooled, their values are weighted
                means, and the mask is averaged down with them. Where a weight is 0 neither feature is used, and 0
                stands for the student's before the first layer.

        Raises:
            TypeError: A feature is no tensor, or has no floating dtype.
            ValueError: Channels, batch, number of axes or mask do not fit.
        """
        for name, x, channels in (
            ("input, the student's feature,", input, self.num_input_channels),
            ("target, the teacher's feature,", target, self.num_target_channels),
        ):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
            if x.is_meta:
                raise ValueError(f"{name} must hold values, got a tensor on the meta device")
            if x.dtype not in DTYPES:
                raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
            if x.dim() < 2 or x.shape[1] != channels:
                raise ValueError(f"{name} must be (B, {channels}, *spatial), got {tuple(x.shape)}")
        eps, _ = check_options(self.eps, self.reduction, number_of(self.weight), inplace=self.inplace)
        reduction = _check_reduction(self.reduction)
        teacher = target.detach()
        if mask is None:
            student, teacher = match_spatial(input, teacher)
        else:
            student, teacher, mask = match_masked(input, teacher, mask)
        dtype = weight_dtype(self.regressor)
        # autocast casts what goes into a convolution, but not from or to fp64
        cast = torch.float64 in (student.dtype, dtype) or not torch.is_autocast_enabled(student.device.type)
        if cast and dtype is not None and student.dtype != dtype:
            student = student.to(dtype)
        if 0 in student.shape[2:] and student.shape[0] > 0:
            # torch's convolutions take an empty batch, and no empty map
            reduction = "sum" if reduction == "batchmean" else reduction
            student, teacher = (x.reshape(0, x.shape[1], 1, 1) for x in (student, teacher))
            mask = None if mask is None else mask.new_zeros(0, 1, 1, 1)
        return regressed_nll(
            self.regressor,
            student,
            teacher,
            self.log_scale,
            eps=eps,
            reduction=reduction,
            weight=self.weight,
            inplace=self.inplace,
            backend=self.backend,
            as_maps=True,
            mask=mask,
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        adopt_variances(state_dict, prefix, "log_scale", ("soft_plus_param", "alpha"), self.log_scale)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """What `repr` shows in brackets."""
        return f"eps={self.eps}, weight={self.weight}, reduction={self.reduction!r}, backend={self.backend!r}"
