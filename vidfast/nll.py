"""The Gaussian negative log-likelihood with one learned variance per channel: function and module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from vidfast import dispatch, ops, reference
from vidfast.arguments import (
    check_channel_dim,
    check_initial_variance,
    check_inplace,
    check_options,
    check_tensors,
)
from vidfast.autograd import NO_FORWARD_MODE, Call, one_pass, two_pass
from vidfast.layout import prepare


def gaussian_nll(
    mean: Tensor,
    target: Tensor,
    alpha: Tensor,
    *,
    channel_dim: int = 1,
    eps: float = 1e-5,
    reduction: str = "mean",
    full: bool = False,
    weight: float = 1.0,
    inplace: bool = False,
    strategy: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """-log q(t|s) of equation 5 (Ahn et al., CVPR 2019), fused: `sum log sigma_c + (t - mean)^2 / (2 sigma_c^2)`.

    sigma_c^2 = softplus(alpha_c) + eps is one variance for each channel. The loss may be negative.

    :param mean: mu(s), any shape with the C channels in `channel_dim`; fp16, bf16, fp32 or fp64.
    :param target: t, the teacher's activation: mean's shape and device, any of these dtypes.
    :param alpha: (C,), any of these dtypes; read in fp64.
    :param reduction: "mean" over all elements, "sum", "batchmean" (the sum over dimension 0's size: equation 5
        averaged over the batch), or "none" (per element, by the reference).
    :param full: adds the constant 1/2 log(2 pi) per element.
    :param weight: a factor of the loss. It belongs in here rather than outside: `backward()` then arrives with
        a gradient of 1, for which the one-pass strategy has nothing left to do.
    :param inplace: d/d mean is written over `mean` where the strategy is one_pass and mean requires grad, else
        it is ignored. Whoever reads mean *after* this call reads a gradient, and autograd cannot know: use it
        only on an activation that nothing else reads, such as the output of your own last convolution. A
        producer that saved its output for backward (ReLU, sigmoid, softmax) raises there.
    :param strategy: "one_pass" computes d/d mean together with the loss; "two_pass" in backward, and supports
        gradients of target and second derivatives; "auto" is one_pass, but two_pass for fp16 (whose loss
        scaler's factor must come before rounding) and where target requires grad.
    :param backend: "auto", "reference" (plain PyTorch), or a back end by name; see :func:`vidfast.info`.
    :returns: a scalar, fp64 if mean or target is, else fp32; mean's shape for reduction="none".
    :raises TypeError, ValueError: an argument is not as above; the text says what was wanted and what came.
    :raises RuntimeError: the back end asked for cannot run, or `inplace` would destroy what somebody else holds.
    """
    channel = check_tensors(mean, target, alpha, channel_dim)
    compiling = torch.compiler.is_compiling()
    check_options(eps, reduction, weight, strategy, full, inplace)
    if reduction == "batchmean" and channel == 0:
        raise ValueError(
            "reduction='batchmean' needs a batch in dimension 0, but channel_dim=0 is the channels"
        )
    chosen = None
    if reduction == "none":
        if backend not in ("auto", "reference"):
            raise ValueError(
                f"reduction='none' has no fused kernel: backend must be 'auto' or 'reference', got {backend!r}"
            )
    elif not compiling:
        chosen = dispatch.choose(backend, mean, target, alpha)
        if backend != "reference":
            _refuse_transforms(mean, target, alpha)
    grad = torch.is_grad_enabled()
    mean_needs, target_needs = grad and mean.requires_grad, grad and target.requires_grad
    if strategy == "one_pass" and target_needs:
        raise ValueError(
            "strategy='one_pass' has no gradient for target, which requires grad: use 'two_pass' or detach it"
        )
    if compiling and reduction != "none" and backend != "reference":
        dispatch.check_name(backend)
        return ops.gaussian_nll(
            mean, target, alpha, channel, float(eps), reduction, full, float(weight), backend
        )
    if chosen is None:
        return reference.gaussian_nll(
            mean, target, alpha,
            channel_dim=channel, eps=eps, reduction=reduction, full=full, weight=weight,
        )  # fmt: skip

    walked = prepare(mean, target, channel)
    k = ops.loss_factor(mean.shape, reduction, weight)
    if not (mean_needs or target_needs or (grad and alpha.requires_grad)):
        return chosen.forward(walked[0], walked[1], alpha.contiguous(), walked[2], k, eps, full)[0]
    call = Call(chosen, channel, eps, reduction, full, weight, k)
    in_one_pass = mean_needs and (
        strategy == "one_pass"
        or (strategy == "auto" and not target_needs and mean.dtype is not torch.float16)
    )
    if not in_one_pass:
        return two_pass(mean, target, alpha, call, walked)
    if inplace:
        check_inplace(mean, target, walked[0])
    return one_pass(mean, target, alpha, call, walked, inplace)


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def _refuse_transforms(*tensors: Tensor) -> None:
    if dispatch.in_functorch(*tensors):
        raise RuntimeError(
            "vidfast.gaussian_nll cannot run inside torch.func transforms on its kernels: use backend='reference'"
        )
    if forward_ad._current_level >= 0 and any(_has_tangent(x) for x in tensors):
        raise RuntimeError(NO_FORWARD_MODE)


def log_likelihood_map(
    mean: Tensor, target: Tensor, alpha: Tensor, *, channel_dim: int = 1, eps: float = 1e-5
) -> Tensor:
    """log q(t_hw|s) = sum_c log q(t_chw|s), with its -1/2 log(2 pi): the heat maps of figure 2 (Ahn et al.).

    :param mean: (B, C, H, W), or any shape with C channels in `channel_dim`.
    :param target: mean's shape and device. :param alpha: (C,).
    :returns: mean's shape without the channel dimension, in nats; fp64 if mean or target is, else fp32.
    :raises TypeError, ValueError: as :func:`gaussian_nll`.
    """
    channel = check_tensors(mean, target, alpha, channel_dim)
    check_options(eps)
    return reference.log_likelihood_map(mean, target, alpha, channel_dim=channel, eps=eps)


class GaussianNLL(nn.Module):
    """:func:`gaussian_nll` that owns its `alpha`: -log q(t|s) with a learned variance for each channel.

    :param num_channels: C, the target's channels.
    :param init_var: softplus(alpha) + eps at the start, for every channel.
    :raises ValueError: num_channels < 1, init_var <= eps, or an unknown name.

    The other arguments are those of :func:`gaussian_nll`. Give `alpha` to the optimizer, without weight decay.
    """

    alpha: nn.Parameter

    def __init__(
        self,
        num_channels: int,
        *,
        channel_dim: int = 1,
        init_var: float = 5.0,
        eps: float = 1e-5,
        reduction: str = "mean",
        full: bool = False,
        weight: float = 1.0,
        inplace: bool = False,
        strategy: str = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if isinstance(num_channels, bool) or not isinstance(num_channels, int):
            raise TypeError(f"num_channels must be an int, got {type(num_channels).__name__}")
        if num_channels < 1:
            raise ValueError(f"num_channels must be at least 1, got {num_channels}")
        check_options(eps, reduction, weight, strategy, full, inplace)
        check_channel_dim(channel_dim)
        dispatch.check_name(backend)
        self.num_channels = num_channels
        self.channel_dim = channel_dim
        self.init_var = init_var
        self.eps = eps
        self.reduction = reduction
        self.full = full
        self.weight = weight
        self.inplace = inplace
        self.strategy = strategy
        self.backend = backend
        alpha = check_initial_variance("init_var", init_var, eps)
        self.alpha = nn.Parameter(torch.full((num_channels,), alpha, dtype=torch.float32))

    @property
    def variance(self) -> Tensor:
        """(C,) softplus(alpha) + eps, in alpha's dtype; differentiable."""
        return reference.variance(self.alpha, self.eps)

    def forward(self, mean: Tensor, target: Tensor) -> Tensor:
        """The loss; see :func:`gaussian_nll`."""
        return gaussian_nll(
            mean,
            target,
            self.alpha,
            channel_dim=self.channel_dim,
            eps=self.eps,
            reduction=self.reduction,
            full=self.full,
            weight=self.weight,
            inplace=self.inplace,
            strategy=self.strategy,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_channels}, channel_dim={self.channel_dim}, init_var={self.init_var}, eps={self.eps}, "
            f"reduction={self.reduction!r}, full={self.full}, weight={self.weight}, inplace={self.inplace}, "
            f"strategy={self.strategy!r}, backend={self.backend!r}"
        )
