"""Where outputs and workspaces come from; large gradients on the CPU from memory that is kept from step to step.

malloc maps large blocks afresh and gives them back when they are freed, so every step's gradient would be thousands of
page faults: they take several times as long as the kernel that writes it (docs/kernel-notes.md). Here a freed
gradient's memory waits for the next of its size; other tensors cannot have it meanwhile. What waits and what is in use
are together never more than twice what was in use at once.

Such a tensor is like any other but for one thing: its storage cannot be resized, as that of a tensor from numpy.
"""

from __future__ import annotations

from os.path import dirname
from typing import NamedTuple

import torch
from torch import Tensor

from vidfast.raw import PLAIN_TYPES

try:
    from vidfast import _C
except ImportError:  # a source checkout that was never built
    from vidfast.unbuilt import warn_of_hidden_package

    _C = None  # type: ignore[assignment]
    warn_of_hidden_package()
else:
    if dirname(_C.__file__) != dirname(__file__):
        from vidfast.unbuilt import warn_of_foreign_extension

        warn_of_foreign_extension(_C.__file__)

# From 32 MiB on glibc maps every block afresh. Smaller ones it reuses, but gives back what is at its heap's end: every
# tenth step with a gradient of 13 MB took four times as long as the others. Below 4 MiB nothing was to be seen.
KEPT_FROM = 4 << 20


class KeptMemory(NamedTuple):
    """Bytes for large gradients: lent to tensors, waiting for the next ones, and the most lent at once so far.

    Blocks are up to an eighth larger than what was asked for.
    """

    in_use: int
    idle: int
    most: int


# empty_like is twice as fast as empty, and asks no default device.
_SCALAR_F64 = torch.empty((), dtype=torch.float64, device="cpu")
_SCALAR_F32 = torch.empty((), dtype=torch.float32, device="cpu")


def empty_loss(mean: Tensor, target: Tensor) -> Tensor:
    """An uninitialised scalar on their device, fp64 if one of them is, else fp32."""
    wide = mean.dtype is torch.float64 or target.dtype is torch.float64
    if mean.is_cpu:
        return torch.empty_like(_SCALAR_F64 if wide else _SCALAR_F32)
    return torch.empty((), dtype=torch.float64 if wide else torch.float32, device=mean.device)


def empty_dense(like: Tensor, strides: tuple[int, ...] | None, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory without gaps.

    Args:
        like: Whose shape and device it takes.
        strides: Of the memory, as :class:`vidfast.layout.Layout` has them; None: those of `torch.empty_like(like)`,
            contiguous where `like` is.
        dtype: Of the memory.
    """
    if like.is_cpu and like.numel() * like.element_size() >= KEPT_FROM and _is_kept(like, strides):
        kept = _from_block(like.numel(), dtype)
        return kept.view(like.shape) if strides is None else kept.as_strided_(like.shape, strides)
    if strides is None:
        return torch.empty_like(like) if like.dtype is dtype else torch.empty_like(like, dtype=dtype)
    return torch.empty_strided(like.shape, strides, dtype=dtype, device=like.device)


def _is_kept(like: Tensor, strides: tuple[int, ...] | None) -> bool:
    return _C is not None and type(like) in PLAIN_TYPES and (strides is not None or like.is_contiguous())


def workspace(count: int, like: Tensor) -> Tensor:
    """(count,), uninitialised, of the dtype and device of `like`, for one call of a kernel on its current stream."""
    return like.new_empty(count)


def empty_scratch(count: int, dtype: torch.dtype) -> Tensor:
    """(count,), uninitialised on the CPU, for what is as large as such gradients and as short-lived."""
    if _C is None or count * dtype.itemsize < KEPT_FROM:
        return torch.empty(count, dtype=dtype, device="cpu")
    return _from_block(count, dtype)


def _from_block(count: int, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(_C.CpuBlock(count * dtype.itemsize), dtype=dtype, count=count)


def kept_memory() -> KeptMemory:
    """What the CPU back end holds for large gradients. All zero where the extension is not built."""
    return KeptMemory(0, 0, 0) if _C is None else KeptMemory(*_C.cpu_block_bytes())


def empty_cache() -> None:
    """Gives back to the system what the CPU back end keeps for the next large gradients.

    What tensors hold stays theirs. What is kept from now on is bound by what is in use at once from now on: the call to
    make after a step much larger than those to come. `VIDFAST_KEEP_MEMORY=0` in the environment keeps nothing.
    """
    if _C is not None:
        _C.cpu_release_idle_blocks()
