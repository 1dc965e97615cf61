"""What the Triton kernels share: rounding, fp64 from its bits, and the mathematics of one channel, in fp64."""

# The body of a kernel is Triton's language: untyped, and what is known at compile time must stand in an `if` of its
# own, since `and` would make it a number of the device.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: SIM108

import os
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

try:
    _interpreted = bool(triton.knobs.runtime.interpret)
except AttributeError:  # Triton before 3.4
    _interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

# Fixed when the kernels below are defined.
INTERPRETED: tl.constexpr = tl.constexpr(_interpreted)


def device_function(fn: Callable[..., Any]) -> Any:
    """A function that kernels call. Interpreted, it skips the patching of triton.language that its caller did."""
    jitted = triton.jit(fn)
    return jitted.rewrite() if _interpreted and hasattr(jitted, "rewrite") else jitted


@triton.jit
def counts(out, n):
    """Interpreted only, to learn whether the interpreter can: a loop whose bound is a number of the program's."""
    most = tl.minimum(n, 4)
    for i in range(0, most, 2):
        tl.store(out + i // 2, i)


@device_function
def widened(x, dtype: tl.constexpr):
    """x in the type that r is computed in: fp32, or fp64 where mean or target is."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(dtype)
    else:
        wide = x.to(dtype)
    return wide


@device_function
def rounded(x, dtype: tl.constexpr):
    """x rounded to nearest even; to 16 bits by way of fp32, as on the other back ends."""
    if dtype == tl.float64:
        y = x.to(dtype)
    elif INTERPRETED and dtype == tl.bfloat16:  # the interpreter's own conversion truncates
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = tl.where(x == x, nearest, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(tl.float32).to(dtype)
    return y


@device_function
def quotient(n, by):
    """n // d of int32 numbers that are not negative, without a division: `by` is :func:`.plan.divisor` of d."""
    by = by.to(tl.int64)
    return ((n.to(tl.int64) * (by & 0xFFFFFFFF)) >> (by >> 32)).to(tl.int32)


@device_function
def start_of(begin, inner, inner_by, NARROW: tl.constexpr):
    """The plane, or row, of `inner` vectors in which a chunk begins; NARROW: all extents are below 2^31."""
    if NARROW:
        first = quotient(begin.to(tl.int32), inner_by).to(tl.int64)
    else:
        first = begin // inner
    return first


@device_function
def place_of(within, u, inner, inner_by, SHORT: tl.constexpr):
    """(plane, vector in it) of a chunk's vectors u, of which the first is `within` its plane."""
    if SHORT:  # 32 bits are enough
        t = within.to(tl.int32) + u
        plane = quotient(t, inner_by)
        i = (t - plane * inner.to(tl.int32)).to(tl.int64)
        o = plane.to(tl.int64)
    else:  # a chunk is no longer than a plane: it crosses one end at most
        t = within + u
        o = (t >= inner).to(tl.int64)
        i = t - o * inner
    return o, i


@device_function
def float64_of(bits):
    """The fp64 number of a bit pattern in int64."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@device_function
def variance_of(alpha, eps):
    """(variance, sigmoid) of fp64 alpha: softplus(alpha) + eps and its derivative.

    softplus(a) = max(a, 0) + log1p(exp(-|a|)): exp never overflows. log1p(e) = log(u) + (e - (u - 1)) / u with
    u = fl(1 + e): what u lost of e comes back to first order, so that tiny variances keep their digits.
    """
    e = tl.exp(-tl.abs(alpha))
    u = e + 1.0
    log1p = tl.log(u) + (e - (u - 1.0)) / u
    variance = tl.where(alpha > 0.0, alpha + log1p, log1p) + eps
    sigmoid = tl.where(alpha >= 0.0, 1.0, e) / u
    return variance, sigmoid


@device_function
def values_of(totals, m):
    """M in fp64: the sum of the positions' weights where there are totals, else the number of values, m."""
    if totals is not None:
        values = tl.load(totals)
    else:
        values = m.to(tl.float64)
    return values


@device_function
def k_of(totals, k_bits):
    """k in fp64: that of the totals, or where there are none the number with these bits."""
    if totals is not None:
        k = tl.load(totals + 1)
    else:
        k = float64_of(k_bits)
    return k


@device_function
def grad_scale(alpha, g, totals, eps_bits, k_bits, live, dtype: tl.constexpr):
    """g k / v_c at pointers into alpha, formed in fp64."""
    v, _ = variance_of(widened(tl.load(alpha, mask=live, other=0.0), tl.float64), float64_of(eps_bits))
    k = k_of(totals, k_bits)
    if g is not None:
        k = k * tl.load(g).to(tl.float64)
    return (k / v).to(dtype)


@device_function
def alpha_derivative(alpha, v, sigmoid, sum_sq, m):
    """[M/(2 v) - S/(2 v^2)] sigmoid(alpha): d/d alpha for k = g = 1."""
    precision = 1.0 / v  # one division: each is a call, and what lives across it fills registers
    return 0.5 * (m - sum_sq * precision) * precision * sigmoid


@device_function
def write_grad_alpha(
    alpha, sum_sq, g, out, totals, channels, m, eps_bits, k_bits, block, BLOCK: tl.constexpr
):  # fmt: skip
    """d/d alpha of one block of channels, rounded to alpha's type."""
    c = block * BLOCK + tl.arange(0, BLOCK)
    live = c < channels
    v, sigmoid = variance_of(
        widened(tl.load(alpha + c, mask=live, other=0.0), tl.float64), float64_of(eps_bits)
    )
    s = tl.load(sum_sq + c, mask=live, other=0.0)
    gk = tl.load(g).to(tl.float64) * k_of(totals, k_bits)
    tl.store(
        out + c, rounded(gk * alpha_derivative(alpha, v, sigmoid, s, m), out.dtype.element_ty), mask=live
    )
