"""The plain back end's primitives with one variance an element: derivatives written out in torch's operations."""

from __future__ import annotations

import torch
from torch import Tensor

from vidfast.heteroscedastic import reference
from vidfast.heteroscedastic.arguments import CLAMP, EXP, LOG_VARIANCE, SOFTPLUS, HeteroscedasticCall
from vidfast.heteroscedastic.layout import Rows
from vidfast.positions import Counts, Weights


class PlainHeteroscedastic:
    """See :class:`vidfast.backends.base.Backend`."""

    def heteroscedastic_forward(
        self,
        mean: Tensor,
        target: Tensor,
        raw: Tensor,
        rows: Rows,
        call: HeteroscedasticCall,
        *,
        loss: Tensor,
        counts: Counts | None = None,
    ) -> None:
        """As the protocol says; the loss is the reference's."""
        whole = call._replace(reduction="sum", weight=1.0)
        weights = None if counts is None else Weights(counts.positions, None)
        k = call.k if counts is None else counts.totals[1]
        loss.copy_(reference.nll(mean, target, raw, whole, weights) * k)

    def heteroscedastic_forward_grad(
        self,
        mean: Tensor,
        target: Tensor,
        raw: Tensor,
        rows: Rows,
        call: HeteroscedasticCall,
        *,
        loss: Tensor,
        grad_mean: Tensor | None,
        grad_raw: Tensor | None,
        counts: Counts | None = None,
    ) -> None:
        """As the protocol says."""
        self.heteroscedastic_forward(mean, target, raw, rows, call, loss=loss, counts=counts)
        of_mean, of_raw = _gradients(loss.new_ones(()), mean, target, raw, call, counts)
        if grad_mean is not None:
            grad_mean.copy_(of_mean)
        if grad_raw is not None:
            grad_raw.copy_(of_raw)

    def heteroscedastic_backward(
        self,
        g: Tensor,
        mean: Tensor,
        target: Tensor,
        raw: Tensor,
        rows: Rows,
        call: HeteroscedasticCall,
        *,
        grad_mean: Tensor | None,
        grad_target: Tensor | None,
        grad_raw: Tensor | None,
        counts: Counts | None = None,
    ) -> None:
        """As the protocol says."""
        of_mean, of_raw = _gradients(g, mean, target, raw, call, counts)
        for to, found in ((grad_mean, of_mean), (grad_target, -of_mean), (grad_raw, of_raw)):
            if to is not None:
                to.copy_(found)


def _gradients(
    g: Tensor, mean: Tensor, target: Tensor, raw: Tensor, call: HeteroscedasticCall, counts: Counts | None
) -> tuple[Tensor, Tensor]:
    """(d/d mean, d/d raw) in the type that is computed in."""
    dtype = torch.float64 if torch.float64 in (mean.dtype, target.dtype, raw.dtype) else torch.float32
    mean, target, raw = (x.detach().to(dtype) for x in (mean, target, raw))
    residual = mean - target
    log_v, quotient, slope = _variance(residual, raw, call)
    factor = (g.double() * (call.k if counts is None else counts.totals[1])).to(dtype)
    if call.beta:
        factor = factor * (call.beta * log_v).exp()
    of_mean, of_raw = factor * quotient, factor * 0.5 * (1 - residual * quotient) * slope
    if counts is None or counts.positions is None:
        return of_mean, of_raw
    weights, zero = counts.positions.to(dtype), torch.zeros_like(mean)
    return torch.where(weights != 0, weights * of_mean, zero), torch.where(
        weights != 0, weights * of_raw, zero
    )


def _variance(residual: Tensor, raw: Tensor, call: HeteroscedasticCall) -> tuple[Tensor, Tensor, Tensor]:
    """log v, the residual over v, and (dv / d raw) / v."""
    if call.transform == LOG_VARIANCE:
        root = (-0.5 * raw).exp()  # which overflows later than 1/v
        return raw, residual * root * root, torch.ones_like(raw)
    if call.transform == EXP:
        e = (-raw.abs()).exp()
        rest = torch.where(raw > 0, 1 + call.eps * e, e + call.eps)
        inverse, slope = (
            torch.where(raw > 0, e, torch.ones_like(e)),
            torch.where(raw > 0, torch.ones_like(e), e),
        )
        return rest.log() + raw.clamp(min=0), residual * (inverse / rest), slope / rest
    v = reference.variance(raw, call.transform, call.eps, call.negative_is_nan)
    assert call.transform in (SOFTPLUS, CLAMP)
    return v.log(), residual / v, (1 / v if call.transform == CLAMP else torch.sigmoid(raw) / v)
