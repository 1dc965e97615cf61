"""The CUDA back end: hand-written kernels for NVIDIA GPUs, on the current stream of the tensors' device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vidfast.layout import Layout, dense_like, walk
from vidfast.raw import vector

_DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_F64 = torch.float64
_F32 = torch.float32
_UINT8 = torch.uint8
_NO_GUARD = contextlib.nullcontext()


class CudaBackend:
    """The kernels of `native`, a module with the cuda_* functions of csrc/bindings_cuda.cpp.

    :param native: None where there is none, for the reason `missing`.
    :param device_type: of the tensors it takes.
    :param stream: the current stream of a device, by its index, as an address.
    """

    name = "cuda"

    def __init__(
        self, native: Any, missing: str | None, device_type: str, stream: Callable[[int], int] | None
    ) -> None:
        self._native = native
        self._missing = missing
        self._device_type = device_type
        self._stream = stream
        self._is_cuda = device_type == "cuda"
        self._refused: dict[int, str | None] = {}  # by device: why it cannot run there
        if native is not None:
            self._workspace_bytes = lru_cache(maxsize=4096)(native.cuda_workspace_bytes)

    def unavailable(self) -> str | None:
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

    def _current_stream(self, index: int) -> int:
        if self._stream is not None:
            return self._stream(index)
        return int(torch.cuda.current_stream(index).cuda_stream)

    def forward(
        self, mean: Tensor, target: Tensor, alpha: Tensor, layout: Layout, k: float, eps: float, full: bool
    ) -> tuple[Tensor, Tensor]:
        outer, channels, inner, mean_stride, target_stride = layout[:5]
        md, td = _DTYPE[mean.dtype], _DTYPE[target.dtype]
        wide = md == 1 or td == 1
        index, device = mean.get_device(), mean.device
        with self._on(index):
            loss = torch.empty((), dtype=_F64 if wide else _F32, device=device)
            sum_sq = torch.empty(channels, dtype=_F64, device=device)
            size = self._workspace_bytes(outer, channels, inner, mean_stride, target_stride, md, td)
            workspace = torch.empty(size, dtype=_UINT8, device=device)
            self._native.cuda_forward(
                mean.data_ptr(), mean_stride, md,
                target.data_ptr(), target_stride, td,
                alpha.data_ptr(), _DTYPE[alpha.dtype],
                outer, channels, inner, k, eps, full,
                loss.data_ptr(), 1 if wide else 0, sum_sq.data_ptr(),
                workspace.data_ptr(), self._current_stream(index),
            )  # fmt: skip
        return loss, sum_sq

    def forward_grad(
        self,
        mean: Tensor,
        target: Tensor,
        alpha: Tensor,
        layout: Layout,
        k: float,
        eps: float,
        full: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        outer, channels, inner, mean_stride, target_stride, channel = layout
        md, td = _DTYPE[mean.dtype], _DTYPE[target.dtype]
        wide = md == 1 or td == 1
        index, device = mean.get_device(), mean.device
        with self._on(index):
            loss = torch.empty((), dtype=_F64 if wide else _F32, device=device)
            grad_mean = mean.detach() if inplace else dense_like(mean, channel)
            grad_alpha = torch.empty(channels, dtype=_F64, device=device)
            size = self._workspace_bytes(outer, channels, inner, mean_stride, target_stride, md, td)
            workspace = torch.empty(size, dtype=_UINT8, device=device)
            self._native.cuda_forward_grad(
                mean.data_ptr(), mean_stride, md,
                target.data_ptr(), target_stride, td,
                alpha.data_ptr(), _DTYPE[alpha.dtype],
                outer, channels, inner, k, eps, full,
                loss.data_ptr(), 1 if wide else 0,
                grad_mean.data_ptr(), mean_stride if inplace else channels * inner,
                grad_alpha.data_ptr(), workspace.data_ptr(), self._current_stream(index),
            )  # fmt: skip
        return loss, grad_mean, grad_alpha

    def backward(
        self,
        g: Tensor,
        mean: Tensor | None,
        target: Tensor | None,
        alpha: Tensor,
        sum_sq: Tensor,
        layout: Layout,
        k: float,
        eps: float,
        want: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        outer, channels, inner, mean_stride, target_stride, channel = layout
        row = channels * inner
        grad_mean = grad_target = None
        activations = (0, 0, 0, 0, 0, 0)
        index, device = alpha.get_device(), alpha.device
        with self._on(index):
            alpha = vector("alpha", alpha, channels, device)
            sum_sq = vector("sum_sq", sum_sq, channels, device, _F64)
            if want[0] or want[1]:
                assert mean is not None, "gradients of the activations need the activations"
                assert target is not None, "gradients of the activations need the activations"
                grad_mean = dense_like(mean, channel) if want[0] else None
                # in mean's order of dimensions, so that one description serves all four tensors
                grad_target = dense_like(mean, channel, target.dtype) if want[1] else None
                activations = (
                    mean.data_ptr(), mean_stride, _DTYPE[mean.dtype],
                    target.data_ptr(), target_stride, _DTYPE[target.dtype],
                )  # fmt: skip
            grad_alpha = torch.empty_like(alpha) if want[2] else None
            self._native.cuda_backward(
                *activations, alpha.data_ptr(), _DTYPE[alpha.dtype],
                outer, channels, inner, k, eps, False,
                g.data_ptr(), _DTYPE[g.dtype], sum_sq.data_ptr(),
                0 if grad_mean is None else grad_mean.data_ptr(), row,
                0 if grad_target is None else grad_target.data_ptr(), row,
                0 if grad_alpha is None else grad_alpha.data_ptr(), self._current_stream(index),
            )  # fmt: skip
        return grad_mean, grad_target, grad_alpha

    def scale(
        self,
        g: Tensor,
        grad_mean: Tensor | None,
        channel: int,
        grad_alpha: Tensor | None,
        alpha_dtype: torch.dtype,
        in_place: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        out = grad_mean
        outer = row = source_stride = result_stride = dtype = 0
        index, device = g.get_device(), g.device
        with self._on(index):
            if grad_alpha is not None:
                grad_alpha = vector("grad_alpha", grad_alpha, grad_alpha.numel(), device, _F64)
            if grad_mean is not None:
                walked = walk(grad_mean, channel)
                if walked is None:  # a saved-tensor hook may give it back laid out in any way
                    grad_mean = grad_mean.contiguous()
                    walked = walk(grad_mean, channel)
                    assert walked is not None, "a contiguous tensor always collapses"
                outer, row, source_stride = walked
                out = grad_mean if in_place else dense_like(grad_mean, channel)
                result_stride = source_stride if in_place else row
                dtype = _DTYPE[grad_mean.dtype]
            scaled_alpha = None if grad_alpha is None else torch.empty_like(grad_alpha, dtype=alpha_dtype)
            self._native.cuda_scale(
                g.data_ptr(), _DTYPE[g.dtype], outer, row,
                0 if grad_mean is None else grad_mean.data_ptr(), source_stride,
                0 if out is None else out.data_ptr(), result_stride, dtype,
                0 if grad_alpha is None else grad_alpha.numel(),
                0 if grad_alpha is None else grad_alpha.data_ptr(),
                0 if scaled_alpha is None else scaled_alpha.data_ptr(),
                _DTYPE[alpha_dtype], self._current_stream(index),
            )  # fmt: skip
        return out, scaled_alpha


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def _of_this_build() -> CudaBackend:
    # torch's own name for it, which its compilers use too; absent in builds without CUDA
    stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    try:
        from vidfast import _C
    except ImportError as error:  # a source checkout that was never built
        from vidfast.unbuilt import reason

        return CudaBackend(None, reason(error), "cuda", stream)
    if not hasattr(_C, "cuda_forward"):
        missing = (
            "vidfast._C was built without CUDA (VIDFAST_CUDA=0, or no nvcc): "
            "VIDFAST_CUDA=1 pip install --no-cache-dir --force-reinstall --no-deps vidfast builds it, or says why not"
        )
        return CudaBackend(None, missing, "cuda", stream)
    return CudaBackend(_C, None, "cuda", stream)


BACKEND = _of_this_build()
