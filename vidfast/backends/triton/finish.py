"""The kernels of what is known of each channel: the sum over a sweep's partial sums, and d/d alpha alone.

Arguments are as in `kernels`.
"""

# The body of a kernel is Triton's language: untyped, and what is known at compile time must stand in an `if` of its
# own, since `and` would make it a number of the device.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from vidfast.backends.triton.math import (
    alpha_derivative,
    float64_of,
    variance_of,
    widened,
    write_grad_alpha,
)

# log(2 pi) as an fp64 bit pattern.
LOG_2PI: tl.constexpr = tl.constexpr(0x3FFD67F1C864BEB5)


@triton.jit(do_not_specialize=["blocks", "channels", "inner", "m", "eps_bits", "k_bits", "programs"])
def finish(
    partial,                    # [blocks, C, inner] sums of r^2
    alpha,                      # [C]
    loss,                       # scalar
    sum_sq,                     # [C] fp64, or None: not wanted
    grad_alpha,                 # [C] fp64, or None: not wanted
    losses,                     # [programs] fp64: each program's channels
    counter,                    # int32: programs that are done; 0 at the start
    blocks, channels, inner,
    m: tl.int64, eps_bits: tl.int64, k_bits: tl.int64, programs,
    ACROSS: tl.constexpr,       # inner is 1: neighbours in memory are channels
    CHANNELS: tl.constexpr, DEPTH: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """S_c, d/d alpha and the loss out of the sweep's partial sums, all in fp64."""
    pid = tl.program_id(0)
    c = pid * CHANNELS + tl.arange(0, CHANNELS)
    live = c < channels
    depth = blocks * inner
    if ACROSS:
        total = tl.full([DEPTH, CHANNELS], 0, tl.float64)
        for t0 in range(0, depth, DEPTH):
            t = t0 + tl.arange(0, DEPTH)
            offset = (t.to(tl.int64) * channels)[:, None] + c[None, :]
            total += tl.load(partial + offset, mask=(t < depth)[:, None] & live[None, :], other=0.0).to(
                tl.float64
            )
        s = tl.sum(total, 0)
    else:
        total = tl.full([CHANNELS, DEPTH], 0, tl.float64)
        for t0 in range(0, depth, DEPTH):
            t = t0 + tl.arange(0, DEPTH)
            block = t // inner
            offset = (block.to(tl.int64) * channels)[None, :] + c[:, None]
            offset = offset * inner + (t - block * inner)[None, :]
            total += tl.load(partial + offset, mask=(t < depth)[None, :] & live[:, None], other=0.0).to(
                tl.float64
            )
        s = tl.sum(total, 1)

    values = m.to(tl.float64)
    v, sigmoid = variance_of(
        widened(tl.load(alpha + c, mask=live, other=0.0), tl.float64), float64_of(eps_bits)
    )
    if sum_sq is not None:
        tl.store(sum_sq + c, s, mask=live)
    if grad_alpha is not None:
        grad = float64_of(k_bits) * alpha_derivative(alpha, v, sigmoid, s, values)
        tl.store(grad_alpha + c, grad, mask=live)
    own = tl.sum(tl.where(live, 0.5 * (values * tl.log(v) + s / v), 0.0), 0)

    # Whichever program comes last adds all of their losses, in the programs' order.
    tl.store(losses + pid, own)
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1:
        rest = tl.full([256], 0, tl.float64)
        for p0 in range(0, programs, 256):
            p = p0 + tl.arange(0, 256)
            rest += tl.load(losses + p, mask=p < programs, other=0.0, cache_modifier=".cg")
        whole = tl.sum(rest, 0)
        if FULL:
            whole += 0.5 * (values * channels) * tl.full([], LOG_2PI, tl.int64).to(tl.float64, bitcast=True)
        tl.store(loss, (float64_of(k_bits) * whole).to(loss.dtype.element_ty))


@triton.jit(do_not_specialize=["channels", "m", "eps_bits", "k_bits"])
def alpha_gradient(
    alpha,                      # [C]
    sum_sq,                     # [C] fp64, forward's
    g,                          # scalar
    grad_alpha,                 # [C] in alpha's type
    channels, m: tl.int64, eps_bits: tl.int64, k_bits: tl.int64,
    ALPHA_BLOCK: tl.constexpr,
):  # fmt: skip
    """d/d alpha where nothing else is wanted: no activation is read."""
    write_grad_alpha(
        alpha, sum_sq, g, grad_alpha, channels, m.to(tl.float64), eps_bits, k_bits, tl.program_id(0), ALPHA_BLOCK,
    )  # fmt: skip
