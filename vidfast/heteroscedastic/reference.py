"""The negative log-likelihood with one variance an element as plain differentiable PyTorch: specification and oracle.

Written out from the formula, it shares nothing with the kernels, runs on any device and in any dtype, and
differentiates as often as asked.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vidfast.heteroscedastic.arguments import CLAMP, EXP, LOG_VARIANCE, SOFTPLUS, HeteroscedasticCall
from vidfast.positions import Weights
from vidfast.reference import no_autocast


def variance(raw: Tensor, transform: int, eps: float, negative_is_nan: bool = False) -> Tensor:
    """The variance of each element, raw's shape and dtype.

    Args:
        raw: Any shape.
        transform: A number of `vidfast.heteroscedastic.arguments`.
        eps: The smallest variance.
        negative_is_nan: As in a call.
    """
    if transform == SOFTPLUS:
        return torch.logaddexp(raw, torch.zeros_like(raw)) + eps  # F.softplus cuts off at 20
    if transform in (EXP, LOG_VARIANCE):
        return raw.exp() + eps
    assert transform == CLAMP
    found = raw.clone()
    with torch.no_grad():  # the gradient passes as if nothing were clamped
        found.clamp_(min=eps)
    if not negative_is_nan:
        return found
    # numbers alone would be fp64 in a forward-mode derivative
    return found * torch.where(raw < 0, raw.new_full((), math.nan), raw.new_ones(()))


def elementwise(mean: Tensor, target: Tensor, raw: Tensor, call: HeteroscedasticCall) -> Tensor:
    """v^beta / 2 (log v + (t - mu)^2 / v), and v^beta / 2 log(2 pi) if `full`; see :func:`nll`."""
    residual = target - mean
    if call.transform == LOG_VARIANCE:
        # by the root of 1/v, which overflows later than 1/v
        log_v, ratio = raw, (residual * (-0.5 * raw).exp()).square()
    elif call.transform == EXP:
        squared = residual.square()
        # log(exp(raw) + eps), and 1 over it, also where exp(raw) is infinite
        large = raw > 0
        below, above = torch.where(large, 0, raw), torch.where(large, raw, 0)
        small = torch.log(below.exp() + call.eps)
        log_v = torch.where(large, above + torch.log1p(call.eps * (-above).exp()), small)
        ratio = torch.where(
            large,
            squared * (-above).exp() / (1 + call.eps * (-above).exp()),
            squared / (below.exp() + call.eps),
        )
    else:
        v = variance(raw, call.transform, call.eps, call.negative_is_nan)
        log_v, ratio = v.log(), residual.square() / v
    nll = 0.5 * (log_v + ratio)
    if call.full:
        nll = nll + 0.5 * math.log(2 * math.pi)
    return nll if call.beta == 0 else (call.beta * log_v).exp().detach() * nll


def nll(
    mean: Tensor, target: Tensor, raw: Tensor, call: HeteroscedasticCall, weights: Weights | None = None
) -> Tensor:
    """The negative log-likelihood of `target` under N(mean, variance of raw), unchecked.

    Shapes, dtypes and meanings are those of :func:`vidfast.heteroscedastic_nll`, but that the mask has mean's number of
    dimensions. fp64 if one of the three tensors is, else fp32.
    """
    mask, factor = (None, None) if weights is None else weights
    wide = torch.float64 in (mean.dtype, target.dtype, raw.dtype)
    dtype = torch.float64 if wide else torch.float32
    with no_autocast(mean):
        mean, target, raw = (x.to(dtype) for x in (mean, target, raw))
        if mask is not None:
            # before anything is computed: a derivative of NaN times 0 would be NaN
            mean, target, raw = (torch.where(mask != 0, x, torch.zeros_like(x)) for x in (mean, target, raw))
        found = elementwise(mean, target, raw, call)
        weight: float | Tensor = call.weight
        if factor is not None:
            weight = factor.to(dtype).reshape(()) * call.weight
        if mask is not None:
            each = mask.to(dtype)
            found = torch.where(mask != 0, each * found, torch.zeros_like(found))
            if isinstance(weight, Tensor):  # one over nothing, say, where nothing is selected
                weight = torch.where((mask != 0).any(), weight, torch.zeros_like(weight))
        if call.reduction == "none":
            scaled = weight * found
            return scaled if mask is None else torch.where(mask != 0, scaled, torch.zeros_like(scaled))
        if call.reduction == "sum":
            return weight * found.sum()
        if call.reduction == "batchmean":
            return weight * found.sum() / (mean.shape[0] if mask is None else max(mean.shape[0], 1))
        if mask is None:
            return weight * found.mean()
        count = each.expand(mean.shape).sum()
        return weight * found.sum() / torch.where(count == 0, torch.ones_like(count), count)
