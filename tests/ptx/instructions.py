"""Arithmetic of integers, bits and floating-point numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from arithmetic import add32_to_zero, fma32, fma32_down, fma64, multiply_high, reciprocal_high
from decode import BITS, FLOATS, INTEGERS, Run, applied, flush, instruction, numpy_type, reader, writer
from errors import Fault
from program import TYPES, Instruction
from waves import Wave

Array = Any


# ---- integers


@instruction("add sub min max and or xor", INTEGERS + " " + BITS)
def _integers(ins: Instruction) -> Run:
    functions = {
        "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }  # fmt: skip
    return applied(ins, functions[ins.head], [ins.types[0]] * 2)


@instruction("and or xor", "pred")
def _predicates(ins: Instruction) -> Run:
    functions = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    return applied(ins, functions[ins.head], ["pred"] * 2)


@instruction("not abs neg", INTEGERS + " " + BITS)
def _one_integer(ins: Instruction) -> Run:
    functions = {"not": np.invert, "abs": np.abs, "neg": np.negative}
    return applied(ins, functions[ins.head], [ins.types[0]])


@instruction("not", "pred")
def _not(ins: Instruction) -> Run:
    return applied(ins, np.logical_not, ["pred"])


@instruction("mul mad", INTEGERS, "lo hi wide")
def _products(ins: Instruction) -> Run:
    (part,) = ins.modifiers
    kind = ins.types[0]
    wide = f"{kind[0]}{2 * TYPES[kind]}" if part == "wide" else kind

    def product(a: Array, b: Array) -> Array:
        if part == "hi":
            return multiply_high(a, b)
        return a.astype(numpy_type(wide)) * b.astype(numpy_type(wide))

    if ins.head == "mul":
        return applied(ins, product, [kind, kind])
    return applied(ins, lambda a, b, c: product(a, b) + c, [kind, kind, wide])


@instruction("div rem", INTEGERS)
def _quotients(ins: Instruction) -> Run:
    """Towards zero, as in C. A division by zero is a fault: what PTX gives for it is open."""
    kind, quotient = ins.types[0], ins.head == "div"
    top, bottom = (reader(o, kind) for o in ins.operands[1:])
    write = writer(ins.operands[0])

    def run(wave: Wave) -> None:
        a, b = np.broadcast_arrays(top(wave), bottom(wave))
        zero = b == 0
        if (zero & wave.mask).any():
            raise Fault("division by zero", wave.first(zero & wave.mask))
        rest = np.fmod(a, np.where(zero, b.dtype.type(1), b))
        write(wave, (a - rest) // np.where(zero, b.dtype.type(1), b) if quotient else rest)

    return run


@instruction("shl shr", INTEGERS + " " + BITS)
def _shifts(ins: Instruction) -> Run:
    kind = ins.types[0]
    bits = np.uint32(TYPES[kind])

    def shift(a: Array, by: Array) -> Array:
        within = np.minimum(by, bits - 1).astype(a.dtype)
        if ins.head == "shl":
            return np.where(by < bits, a << within, a.dtype.type(0))
        # a sign goes on; beyond all bits there is nothing else left
        return np.where(
            by < bits, a >> within, (a >> (bits - 1).astype(a.dtype)) if kind[0] == "s" else a.dtype.type(0)
        )

    return applied(ins, shift, [kind, "u32"])


@instruction("shf", "b32", "l r wrap clamp")
def _funnel(ins: Instruction) -> Run:
    def shift(low: Array, high: Array, by: Array) -> Array:
        by = by & np.uint32(31) if "wrap" in ins.modifiers else np.minimum(by, np.uint32(32))
        both = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
        if "l" in ins.modifiers:
            return ((both << by.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)
        return (both >> by.astype(np.uint64)).astype(np.uint32)

    return applied(ins, shift, ["b32", "b32", "u32"])


@instruction("lop3", "b32")
def _any_logic(ins: Instruction) -> Run:
    def logic(a: Array, b: Array, c: Array, table: Array) -> Array:
        out = a & np.uint32(0)
        for i in range(8):
            if int(table) >> i & 1:
                out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        return out

    return applied(ins, logic, ["b32"] * 4)


@instruction("prmt", "b32")
def _permute(ins: Instruction) -> Run:
    def permute(a: Array, b: Array, selector: Array) -> Array:
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        out = np.zeros_like(both)
        for i in range(4):
            nibble = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
            byte = (both >> (np.uint64(8) * (nibble & np.uint64(7)))) & np.uint64(255)
            signs = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            out = out | (np.where(nibble & np.uint64(8), signs, byte) << np.uint64(8 * i))
        return out.astype(np.uint32)

    return applied(ins, permute, ["b32", "b32", "b32"])


@instruction("bfe", "u32 u64 s32 s64")
def _extract(ins: Instruction) -> Run:
    kind = ins.types[0]
    bits = TYPES[kind]

    def extract(a: Array, position: Array, length: Array) -> Array:
        position, length = (np.minimum(x & np.uint32(255), np.uint32(bits)) for x in (position, length))
        wide = a.astype(np.int64 if kind[0] == "s" else np.uint64)
        at = position.astype(wide.dtype)
        # the field to the top, then down again: a signed one brings its sign along
        up = np.maximum(64 - at.astype(np.int64) - length.astype(np.int64), 64 - bits)
        up = np.where(length == 0, 0, up).astype(wide.dtype)
        down = np.where(length == 0, 0, up + at).astype(wide.dtype)
        field = (wide << np.minimum(up, 63).astype(wide.dtype)) >> np.minimum(down, 63).astype(wide.dtype)
        nothing = (length == 0) | ((position >= bits) if kind[0] == "u" else False)
        return np.where(nothing, 0, field).astype(a.dtype)

    return applied(ins, extract, [kind, "u32", "u32"])


@instruction("bfi", "b32")
def _insert(ins: Instruction) -> Run:
    def insert(a: Array, b: Array, position: Array, length: Array) -> Array:
        at, n = ((x & np.uint32(255)).astype(np.uint64) for x in (position, length))
        at, n = np.minimum(at, np.uint64(32)), np.minimum(n, np.uint64(32))
        mask = ((np.uint64(1) << n) - np.uint64(1)) << at
        return ((b.astype(np.uint64) & ~mask) | ((a.astype(np.uint64) << at) & mask)).astype(np.uint32)

    return applied(ins, insert, ["b32", "b32", "u32", "u32"])


@instruction("popc clz brev", "b32 b64")
def _bits(ins: Instruction) -> Run:
    kind = ins.types[0]
    bits = TYPES[kind]

    def count(a: Array) -> Array:
        each = (a[..., None] >> np.arange(bits, dtype=a.dtype)) & a.dtype.type(1)
        if ins.head == "popc":
            return each.sum(-1).astype(np.uint32)
        if ins.head == "clz":
            return np.where(a == 0, bits, np.argmax(each[..., ::-1], -1)).astype(np.uint32)
        return (each[..., ::-1] << np.arange(bits, dtype=a.dtype)).sum(-1, dtype=a.dtype)

    return applied(ins, count, [kind])


# ---- floating point


@instruction("add sub mul", FLOATS, "rn ftz")
@instruction("div", FLOATS, "rn ftz full approx")
def _floats(ins: Instruction) -> Run:
    functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
    return applied(ins, flush(ins, functions[ins.head]), [ins.types[0]] * 2)


@instruction("fma", FLOATS, "rn ftz")
def _fma(ins: Instruction) -> Run:
    return applied(ins, flush(ins, fma64 if ins.types[0] == "f64" else fma32), [ins.types[0]] * 3)


@instruction("fma", "f32", "rm ftz")
def _fma_down(ins: Instruction) -> Run:
    return applied(ins, flush(ins, fma32_down), ["f32"] * 3)


@instruction("add", "f32", "rz")
def _add_to_zero(ins: Instruction) -> Run:
    return applied(ins, add32_to_zero, ["f32"] * 2)


@instruction("min max", FLOATS, "ftz")
def _extremes(ins: Instruction) -> Run:
    """The one that is a number; -0 is less than 0."""

    def lesser(a: Array, b: Array) -> Array:
        return np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))

    def greater(a: Array, b: Array) -> Array:
        return np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))

    return applied(ins, flush(ins, lesser if ins.head == "min" else greater), [ins.types[0]] * 2)


@instruction("abs neg", FLOATS, "ftz")
@instruction("sqrt", FLOATS, "rn ftz approx")
@instruction("rcp", FLOATS, "rn")
@instruction("rcp rsqrt ex2 lg2", "f32", "approx ftz")
def _one_float(ins: Instruction) -> Run:
    """Approximations are as good as fp32 can be; hardware's are within some units."""

    def by_wide(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
        return lambda x: function(x.astype(np.float64)).astype(x.dtype)

    functions: dict[str, Callable[[Array], Array]] = {
        "abs": np.abs, "neg": np.negative, "sqrt": np.sqrt, "rcp": lambda x: x.dtype.type(1) / x,
        "rsqrt": by_wide(lambda x: 1 / np.sqrt(x)), "ex2": by_wide(np.exp2), "lg2": by_wide(np.log2),
    }  # fmt: skip
    return applied(ins, flush(ins, functions[ins.head]), [ins.types[0]])


@instruction("abs neg", "bf16 bf16x2")
def _sign_of_bf16(ins: Instruction) -> Run:
    kind = "b32" if ins.types[0] == "bf16x2" else "b16"
    signs = numpy_type(kind).type(0x80008000 if kind == "b32" else 0x8000)
    return applied(ins, lambda x: x & ~signs if ins.head == "abs" else x ^ signs, [kind])


@instruction("rcp", "f64", "approx ftz")
def _rough_reciprocal(ins: Instruction) -> Run:
    return applied(ins, reciprocal_high, ["f64"])


@instruction("copysign", FLOATS)
def _copysign(ins: Instruction) -> Run:
    """The sign of the first, the rest of the second."""
    return applied(ins, lambda a, b: np.copysign(b, a), [ins.types[0]] * 2)
