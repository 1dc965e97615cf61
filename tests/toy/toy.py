"""A back end in one file: its sums in fp64, by torch on views of the memory.

Importing it registers it from outside; test_toy_backend.py runs the suite on it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from vidfast import backends
from vidfast.arguments import Call
from vidfast.backends.plain_heteroscedastic import PlainHeteroscedastic
from vidfast.heteroscedastic.arguments import HeteroscedasticCall
from vidfast.layout import Layout, RowLayout
from vidfast.positions import Counts

LARGE = 40.0  # from here on softplus(x) is x in fp64


def _view(x: Tensor, layout: Layout, stride: int) -> Tensor:
    """(outer, C, inner) of x's memory."""
    shape = (layout.outer, layout.channels, layout.inner)
    return x.detach().as_strided(shape, (stride, layout.inner, 1))


def _store(x: Tensor, values: Tensor) -> None:
    """Writes fp64 values; to 16 bits by way of fp32, as the other back ends do."""
    x.copy_(values if x.dtype is torch.float64 else values.float())


class _ToyHeteroscedastic(PlainHeteroscedastic):
    """One variance an element: the plain derivatives, for positions' weights that lack the channels' dimension."""

    def heteroscedastic_forward(self, mean: Tensor, *rest: Any, **outputs: Any) -> None:
        super().heteroscedastic_forward(mean, *rest, **self._whole(mean, rest[-1], outputs))

    def heteroscedastic_forward_grad(self, mean: Tensor, *rest: Any, **outputs: Any) -> None:
        super().heteroscedastic_forward_grad(mean, *rest, **self._whole(mean, rest[-1], outputs))

    def heteroscedastic_backward(self, g: Tensor, mean: Tensor, *rest: Any, **outputs: Any) -> None:
        super().heteroscedastic_backward(g, mean, *rest, **self._whole(mean, rest[-1], outputs))

    def _whole(self, mean: Tensor, call: HeteroscedasticCall, outputs: dict[str, Any]) -> dict[str, Any]:
        counts: Counts | None = outputs.get("counts")
        if counts is None or counts.positions is None or counts.positions.dim() == mean.dim():
            return outputs
        assert call.channel is not None
        return {**outputs, "counts": counts._replace(positions=counts.positions.unsqueeze(call.channel))}


class ToyBackend(_ToyHeteroscedastic):
    """Sums in fp64 whatever the dtypes, one operation of torch after another."""

    name = "toy"
    walks = True
    in_parts = False

    def unavailable(self) -> str | None:
        return None

    def supports(self, mean: Tensor, target: Tensor, alpha: Tensor) -> str | None:
        return None if mean.is_cpu else f"it takes tensors on the CPU, not on {mean.device}"

    def info(self) -> dict[str, object]:
        return {"toy": True}

    def _residual(self, mean: Tensor, target: Tensor, layout: Layout) -> Tensor:
        x, y = _view(mean, layout, layout.mean_stride), _view(target, layout, layout.target_stride)
        if torch.float64 in (x.dtype, y.dtype):
            return x.double() - y.double()
        return (x.float() - y.float()).double()

    def _weighted(self, x: Tensor, layout: Layout, counts: Counts | None) -> Tensor:
        """x (outer, C, inner) times the positions' weights; where one is 0, 0."""
        if counts is None or counts.positions is None:
            return x
        w = counts.positions.as_strided((layout.outer, 1, layout.inner), (layout.inner, layout.inner, 1))
        return torch.where(w != 0, w * x, 0.0)

    def _m_and_k(self, layout: Layout, call: Call, counts: Counts | None) -> Any:
        return (layout.outer * layout.inner, call.k) if counts is None else counts.totals

    def total(
        self, positions: Tensor | None, factor: Tensor | None, count: int, k: float, channels: int, *, totals: Tensor
    ) -> None:  # fmt: skip
        m = float(count) if positions is None else positions.double().sum().item()
        k *= 1.0 if factor is None else factor.item()
        totals[0] = m
        totals[1] = k / (m * channels or 1.0) if m or positions is None else 0.0

    def _variance(self, alpha: Tensor, call: Call) -> Tensor:
        return softplus(alpha.double(), threshold=LARGE) + call.eps

    def _of_alpha(
        self, alpha: Tensor, sum_sq: Tensor, layout: Layout, call: Call, counts: Counts | None
    ) -> Tensor:
        v, (m, k) = self._variance(alpha, call), self._m_and_k(layout, call, counts)
        return k / 2 * (m - sum_sq / v) / v * alpha.double().sigmoid()

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
        v, (m, k) = self._variance(alpha, call), self._m_and_k(layout, call, counts)
        squares = self._residual(mean, target, layout).square()
        sum_sq.copy_(self._weighted(squares, layout, counts).sum((0, 2)))
        constant = m * layout.channels * math.log(2 * math.pi) if call.full else 0.0
        _store(loss, k / 2 * ((m * v.log() + sum_sq / v).sum() + constant))

    def forward_grad(
        self, mean: Tensor, target: Tensor, alpha: Tensor, layout: Layout, call: Call, *,
        loss: Tensor, grad_mean: Tensor, grad_alpha: Tensor, counts: Counts | None = None,
    ) -> None:  # fmt: skip
        self.forward(mean, target, alpha, layout, call, loss=loss, sum_sq=grad_alpha, counts=counts)
        grad_alpha.copy_(self._of_alpha(alpha, grad_alpha, layout, call, counts))
        k = self._m_and_k(layout, call, counts)[1]
        stride = layout.mean_stride if call.inplace else layout.channels * layout.inner
        residual = self._weighted(self._residual(mean, target, layout), layout, counts)
        gradient = residual * (k / self._variance(alpha, call)).view(1, -1, 1)
        _store(_view(grad_mean, layout, stride), gradient)

    def backward(
        self, g: Tensor, mean: Tensor | None, target: Tensor | None, alpha: Tensor, sum_sq: Tensor, layout: Layout,
        call: Call, *, grad_mean: Tensor | None, grad_target: Tensor | None, grad_alpha: Tensor | None,
        counts: Counts | None = None,
    ) -> None:  # fmt: skip
        k = self._m_and_k(layout, call, counts)[1]
        if mean is not None and target is not None:
            scale = g.double() * k / self._variance(alpha, call)
            residual = self._weighted(self._residual(mean, target, layout), layout, counts)
            gradient = residual * scale.view(1, -1, 1)
            for out, values in ((grad_mean, gradient), (grad_target, -gradient)):
                if out is not None:
                    _store(_view(out, layout, layout.channels * layout.inner), values)
        if grad_alpha is not None:
            _store(grad_alpha, g.double() * self._of_alpha(alpha, sum_sq, layout, call, counts))

    def scale(
        self, g: Tensor, rows: RowLayout | None, source: Tensor | None, grad_alpha: Tensor | None, *,
        result: Tensor | None, scaled_alpha: Tensor | None,
    ) -> None:  # fmt: skip
        if rows is not None and source is not None and result is not None:
            stride = rows.stride if result is source else rows.row
            values = source.detach().as_strided((rows.outer, rows.row), (rows.stride, 1))
            _store(
                result.detach().as_strided((rows.outer, rows.row), (stride, 1)), values.double() * g.double()
            )
        if grad_alpha is not None and scaled_alpha is not None:
            _store(scaled_alpha, grad_alpha * g.double())


BACKEND: Any = ToyBackend()
backends.NAMES = (*backends.NAMES, BACKEND.name)
backends._loaded[BACKEND.name] = BACKEND
