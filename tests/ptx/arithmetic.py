"""Arithmetic that numpy does not have: fused multiply-add with one rounding, bfloat16, high halves of products.

All functions take and return arrays, or numpy's scalars.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

Array = Any  # an array or a scalar of numpy

_U32, _U64 = np.uint32, np.uint64


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b rounded, and what rounding dropped (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """a * b rounded, and what rounding dropped (Dekker), where no intermediate overflows or underflows."""

    def halves(x: Array) -> tuple[Array, Array]:
        scaled = 134217729.0 * x  # 2^27 + 1
        high = scaled - (scaled - x)
        return high, x - high

    product = a * b
    (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _odd_sum(a: Array, b: Array) -> Array:
    """a + b in fp64, rounded to odd: of the two neighbours of an inexact sum the one whose last bit is 1.

    Rounding this once more to a narrower type gives what rounding the exact sum would.
    """
    total, error = two_sum(a, b)
    bits = np.asarray(total).view(np.int64)
    # towards the error: away from zero where both have one sign
    step = np.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & np.isfinite(total) & np.isfinite(error) & (bits & 1 == 0)
    return np.where(inexact, bits + step, bits).view(np.float64)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of fp32 values with one rounding: the product is exact in fp64."""
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    return _odd_sum(product, np.asarray(c, np.float64)).astype(np.float32)


def _directed32(exact: Array, error: Array, towards: Array) -> Array:
    """exact + error in fp32, of its two neighbours there the one on the side of `towards`, an infinity or 0."""
    nearest = exact.astype(np.float32)
    wide = nearest.astype(np.float64)
    above = (wide > exact) | ((wide == exact) & (error < 0))
    below = (wide < exact) | ((wide == exact) & (error > 0))
    beyond = np.where(towards < exact, above, below) & (towards != wide)
    towards = np.broadcast_to(towards, nearest.shape).astype(np.float32)
    return np.where(beyond, np.nextafter(nearest, towards), nearest).astype(np.float32)


def fma32_down(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of fp32 values, rounded towards minus infinity."""
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    return _directed32(*two_sum(product, np.asarray(c, np.float64)), np.float64(-np.inf))


def add32_to_zero(a: Array, b: Array) -> Array:
    """a + b of fp32 values, rounded towards 0."""
    return _directed32(*two_sum(np.asarray(a, np.float64), np.asarray(b, np.float64)), np.float64(0))


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of fp64 values with one rounding (Boldo and Melquiond, 2008)."""
    a, b, c = np.broadcast_arrays(np.asarray(a), np.asarray(b), np.asarray(c))
    high, low = two_product(a, b)
    carried, small = two_sum(c, low)
    high, middle = two_sum(high, carried)
    result = np.asarray(high + _odd_sum(small, middle))
    plain = a * b + c
    size = np.abs(a * b)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    # far from where a step above overflows or loses bits to underflow
    safe = (size < 2.0**960) & (np.maximum(np.abs(a), np.abs(b)) < 2.0**960) & (np.abs(c) < 2.0**960)
    safe &= (size > 2.0**-900) & ((np.abs(c) > 2.0**-900) | (c == 0) | (size > 2.0**-500))
    result = np.where(safe & finite, result, plain)
    # a product that is exactly 0, or anything that is not finite, needs no care
    for i in zip(*np.nonzero(finite & ~safe & (a != 0) & (b != 0)), strict=True):
        result[i] = _exact_fma(float(a[i]), float(b[i]), float(c[i]))
    return result


def _exact_fma(a: float, b: float, c: float) -> float:
    """Python divides integers with one rounding, subnormal results included."""
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c if c == 0 else 0.0
    try:
        return exact.numerator / exact.denominator
    except OverflowError:
        return float("inf") if exact > 0 else -float("inf")


def to_bf16(x: Array) -> Array:
    """The bits of fp32 values rounded to the nearest bfloat16; NaN becomes PTX's 0x7fff."""
    x = np.asarray(x, np.float32)
    bits = x.view(_U32)
    rounded = (bits + _U32(0x7FFF) + ((bits >> _U32(16)) & _U32(1))) >> _U32(16)
    return np.where(np.isnan(x), _U32(0x7FFF), rounded).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    """fp32 values of bfloat16's bits."""
    return (np.asarray(bits).astype(_U32) << _U32(16)).view(np.float32)


def to_f16(x: Array) -> Array:
    """The bits of fp32 or fp64 values rounded to the nearest fp16; NaN becomes PTX's 0x7fff."""
    x = np.asarray(x)
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the product of integers of one type, of 16, 32 or 64 bits."""
    dtype = a.dtype
    bits = 8 * dtype.itemsize
    signed = dtype.kind == "i"
    if bits < 64:
        wide = np.int64 if signed else _U64
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(dtype)
    x, y = np.asarray(a).view(_U64), np.asarray(b).view(_U64)
    mask, half = _U64(0xFFFFFFFF), _U64(32)
    x_low, x_high, y_low, y_high = x & mask, x >> half, y & mask, y >> half
    cross = x_high * y_low + ((x_low * y_low) >> half)
    other = x_low * y_high + (cross & mask)
    high = x_high * y_high + (cross >> half) + (other >> half)
    if signed:
        high = high - np.where(a < 0, y, _U64(0)) - np.where(b < 0, x, _U64(0))
    return high.view(dtype)


def reciprocal_high(x: Array) -> Array:
    """rcp.approx.ftz.f64: the upper 32 bits of the reciprocal, the lower are zero."""
    bits = (1.0 / np.asarray(x)).view(_U64) & _U64(0xFFFFFFFF00000000)
    return bits.view(np.float64)


def flushed(x: Array) -> Array:
    """fp32 values with subnormal ones as zeros of their sign (.ftz)."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)
