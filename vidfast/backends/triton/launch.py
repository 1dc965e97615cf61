"""The Triton back end: any GPU that the installed Triton drives, and the CPU under TRITON_INTERPRET=1.

Triton is imported on first use. Every launch goes to the current stream of the tensors' device; nothing is read
on the host, so calls can be captured in a CUDA graph once their kernels are compiled (one call beforehand).
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vidfast.arguments import Call
from vidfast.backends.triton.device import find_device
from vidfast.backends.triton.heteroscedastic_launch import Heteroscedastic
from vidfast.backends.triton.options import EARLY, bits
from vidfast.backends.triton.plan import (
    ALPHA_BLOCK,
    NOTHING,
    RULE,
    Planes,
    Rows,
    Tuning,
    ceil_div,
    divisor,
    plan,
    plan_finish,
    plan_scale,
    plan_total,
)
from vidfast.backends.triton.tune import autotunes, median_seconds, tuned
from vidfast.layout import Layout, RowLayout
from vidfast.memory import empty_dense, workspace
from vidfast.positions import Counts

if TYPE_CHECKING:
    from types import ModuleType

_F32, _F64 = torch.float32, torch.float64
# r * r is added with one rounding, whatever the installed Triton's default is.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
# What counts, and where a call says nothing of it.
_Counts = tuple[Tensor | None, Tensor | None]
_ALL: _Counts = (None, None)
_TRUE = ("1", "true", "on", "yes", "y")


class TritonBackend(Heteroscedastic):
    """The kernels of `kernels`; see :class:`vidfast.backends.base.Backend`.

    Attributes:
        rule: The free numbers of the plan, for the device that Triton drives.
    """

    name = "triton"
    walks = True
    in_parts = False

    def __init__(self) -> None:
        self._module: ModuleType | None = None
        self._obstacle: str | None = None  # of the machine, once it was probed
        self._probed = False
        self._kind = ""  # the device type that Triton drives
        self.rule = RULE
        self._interpreter = threading.RLock()  # which has one grid for all threads

    @property
    def _kernels(self) -> Any:
        if self._module is None:
            from vidfast.backends.triton import kernels

            self._module = kernels
        return self._module

    def _probe(self) -> str | None:
        """Import Triton and ask it for a device, once."""
        if not self._probed:
            with self._interpreter:
                if not self._probed:
                    found = find_device()
                    if isinstance(found, str):
                        self._obstacle = found
                    else:
                        self._kind = found.kind
                        self.rule = RULE._replace(lanes=found.lanes)
                    self._probed = True
        return self._obstacle

    def unavailable(self) -> str | None:
        """Why Triton is missing, finds no device, or has an interpreter that cannot run here."""
        return self._probe()

    def supports(self, mean: Tensor, target: Tensor, alpha: Tensor) -> str | None:
        """It takes tensors on the device that Triton drives; interpreted, on the CPU and on CUDA devices."""
        if mean.is_cpu:
            if os.environ.get("TRITON_INTERPRET", "0").lower() not in _TRUE:
                return (
                    "it takes tensors on a GPU, not on cpu (unless TRITON_INTERPRET=1 interprets its kernels)"
                )
            return self._probe() or (None if self._kind == "cpu" else "TRITON_INTERPRET was set too late")
        obstacle = self._probe()
        if obstacle is not None:
            return obstacle
        # interpreted, Triton copies a GPU's tensors to the host and back: still right
        if mean.device.type != self._kind and not (self._kind == "cpu" and mean.is_cuda):
            return f"it takes tensors on {self._kind}, not on {mean.device}"
        return None

    def info(self) -> dict[str, object]:
        """Triton's version, whether it interprets, its target and devices, whether it searches."""
        if self._probe() is not None:
            return {}
        import triton

        found: dict[str, object] = {"triton": triton.__version__, "interpreted": self._kind == "cpu"}
        if self._kind != "cpu":
            devices = torch.get_device_module(self._kind)
            found["target"] = str(triton.runtime.driver.active.get_current_target())
            found["devices"] = [devices.get_device_name(i) for i in range(devices.device_count())]
        found["autotune"] = autotunes()
        return found

    def _on(self, x: Tensor) -> contextlib.AbstractContextManager[object]:
        """Makes x's device the current one, on which Triton launches."""
        if self._probe() is None and self._kind == "cpu":
            return self._interpreter
        devices = torch.get_device_module(x.device)
        if devices.current_device() == x.device.index:
            return contextlib.nullcontext()
        guard: contextlib.AbstractContextManager[object] = devices.device(x.device)
        return guard

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
        kernels = self._kernels
        with self._on(totals):
            adding = plan_total(1 if positions is None else count, self.rule)
            options = {"TILE": adding.tile, "num_warps": adding.warps, "enable_fp_fusion": True}
            added = count
            if adding.programs > 1:
                sums, added = workspace(adding.programs, totals), adding.programs
                kernels.sum_positions[(added,)](positions, sums, count, CHUNK=adding.chunk, **options)
                positions = sums
            kernels.total[(1,)](positions, factor, totals, added, count, channels, bits(k), **options)

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
        """As the protocol says."""
        with self._on(mean):
            self._reduce(mean, target, alpha, layout, call, counts or _ALL, loss=loss, sum_sq=sum_sq)

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
        with self._on(mean):
            self._reduce(
                mean, target, alpha, layout, call, counts or _ALL,
                loss=loss, grad_mean=grad_mean, grad_alpha=grad_alpha,
            )  # fmt: skip

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
        known = counts or _ALL
        with self._on(alpha):
            if mean is not None and target is not None:
                tuning = self._tuning(mean, target, layout)
                cut = self._planned(mean, target, layout, tuning, known)
                self._sweep(
                    tuning, cut, mean, target, alpha, layout, call, known,
                    grad_mean=grad_mean, grad_target=grad_target, g=g, sum_sq=sum_sq, grad_alpha=grad_alpha,
                )  # fmt: skip
            elif grad_alpha is not None:
                channels = layout.channels
                self._kernels.alpha_gradient[(ceil_div(channels, ALPHA_BLOCK),)](
                    alpha, sum_sq, g, grad_alpha, known[1], channels, layout.outer * layout.inner,
                    bits(call.eps), bits(call.k), ALPHA_BLOCK=ALPHA_BLOCK, **_OPTIONS,
                )  # fmt: skip

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
        in_place = result is source
        flat = NOTHING
        if rows is not None and source is not None:
            outer, row, stride = rows[:3]
            flat = plan_scale(
                outer, row, stride, stride if in_place else row, source.element_size(), self.rule
            )
        channels = 0 if grad_alpha is None else grad_alpha.numel()
        if not flat.chunks and not channels:
            return
        tl = self._kernels.tl
        with self._on(g):
            self._kernels.scale[(flat.chunks + ceil_div(channels, ALPHA_BLOCK),)](
                g, source, result, grad_alpha, scaled_alpha,
                flat.outer, flat.row, flat.tail, flat.src_stride, flat.dst_stride, flat.chunks, divisor(flat.row),
                channels,
                IN_PLACE=in_place, VEC=flat.vec, TILE=flat.tile, CHUNK=flat.chunk, SHORT=flat.short, NARROW=flat.narrow,
                WIDE=tl.float64 if source is not None and source.dtype is _F64 else tl.float32,
                ALPHA_BLOCK=ALPHA_BLOCK, num_warps=flat.warps, enable_fp_fusion=True,
            )  # fmt: skip

    def _tuning(self, mean: Tensor, target: Tensor, layout: Layout) -> Tuning:
        if not autotunes():
            return self.rule
        return tuned(mean, target, layout, self.rule, functools.partial(self._seconds, mean, target, layout))

    def _planned(
        self, mean: Tensor, target: Tensor, layout: Layout, tuning: Tuning, counts: _Counts
    ) -> Planes | Rows:
        sizes = mean.element_size(), target.element_size()
        return plan(*layout[:5], *sizes, tuning, counts[0] is not None)

    def _seconds(self, mean: Tensor, target: Tensor, layout: Layout, tuning: Tuning) -> float:
        """How long forward_grad takes with these free numbers."""
        alpha = torch.zeros(layout.channels, device=mean.device)
        loss = torch.empty((), dtype=_F64, device=mean.device)
        grad_mean = empty_dense(mean, layout.dense, mean.dtype)
        grad_alpha = torch.empty(layout.channels, dtype=_F64, device=mean.device)
        call = Call(channel=1, eps=1e-5, k=1.0)
        return median_seconds(
            lambda: self._reduce(
                mean, target, alpha, layout, call, _ALL,
                loss=loss, grad_mean=grad_mean, grad_alpha=grad_alpha, tuning=tuning,
            )
        )  # fmt: skip

    def _reduce(
        self,
        mean: Tensor,
        target: Tensor,
        alpha: Tensor,
        layout: Layout,
        call: Call,
        counts: _Counts,
        *,
        loss: Tensor,
        grad_mean: Tensor | None = None,
        sum_sq: Tensor | None = None,
        grad_alpha: Tensor | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        """The two launches of forward and forward_grad."""
        tuning = tuning or self._tuning(mean, target, layout)
        cut = self._planned(mean, target, layout, tuning, counts)
        channels = layout.channels
        blocks, inner = cut.partials
        ending = plan_finish(blocks, channels, inner, tuning)
        is_wide = _F64 in (mean.dtype, target.dtype)
        partials_at = 1 + ending.programs  # behind the counter and the losses
        partials = blocks * channels * inner
        sums = grad_alpha if sum_sq is None else sum_sq  # in fp64, as the workspace
        assert sums is not None
        space = workspace(partials_at + (partials if is_wide else ceil_div(partials, 2)), sums)
        self._sweep(
            tuning, cut, mean, target, alpha, layout, call, counts,
            grad_mean=grad_mean, in_place=call.inplace and grad_mean is not None, space=space, partials_at=partials_at,
        )  # fmt: skip
        tl = self._kernels.tl
        self._kernels.finish[(ending.programs,)](
            space, partials_at, alpha, loss, sum_sq, grad_alpha, counts[1],
            ending.blocks, channels, ending.inner, divisor(ending.inner),
            layout.outer * layout.inner, bits(call.eps), bits(call.k), ending.programs,
            ACROSS=ending.across, CHANNELS=ending.channels, DEPTH=ending.depth, FULL=call.full,
            WIDE=tl.float64 if is_wide else tl.float32, OVERLAP=tuning.overlap != 0,
            num_warps=ending.warps, enable_fp_fusion=True, **(EARLY if tuning.overlap else {}),
        )  # fmt: skip

    def _sweep(
        self,
        tuning: Tuning,
        planned: Planes | Rows,
        mean: Tensor,
        target: Tensor,
        alpha: Tensor,
        layout: Layout,
        call: Call,
        counts: _Counts,
        *,
        grad_mean: Tensor | None = None,
        in_place: bool = False,
        grad_target: Tensor | None = None,
        g: Tensor | None = None,
        sum_sq: Tensor | None = None,
        grad_alpha: Tensor | None = None,
        space: Tensor | None = None,
        partials_at: int = 0,
    ) -> None:
        """One launch over whatever is wanted."""
        kernels = self._kernels
        tl = kernels.tl
        positions, totals = counts
        channels = layout.channels
        m, eps, k = layout.outer * layout.inner, bits(call.eps), bits(call.k)
        if grad_alpha is None:
            sum_sq = None
        wide = tl.float64 if _F64 in (mean.dtype, target.dtype) else tl.float32
        grid = (planned.programs + (0 if grad_alpha is None else ceil_div(channels, ALPHA_BLOCK)),)
        grad_stride = planned.mean_stride if in_place else planned.dense_stride
        tensors = (
            mean, target, grad_mean, grad_target, positions, alpha, g, sum_sq, grad_alpha, totals, space,
        )  # fmt: skip
        options = {
            "AHEAD": tuning.ahead != 0, "WIDE": wide, "ALPHA_BLOCK": ALPHA_BLOCK, "OVERLAP": tuning.overlap != 0,
            "num_warps": planned.warps, "enable_fp_fusion": True,
        }  # fmt: skip
        if isinstance(planned, Planes):
            kernels.sweep_planes[grid](
                *tensors, partials_at, planned.outer, channels, planned.inner, planned.tail,
                planned.mean_stride, planned.target_stride, grad_stride, planned.dense_stride,
                planned.chunks, divisor(channels), divisor(planned.inner), m, eps, k, planned.programs,
                VEC=planned.vec, TILE=planned.tile, CHUNK=planned.chunk, SHORT=planned.short, NARROW=planned.narrow,
                **options,
            )  # fmt: skip
        else:
            kernels.sweep_rows[grid](
                *tensors, partials_at, planned.rows, channels, planned.inner, planned.columns, planned.tail,
                planned.mean_stride, planned.target_stride, grad_stride, planned.dense_stride,
                planned.column_tiles, planned.row_blocks,
                divisor(channels), divisor(planned.inner), divisor(planned.column_tiles), m, eps, k, planned.programs,
                VEC=planned.vec, ROWS=planned.tile_rows, COLS=planned.tile_columns,
                BLOCK_ROWS=planned.block_rows, NEAR=planned.near, JOINED=planned.join > 1,
                EACH=positions is not None and planned.join == 1 and planned.inner == 1, **options,
            )  # fmt: skip


BACKEND = TritonBackend()
