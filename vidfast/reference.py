"""Equation 5 of the VID paper (Ahn et al., CVPR 2019) as plain differentiable PyTorch.

The specification of every back end and the oracle of their tests: it is written out from the paper, shares
nothing with the kernels, runs on any device and in any dtype, and differentiates as often as asked.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

# Asked once: dynamo of torch 2.6 to 2.11 cannot trace `is_autocast_available`.
_HAVE_AUTOCAST = frozenset(
    kind
    for kind in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu")
    if torch.amp.is_autocast_available(kind)
)


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A block in which autocast is off on x's device; eagerly nothing where it is off already.

    In a compiled graph it is always a region of its own, whatever autocast was while torch traced.
    """
    kind = x.device.type
    if torch.compiler.is_compiling():
        if kind in _HAVE_AUTOCAST:
            return torch.autocast(kind, enabled=False)
        return contextlib.nullcontext()
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def variance(alpha: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """(C,) softplus(alpha) + eps, in `dtype` (alpha's own if None)."""
    # logaddexp(alpha, 0) is softplus without F.softplus's cut-off at 20; fp64 wherever the device has it.
    wide = alpha if alpha.device.type == "mps" else alpha.double()
    return (torch.logaddexp(wide, torch.zeros_like(wide)) + eps).to(dtype or alpha.dtype)


def _elementwise(
    mean: Tensor, target: Tensor, alpha: Tensor, channel_dim: int, eps: float, full: bool
) -> Tensor:
    """-log q(t|s) per element: log sigma + (t - mu)^2 / (2 sigma^2), and 1/2 log 2 pi if `full`."""
    wide = torch.float64 in (mean.dtype, target.dtype)
    dtype = torch.float64 if wide else torch.float32
    shape = [1] * mean.dim()
    shape[channel_dim] = -1
    v = variance(alpha, eps, dtype).view(shape)
    residual = target.to(dtype) - mean.to(dtype)
    nll = 0.5 * (torch.log(v) + residual.square() / v)
    return nll + 0.5 * math.log(2 * math.pi) if full else nll


def gaussian_nll(
    mean: Tensor,
    target: Tensor,
    alpha: Tensor,
    *,
    channel_dim: int = 1,
    eps: float = 1e-5,
    reduction: str = "mean",
    full: bool = False,
    weight: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """The negative log-likelihood of `target` under N(mean, softplus(alpha) + eps), unchecked.

    Shapes, dtypes and meanings are those of :func:`vidfast.gaussian_nll`, but that the mask has mean's number of
    dimensions. fp64 if mean or target is, else fp32.
    """
    with no_autocast(mean):
        if mask is not None:
            # before anything is computed: a derivative of NaN times 0 would be NaN
            mean, target = (torch.where(mask != 0, x, torch.zeros_like(x)) for x in (mean, target))
        nll = _elementwise(mean, target, alpha, channel_dim, eps, full)
        if isinstance(weight, Tensor):
            weight = weight.to(nll.dtype).reshape(())
        if mask is not None:
            each = mask.to(nll.dtype)
            nll = torch.where(mask != 0, each * nll, torch.zeros_like(nll))
            if isinstance(weight, Tensor):  # one over nothing, say, where nothing is selected
                weight = torch.where((mask != 0).any(), weight, torch.zeros_like(weight))
        if reduction == "none":
            return (
                weight * nll if mask is None else torch.where(mask != 0, weight * nll, torch.zeros_like(nll))
            )
        if reduction == "sum":
            return weight * nll.sum()
        if reduction == "batchmean":
            # of no sample with a mask: nothing is selected
            return weight * nll.sum() / (mean.shape[0] if mask is None else max(mean.shape[0], 1))
        if mask is None:
            return weight * nll.mean()
        shape = list(mean.shape)
        shape[channel_dim] = 1
        count = each.expand(shape).sum() * mean.shape[channel_dim]
        return weight * nll.sum() / torch.where(count == 0, torch.ones_like(count), count)


def log_likelihood_map(
    mean: Tensor, target: Tensor, alpha: Tensor, *, channel_dim: int = 1, eps: float = 1e-5
) -> Tensor:
    """sum over channels of log q(t|s), unchecked; see :func:`vidfast.log_likelihood_map`."""
    with no_autocast(mean):
        return -_elementwise(mean, target, alpha, channel_dim, eps, full=True).sum(channel_dim)
