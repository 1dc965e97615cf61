"""Loads, stores, atomics, prefetches: what instructions ask of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from decode import BITS, INTEGERS, Run, addresses, instruction, numpy_type, parts, reader, writer
from errors import UnknownInstruction
from program import TYPES, Instruction
from waves import Wave

Array = Any
_SPACES = ("global", "shared", "shared::cta", "local", "param", "const")
_SCOPES = "cta cluster gpu sys"
_ORDERS = "relaxed acquire release acq_rel weak volatile"
_CACHES = (
    "ca cg cs lu cv wb wt nc L1::evict_normal L1::evict_unchanged L1::evict_first L1::evict_last L1::no_allocate "
    "L2::64B L2::128B L2::256B"
)
_ANY = f"{' '.join(_SPACES)} {_SCOPES} {_ORDERS} {_CACHES} v2 v4"
_MEMORY_TYPES = f"b8 u8 s8 {INTEGERS} {BITS} f32 f64"


def _space(ins: Instruction) -> str:
    """ "" for a generic address."""
    return next((m.split("::")[0] for m in ins.modifiers if m in _SPACES), "")


def _count(ins: Instruction, operands: int) -> int:
    count = {"v2": 2, "v4": 4}.get(next((m for m in ins.modifiers if m in ("v2", "v4")), ""), 1)
    if count != operands:
        raise UnknownInstruction(f"{operands} registers for {count} words")
    return count


@instruction("ld", _MEMORY_TYPES, _ANY)
def _load(ins: Instruction) -> Run:
    result = parts(ins.operands[0])
    count, size = _count(ins, len(result)), TYPES[ins.types[0]] // 8
    writes, address, space = [writer(o) for o in result], addresses(ins.operands[1]), _space(ins)
    dtype = numpy_type(ins.types[0])

    def run(wave: Wave) -> None:
        words = wave.load(space, address(wave), size, count)
        for write, word in zip(writes, words, strict=True):
            write(wave, wave.spread(word).view(dtype))

    return run


@instruction("st", _MEMORY_TYPES, _ANY)
def _store(ins: Instruction) -> Run:
    source = parts(ins.operands[1])
    _count(ins, len(source))
    kind = f"b{TYPES[ins.types[0]]}"
    reads, address, space = [reader(o, kind) for o in source], addresses(ins.operands[0]), _space(ins)
    return lambda wave: wave.store(space, address(wave), [read(wave) for read in reads])


_UPDATES: dict[str, Callable[..., Array]] = {
    "add": lambda old, value: old + value,
    "exch": lambda old, value: value,
    "cas": lambda old, compare, value: value if old == compare else old,
    "min": min, "max": max,
    "and": lambda old, value: old & value, "or": lambda old, value: old | value, "xor": lambda old, value: old ^ value,
    "inc": lambda old, value: old * 0 if old >= value else old + old.dtype.type(1),
}  # fmt: skip


@instruction(
    "atom red",
    f"{INTEGERS} {BITS} f32 f64",
    f"global shared shared::cta {_SCOPES} {_ORDERS} {' '.join(_UPDATES)}",
)
def _atomic(ins: Instruction) -> Run:
    """Of the threads that are active each in turn, in an order drawn at random."""
    kind = ins.types[0]
    update = next(_UPDATES[m] for m in ins.modifiers if m in _UPDATES)
    operands = list(ins.operands)
    write = writer(operands.pop(0)) if ins.head == "atom" else None
    address, space = addresses(operands.pop(0)), _space(ins)
    inputs = [reader(o, kind) for o in operands]

    def run(wave: Wave) -> None:
        where = np.broadcast_to(address(wave), (wave.lanes,))
        values = [np.broadcast_to(read(wave), (wave.lanes,)) for read in inputs]
        before = np.zeros(wave.lanes, numpy_type(kind))
        for lane in wave.shuffled():
            with wave.only(lane):
                (word,) = wave.load(space, where, before.itemsize, 1, atomic=True)
                before[lane] = word.view(before.dtype)[0]
                new = np.asarray(update(before[lane], *(v[lane] for v in values)), before.dtype)
                wave.store(space, where, [np.full(wave.lanes, new).view(f"u{before.itemsize}")], atomic=True)
        if write is not None:
            write(wave, before)

    return run


@instruction("prefetch", modifiers="global L1 L2 L2::evict_last L2::evict_normal")
def _prefetch(ins: Instruction) -> Run:
    address = addresses(ins.operands[0])
    return lambda wave: wave.prefetch(address(wave))


@instruction("membar fence", modifiers=f"{_SCOPES} gl acq_rel sc release acquire proxy alias async")
def _fence(ins: Instruction) -> Run:
    """Accesses happen in the program's order here: there is nothing to do."""
    return lambda wave: None
