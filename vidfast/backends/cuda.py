"""The CUDA back end: hand-written kernels for NVIDIA GPUs, on the current stream of the tensors' device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vidfast._torch import current_stream
from vidfast.arguments import Call
from vidfast.heteroscedastic.arguments import HeteroscedasticCall
from vidfast.heteroscedastic.layout import Rows
from vidfast.heteroscedastic.native import native_problem
from vidfast.layout import Layout, RowLayout
from vidfast.memory import workspace
from vidfast.positions import Counts, native_counts
from vidfast.raw import NATIVE_DTYPE, NO_ROWS, address, native_dtype

_NO_GUARD = contextlib.nullcontext()


class CudaBackend:
    """The kernels of csrc/cuda; see :class:`vidfast.backends.base.Backend`.

    Args:
        native: A module with the cuda_* functions of csrc/bindings_cuda.cpp; None where there is none.
        missing: Why there is none.
        device_type: Of the tensors it takes.
        stream: The current stream of a device, by its index, as an address.
    """

    name = "cuda"
    walks = True
    in_parts = False

    def __init__(
        self,
        native: Any,
        missing: str | None,
        device_type: str = "cuda",
        stream: Callable[[int], int] = current_stream,
    ) -> None:
        self._native = native
        self._missing = missing
        self._device_type = device_type
        self._stream = stream
        self._is_cuda = device_type == "cuda"
        self._refused: dict[int, str | None] = {}  # by device: why it cannot run there
        self._workspace_length = lru_cache(maxsize=4096)(self._count_workspace)
        self._heteroscedastic_bytes = lru_cache(maxsize=4096)(self._count_heteroscedastic)

    def unavailable(self) -> str | None:
        """Why the extension was built without it, or torch, the driver or the machine has no CUDA."""
        if self._missing is not None:
            return self._missing
        if not self._is_cuda:
            return None
        if torch.version.hip is not None:
            return "this build of torch is for ROCm, and the kernels are for NVIDIA GPUs"
        if torch.version.cuda is None:
            return "this build of torch is without CUDA"
        reason: str = self._native.cuda_unavailable()
        if not reason and not torch.cuda.is_available():
            reason = "torch sees no CUDA device"
        return reason or None

    def supports(self, mean: Tensor, target: Tensor, alpha: Tensor) -> str | None:
        """It takes tensors on a device that the kernels were built for."""
        if mean.device.type != self._device_type:
            return "it takes tensors on a CUDA device"
        index = mean.get_device()
        try:
            return self._refused[index]
        except KeyError:
            reason = self._refused[index] = self._probe(index)
            return reason

    def _probe(self, index: int) -> str | None:
        """Once for each device: why the kernels cannot run there."""
        reason = self.unavailable()
        if reason is None:
            with self._on(index):
                reason = self._native.cuda_device_unsupported() or None
        return reason

    def info(self) -> dict[str, object]:
        """The architectures of the kernels, the versions of runtime and driver, the devices."""
        if self._missing is not None:
            return {}
        facts: dict[str, object] = {
            "architectures": self._native.cuda_architectures(),
            "runtime": _version(self._native.cuda_runtime_version()),
            "driver": _version(self._native.cuda_driver_version()),
        }
        if self._is_cuda and self.unavailable() is None:
            facts["devices"] = [
                f"{torch.cuda.get_device_name(i)}: {self._probe(i) or 'ready'}"
                for i in range(torch.cuda.device_count())
            ]
        return facts

    def _on(self, index: int) -> contextlib.AbstractContextManager[object]:
        """The device is set here and only if it differs: native code never does."""
        if not self._is_cuda or torch.cuda.current_device() == index:
            return _NO_GUARD
        return torch.cuda.device(index)

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
        index = totals.get_device()
        kind = None if positions is None else positions.dtype
        with self._on(index):
            length = 0 if positions is None else -(-self._native.cuda_total_workspace_bytes(count) // 8)
            space = workspace(length, totals) if length else None
            self._native.cuda_total(
                address(positions), kind is torch.uint8, kind is torch.float64, count,
                address(factor), native_dtype(factor), k, channels,
                totals.data_ptr(), address(space), self._stream(index),
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
        outer, channels, inner, mean_stride, target_stride = extents = layout[:5]
        mean_dtype, target_dtype = NATIVE_DTYPE[mean.dtype], NATIVE_DTYPE[target.dtype]
        index = mean.get_device()
        with self._on(index):
            space = workspace(self._workspace_length(extents, mean_dtype, target_dtype), sum_sq)
            self._native.cuda_forward(
                mean.data_ptr(), mean_stride, mean_dtype, target.data_ptr(), target_stride, target_dtype,
                alpha.data_ptr(), NATIVE_DTYPE[alpha.dtype], outer, channels, inner, call.k, call.eps, call.full,
                *native_counts(counts),
                loss.data_ptr(), NATIVE_DTYPE[loss.dtype], sum_sq.data_ptr(),
                space.data_ptr(), self._stream(index),
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
        outer, channels, inner, mean_stride, target_stride = extents = layout[:5]
        mean_dtype, target_dtype = NATIVE_DTYPE[mean.dtype], NATIVE_DTYPE[target.dtype]
        index = mean.get_device()
        with self._on(index):
            space = workspace(self._workspace_length(extents, mean_dtype, target_dtype), grad_alpha)
            self._native.cuda_forward_grad(
                mean.data_ptr(), mean_stride, mean_dtype, target.data_ptr(), target_stride, target_dtype,
                alpha.data_ptr(), NATIVE_DTYPE[alpha.dtype], outer, channels, inner, call.k, call.eps, call.full,
                *native_counts(counts),
                loss.data_ptr(), NATIVE_DTYPE[loss.dtype],
                grad_mean.data_ptr(), mean_stride if call.inplace else channels * inner,
                grad_alpha.data_ptr(), space.data_ptr(), self._stream(index),
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
        index = alpha.get_device()
        with self._on(index):
            self._native.cuda_backward(
                address(mean), mean_stride, native_dtype(mean),
                address(target), target_stride, native_dtype(target),
                alpha.data_ptr(), NATIVE_DTYPE[alpha.dtype],
                outer, channels, inner, call.k, call.eps, False,
                *native_counts(counts),
                g.data_ptr(), NATIVE_DTYPE[g.dtype], sum_sq.data_ptr(),
                address(grad_mean), row, address(grad_target), row, address(grad_alpha), self._stream(index),
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
        index = g.get_device()
        # Not by `address` and `native_dtype`: it is called in every step, and six calls more show in a small one.
        with self._on(index):
            self._native.cuda_scale(
                g.data_ptr(), NATIVE_DTYPE[g.dtype], outer, row,
                0 if source is None else source.data_ptr(), stride,
                0 if result is None else result.data_ptr(), stride if result is source else row,
                0 if source is None else NATIVE_DTYPE[source.dtype],
                0 if grad_alpha is None else grad_alpha.numel(),
                0 if grad_alpha is None else grad_alpha.data_ptr(),
                0 if scaled_alpha is None else scaled_alpha.data_ptr(),
                0 if scaled_alpha is None else NATIVE_DTYPE[scaled_alpha.dtype], self._stream(index),
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
        index = mean.get_device()
        with self._on(index):
            space = self._heteroscedastic_workspace(mean, target, raw, rows, loss)
            self._native.cuda_heteroscedastic_forward(
                *native_problem(mean, target, raw, rows, call, counts),
                loss.data_ptr(), NATIVE_DTYPE[loss.dtype], space.data_ptr(), self._stream(index),
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
        index = mean.get_device()
        with self._on(index):
            space = self._heteroscedastic_workspace(mean, target, raw, rows, loss)
            self._native.cuda_heteroscedastic_forward_grad(
                *native_problem(mean, target, raw, rows, call, counts),
                loss.data_ptr(), NATIVE_DTYPE[loss.dtype],
                address(grad_mean), rows.grad_mean_stride, address(grad_raw), rows.grad_raw_stride,
                space.data_ptr(), self._stream(index),
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
        index = mean.get_device()
        with self._on(index):
            self._native.cuda_heteroscedastic_backward(
                *native_problem(mean, target, raw, rows, call, counts),
                g.data_ptr(), NATIVE_DTYPE[g.dtype],
                address(grad_mean), rows.grad_mean_stride, address(grad_target), rows.row,
                address(grad_raw), rows.grad_raw_stride, self._stream(index),
            )  # fmt: skip

    def _heteroscedastic_workspace(
        self, mean: Tensor, target: Tensor, raw: Tensor, rows: Rows, loss: Tensor
    ) -> Tensor:
        """Room for a call's partial sums, in numbers of the loss's type."""
        dtypes = NATIVE_DTYPE[mean.dtype], NATIVE_DTYPE[target.dtype], NATIVE_DTYPE[raw.dtype]
        size = self._heteroscedastic_bytes(rows.outer, rows.row, *dtypes)
        return workspace(size // loss.element_size(), loss)

    def _count_heteroscedastic(self, outer: int, row: int, mean: int, target: int, raw: int) -> int:
        """How many bytes have room for them: a number of 8 bytes for each block."""
        size: int = self._native.cuda_heteroscedastic_workspace_bytes(outer, row, mean, target, raw)
        return size

    def _count_workspace(self, extents: tuple[int, ...], mean_dtype: int, target_dtype: int) -> int:
        """How many fp64 numbers have room for partial sums and a counter; the kernels set what they read."""
        size: int = self._native.cuda_workspace_bytes(*extents, mean_dtype, target_dtype)
        return -(-size // 8)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def _of_this_build() -> CudaBackend:
    try:
        from vidfast import _C
    except ImportError as error:  # a source checkout that was never built
        from vidfast.unbuilt import reason

        return CudaBackend(None, reason(error))
    if not hasattr(_C, "cuda_forward"):
        missing = (
            "vidfast._C was built without CUDA (VIDFAST_CUDA=0, or no nvcc): "
            "VIDFAST_CUDA=1 pip install --no-cache-dir --force-reinstall --no-deps vidfast builds it, or says why not"
        )
        return CudaBackend(None, missing)
    return CudaBackend(_C, None)


BACKEND = _of_this_build()
