"""Tensors inside larger buffers, so that a kernel that reads or writes beside its elements is noticed.

A tensor's elements are values; every other element of its buffer is a sentinel. A sentinel that is read makes
a result wrong by far, and one that is written differs from what it was, bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
from torch import Tensor

GUARD = 64  # elements on either side: whole cache lines, so that a tensor starts aligned unless it is shifted
SENTINELS = ("nan", "bits", "exact")  # exact: the storage ends with the tensor, for AddressSanitizer
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Plan:
    """Where a tensor's elements are, in elements of its buffer. Everything outside is the sentinel."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    shift: int = 0

    @property
    def extent(self) -> int:
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))


def _strides(
    shape: tuple[int, ...],
    order: list[int],
    steps: dict[int, int] | None = None,
    pads: dict[int, int] | None = None,
    expanded: tuple[int, ...] = (),
) -> tuple[int, ...]:
    """Strides with `order` from the outermost dimension to the innermost.

    Args:
        shape: The sizes.
        order: The dimensions in the order of memory.
        steps: Dimensions of which only every n-th element is taken.
        pads: Dimensions that are followed by so many elements of a larger tensor.
        expanded: Dimensions with stride 0.
    """
    strides, run = [0] * len(shape), 1
    for d in reversed(order):
        if d in expanded:
            continue
        step = (steps or {}).get(d, 1)
        strides[d] = run * step
        run *= shape[d] * step + (pads or {}).get(d, 0)
    return tuple(strides)


def _channel_last(shape: tuple[int, ...], channel: int) -> list[int]:
    return [d for d in range(len(shape)) if d != channel] + [channel]


def _overlapping(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Windows that share half of their elements, as in Tensor.unfold."""
    dense = list(_strides(shape, list(range(len(shape)))))
    dense[0] = max(dense[0] // 2, 1)
    return tuple(dense)


def _shuffled(rng: Random, n: int) -> list[int]:
    return rng.sample(range(n), n)


def _ones_anywhere(rng: Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A dimension of size 1 may have any stride."""
    dense = _strides(shape, list(range(len(shape))))
    return tuple(rng.choice((0, 1, 7, 12345)) if n == 1 else s for n, s in zip(shape, dense, strict=True))


_Strided = Callable[[Random, tuple[int, ...], int], tuple[int, ...]]
# By name: strides of (random numbers, shape, channel).
LAYOUTS: dict[str, _Strided] = {
    "contiguous": lambda r, s, c: _strides(s, list(range(len(s)))),
    "channels_last": lambda r, s, c: _strides(s, _channel_last(s, c)),
    "batch_slice": lambda r, s, c: _strides(s, list(range(len(s))), steps={0: 2}),
    "batch_columns": lambda r, s, c: _strides(s, list(range(len(s))), pads={min(1, len(s) - 1): 3}),
    "channel_slice": lambda r, s, c: _strides(s, list(range(len(s))), pads={c: r.choice((1, 3, 16))}),
    "channels_last_slice": lambda r, s, c: _strides(s, _channel_last(s, c), pads={c: r.choice((1, 5, 32))}),
    "last_slice": lambda r, s, c: _strides(s, list(range(len(s))), pads={len(s) - 1: 3}),
    "last_step": lambda r, s, c: _strides(s, list(range(len(s))), steps={len(s) - 1: 2}),
    "channel_step": lambda r, s, c: _strides(s, _channel_last(s, c), steps={c: 2}),
    "every_step": lambda r, s, c: _strides(s, list(range(len(s))), steps=dict.fromkeys(range(len(s)), 2)),
    "reversed": lambda r, s, c: _strides(s, list(reversed(range(len(s))))),
    "any_order": lambda r, s, c: _strides(s, _shuffled(r, len(s))),
    "any_order_slice": lambda r, s, c: _strides(s, _shuffled(r, len(s)), pads={r.randrange(len(s)): 2}),
    "ones_anywhere": lambda r, s, c: _ones_anywhere(r, s),
    "expanded_first": lambda r, s, c: _strides(s, list(range(len(s))), expanded=(0,)),
    "expanded_channel": lambda r, s, c: _strides(s, list(range(len(s))), expanded=(c,)),
    "expanded_last": lambda r, s, c: _strides(s, list(range(len(s))), expanded=(len(s) - 1,)),
    "expanded_all": lambda r, s, c: (0,) * len(s),
    "overlapping": lambda r, s, c: _overlapping(s),
}
# Several indices may mean one element: such a tensor cannot be written.
REPEATING = ("expanded_first", "expanded_channel", "expanded_last", "expanded_all", "overlapping")
# A kernel can walk these where they are, whatever the shape.
ALWAYS_WALKED = ("contiguous", "channels_last", "ones_anywhere")


def plan(layout: str, shape: tuple[int, ...], channel: int, rng: Random) -> Plan:
    """A layout of that name. One tensor in three is not aligned."""
    shift = rng.choice((0, 0, 0, 0, 1, rng.randrange(16)))
    return Plan(shape, LAYOUTS[layout](rng, shape, channel % len(shape)), shift)


@dataclass
class _Zone:
    name: str
    buffer: Tensor
    before: Tensor  # as integers
    own: Tensor  # which elements are the tensor's
    writable: bool


def _bits(x: Tensor) -> Tensor:
    return x.view(_INTEGERS[x.element_size()])


@dataclass
class Memory:
    """The buffers of one case, and what they held when they were made."""

    sentinel: str = "nan"
    zones: list[_Zone] = field(default_factory=list)

    def place(
        self, name: str, where: Plan, values: np.ndarray, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A tensor whose elements are taken from `values`, in the order of memory.

        Args:
            name: What a message calls it.
            where: Its shape, strides and alignment.
            values: At least `where.extent` numbers.
            dtype: The tensor's dtype.
            device: Where it is stored.
        """
        out, buffer, own = self._reserve(where, dtype)
        inside = torch.from_numpy(values[: int(own.sum())]).to(dtype)
        buffer[own] = inside
        return self._keep(name, out, buffer, own, device, writable=False)

    def copy(self, name: str, values: Tensor, where: Plan, writable: bool = True) -> Tensor:
        """Equal to `values`, stored as `where` says. Its own elements may be written, or not."""
        out, buffer, own = self._reserve(where, values.dtype)
        out.copy_(values.detach())
        return self._keep(name, out, buffer, own, values.device, writable)

    def empty(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Memory for a result: what stands in for torch.empty_strided."""
        out, buffer, own = self._reserve(Plan(shape, strides), dtype)
        return self._keep("a result", out, buffer, own, device, writable=True)

    def _reserve(self, where: Plan, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        guard = 0 if self.sentinel == "exact" else GUARD
        start = guard + where.shift
        extent = where.extent if math.prod(where.shape) else 0
        size = start + extent + guard
        buffer = torch.empty(size, dtype=dtype, device="cpu")
        if self.sentinel == "bits" or not dtype.is_floating_point:
            buffer.view(torch.uint8).fill_(0x7B)  # 6e4 in fp16, 1e36 in bf16 and fp32, 1e286 in fp64
        else:
            buffer.fill_(math.nan)
        own = torch.zeros(size, dtype=torch.bool, device="cpu")
        if extent:
            torch.as_strided(own, where.shape, where.strides, start).fill_(True)
        return _tensor_on(buffer, where.shape, where.strides, start), buffer, own

    def _keep(
        self, name: str, out: Tensor, buffer: Tensor, own: Tensor, device: torch.device, writable: bool
    ) -> Tensor:
        if device.type != "cpu":
            start, buffer = out.storage_offset(), buffer.to(device)
            out = _tensor_on(buffer, tuple(out.shape), out.stride(), start)
        self.zones.append(_Zone(name, buffer, _bits(buffer).clone(), own.to(device), writable))
        return out

    def check(self, unwritten: str = "") -> None:
        """Every element outside the tensors is bitwise what it was, as is every tensor that is not writable.

        Args:
            unwritten: The name of a writable tensor that had to stay as it was all the same.
        """
        for zone in list(self.zones):
            changed = _bits(zone.buffer) != zone.before
            if not changed.any():
                continue
            outside = (changed & ~zone.own).nonzero().flatten().tolist()
            first = int(zone.own.nonzero()[0]) if bool(zone.own.any()) else 0
            places = [i - first for i in outside[:8]]
            assert not outside, f"{zone.name}: elements beside it were written, at {places} from its first"
            allowed = zone.writable and zone.name != unwritten
            assert allowed, f"{zone.name} was written"


def _tensor_on(buffer: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], start: int) -> Tensor:
    """A tensor of its own in this memory: for autograd it is no view."""
    out = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
    return out.set_(buffer.untyped_storage(), start, shape, strides)
