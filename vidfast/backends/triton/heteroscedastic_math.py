"""The mathematics of one element with a variance of its own: csrc/heteroscedastic.h has the formulas.

Everything is formed in `dtype`, fp32 or fp64. In fp32 a logarithm is a polynomial of degree 9, of 1 ulp and 3e-8, and
an exponential libdevice's, of 2 ulp in all of its range, both without a branch; 1 / v has 1 ulp, and is 0 from 2^126
on.
"""

# The body of a kernel is Triton's language: untyped, and what is known at compile time must stand in an `if` of its
# own, since `and` would make it a number of the device.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: SIM108

import triton.language as tl
from triton.language.extra import libdevice

from vidfast.backends.triton.math import INTERPRETED, device_function
from vidfast.heteroscedastic import arguments

SOFTPLUS: tl.constexpr = tl.constexpr(arguments.SOFTPLUS)
EXP: tl.constexpr = tl.constexpr(arguments.EXP)
LOG_VARIANCE: tl.constexpr = tl.constexpr(arguments.LOG_VARIANCE)
# Powers of the variance that need no logarithm; OTHER does.
BETA_0: tl.constexpr = tl.constexpr(0)
BETA_HALF: tl.constexpr = tl.constexpr(1)
BETA_1: tl.constexpr = tl.constexpr(2)
BETA_OTHER: tl.constexpr = tl.constexpr(3)

LOG_2PI: tl.constexpr = tl.constexpr(1.8378770664093453)
LARGEST_FP32: tl.constexpr = tl.constexpr(3.4028234663852886e38)
LARGEST_FP64: tl.constexpr = tl.constexpr(1.7976931348623157e308)


@device_function
def exponential(x, dtype: tl.constexpr):
    """exp(x). tl.exp in fp32 rounds x / ln 2: at x = -80 that is dozens of ulp."""
    if INTERPRETED or dtype == tl.float64:
        y = tl.exp(x)
    else:
        y = libdevice.exp(x)
    return y


@device_function
def reciprocal(v, dtype: tl.constexpr):
    """1 / v for v > 0 that is no subnormal number. A division with IEEE's rounding has a branch for each element."""
    if INTERPRETED or dtype == tl.float64:
        y = 1.0 / v
    else:
        y = libdevice.fast_dividef(1.0, v)
    return y


@device_function
def logarithm(v, dtype: tl.constexpr):
    """log(v) for v > 0 that is no subnormal number; NaN and infinity stay what they are."""
    if dtype == tl.float64:
        y = tl.log(v)
    else:
        # v = (1 + m) 2^k, 1 + m from 2/3 to 4/3
        bits = v.to(tl.int32, bitcast=True)
        k = (bits - 0x3F2AAAAB) & -0x800000  # in the exponent's place
        m = (bits - k).to(tl.float32, bitcast=True) - 1.0
        p = m * 0.14026351273059845 + -0.15388540923595428
        p = p * m + 0.13995808362960815
        p = p * m + -0.1641596108675003
        p = p * m + 0.20011168718338013
        p = p * m + -0.2500782012939453
        p = p * m + 0.33333197236061096
        p = p * m + -0.49999937415122986
        y = k.to(tl.float32) * 8.262958288192749e-08 + ((p * m) * m + m)  # ln 2 / 2^23
        y = tl.where(v < float("inf"), y, v)
    return y


@device_function
def logarithm_of_one_and(e, dtype: tl.constexpr):
    """log(1 + e) for e from 0 to 1, relative to itself as exact for the smallest."""
    if dtype == tl.float64:  # what 1 + e loses of e comes back to first order
        s = e + 1.0
        y = tl.log(s) + (e - (s - 1.0)) / s
    else:
        p = e * 0.005364818498492241 + -0.03006576932966709
        p = p * e + 0.0792044997215271
        p = p * e + -0.13753798604011536
        p = p * e + 0.1915365308523178
        p = p * e + -0.24857163429260254
        p = p * e + 0.3332132399082184
        p = p * e + -0.49999648332595825
        y = (p * e) * e + e
    return y


@device_function
def _powers(v, inv_v, log_v, beta, r, BETA: tl.constexpr, dtype: tl.constexpr):
    """v^beta and v^(beta - 1) r: a product of the first with 1 / v could overflow where that does not."""
    if BETA == BETA_0:
        power = tl.full(r.shape, 1.0, dtype)
        a = inv_v * r
    elif BETA == BETA_HALF:
        power = tl.sqrt(v)
        a = (power * inv_v) * r
    elif BETA == BETA_1:
        power = v
        a = r
    else:
        power = exponential(beta * log_v, dtype)
        a = exponential((beta - 1.0) * log_v, dtype) * r
    return power, a


@device_function
def _softplus(r, u, eps, beta, BETA: tl.constexpr, RAW: tl.constexpr, dtype: tl.constexpr):
    e = exponential(-tl.abs(u), dtype)
    v = tl.maximum(u, 0.0) + logarithm_of_one_and(e, dtype) + eps
    if RAW:  # one division for 1 / v and for the sigmoid over v
        s = e + 1.0
        inv = reciprocal(s * v, dtype)
        inv_v = inv * s
        p = tl.where(u >= 0.0, 1.0, e) * inv
    else:
        inv_v = reciprocal(v, dtype)
        p = inv_v  # not used
    log_v = logarithm(v, dtype)
    power, a = _powers(v, inv_v, log_v, beta, r, BETA, dtype)
    return log_v, power, a, p


@device_function
def _exp(r, u, eps, beta, BETA: tl.constexpr, dtype: tl.constexpr):
    # v = z where u <= 0, else exp(u) z: nothing overflows
    if BETA == BETA_HALF:
        h = exponential(-0.5 * tl.abs(u), dtype)
        e = h * h
    else:
        h = u  # not used
        e = exponential(-tl.abs(u), dtype)
    small = u <= 0.0
    z = tl.where(small, e + eps, eps * e + 1.0)
    inv_z = reciprocal(z, dtype)
    above = tl.maximum(u, 0.0)
    log_v = logarithm(z, dtype) + above
    p = tl.where(small, e, 1.0) * inv_z
    if BETA == BETA_HALF:
        root = tl.sqrt(z)
        h = tl.where(small, 1.0, h)
        power = root * reciprocal(h, dtype)
        a = (root * inv_z) * h * r
    elif BETA == BETA_1:
        power = z * exponential(above, dtype)
        a = r
    else:
        power, a = _powers(z, tl.where(small, 1.0, e) * inv_z, log_v, beta, r, BETA, dtype)
    return log_v, power, a, p


@device_function
def _log_variance(r, u, beta, BETA: tl.constexpr, dtype: tl.constexpr):
    if BETA == BETA_1:
        a = r
    else:
        # the root of v^(beta - 1): twice a factor of r, it overflows where the product with r nearly does
        if BETA == BETA_0:
            h = exponential(-0.5 * u, dtype)
        else:
            h = exponential((0.5 * (beta - 1.0)) * u, dtype)
        # finite, so that it leaves an r of 0
        if dtype == tl.float64:
            h = tl.where(h == float("inf"), LARGEST_FP64, h)
        else:
            h = tl.where(h == float("inf"), LARGEST_FP32, h)
        a = (r * h) * h
    one = tl.full(r.shape, 1.0, dtype)
    if BETA == BETA_0:
        power = one
    else:
        power = exponential(beta * u, dtype)
    return u, power, a, one


@device_function
def _clamp(r, u, eps, beta, BETA: tl.constexpr, NEGATIVE_IS_NAN: tl.constexpr, dtype: tl.constexpr):
    v = tl.where(u < eps, eps, u)  # NaN stays NaN
    if NEGATIVE_IS_NAN:
        v = tl.where(u < 0.0, float("nan"), v)
    inv_v = reciprocal(v, dtype)
    log_v = logarithm(v, dtype)
    power, a = _powers(v, inv_v, log_v, beta, r, BETA, dtype)
    return log_v, power, a, inv_v


@device_function
def element(
    r, u, eps, beta,
    TRANSFORM: tl.constexpr, BETA: tl.constexpr, NEGATIVE_IS_NAN: tl.constexpr, RAW: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """(log v, v^beta, a, p) of r = mean - target and u = raw, with a = v^(beta - 1) r.

    What is 1 everywhere leaves no instruction. RAW: d / d raw is wanted, and with it p.
    """
    if TRANSFORM == SOFTPLUS:
        log_v, power, a, p = _softplus(r, u, eps, beta, BETA, RAW, dtype)
    elif TRANSFORM == EXP:
        log_v, power, a, p = _exp(r, u, eps, beta, BETA, dtype)
    elif TRANSFORM == LOG_VARIANCE:
        log_v, power, a, p = _log_variance(r, u, beta, BETA, dtype)
    else:
        log_v, power, a, p = _clamp(r, u, eps, beta, BETA, NEGATIVE_IS_NAN, dtype)
    return log_v, power, a, p


@device_function
def twice_the_loss(log_v, power, a, r, FULL: tl.constexpr):
    """v^beta (log v + r^2 / v), and v^beta log(2 pi) if FULL."""
    if FULL:
        log_v += LOG_2PI
    return log_v * power + a * r


@device_function
def twice_the_slope(power, a, r, p):
    """v^beta (1 - r^2 / v) p: twice d / d raw for a factor of 1."""
    return (power - a * r) * p
