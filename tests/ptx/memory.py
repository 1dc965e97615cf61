"""Memory that a kernel reaches: which bytes exist, which may be written, which hold something.

Global memory is this process's own: the regions are tensors, at their addresses. Shared memory belongs to a block,
local memory to a thread, and both are numbered from a fixed address each, so that an address says its space.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from errors import Fault
from torch import Tensor

Array = Any

SHARED, PARAMETERS, LOCAL = 0x0100_0000, 0x0200_0000, 0x0300_0000
WINDOW = 0x0100_0000
# What is known of a byte.
EXISTS, HOLDS, WRITABLE = 1, 2, 4
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def _repeated(flags: int, size: int) -> Any:
    return _UNSIGNED[size](int.from_bytes(bytes([flags]) * size, "little"))


def check_aligned(address: Array, size: int, what: str) -> None:
    wrong = np.flatnonzero(address % np.uint64(size))
    if wrong.size:
        raise Fault(f"misaligned {what} of {size} bytes at {hex(int(address[wrong[0]]))}", lane=int(wrong[0]))


class Region:
    """Neighbouring bytes of this process. It begins and ends on 16 bytes, so that whole words of it can be seen."""

    def __init__(self, start: int, end: int, name: str) -> None:
        self.start, self.end = start // 16 * 16, (end + 15) // 16 * 16
        self.name = name
        size = self.end - self.start
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.start))
        self.flags = np.zeros(size, np.uint8)

    def words(self, size: int) -> tuple[Array, Array]:
        """Its content and its flags, in words of so many bytes."""
        return self.bytes.view(_UNSIGNED[size]), self.flags.view(_UNSIGNED[size])


class GlobalMemory:
    """Tensors and arrays that kernels may reach; everything else is out of bounds."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._kept: list[object] = []  # arrays of the program's own

    # -- what there is

    def add(self, x: Tensor, name: str, holds: bool, writable: bool) -> None:
        """The elements of x. What lies between them does not exist."""
        if x.numel() == 0:
            return
        size = x.element_size()
        offsets = np.zeros(1, np.int64)
        for extent, stride in zip(x.shape, x.stride(), strict=True):
            offsets = (offsets[:, None] + np.arange(extent) * stride * size).reshape(-1)
        start = x.data_ptr()
        region = self._region(start, start + int(offsets.max()) + size, name)
        flags = EXISTS | (HOLDS if holds else 0) | (WRITABLE if writable else 0)
        for byte in range(size):
            region.flags[start - region.start + offsets + byte] |= flags
        self._kept.append(x)

    def forget(self, x: Tensor) -> None:
        """The elements of x hold nothing any more: reading one is a fault."""
        region = next(r for r in self.regions if r.start <= x.data_ptr() < r.end)
        offsets = np.zeros(1, np.int64)
        for extent, stride in zip(x.shape, x.stride(), strict=True):
            offsets = (offsets[:, None] + np.arange(extent) * stride * x.element_size()).reshape(-1)
        for byte in range(x.element_size()):
            region.flags[x.data_ptr() - region.start + offsets + byte] &= ~np.uint8(HOLDS)

    def add_constant(self, data: bytes, name: str) -> int:
        """An array of the program's own; where it is."""
        array = np.frombuffer(bytearray(data).ljust(_up(len(data)) + 16, b"\0"), np.uint8)
        self._kept.append(array)
        start = _up(array.ctypes.data)
        array[start - array.ctypes.data :][: len(data)] = np.frombuffer(data, np.uint8)
        region = self._region(start, start + len(data), name)
        region.flags[: len(data)] |= EXISTS | HOLDS
        return start

    def _region(self, start: int, end: int, name: str) -> Region:
        """One that has these bytes, in place of those that share some of them."""
        new = Region(start, end, name)
        shared = [r for r in self.regions if r.start < new.end and new.start < r.end]
        if shared:
            all_of_them = [new, *shared]
            names = list(dict.fromkeys(r.name for r in [*shared, new]))
            new = Region(
                min(r.start for r in all_of_them), max(r.end for r in all_of_them), " and ".join(names)
            )
            for r in shared:
                new.flags[r.start - new.start : r.end - new.start] |= r.flags
        self.regions = sorted((r for r in [*self.regions, new] if r not in shared), key=lambda r: r.start)
        return new

    def unwritten(self, x: Tensor) -> int:
        """How many elements of x hold nothing."""
        region = next(r for r in self.regions if r.start <= x.data_ptr() < r.end)
        holds = np.ones(x.numel(), bool)
        offsets = np.zeros(1, np.int64)
        for extent, stride in zip(x.shape, x.stride(), strict=True):
            offsets = (offsets[:, None] + np.arange(extent) * stride * x.element_size()).reshape(-1)
        for byte in range(x.element_size()):
            holds &= region.flags[x.data_ptr() - region.start + offsets + byte] & HOLDS != 0
        return int((~holds).sum())

    # -- accesses: addresses of the threads, `count` neighbouring words of `size` bytes each

    def _places(self, address: Array, total: int, what: str) -> list[tuple[Array, Region, Array]]:
        """(which threads, their region, offsets in it)."""
        check_aligned(address, total, what)
        starts = np.array([r.start for r in self.regions], np.uint64)
        which = np.searchsorted(starts, address, side="right") - 1
        out = []
        for number in np.unique(which):
            chosen = which == number
            region = self.regions[number] if number >= 0 else None
            inside = address[chosen] + np.uint64(total) <= np.uint64(region.end if region else 0)
            if region is None or not inside.all():
                lane = int(np.flatnonzero(chosen)[0 if region is None else np.argmin(inside)])
                raise Fault(f"{what} out of bounds{self._near(int(address[lane]))}", lane)
            out.append((chosen, region, (address[chosen] - np.uint64(region.start)).astype(np.int64)))
        return out

    def _near(self, address: int) -> str:
        """Where that is, seen from the nearest region."""
        if not self.regions:
            return f": {hex(address)}, and there is no memory"

        def distance(r: Region) -> int:
            return max(r.start - address, address - r.end + 1, 0)

        region = min(self.regions, key=distance)
        size = region.end - region.start
        return f": {hex(address)}, {address - region.start:+d} bytes from the start of {region.name} ({size} bytes)"

    def _check(
        self, flags: Array, want: int, size: int, what: str, region: Region, at: Array, lanes: Array
    ) -> None:
        needed = _repeated(want, size)
        bad = flags & needed != needed
        if not bad.any():
            return
        lane = int(np.argmax(bad))
        byte = int(at[lane])
        state = int(np.bitwise_and.reduce(region.flags[byte : byte + size]))
        if not state & EXISTS:
            kind = "out of bounds"
        else:
            kind = "of memory that was not written" if want & HOLDS else "to memory that may only be read"
        raise Fault(f"{what} {kind}: byte {byte} of {region.name}", int(np.flatnonzero(lanes)[lane]))

    def load(self, address: Array, size: int, count: int) -> list[Array]:
        out = [np.zeros(address.size, _UNSIGNED[size]) for _ in range(count)]
        for lanes, region, at in self._places(address, size * count, "load"):
            words, flags = region.words(size)
            for i in range(count):
                index = at // size + i
                self._check(flags[index], EXISTS | HOLDS, size, "load", region, index * size, lanes)
                out[i][lanes] = words[index]
        return out

    def store(self, address: Array, values: list[Array]) -> None:
        size = values[0].itemsize
        for lanes, region, at in self._places(address, size * len(values), "store"):
            words, flags = region.words(size)
            for i, value in enumerate(values):
                index = at // size + i
                self._check(flags[index], EXISTS | WRITABLE, size, "store", region, index * size, lanes)
                words[index] = value[lanes]
                flags[index] |= _repeated(HOLDS, size)

    def check_prefetch(self, address: Array) -> None:
        """Hardware ignores a prefetch of what does not exist; here it shows an address that is wrong."""
        for lane, a in enumerate(address):
            if not any(r.start <= int(a) < r.end for r in self.regions):
                raise Fault(f"prefetch out of bounds{self._near(int(a))}", lane)


def _up(n: int) -> int:
    return (n + 15) // 16 * 16


class OwnMemory:
    """Shared memory of blocks, or local memory of threads: `owners` pieces of `size` bytes, from one address on.

    Accesses of two warps to one byte without a barrier between them, one of them a store, are a fault: on a GPU their
    order is open. Threads of one warp are taken to run in step.
    """

    def __init__(self, owners: int, size: int, start: int, name: str) -> None:
        self.size, self.start, self.name = size, start, name
        total = owners * max(size, 1)
        self.bytes = np.zeros(total, np.uint8)
        self.holds = np.zeros(total, bool)
        self.phase = np.zeros(owners, np.int64)  # barriers that the owner has passed
        self._written_in, self._writer = np.full(total, -1, np.int64), np.full(total, -1, np.int64)
        self._read_in, self._reader = np.full(total, -1, np.int64), np.full(total, -1, np.int64)

    def _index(self, address: Array, owner: Array, total: int, what: str) -> Array:
        check_aligned(address, total, what)
        at = address.astype(np.int64) - self.start
        bad = (at < 0) | (at + total > self.size)
        if bad.any():
            lane = int(np.argmax(bad))
            raise Fault(f"{what} out of bounds: byte {at[lane]} of {self.size} in {self.name}", lane)
        return (owner * self.size + at)[:, None] + np.arange(total)

    def load(
        self, address: Array, owner: Array, warp: Array, size: int, count: int, atomic: bool
    ) -> list[Array]:
        what = f"{self.name} load"
        index = self._index(address, owner, size * count, what)
        if not self.holds[index].all():
            lane = int(np.argmin(self.holds[index].all(1)))
            raise Fault(f"{what} of memory that was not written: byte {address[lane] - self.start}", lane)
        if not atomic:
            self._note_load(what, index, self.phase[owner][:, None], warp)
        data = self.bytes[index]
        return [
            np.ascontiguousarray(data[:, i * size : (i + 1) * size]).view(_UNSIGNED[size])[:, 0]
            for i in range(count)
        ]

    def store(self, address: Array, owner: Array, warp: Array, values: list[Array], atomic: bool) -> None:
        size = values[0].itemsize
        what = f"{self.name} store"
        index = self._index(address, owner, size * len(values), what)
        data = np.concatenate([np.ascontiguousarray(v).view(np.uint8).reshape(-1, size) for v in values], 1)
        if not atomic:
            self._note_store(what, index, data, self.phase[owner][:, None], warp)
        self.bytes[index] = data
        self.holds[index] = True
        self._no_race(what, self.bytes[index] != data, "is stored to with another value by another thread")

    def _note_load(self, what: str, index: Array, phase: Array, warp: Array) -> None:
        by = np.broadcast_to(warp[:, None], index.shape)
        self._no_race(
            what,
            (self._written_in[index] == phase) & (self._writer[index] != by),
            "was stored to by another warp",
        )
        several = (self._read_in[index] == phase) & (self._reader[index] != by)
        self._read_in[index], self._reader[index] = phase, by
        self._reader[index[several | (self._reader[index] != by)]] = -2  # more than one warp

    def _note_store(self, what: str, index: Array, data: Array, phase: Array, warp: Array) -> None:
        """Several warps may store the same: compilers have threads repeat what others do."""
        by = np.broadcast_to(warp[:, None], index.shape)
        again = (self._written_in[index] == phase) & (self._writer[index] != by)
        self._no_race(what, again & (self.bytes[index] != data), "was stored to by another warp")
        self._no_race(
            what, (self._read_in[index] == phase) & (self._reader[index] != by), "was loaded by another warp"
        )
        self._written_in[index], self._writer[index] = phase, by
        self._writer[index[again | (self._writer[index] != by)]] = -2  # more than one warp

    def _no_race(self, what: str, bad: Array, action: str) -> None:
        if bad.any():
            lane = int(np.argmax(bad.any(1)))
            raise Fault(f"{what} that races: its memory {action} since the last barrier", lane)
