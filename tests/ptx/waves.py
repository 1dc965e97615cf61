"""Runs a kernel: some blocks at a time, all their threads at once in numpy's arrays.

Threads that are at the same instruction are a front. The front at the lowest instruction goes on until it meets
another, divides at a branch, or waits: for its warp, for its block, or for the grid before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from decode import Step
from errors import Fault
from memory import LOCAL, PARAMETERS, SHARED, WINDOW, GlobalMemory, OwnMemory
from program import Kernel, Register

Array = Any
WARP = 32
MOST_STEPS = 1_000_000


@dataclass
class Launch:
    """A kernel, and what it is launched with."""

    kernel: Kernel
    steps: list[Step]
    title: str  # in messages
    grid: tuple[int, int, int]
    threads: int  # of a block, which has one dimension
    shared_bytes: int  # asked for beside those of fixed size
    parameters: bytes
    overlap: bool = False  # it may start before the launch before it has ended
    constants: dict[str, int] = field(default_factory=dict)  # where its arrays in global memory are

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def block(self, number: int) -> tuple[int, int, int]:
        x, y, _ = self.grid
        return number % x, number // x % y, number // (x * y)


class Wave:
    """Some blocks of a launch, which run together.

    Attributes:
        lanes: Threads in all.
        threads: Of a block.
        registers: By number, one value for each lane; None: written by no thread.
        partly_written: By number, which lanes have written a register, where these are not all.
        mask: The lanes that are active.
    """

    def __init__(self, launch: Launch, blocks: list[int], memory: GlobalMemory, draw: random.Random) -> None:
        if launch.threads % WARP:
            raise Fault(f"{launch.title}: {launch.threads} threads are no whole warps")
        self.launch, self.blocks, self.memory, self.draw = launch, blocks, memory, draw
        self.threads = launch.threads
        self.lanes = len(blocks) * self.threads
        self.registers: list[Array] = [None] * len(launch.kernel.registers)
        self.partly_written: dict[int, Array] = {}
        self._special = self._specials()
        shared = launch.kernel.shared_bytes + launch.shared_bytes
        self.shared = OwnMemory(len(blocks), shared, SHARED, "shared")
        self.local = OwnMemory(self.lanes, launch.kernel.local_bytes, LOCAL, "local")
        self._block_of, self._warp_of = np.arange(self.lanes) // self.threads, np.arange(self.lanes) // WARP
        self.mask = np.ones(self.lanes, bool)
        self._full = True
        self.fronts: dict[int, Array] = {0: self.mask}
        self.parked: dict[int, Array] = {}  # at a barrier or a shuffle
        self.held: dict[int, Array] = {}  # until the grid before has ended
        self.step: Step | None = None
        self._left = MOST_STEPS

    def _specials(self) -> dict[str, Array]:
        thread = np.tile(np.arange(self.threads, dtype=np.uint32), len(self.blocks))
        places = np.array([self.launch.block(b) for b in self.blocks], np.uint32)
        out = {"%laneid": thread % np.uint32(WARP), "%warpid": thread // np.uint32(WARP)}
        for i, axis in enumerate("xyz"):
            out[f"%tid.{axis}"] = thread if i == 0 else thread * np.uint32(0)
            out[f"%ntid.{axis}"] = np.uint32(self.threads if i == 0 else 1)
            out[f"%ctaid.{axis}"] = np.repeat(places[:, i], self.threads)
            out[f"%nctaid.{axis}"] = np.uint32(self.launch.grid[i])
        return out

    # ---- registers and symbols

    def special(self, name: str) -> Array:
        if name not in self._special:
            raise Fault(f"the interpreter does not have {name}")
        return self._special[name]

    def symbol(self, name: str) -> int:
        kernel = self.launch.kernel
        for parameter, offset, _ in kernel.parameters:
            if parameter == name:
                return PARAMETERS + offset
        if name in kernel.shared:
            return SHARED + kernel.shared[name]
        if name in kernel.local:
            return LOCAL + kernel.local[name]
        return self.launch.constants[name]

    def check_written(self, register: Register) -> None:
        written = self.partly_written.get(register.number)
        if self.registers[register.number] is None:
            written = np.zeros(self.lanes, bool)
            self.registers[register.number] = np.zeros(
                self.lanes, np.bool_ if register.bits == 1 else f"u{register.bits // 8}"
            )
            self.partly_written[register.number] = written
        if written is not None and (self.mask & ~written).any():
            raise Fault(f"{register.name} is read before it is written", self.first(self.mask & ~written))

    def put(self, number: int, value: Array) -> None:
        """Into the active lanes of a register."""
        if value.ndim == 0:
            value = np.full(self.lanes, value)
        if self._full:
            self.registers[number] = value
            self.partly_written.pop(number, None)
            return
        old = self.registers[number]
        if old is None:
            self.registers[number] = value
            self.partly_written[number] = self.mask
            return
        self.registers[number] = np.where(self.mask, value, old)
        written = self.partly_written.get(number)
        if written is not None:
            written = written | self.mask
            if written.all():
                del self.partly_written[number]
            else:
                self.partly_written[number] = written

    # ---- lanes

    def first(self, which: Array) -> int:
        return int(np.argmax(which))

    @property
    def active(self) -> Array:
        return slice(None) if self._full else np.flatnonzero(self.mask)

    def _set(self, mask: Array) -> None:
        self.mask, self._full = mask, bool(mask.all())

    def shuffled(self) -> list[int]:
        lanes = [int(i) for i in np.flatnonzero(self.mask)]
        self.draw.shuffle(lanes)
        return lanes

    @contextmanager
    def only(self, lanes: Array) -> Iterator[None]:
        """One lane, or those of a mask, active for a while."""
        before = self.mask
        mask = np.zeros(self.lanes, bool)
        mask[lanes] = True
        self._set(mask)
        yield
        self._set(before)

    def spread(self, word: Array) -> Array:
        """Values of the active lanes, or one for all, as an array of all lanes."""
        if self._full or word.ndim == 0:
            return word
        out = np.zeros(self.lanes, word.dtype)
        out[self.mask] = word
        return out

    # ---- memory

    def load(self, space: str, address: Array, size: int, count: int, atomic: bool = False) -> list[Array]:
        """`count` words of `size` bytes for each active lane."""
        if space == "param":
            return self._load_parameters(address, size, count)
        address, active, space = self._resolved(space, address)
        with self._lane_of(active):
            if space == "global":
                return self.memory.load(address, size, count)
            own = self.shared if space == "shared" else self.local
            owner = (self._block_of if space == "shared" else np.arange(self.lanes))[active]
            return own.load(address, owner, self._warp_of[active], size, count, atomic)

    def store(self, space: str, address: Array, values: list[Array], atomic: bool = False) -> None:
        address, active, space = self._resolved(space, address)
        mine = [np.broadcast_to(v, (self.lanes,))[active] for v in values]
        with self._lane_of(active):
            if space == "global":
                self.memory.store(address, mine)
                return
            own = self.shared if space == "shared" else self.local
            owner = (self._block_of if space == "shared" else np.arange(self.lanes))[active]
            own.store(address, owner, self._warp_of[active], mine, atomic)

    def prefetch(self, address: Array) -> None:
        address, active, _ = self._resolved("global", address)
        with self._lane_of(active):
            self.memory.check_prefetch(address)

    def _resolved(self, space: str, address: Array) -> tuple[Array, Array, str]:
        """The active lanes' addresses, these lanes, and the space that a generic address is in."""
        active = self.active
        address = np.broadcast_to(address, (self.lanes,))[active]
        windows = {"shared": SHARED, "param": PARAMETERS, "local": LOCAL}
        if space == "":
            found = {
                name for name, at in windows.items() if ((address >= at) & (address < at + WINDOW)).any()
            }
            if len(found) > 1:
                raise Fault("a generic access of several spaces")
            space = found.pop() if found else "global"
        return address, active, "global" if space == "const" else space

    @contextmanager
    def _lane_of(self, active: Array) -> Iterator[None]:
        """A fault in an access counts the active lanes only."""
        try:
            yield
        except Fault as fault:
            if fault.lane is not None and not isinstance(active, slice):
                fault.lane = int(active[fault.lane])
            raise

    def _load_parameters(self, address: Array, size: int, count: int) -> list[Array]:
        data = np.frombuffer(self.launch.parameters, np.uint8)
        at = np.asarray(address)[... if np.ndim(address) == 0 else self.active].astype(np.int64) - PARAMETERS
        if ((at < 0) | (at + size * count > data.size) | (at % size != 0)).any():
            raise Fault(f"a parameter out of bounds or misaligned: byte {np.ravel(at)[0]} of {data.size}")
        raw = data[at[..., None] + np.arange(size * count)]
        return [
            np.ascontiguousarray(raw[..., i * size : (i + 1) * size]).view(f"u{size}")[..., 0]
            for i in range(count)
        ]

    def pass_barrier(self) -> None:
        self.shared.phase[np.unique(self._block_of[self.mask])] += 1

    # ---- running

    def run(self, hold: bool = False) -> None:
        """To the end, or with `hold` as far as the wait for the grid before.

        Raises:
            Fault: With the kernel, the block, the thread and the instruction.
        """
        try:
            with np.errstate(all="ignore"):
                if not hold:
                    for at, mask in self.held.items():
                        self._add(at, mask)
                    self.held = {}
                while self.fronts:
                    at = min(self.fronts)
                    self._advance(at, self.fronts.pop(at), hold)
                if not hold:
                    self._check_none_waits()
        except Fault as fault:
            raise Fault(self._place(fault)) from None

    def _place(self, fault: Fault) -> str:
        where = f"{self.launch.title}: {fault}"
        if fault.lane is None:
            where += f"; block {self._names(self.mask)}"
        else:
            block = self.launch.block(self.blocks[fault.lane // self.threads])
            where += f"; block {block}, thread {fault.lane % self.threads}"
        return where if self.step is None else f"{where}; {self.step.instruction}"

    def _names(self, mask: Array) -> str:
        numbers = np.unique(self._block_of[mask])
        return ", ".join(str(self.launch.block(self.blocks[n])) for n in numbers[:3])

    def _add(self, at: int, mask: Array) -> None:
        if mask.any():
            self.fronts[at] = self.fronts[at] | mask if at in self.fronts else mask

    def _advance(self, at: int, mask: Array, hold: bool) -> None:
        """The front at `at`, until it divides, waits, ends or comes to where another front is."""
        steps = self.launch.steps
        self._set(mask)
        end = min(self.fronts, default=len(steps))
        while at < end:
            step = self.step = steps[at]
            self._left -= 1
            if self._left < 0:
                raise Fault(f"no end after {MOST_STEPS} steps")
            chosen = mask if step.guard is None else mask & step.guard(self)
            if step.kind == "plain":
                if chosen is mask:
                    step.run(self)  # type: ignore[misc]
                elif chosen.any():
                    self._set(chosen)
                    step.run(self)  # type: ignore[misc]
                    self._set(mask)
                at += 1
                continue
            others = mask & ~chosen
            if step.kind == "branch":
                self._branch(step, chosen)
            elif step.kind == "wait" and hold:
                self.held[at + 1] = self.held.get(at + 1, False) | chosen
            elif step.kind == "wait":
                others = mask
            elif step.kind in ("warp", "block"):
                others = others | self._meet(step, at, chosen)
            if not others.any():
                return
            mask = others
            self._set(mask)
            end = min(self.fronts, default=len(steps))
            at += 1
        self._add(at, mask)

    def _branch(self, step: Step, chosen: Array) -> None:
        if step.run is None:
            self._add(step.targets[0], chosen)
            return
        which = np.broadcast_to(step.run(self), (self.lanes,))
        if (chosen & (which >= len(step.targets))).any():
            raise Fault("a branch beyond its targets", self.first(chosen & (which >= len(step.targets))))
        for i, target in enumerate(step.targets):
            self._add(target, chosen & (which == i))

    def _meet(self, step: Step, at: int, arrived: Array) -> Array:
        """The threads whose warp or block is complete, and who go on. The others wait here."""
        there = arrived | self.parked.pop(at, False)
        if step.kind == "block":
            ready = np.repeat(there.reshape(-1, self.threads).all(1), self.threads) & there
        else:
            ready = self._whole_warps(step, there)
        if (there & ~ready).any():
            self.parked[at] = there & ~ready
        if ready.any():
            self._set(ready)
            assert step.run is not None
            step.run(self)
        return ready

    def _whole_warps(self, step: Step, there: Array) -> Array:
        assert step.members is not None
        self._set(there)
        members = np.broadcast_to(step.members(self), (self.lanes,)).reshape(-1, WARP)
        if there.all() and (members == np.uint32(0xFFFFFFFF)).all():
            return there
        present = there.reshape(-1, WARP)
        named = (members[:, :, None] >> np.arange(WARP, dtype=np.uint32)) & np.uint32(1) == 1  # by whom, whom
        outside = present & ~np.einsum("wii->wi", named)
        if outside.any():
            raise Fault("a thread that does not name itself", self.first(outside.reshape(-1)))
        missing = (present[:, :, None] & named & ~present[:, None, :]).any((1, 2))
        return np.repeat(~missing, WARP) & there

    def _check_none_waits(self) -> None:
        for at, mask in sorted(self.parked.items()):
            self.step = self.launch.steps[at]
            self.mask = mask
            block = int(np.argmax(mask)) // self.threads
            here = mask.reshape(-1, self.threads)[block]
            if self.step.kind == "block":
                raise Fault(f"only {int(here.sum())} of {self.threads} threads come to a barrier")
            warp = int(np.argmax(mask)) // WARP
            count = int(mask.reshape(-1, WARP)[warp].sum())
            raise Fault(f"only {count} of a warp's threads come to what it does together", self.first(mask))
