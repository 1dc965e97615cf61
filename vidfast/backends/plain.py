"""The plain back end: the primitives as plain PyTorch, wherever torch runs.

It stands for `backend="reference"`, and for `auto` where no kernel takes the tensors. Eagerly its calls go to the
reference itself, which autograd differentiates as often as asked; this is what compiled graphs run, whose operators
autograd does not look into: there the derivatives are written out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidfast import reference
from vidfast.arguments import Call
from vidfast.backends.plain_heteroscedastic import PlainHeteroscedastic
from vidfast.layout import Layout, RowLayout
from vidfast.positions import Counts, Weights


class PlainBackend(PlainHeteroscedastic):
    """The primitives out of torch's operations; see :class:`vidfast.backends.base.Backend`."""

    name = "reference"
    walks = False
    in_parts = False

    def unavailable(self) -> str | None:
        """It runs wherever torch does."""
        return None

    def supports(self, mean: Tensor, target: Tensor, alpha: Tensor) -> str | None:
        """It takes all tensors."""
        return None

    def info(self) -> dict[str, object]:
        """There is nothing to know."""
        return {}

    def total(
        self,
        positions: Tensor | None,
        factor: Tensor | None,
        count: int,
        k: float,
        channels: int,
        *,
        totals: Tensor,
    ) -> None:
        """As the protocol says."""
        m = totals.new_full((), count) if positions is None else positions.sum(dtype=torch.float64)
        each = totals.new_full((), k) if factor is None else factor.reshape(()).double() * k
        if channels:
            each = each / (m * channels)
        if positions is not None:
            each = torch.where(m == 0, torch.zeros_like(m), each)
        totals.copy_(torch.stack([m, each]))

    def forward(
        self,
        mean: Tensor,
        target: Tensor,
        alpha: Tensor,
        layout: Layout,
        call: Call,
        *,
        loss: Tensor,
        sum_sq: Tensor,
        counts: Counts | None = None,
    ) -> None:
        """As the protocol says; the loss is the reference's."""
        if counts is None:
            loss.copy_(reference_nll(mean, target, alpha, call))
        else:
            whole = call._replace(reduction="sum", weight=1.0)
            of_sum = reference_nll(mean, target, alpha, whole, Weights(counts.positions, None))
            loss.copy_(of_sum * counts.totals[1])
        sum_sq.copy_(_sums_of_squares(mean, target, call.channel, counts))

    def forward_grad(
        self,
        mean: Tensor,
        target: Tensor,
        alpha: Tensor,
        layout: Layout,
        call: Call,
        *,
        loss: Tensor,
        grad_mean: Tensor,
        grad_alpha: Tensor,
        counts: Counts | None = None,
    ) -> None:
        """As the protocol says."""
        self.forward(mean, target, alpha, layout, call, loss=loss, sum_sq=grad_alpha, counts=counts)
        one = loss.new_ones(())
        grad_alpha.copy_(_of_alpha(one, alpha, grad_alpha, layout, call, counts))
        grad_mean.copy_(_of_mean(one, mean, target, alpha, call, counts))

    def backward(
        self,
        g: Tensor,
        mean: Tensor | None,
        target: Tensor | None,
        alpha: Tensor,
        sum_sq: Tensor,
        layout: Layout,
        call: Call,
        *,
        grad_mean: Tensor | None,
        grad_target: Tensor | None,
        grad_alpha: Tensor | None,
        counts: Counts | None = None,
    ) -> None:
        """As the protocol says."""
        if mean is not None and target is not None:
            of_mean = _of_mean(g, mean, target, alpha, call, counts)
            if grad_mean is not None:
                grad_mean.copy_(of_mean)
            if grad_target is not None:
                grad_target.copy_(of_mean.neg())
        if grad_alpha is not None:
            grad_alpha.copy_(_of_alpha(g, alpha, sum_sq, layout, call, counts))

    def scale(
        self,
        g: Tensor,
        rows: RowLayout | None,
        source: Tensor | None,
        grad_alpha: Tensor | None,
        *,
        result: Tensor | None,
        scaled_alpha: Tensor | None,
    ) -> None:
        """As the protocol says."""
        if source is not None and result is not None:
            wide = torch.float64 if source.dtype is torch.float64 else torch.float32
            result.copy_(source.to(wide) * g.to(wide))
        if grad_alpha is not None and scaled_alpha is not None:
            scaled_alpha.copy_(grad_alpha * g.double())


def reference_nll(
    mean: Tensor, target: Tensor, alpha: Tensor, call: Call, weights: Weights | None = None
) -> Tensor:
    """What the reference gives for a call: differentiable as often as asked."""
    mask, factor = (None, None) if weights is None else weights
    return reference.gaussian_nll(
        mean,
        target,
        alpha,
        channel_dim=call.channel,
        eps=call.eps,
        reduction=call.reduction,
        full=call.full,
        weight=call.weight if factor is None else factor.double() * call.weight,
        mask=mask,
    )


def _weighted(x: Tensor, counts: Counts | None) -> Tensor:
    """x times the positions' weights, and 0 where one is 0, whatever x is there."""
    if counts is None or counts.positions is None:
        return x
    return torch.where(counts.positions != 0, counts.positions.to(x.dtype) * x, torch.zeros_like(x))


def _sums_of_squares(mean: Tensor, target: Tensor, channel: int, counts: Counts | None) -> Tensor:
    squares = _weighted((mean.double() - target.double()).square(), counts)
    return squares.movedim(channel, 0).flatten(1).sum(1) if mean.dim() > 1 else squares


def _of_mean(
    g: Tensor, mean: Tensor, target: Tensor, alpha: Tensor, call: Call, counts: Counts | None
) -> Tensor:
    """g times d loss / d mean, in fp64 if mean or target is, else in fp32."""
    dtype = torch.float64 if torch.float64 in (mean.dtype, target.dtype) else torch.float32
    shape = [1] * mean.dim()
    shape[call.channel] = -1
    k = call.k if counts is None else counts.totals[1]
    factor = g.double() * k / reference.variance(alpha, call.eps, torch.float64)
    return _weighted(mean.to(dtype) - target.to(dtype), counts) * factor.to(dtype).view(shape)


def _of_alpha(
    g: Tensor, alpha: Tensor, sum_sq: Tensor, layout: Layout, call: Call, counts: Counts | None
) -> Tensor:
    """g times d loss / d alpha, (C,) in fp64."""
    variance = reference.variance(alpha, call.eps, torch.float64)
    count, k = (layout.outer * layout.inner, call.k) if counts is None else counts.totals
    return g.double() * k * 0.5 * (count - sum_sq / variance) / variance * torch.sigmoid(alpha.double())


PLAIN = PlainBackend()
