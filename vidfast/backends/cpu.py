"""The CPU back end: C++ kernels with SIMD chosen at run time and torch's own OpenMP threads."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from vidfast.layout import Layout, dense_like, walk
from vidfast.raw import vector

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

_DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CPU = torch.device("cpu")
_F64 = torch.float64
_F32 = torch.float32
# empty_like is twice as fast as empty, and asks no default device.
_SCALAR_F64 = torch.empty((), dtype=_F64, device="cpu")
_SCALAR_F32 = torch.empty((), dtype=_F32, device="cpu")
_num_threads = torch.get_num_threads


class CpuBackend:
    name = "cpu"

    def unavailable(self) -> str | None:
        return _missing

    def supports(self, mean: Tensor, target: Tensor, alpha: Tensor) -> str | None:
        if _missing is not None:
            return _missing
        if not mean.is_cpu:
            return f"it takes tensors on the CPU, not on {mean.device}"
        return None

    def info(self) -> dict[str, object]:
        if _missing is not None:
            return {}
        return {
            "isa": _C.cpu_isa(),
            "threads": torch.get_num_threads(),
            "openmp": _C.cpu_openmp_runtime(),
        }

    def forward(
        self, mean: Tensor, target: Tensor, alpha: Tensor, layout: Layout, k: float, eps: float, full: bool
    ) -> tuple[Tensor, Tensor]:
        outer, channels, inner, mean_stride, target_stride = layout[:5]
        md, td = _DTYPE[mean.dtype], _DTYPE[target.dtype]
        wide = md == 1 or td == 1
        loss = torch.empty_like(_SCALAR_F64 if wide else _SCALAR_F32)
        sum_sq = torch.empty_like(alpha, dtype=_F64)
        _C.cpu_forward(
            mean.data_ptr(), mean_stride, md,
            target.data_ptr(), target_stride, td,
            alpha.data_ptr(), _DTYPE[alpha.dtype],
            outer, channels, inner, k, eps, full,
            loss.data_ptr(), 1 if wide else 0, sum_sq.data_ptr(), _num_threads(),
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
        loss = torch.empty_like(_SCALAR_F64 if wide else _SCALAR_F32)
        grad_mean = mean.detach() if inplace else dense_like(mean, channel)
        grad_alpha = torch.empty_like(alpha, dtype=_F64)
        _C.cpu_forward_grad(
            mean.data_ptr(), mean_stride, md,
            target.data_ptr(), target_stride, td,
            alpha.data_ptr(), _DTYPE[alpha.dtype],
            outer, channels, inner, k, eps, full,
            loss.data_ptr(), 1 if wide else 0,
            grad_mean.data_ptr(), mean_stride if inplace else channels * inner,
            grad_alpha.data_ptr(), _num_threads(),
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
        alpha = vector("alpha", alpha, channels, _CPU)
        sum_sq = vector("sum_sq", sum_sq, channels, _CPU, _F64)
        row = channels * inner
        grad_mean = grad_target = None
        activations = (0, 0, 0, 0, 0, 0)
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
        _C.cpu_backward(
            *activations, alpha.data_ptr(), _DTYPE[alpha.dtype],
            outer, channels, inner, k, eps, False,
            g.data_ptr(), _DTYPE[g.dtype], sum_sq.data_ptr(),
            0 if grad_mean is None else grad_mean.data_ptr(), row,
            0 if grad_target is None else grad_target.data_ptr(), row,
            0 if grad_alpha is None else grad_alpha.data_ptr(), _num_threads(),
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
        if grad_alpha is not None:
            grad_alpha = vector("grad_alpha", grad_alpha, grad_alpha.numel(), _CPU, _F64)
        outer = row = src_stride = dst_stride = dtype = 0
        if grad_mean is not None:
            n = grad_mean.numel()
            walked = (1, n, n) if grad_mean.is_contiguous() else walk(grad_mean, channel)
            if walked is None:  # a saved-tensor hook may give it back laid out in any way
                grad_mean = grad_mean.contiguous()
                walked = walk(grad_mean, channel)
                assert walked is not None, "a contiguous tensor always collapses"
            outer, row, src_stride = walked
            out = grad_mean if in_place else dense_like(grad_mean, channel)
            dst_stride = src_stride if in_place else row
            dtype = _DTYPE[grad_mean.dtype]
        scaled_alpha = None if grad_alpha is None else torch.empty_like(grad_alpha, dtype=alpha_dtype)
        _C.cpu_scale(
            g.data_ptr(), _DTYPE[g.dtype], outer, row,
            0 if grad_mean is None else grad_mean.data_ptr(), src_stride,
            0 if out is None else out.data_ptr(), dst_stride, dtype,
            0 if grad_alpha is None else grad_alpha.numel(),
            0 if grad_alpha is None else grad_alpha.data_ptr(),
            0 if scaled_alpha is None else scaled_alpha.data_ptr(),
            _DTYPE[alpha_dtype], _num_threads(),
        )  # fmt: skip
        return out, scaled_alpha


BACKEND = CpuBackend()
