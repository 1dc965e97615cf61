"""Comparisons, selection, moves and conversions between types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from arithmetic import flushed, from_bf16, to_bf16, to_f16
from decode import (
    BITS,
    FLOATS,
    INTEGERS,
    UNSIGNED,
    Run,
    applied,
    flush,
    instruction,
    numpy_type,
    parts,
    reader,
    writer,
)
from errors import UnknownInstruction
from program import TYPES, Instruction, Pair, Vector
from waves import Wave

Array = Any

# ---- comparisons

_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _comparison(name: str, floating: bool) -> Callable[[Array, Array], Array]:
    """Of floating-point numbers: false where one is NaN, and true there with a u behind its name."""
    if not floating:
        return _COMPARE[name]

    def unordered(a: Array, b: Array) -> Array:
        return np.isnan(a) | np.isnan(b)

    if name == "nan":
        return unordered
    if name == "num":
        return lambda a, b: ~unordered(a, b)
    if len(name) == 3:
        return lambda a, b: _COMPARE[name[:2]](a, b) | unordered(a, b)
    return lambda a, b: _COMPARE[name](a, b) & ~unordered(a, b)


@instruction(
    "setp",
    f"{INTEGERS} {BITS} {FLOATS}",
    "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu nan num and or xor ftz",
)
def _compare(ins: Instruction) -> Run:
    kind = ins.types[0]
    compare = _flush_inputs(ins, _comparison(ins.modifiers[0], kind[0] == "f"))
    a, b = (reader(o, kind) for o in ins.operands[1:3])
    combine = next((m for m in ins.modifiers[1:] if m in ("and", "or", "xor")), None)
    other = None if combine is None else reader(ins.operands[3], "pred")
    result = ins.operands[0]
    pair = (result.first, result.second) if isinstance(result, Pair) else (result,)
    writes = [writer(o) for o in pair]
    functions = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}

    def run(wave: Wave) -> None:
        truth = np.asarray(compare(a(wave), b(wave)))
        values = [truth, ~truth][: len(writes)]
        if combine is not None and other is not None:
            values = [functions[combine](v, other(wave)) for v in values]
        for write, value in zip(writes, values, strict=True):
            write(wave, value)

    return run


@instruction("setp", "bf16 bf16x2", "eq ne lt le gt ge equ neu ltu leu gtu geu nan num")
def _compare_bf16(ins: Instruction) -> Run:
    """Of two pairs: the first predicate of the lower halves, the second of the upper ones."""
    compare = _comparison(ins.modifiers[0], True)
    paired = ins.types[0] == "bf16x2"
    a, b = (reader(o, "b32" if paired else "b16") for o in ins.operands[1:3])
    result = ins.operands[0]
    if isinstance(result, Pair) != paired:
        raise UnknownInstruction("a predicate for each half")
    writes = [writer(o) for o in ((result.first, result.second) if isinstance(result, Pair) else (result,))]

    def run(wave: Wave) -> None:
        x, y = a(wave), b(wave)
        for i, write in enumerate(writes):
            write(
                wave,
                np.asarray(
                    compare(*(from_bf16(z >> z.dtype.type(16 * i) & z.dtype.type(0xFFFF)) for z in (x, y)))
                ),
            )

    return run


def _flush_inputs(
    ins: Instruction, compare: Callable[[Array, Array], Array]
) -> Callable[[Array, Array], Array]:
    if "ftz" not in ins.modifiers:
        return compare
    return lambda a, b: compare(flushed(a), flushed(b))


@instruction("selp", f"{INTEGERS} {BITS} {FLOATS}")
def _select(ins: Instruction) -> Run:
    kind = ins.types[0]
    return applied(ins, lambda a, b, p: np.where(p, a, b), [kind, kind, "pred"])


# ---- moves and conversions


@instruction("mov", f"{INTEGERS} {BITS} {FLOATS} pred")
def _move(ins: Instruction) -> Run:
    result, source = ins.operands
    kind = ins.types[0]
    if isinstance(result, Vector):
        return _unpack(result, reader(source, f"b{TYPES[kind]}"), TYPES[kind])
    if isinstance(source, Vector):
        return _pack(ins, source, TYPES[kind])
    if kind == "pred":
        return applied(ins, lambda x: x, ["pred"])
    return applied(ins, lambda x: x, [f"b{TYPES[kind]}"])


def _unpack(result: Vector, read: Callable[[Wave], Array], bits: int) -> Run:
    each = bits // len(result.parts)
    writes = [writer(o) for o in result.parts]

    def run(wave: Wave) -> None:
        value = read(wave)
        for i, write in enumerate(writes):
            write(wave, (value >> value.dtype.type(each * i)).astype(UNSIGNED[each]))

    return run


def _pack(ins: Instruction, source: Vector, bits: int) -> Run:
    each = bits // len(source.parts)
    reads = [reader(o, f"b{each}") for o in parts(source)]
    write, whole = writer(ins.operands[0]), UNSIGNED[bits]

    def run(wave: Wave) -> None:
        value = whole(0)
        for i, read in enumerate(reads):
            value = value | (read(wave).astype(whole) << whole(each * i))
        write(wave, value)

    return run


@instruction("cvta", "u32 u64", "to global shared local const param")
def _same_address(ins: Instruction) -> Run:
    """An address says its space here, and is the same with and without it."""
    return applied(ins, lambda x: x, [ins.types[0]])


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt", f"u8 s8 b8 {INTEGERS} {FLOATS} f16 bf16", "rn rni rzi rmi rpi ftz")
def _convert(ins: Instruction) -> Run:
    to, source = ins.types
    target = numpy_type(to)
    from_float, to_float = (k[0] == "f" or k == "bf16" for k in (source, to))
    rounding = next((_ROUND[m] for m in ins.modifiers if m in _ROUND), None)
    narrowing = {"f16": to_f16, "bf16": to_bf16}.get(to)
    if from_float and not to_float and rounding is None:
        raise UnknownInstruction("a conversion to an integer without a rounding")
    if (source, to) == ("f64", "bf16") or (not from_float and narrowing):
        raise UnknownInstruction("a conversion that would round twice")

    def convert(x: Array) -> Array:
        if source == "bf16":
            x = from_bf16(x)
        if rounding is not None:
            x = rounding(x)
        if narrowing is not None:
            return narrowing(x)
        if to_float or not from_float:
            return x.astype(target)
        limits = np.iinfo(target)
        # the greatest floating-point number that an integer of 64 bits reaches is less than its own greatest
        inside = np.where(
            np.isnan(x), 0, np.clip(x, float(limits.min), np.nextafter(float(limits.max) + 1, 0))
        )
        return np.where(x >= float(limits.max) + 1, limits.max, inside.astype(target)).astype(target)

    return applied(ins, flush(ins, convert), [source])


@instruction("cvt", "f32", "sat ftz")
def _saturate(ins: Instruction) -> Run:
    """To 0 at least and 1 at most; NaN becomes 0."""
    zero, one = np.float32(0), np.float32(1)
    return applied(ins, flush(ins, lambda x: np.where(x > 0, np.minimum(x, one), zero)), ["f32"])


@instruction("cvt", "f16x2 bf16x2 f32", "rn")
def _convert_pair(ins: Instruction) -> Run:
    """The first of the two goes to the upper half."""
    narrow = to_bf16 if ins.types[0] == "bf16x2" else to_f16

    def convert(high: Array, low: Array) -> Array:
        return (narrow(high).astype(np.uint32) << np.uint32(16)) | narrow(low).astype(np.uint32)

    return applied(ins, convert, ["f32", "f32"])
