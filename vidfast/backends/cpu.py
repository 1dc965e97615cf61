"""The CPU back end: C++ kernels with SIMD chosen at run time and torch's own OpenMP threads."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from vidfast.arguments import Call
from vidfast.heteroscedastic.arguments import HeteroscedasticCall
from vidfast.heteroscedastic.layout import Rows
from vidfast.heteroscedastic.native import native_problem
from vidfast.layout import Layout, RowLayout
from vidfast.memory import empty_scratch
from vidfast.positions import Counts, native_counts
from vidfast.raw import NATIVE_DTYPE, NO_ROWS, address, native_dtype

try:
    import vidfast._C as _C

    _missing: str | None = None
    _wanted = os.environ.get("VIDFAST_CPU_ISA", _C.cpu_isa())
    if _wanted != _C.cpu_isa():
        _missing = (
            f"VIDFAST_CPU_ISA must be an instruction set of this processor, got {_wanted!r}; "
            f"unset, {_C.cpu_isa()} is taken"
        )
except ImportError as error:  # a source checkout that was never built
    from vidfast.unbuilt import reason

    _missing = reason(error)

_num_threads = torch.get_num_threads


class CpuBackend:
    """The kernels of csrc/cpu; see :class:`vidfast.backends.base.Backend`."""

    name = "cpu"
    walks = True
    in_parts = True

    def unavailable(self) -> str | None:
        """Why the extension is not there, or was asked for what this processor has not."""
        return _missing

    def supports(self, mean: Tensor, target: Tensor, alpha: Tensor) -> str | None:
        """It takes tensors on the CPU."""
        if _missing is not None:
            return _missing
        if not mean.is_cpu:
            return f"it takes tensors on the CPU, not on {mean.device}"
        return None

    def info(self) -> dict[str, object]:
        """The instruction set in use, torch's number of threads, the OpenMP runtime they are of."""
        if _missing is not None:
            return {}
        return {
            "isa": _C.cpu_isa(),
            "threads": torch.get_num_threads(),
            "openmp": _C.cpu_openmp_runtime(),
        }

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
        dtype = None if positions is None else positions.dtype
        _C.cpu_total(
            address(positions), dtype is torch.uint8, dtype is torch.float64, count,
            address(factor), native_dtype(factor), k, channels, totals.data_ptr(), _num_threads(),
        )  # fmt: skip

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
        _C.cpu_forward(
            mean.data_ptr(), layout.mean_stride, NATIVE_DTYPE[mean.dtype],
            target.data_ptr(), layout.target_stride, NATIVE_DTYPE[target.dtype],
            alpha.data_ptr(), NATIVE_DTYPE[alpha.dtype],
            layout.outer, layout.channels, layout.inner, call.k, call.eps, call.full,
            *native_counts(counts),
            loss.data_ptr(), NATIVE_DTYPE[loss.dtype], sum_sq.data_ptr(), _num_threads(),
        )  # fmt: skip

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
        outer, channels, inner, mean_stride, target_stride = layout[:5]
        _C.cpu_forward_grad(
            mean.data_ptr(), mean_stride, NATIVE_DTYPE[mean.dtype],
            target.data_ptr(), target_stride, NATIVE_DTYPE[target.dtype],
            alpha.data_ptr(), NATIVE_DTYPE[alpha.dtype],
            outer, channels, inner, call.k, call.eps, call.full,
            *native_counts(counts),
            loss.data_ptr(), NATIVE_DTYPE[loss.dtype],
            grad_mean.data_ptr(), mean_stride if call.inplace else channels * inner,
            grad_alpha.data_ptr(), _num_threads(),
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
        outer, channels, inner, mean_stride, target_stride = layout[:5]
        row = channels * inner
        _C.cpu_backward(
            address(mean), mean_stride, native_dtype(mean),
            address(target), target_stride, native_dtype(target),
            alpha.data_ptr(), NATIVE_DTYPE[alpha.dtype],
            outer, channels, inner, call.k, call.eps, False,
            *native_counts(counts),
            g.data_ptr(), NATIVE_DTYPE[g.dtype], sum_sq.data_ptr(),
            address(grad_mean), row, address(grad_target), row, address(grad_alpha), _num_threads(),
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
        outer, row, stride = NO_ROWS if rows is None else rows[:3]
        # Not by `address` and `native_dtype`: it is called in every step, and six calls more show in a small one.
        _C.cpu_scale(
            g.data_ptr(), NATIVE_DTYPE[g.dtype], outer, row,
            0 if source is None else source.data_ptr(), stride,
            0 if result is None else result.data_ptr(), stride if result is source else row,
            0 if source is None else NATIVE_DTYPE[source.dtype],
            0 if grad_alpha is None else grad_alpha.numel(),
            0 if grad_alpha is None else grad_alpha.data_ptr(),
            0 if scaled_alpha is None else scaled_alpha.data_ptr(),
            0 if scaled_alpha is None else NATIVE_DTYPE[scaled_alpha.dtype], _num_threads(),
        )  # fmt: skip

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
        _C.cpu_heteroscedastic_forward(
            native_problem(mean, target, raw, rows, call, counts),
            loss.data_ptr(), NATIVE_DTYPE[loss.dtype], _num_threads(),
        )  # fmt: skip

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
        _C.cpu_heteroscedastic_forward_grad(
            native_problem(mean, target, raw, rows, call, counts),
            loss.data_ptr(), NATIVE_DTYPE[loss.dtype],
            address(grad_mean), rows.grad_mean_stride, address(grad_raw), rows.grad_raw_stride, _num_threads(),
        )  # fmt: skip

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
        _C.cpu_heteroscedastic_backward(
            native_problem(mean, target, raw, rows, call, counts), g.data_ptr(), NATIVE_DTYPE[g.dtype],
            address(grad_mean), rows.grad_mean_stride, address(grad_target), rows.row,
            address(grad_raw), rows.grad_raw_stride, _num_threads(),
        )  # fmt: skip

    def has_head(self, module: torch.dtype, layers: int) -> bool:
        """As the protocol says."""
        return _C.cpu_head_instructions(NATIVE_DTYPE[module], layers) is not None

    def head(
        self,
        student: Tensor,
        target: Tensor,
        alpha: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        call: Call,
        module: torch.dtype,
        *,
        loss: Tensor,
        grad_student: Tensor | None,
        grad_alpha: Tensor | None,
        grad_weights: Sequence[Tensor | None],
        grad_biases: Sequence[Tensor | None],
        positions: Tensor | None = None,
        values: float = 0.0,
    ) -> None:
        """As the protocol says."""
        layers = [
            (
                weight.data_ptr(), NATIVE_DTYPE[weight.dtype], address(bias), native_dtype(bias),
                weight.shape[1], weight.shape[0], address(grad_weight), address(grad_bias),
            )
            for weight, bias, grad_weight, grad_bias in zip(weights, biases, grad_weights, grad_biases, strict=True)
        ]  # fmt: skip
        head = _C.CpuHead(
            target.shape[0], target.shape[1], target.shape[2], _feature(student), _feature(target), layers,
            alpha.data_ptr(), NATIVE_DTYPE[alpha.dtype], call.eps, call.k, NATIVE_DTYPE[module],
            _feature(grad_student), address(grad_alpha),
            address(positions), positions is not None and positions.dtype is torch.uint8, values,
        )  # fmt: skip
        threads = _num_threads()
        workspace = empty_scratch(head.workspace_bytes(threads), torch.uint8)
        head.run(loss.data_ptr(), workspace.data_ptr(), threads)

    def rectify(self, x: Tensor, rounded: torch.dtype, positive: bool) -> None:
        """As the protocol says."""
        _C.cpu_rectify(
            x.data_ptr(), NATIVE_DTYPE[x.dtype], NATIVE_DTYPE[rounded], positive, x.numel(), _num_threads()
        )

    def rectify_backward(
        self, gradient: Tensor, activation: Tensor, out: Tensor, rounded: torch.dtype
    ) -> None:
        """As the protocol says."""
        _C.cpu_rectify_backward(
            gradient.data_ptr(), activation.data_ptr(), out.data_ptr(),
            NATIVE_DTYPE[out.dtype], NATIVE_DTYPE[rounded], out.numel(), _num_threads(),
        )  # fmt: skip


def _feature(x: Tensor | None) -> tuple[int, int, int, int, int]:
    """(address, dtype, strides of batch, channels and positions) of a tensor (B, C, positions)."""
    if x is None:
        return 0, 0, 0, 0, 0
    batch, channel, position = x.stride()
    return x.data_ptr(), NATIVE_DTYPE[x.dtype], batch, channel, position


BACKEND = CpuBackend()
