"""The second family's part of the Triton back end: one variance an element."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from vidfast.backends.triton.heteroscedastic_plan import Weighing, plan_elements, plan_ending, plan_weights
from vidfast.backends.triton.options import EARLY, bits
from vidfast.backends.triton.plan import Tuning, divisor
from vidfast.heteroscedastic.arguments import CLAMP, LOG_VARIANCE, HeteroscedasticCall
from vidfast.heteroscedastic.layout import Rows
from vidfast.memory import workspace
from vidfast.positions import Counts

# A smallest variance beyond what fp32 holds and divides by is computed with in fp64, as if a tensor were.
_SMALLEST_EPS, _LARGEST_EPS = 2.0**-125, 2.0**125
# The powers of the variance that kernels know: `heteroscedastic_math.BETA_0` and so on; the last is any other.
_BETAS = {0.0: 0, 0.5: 1, 1.0: 2}
_OTHER_BETA = 3


class Heteroscedastic:
    """The methods of the back end for one variance an element; see :class:`vidfast.backends.base.Backend`.

    Attributes:
        rule: The free numbers of the plan.
    """

    rule: Tuning

    @property
    def _kernels(self) -> Any:
        raise NotImplementedError

    def _on(self, x: Tensor) -> contextlib.AbstractContextManager[object]:
        raise NotImplementedError

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
        """As the protocol says."""
        self._sweep_elements(mean, target, raw, rows, call, counts, loss=loss)

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
        self._sweep_elements(
            mean, target, raw, rows, call, counts, loss=loss, grad_mean=grad_mean, grad_raw=grad_raw
        )

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
        self._sweep_elements(
            mean, target, raw, rows, call, counts,
            g=g, grad_mean=grad_mean, grad_target=grad_target, grad_raw=grad_raw,
        )  # fmt: skip

    def _sweep_elements(
        self,
        mean: Tensor,
        target: Tensor,
        raw: Tensor,
        rows: Rows,
        call: HeteroscedasticCall,
        counts: Counts | None,
        *,
        loss: Tensor | None = None,
        g: Tensor | None = None,
        grad_mean: Tensor | None = None,
        grad_target: Tensor | None = None,
        grad_raw: Tensor | None = None,
    ) -> None:
        """One launch over whatever is wanted, and where the loss is one that adds its parts."""
        kernels, tuning = self._kernels, self.rule
        tl = kernels.tl
        positions, totals = (None, None) if counts is None else counts
        cut = plan_elements(rows, (mean.element_size(), target.element_size(), raw.element_size()), tuning)
        weighing = Weighing() if positions is None else plan_weights(rows, cut)
        wide = torch.float64 in (mean.dtype, target.dtype, raw.dtype) or (
            call.transform != LOG_VARIANCE and not _SMALLEST_EPS <= call.eps <= _LARGEST_EPS
        )
        k, early = bits(call.k), tuning.overlap != 0
        options = {"WIDE": tl.float64 if wide else tl.float32, "OVERLAP": early, "enable_fp_fusion": True}
        space = None
        if loss is not None:
            space = workspace(cut.programs * (8 if wide else 4) // loss.element_size(), loss)
        with self._on(mean):
            kernels.heteroscedastic_sweep[(cut.programs,)](
                mean, target, raw, grad_mean, grad_target, grad_raw, positions, g, totals, space,
                cut.outer, cut.row, cut.tail, cut.mean_stride, cut.target_stride, cut.raw_stride,
                cut.grad_mean_stride, cut.grad_raw_stride, cut.programs, divisor(cut.row),
                weighing.run, weighing.step, divisor(weighing.run), divisor(weighing.step),
                bits(call.eps), bits(call.beta), k,
                VEC=cut.vec, TILE=cut.tile, CHUNK=cut.chunk, ONE_ROW=cut.outer == 1, SHORT=cut.short,
                NARROW=cut.narrow, AHEAD=tuning.ahead != 0, WEIGHTS=weighing.kind, RUN_SHORT=weighing.short,
                RUN_NARROW=weighing.narrow, RUN_SMALL=weighing.small,
                TRANSFORM=call.transform, BETA=_BETAS.get(call.beta, _OTHER_BETA), FULL=call.full,
                NEGATIVE_IS_NAN=call.transform == CLAMP and call.negative_is_nan,
                num_warps=cut.warps, **options,
            )  # fmt: skip
            if loss is not None:
                ending = plan_ending(cut.programs, tuning)
                kernels.heteroscedastic_finish[(1,)](
                    space, loss, totals, cut.programs, k, TILE=ending.tile, num_warps=ending.warps, **options,
                    **(EARLY if early else {}),
                )  # fmt: skip
