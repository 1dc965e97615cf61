"""The Triton back end: any GPU that the installed Triton drives, and the CPU under TRITON_INTERPRET=1.

Triton is imported on first use. Every launch goes to the current stream of the tensors' device; nothing is read
on the host, so calls can be captured in a CUDA graph once their kernels are compiled (one call beforehand).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vidfast.backends.triton_plan import (
    ALPHA_BLOCK,
    RULE,
    Flat,
    Planes,
    Rows,
    ceil_div,
    plan,
    plan_finish,
    plan_scale,
)
from vidfast.backends.triton_tune import autotunes, tuned
from vidfast.layout import Layout, dense_like, walk
from vidfast.raw import vector

if TYPE_CHECKING:
    from types import ModuleType

_F32, _F64 = torch.float32, torch.float64
# r * r is added with one rounding, whatever the installed Triton's default is.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
_TRUE = ("1", "true", "on", "yes", "y")


def _bits(x: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", x))[0]
    return bits


class TritonBackend:
    name = "triton"

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
            from vidfast.backends import triton_kernels

            self._module = triton_kernels
        return self._module

    def _probe(self) -> str | None:
        """Import Triton and ask it for a device, once."""
        if not self._probed:
            with self._interpreter:
                if not self._probed:
                    self._obstacle, self._kind = self._find_device()
                    self._probed = True
        return self._obstacle

    def _find_device(self) -> tuple[str | None, str]:
        if importlib.util.find_spec("triton") is None:
            return (
                "the package triton is not installed: torch's GPU builds bring it, "
                "pip install 'vidfast[triton]' adds it"
            ), ""
        try:
            from vidfast.backends.triton_math import INTERPRETED

            if INTERPRETED.value:
                # a thread of its own has none of this one's modes, transforms and default devices
                with ThreadPoolExecutor(1) as thread:
                    return thread.submit(_interpreter_fault).result(), "cpu"
            from triton.runtime import driver

            kind = str(driver.active.get_active_torch_device().type)
            self.rule = RULE._replace(lanes=driver.active.get_current_target().warp_size)
        except Exception as error:  # a broken installation must not take the other back ends with it
            return f"triton finds no GPU that it can drive ({type(error).__name__}: {error})", ""
        try:
            torch.get_device_module(kind).current_device()
        except Exception as error:
            return f"this build of torch cannot use the {kind} device that triton drives ({error})", ""
        return None, kind

    def unavailable(self) -> str | None:
        return self._probe()

    def supports(self, mean: Tensor, target: Tensor, alpha: Tensor) -> str | None:
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

    def forward(
        self, mean: Tensor, target: Tensor, alpha: Tensor, layout: Layout, k: float, eps: float, full: bool
    ) -> tuple[Tensor, Tensor]:
        loss = _empty_loss(mean, target)
        sum_sq = torch.empty(layout.channels, dtype=_F64, device=mean.device)
        with self._on(mean):
            self.reduce(mean, target, alpha, layout, k, eps, full, loss, None, False, sum_sq, None)
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
        loss = _empty_loss(mean, target)
        grad_mean = mean.detach() if inplace else dense_like(mean, layout.channel)
        grad_alpha = torch.empty(layout.channels, dtype=_F64, device=mean.device)
        with self._on(mean):
            self.reduce(mean, target, alpha, layout, k, eps, full, loss, grad_mean, inplace, None, grad_alpha)
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
        alpha = vector("alpha", alpha, layout.channels, alpha.device)
        sum_sq = vector("sum_sq", sum_sq, layout.channels, alpha.device, _F64)
        grad_mean = grad_target = None
        if want[0] or want[1]:
            assert mean is not None, "gradients of the activations need the activations"
            assert target is not None, "gradients of the activations need the activations"
            grad_mean = dense_like(mean, layout.channel) if want[0] else None
            # in mean's order of dimensions, so that one description serves all four tensors
            grad_target = dense_like(mean, layout.channel, target.dtype) if want[1] else None
        else:
            mean = target = None
        grad_alpha = torch.empty_like(alpha) if want[2] else None
        with self._on(alpha):
            self._sweep(
                mean, target, grad_mean, False, grad_target, alpha, g, sum_sq, grad_alpha, None, None,
                layout, self._plan(mean, target, layout), k, eps,
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
        flat: Flat | None = None
        if grad_mean is not None:
            walked = walk(grad_mean, channel)
            if walked is None:  # a saved-tensor hook may give it back laid out in any way
                grad_mean = grad_mean.contiguous()
                walked = walk(grad_mean, channel)
                assert walked is not None, "a contiguous tensor always collapses"
            outer, row, src_stride = walked
            out = grad_mean if in_place else dense_like(grad_mean, channel)
            flat = plan_scale(
                outer, row, src_stride, src_stride if in_place else row, grad_mean.element_size(), self.rule
            )
        channels = 0 if grad_alpha is None else grad_alpha.numel()
        if grad_alpha is not None:
            grad_alpha = vector("grad_alpha", grad_alpha, channels, g.device, _F64)
        scaled_alpha = None if grad_alpha is None else torch.empty_like(grad_alpha, dtype=alpha_dtype)
        if flat is not None or scaled_alpha is not None:
            with self._on(g):
                self._scale(g, grad_mean, out, grad_alpha, scaled_alpha, flat, channels, in_place)
        return out, scaled_alpha

    def _plan(self, mean: Tensor | None, target: Tensor | None, layout: Layout) -> Planes | Rows | None:
        if mean is None or target is None:
            return None
        tuning = tuned(self, mean, target, layout) if autotunes() else self.rule
        return plan(*layout[:5], mean.element_size(), target.element_size(), tuning)

    def reduce(
        self,
        mean: Tensor,
        target: Tensor,
        alpha: Tensor,
        layout: Layout,
        k: float,
        eps: float,
        full: bool,
        loss: Tensor,
        grad_mean: Tensor | None,
        inplace: bool,
        sum_sq: Tensor | None,
        grad_alpha: Tensor | None,
        planned: Planes | Rows | None = None,
    ) -> None:
        """The two launches of forward and forward_grad."""
        device = mean.device
        planned = planned or self._plan(mean, target, layout)
        assert planned is not None, "a sum needs the activations"
        blocks, inner = planned.partials
        ending = plan_finish(blocks, layout.channels, inner)
        wide = _F64 if _F64 in (mean.dtype, target.dtype) else _F32
        partial = torch.empty(blocks * layout.channels * inner, dtype=wide, device=device)
        losses = torch.empty(ending.programs, dtype=_F64, device=device)
        counter = torch.empty(1, dtype=torch.int32, device=device)
        self._sweep(
            mean, target, grad_mean, inplace, None, alpha, None, None, None, partial, counter,
            layout, planned, k, eps,
        )  # fmt: skip
        self._kernels.finish[(ending.programs,)](
            partial, alpha, loss, sum_sq, grad_alpha, losses, counter,
            ending.blocks, layout.channels, ending.inner,
            layout.outer * layout.inner, _bits(eps), _bits(k), ending.programs,
            ACROSS=ending.across, CHANNELS=ending.channels, DEPTH=ending.depth, FULL=full, **_OPTIONS,
        )  # fmt: skip

    def _sweep(
        self,
        mean: Tensor | None,
        target: Tensor | None,
        grad_mean: Tensor | None,
        inplace: bool,
        grad_target: Tensor | None,
        alpha: Tensor,
        g: Tensor | None,
        sum_sq: Tensor | None,
        grad_alpha: Tensor | None,
        partial: Tensor | None,
        counter: Tensor | None,
        layout: Layout,
        planned: Planes | Rows | None,
        k: float,
        eps: float,
    ) -> None:
        """One launch over whatever is wanted."""
        kernels = self._kernels
        tl = kernels.tl
        channels = layout.channels
        m = layout.outer * layout.inner
        alpha_programs = 0 if grad_alpha is None else ceil_div(channels, ALPHA_BLOCK)
        double = mean is not None and target is not None and _F64 in (mean.dtype, target.dtype)
        wide = tl.float64 if double else tl.float32
        if grad_alpha is None:
            sum_sq = None
        if planned is None:  # alpha's gradient alone
            kernels.sweep_planes[(alpha_programs,)](
                None, None, None, None, alpha, g, sum_sq, grad_alpha, None, None,
                1, channels, 1, None, 0, 0, 0, 0, 1, m, _bits(eps), _bits(k), 0,
                VEC=1, TILE=1, CHUNK=1, SHORT=False, WIDE=wide, ALPHA_BLOCK=ALPHA_BLOCK, **_OPTIONS,
            )  # fmt: skip
            return
        grid = (planned.programs + alpha_programs,)
        grad_stride = planned.mean_stride if inplace else planned.dense_stride
        if isinstance(planned, Planes):
            kernels.sweep_planes[grid](
                mean, target, grad_mean, grad_target, alpha, g, sum_sq, grad_alpha, partial, counter,
                planned.outer, channels, planned.inner, planned.tail,
                planned.mean_stride, planned.target_stride, grad_stride, planned.dense_stride,
                planned.chunks, m, _bits(eps), _bits(k), planned.programs,
                VEC=planned.vec, TILE=planned.tile, CHUNK=planned.chunk, SHORT=planned.short, WIDE=wide,
                ALPHA_BLOCK=ALPHA_BLOCK, num_warps=planned.warps, enable_fp_fusion=True,
            )  # fmt: skip
        else:
            kernels.sweep_rows[grid](
                mean, target, grad_mean, grad_target, alpha, g, sum_sq, grad_alpha, partial, counter,
                planned.rows, channels, planned.inner, planned.columns, planned.tail,
                planned.mean_stride, planned.target_stride, grad_stride, planned.dense_stride,
                planned.column_tiles, planned.row_blocks, m, _bits(eps), _bits(k), planned.programs,
                VEC=planned.vec, ROWS=planned.tile_rows, COLS=planned.tile_columns,
                BLOCK_ROWS=planned.block_rows, NEAR=planned.near, JOINED=planned.join > 1, WIDE=wide,
                ALPHA_BLOCK=ALPHA_BLOCK, num_warps=planned.warps, enable_fp_fusion=True,
            )  # fmt: skip

    def _scale(
        self,
        g: Tensor,
        src: Tensor | None,
        dst: Tensor | None,
        grad_alpha: Tensor | None,
        scaled_alpha: Tensor | None,
        flat: Flat | None,
        channels: int,
        in_place: bool,
    ) -> None:
        kernels = self._kernels
        tl = kernels.tl
        wide = tl.float64 if src is not None and src.dtype is _F64 else tl.float32
        flat = flat or Flat(1, 1, None, 1, 1, 0, 1, 1, 1, False, 4)
        kernels.scale[(flat.chunks + ceil_div(channels, ALPHA_BLOCK),)](
            g, src, dst, grad_alpha, scaled_alpha,
            flat.outer, flat.row, flat.tail, flat.src_stride, flat.dst_stride, flat.chunks, channels,
            IN_PLACE=in_place, VEC=flat.vec, TILE=flat.tile, CHUNK=flat.chunk, SHORT=flat.short, WIDE=wide,
            ALPHA_BLOCK=ALPHA_BLOCK, num_warps=flat.warps, enable_fp_fusion=True,
        )  # fmt: skip


def _interpreter_fault() -> str | None:
    """Why this Triton's interpreter cannot run here, or None. Triton 3.6 cannot count with numpy 2.4 and later."""
    import numpy
    import triton

    from vidfast.backends.triton_math import counts

    found = torch.full((2,), -1, dtype=torch.int32, device="cpu")
    try:
        counts[(1,)](found, 7)
    except Exception as error:
        versions = f"triton {triton.__version__} with numpy {numpy.__version__}"
        return (
            f"the interpreter of {versions} fails ({error}): install another version of one of them, "
            "or unset TRITON_INTERPRET"
        )
    if found.tolist() != [0, 2]:
        return f"the interpreter of triton {triton.__version__} counts wrong: {found.tolist()} for [0, 2]"
    return None


def _empty_loss(mean: Tensor, target: Tensor) -> Tensor:
    wide = mean.dtype is _F64 or target.dtype is _F64
    return torch.empty((), dtype=_F64 if wide else _F32, device=mean.device)


BACKEND = TritonBackend()
