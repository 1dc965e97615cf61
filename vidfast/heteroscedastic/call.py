"""The Gaussian negative log-likelihood with one variance an element: functions and module."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex

import torch
from torch import Tensor

from vidfast import backends, dispatch
from vidfast.arguments import (
    BackendName,
    Reduction,
    Strategy,
    as_weight,
    check_channel_dim,
    check_dense,
    check_options,
    number_of,
)
from vidfast.heteroscedastic import autograd, operators, reference
from vidfast.heteroscedastic.arguments import (
    HeteroscedasticCall,
    Transform,
    check_call,
    check_variance,
)
from vidfast.nll import Weighted
from vidfast.positions import Weights
from vidfast.recall import KERNELS, OPERATOR


def heteroscedastic_nll(
    mean: Tensor,
    target: Tensor,
    raw: Tensor,
    *,
    transform: Transform = "softplus",
    eps: float = 1e-5,
    beta: float = 0.0,
    channel_dim: SupportsIndex | None = None,
    reduction: Reduction = "mean",
    full: bool = False,
    weight: float | Tensor = 1.0,
    inplace: bool = False,
    strategy: Strategy = "auto",
    backend: BackendName = "auto",
    mask: Tensor | None = None,
) -> Tensor:
    """-log N(target; mean, v) with a predicted variance v for each element, fused: `log v / 2 + r^2 / (2 v)`.

    r is mean - target, and v comes from `raw`, a network's output of any sign. The kernel reads mean, target and raw
    once and writes both gradients. Where mean and raw are the two halves of one tensor, `y.chunk(2, 1)`, nothing is
    copied, and `backward()` writes y's gradient as one tensor. The loss may be negative; where there is nothing to
    score it is as in :func:`vidfast.gaussian_nll`.

    Args:
        mean: Any shape; fp16, bf16, fp32 or fp64.
        target: mean's shape and device, any of these dtypes.
        raw: mean's shape and device, any of these dtypes: what the variance is made of.
        transform: "softplus": v = softplus(raw) + eps. "exp": v = exp(raw) + eps; with eps=0 raw is the logarithm of
            the variance (Kendall & Gal, NeurIPS 2017). "identity": v = max(raw, eps), with the gradient of v = raw, as
            in torch.nn.GaussianNLLLoss; a raw below 0 is no error here.
        eps: The smallest variance; 0 is taken for "exp" alone.
        beta: Each element is multiplied by v^beta, taken for a constant (Seitzer et al., ICLR 2022; they use 0.5). 0 is
            the likelihood; with 1 d/d mean is that of the squared error.
        channel_dim: The dimension along which a mask has one weight for all; None: a mask has one for each element.
        reduction: "mean" over all elements, "sum", "batchmean" (the sum over dimension 0's size), or "none" (per
            element, by the reference).
        full: Adds the constant 1/2 log(2 pi) per element.
        weight: A factor of the loss, a number or a tensor of one element on mean's device; see
            :func:`vidfast.gaussian_nll`.
        inplace: d/d mean is written over `mean` and d/d raw over `raw`, those that are wanted, where the strategy is
            one_pass. See :func:`vidfast.gaussian_nll` for when that is right.
        strategy: "one_pass" computes the gradients together with the loss; "two_pass" in backward, and supports
            gradients of target and second derivatives; "auto" is one_pass, but two_pass for a mean in fp16 (whose loss
            scaler's factor must come before rounding) and where target requires grad.
        backend: "auto", "reference" (plain PyTorch), or a back end by name; see :func:`vidfast.info`.
        mask: A weight of 0 or more for each position, without gradient: with a channel_dim as in
            :func:`vidfast.gaussian_nll`, without one of mean's shape, where any size may be 1, or (B,). "mean" then
            divides by the sum of all elements' weights. Where it is 0, mean, target and raw are not used.

    Returns:
        A scalar, fp64 if one of the three tensors is, else fp32; mean's shape for reduction="none".

    Raises:
        TypeError, ValueError: An argument is not as above; the text says what was wanted and what came.
        RuntimeError: The back end asked for cannot run, or `inplace` would destroy what other code still uses.
    """
    call, weights = check_call(
        mean,
        target,
        raw,
        transform,
        eps,
        beta,
        channel_dim,
        reduction,
        full,
        weight,
        inplace,
        strategy,
        backend,
        mask,
    )
    return computed(mean, target, raw, call, weights)


def computed(
    mean: Tensor, target: Tensor, raw: Tensor, call: HeteroscedasticCall, weights: Weights | None = None
) -> Tensor:
    """The loss of a checked call, by whichever way it takes.

    Args:
        mean: mu.
        target: t, mean's shape.
        raw: Of the variances, mean's shape.
        call: Everything else but tensors.
        weights: The tensors among it.
    """
    way, backend = dispatch.choose_way(mean, target, raw, call, weights)
    if way == KERNELS:
        assert backend is not None
        return autograd.run_strategy(mean, target, raw, call, weights, backend)
    if way == OPERATOR:
        return operators.call_operator(mean, target, raw, call, weights)
    return reference.nll(mean, target, raw, call, weights)


def variance_of(raw: Tensor, *, transform: Transform = "softplus", eps: float = 1e-5) -> Tensor:
    """The variance that :func:`heteroscedastic_nll` makes of `raw`, in raw's shape and dtype; differentiable.

    Args:
        raw: Any shape; fp16, bf16, fp32 or fp64.
        transform: As there.
        eps: As there.

    Raises:
        TypeError, ValueError: An argument is not as it must be.
    """
    check_dense(raw=raw)
    kind, eps, _ = check_variance(transform, eps)
    wide = raw if raw.dtype is torch.float64 else raw.float()
    return reference.variance(wide, kind, eps).to(raw.dtype)


class HeteroscedasticNLL(Weighted):
    """:func:`heteroscedastic_nll` as a module: `loss(mean, target, raw)`.

    The arguments are those of :func:`heteroscedastic_nll`.

    Raises:
        TypeError: A number or flag is something else.
        ValueError: A number is out of its range, or a name unknown.
    """

    def __init__(
        self,
        *,
        transform: Transform = "softplus",
        eps: float = 1e-5,
        beta: float = 0.0,
        channel_dim: SupportsIndex | None = None,
        reduction: Reduction = "mean",
        full: bool = False,
        weight: float | Tensor = 1.0,
        inplace: bool = False,
        strategy: Strategy = "auto",
        backend: BackendName = "auto",
    ) -> None:
        super().__init__()
        _, self.eps, self.beta = check_variance(transform, eps, beta)
        check_options(1.0, reduction, number_of(weight), strategy, full, inplace)
        backends.check_name(backend)
        self._weight = as_weight(weight)
        self.transform: Transform = transform
        self.channel_dim = None if channel_dim is None else check_channel_dim(channel_dim)
        self.reduction: Reduction = reduction
        self.full = full
        self.inplace = inplace
        self.strategy: Strategy = strategy
        self.backend: BackendName = backend

    if TYPE_CHECKING:  # nn.Module's own is Any

        def __call__(self, mean: Tensor, target: Tensor, raw: Tensor, mask: Tensor | None = None) -> Tensor:
            """The loss; see `forward`."""
            ...

    def forward(self, mean: Tensor, target: Tensor, raw: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss; see :func:`heteroscedastic_nll`."""
        return heteroscedastic_nll(
            mean,
            target,
            raw,
            transform=self.transform,
            eps=self.eps,
            beta=self.beta,
            channel_dim=self.channel_dim,
            reduction=self.reduction,
            full=self.full,
            weight=self.weight,
            inplace=self.inplace,
            strategy=self.strategy,
            backend=self.backend,
            mask=mask,
        )

    def variance(self, raw: Tensor) -> Tensor:
        """The variance that the loss makes of `raw`; see :func:`variance_of`."""
        return variance_of(raw, transform=self.transform, eps=self.eps)

    def extra_repr(self) -> str:
        """What `repr` shows in brackets."""
        return (
            f"transform={self.transform!r}, eps={self.eps}, beta={self.beta}, channel_dim={self.channel_dim}, "
            f"reduction={self.reduction!r}, full={self.full}, weight={self.weight}, inplace={self.inplace}, "
            f"strategy={self.strategy!r}, backend={self.backend!r}"
        )
