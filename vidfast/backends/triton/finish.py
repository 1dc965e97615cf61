"""The kernels of what is known of each channel: the sum over a sweep's partial sums, and d/d alpha alone.

Arguments are as in `kernels`.
"""

# The body of a kernel is Triton's language: untyped, and what is known at compile time must stand in an `if` of its
# own, since `and` would make it a number of the device.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: SIM108

import triton
import triton.language as tl

from vidfast.backends.triton.math import (
    alpha_derivative,
    device_function,
    float64_of,
    k_of,
    quotient,
    values_of,
    variance_of,
    widened,
    write_grad_alpha,
)

# log(2 pi) as an fp64 bit pattern.
LOG_2PI: tl.constexpr = tl.constexpr(0x3FFD67F1C864BEB5)


# A workspace is in fp64: the counter of the programs of `finish` that are done, as int32; each program's loss; partial
# sums of r^2, in the type that r is computed in.


@device_function
def counter_of(workspace):
    """The counter of a workspace, as a pointer."""
    return workspace.to(tl.pointer_type(tl.int32), bitcast=True)


@device_function
def partials_of(workspace, partials_at, dtype: tl.constexpr):
    """The partial sums of a workspace, as a pointer."""
    return (workspace + partials_at).to(tl.pointer_type(dtype), bitcast=True)


@device_function
def begin_sweep(workspace, partials_at, pid, dtype: tl.constexpr, OVERLAP: tl.constexpr):
    """The partial sums in a sweep's workspace, whose counter is set to 0 for `finish`, or None: no sums are wanted."""
    if workspace is not None:
        if OVERLAP:  # `finish` may come, and waits for this sweep's end
            tl.extra.cuda.gdc_launch_dependents()
        if pid == 0:
            tl.store(counter_of(workspace), 0)
        partial = partials_of(workspace, partials_at, dtype)
    else:
        partial = None
    return partial


@device_function
def _tile(
    partial, t0, c, live, depth, channels, inner, inner_by,
    ACROSS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Partial sums number t0 to t0 + DEPTH - 1 of channels c, 0 for those that are not there."""
    t = t0 + tl.arange(0, DEPTH)
    if ACROSS:
        offset = (t.to(tl.int64) * channels)[:, None] + c[None, :]
        here = (t < depth)[:, None] & live[None, :]
    else:
        block = quotient(t, inner_by)
        offset = (block.to(tl.int64) * channels)[None, :] + c[:, None]
        offset = offset * inner + (t - block * inner)[None, :]
        here = (t < depth)[None, :] & live[:, None]
    return tl.load(partial + offset, mask=here, other=0.0)


@triton.jit(
    do_not_specialize=["partials_at", "blocks", "channels", "inner", "inner_by", "m", "eps_bits", "k_bits", "programs"]
)  # fmt: skip
def finish(
    workspace,                  # a sweep's
    partials_at,                # where in it [blocks, C, inner] sums of r^2 begin
    alpha,                      # [C]
    loss,                       # scalar
    sum_sq,                     # [C] fp64, or None: not wanted
    grad_alpha,                 # [C] fp64, or None: not wanted
    totals,                     # [2] fp64: M and k, or None: m and k_bits hold
    blocks, channels, inner,
    inner_by: tl.int64,         # `.plan.divisor` of inner
    m: tl.int64, eps_bits: tl.int64, k_bits: tl.int64, programs,
    ACROSS: tl.constexpr,       # inner is 1: neighbours in memory are channels
    CHANNELS: tl.constexpr, DEPTH: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """S_c, d/d alpha and the loss out of the sweep's partial sums, all in fp64."""
    pid = tl.program_id(0)
    c = pid * CHANNELS + tl.arange(0, CHANNELS)
    live = c < channels
    depth = blocks * inner
    partial = partials_of(workspace, partials_at, WIDE)
    a = tl.load(alpha + c, mask=live, other=0.0)
    # What belongs to the channels is computed while the first sums are on their way, or while the sweep ends.
    if OVERLAP:
        v, sigmoid = variance_of(widened(a, tl.float64), float64_of(eps_bits))
        log_v = tl.log(v)
        tl.extra.cuda.gdc_wait()
    total = _tile(partial, 0, c, live, depth, channels, inner, inner_by, ACROSS, DEPTH)
    if not OVERLAP:
        v, sigmoid = variance_of(widened(a, tl.float64), float64_of(eps_bits))
        log_v = tl.log(v)
    total = total.to(tl.float64)
    for t0 in range(DEPTH, depth, DEPTH):
        total += _tile(partial, t0, c, live, depth, channels, inner, inner_by, ACROSS, DEPTH).to(tl.float64)
    if ACROSS:
        s = tl.sum(total, 0)
    else:
        s = tl.sum(total, 1)

    values = values_of(totals, m)
    k = k_of(totals, k_bits)
    if sum_sq is not None:
        tl.store(sum_sq + c, s, mask=live)
    if grad_alpha is not None:
        grad = k * alpha_derivative(alpha, v, sigmoid, s, values)
        tl.store(grad_alpha + c, grad, mask=live)
    own = tl.sum(tl.where(live, 0.5 * (values * log_v + s / v), 0.0), 0)

    # Whichever program comes last adds all of their losses, in the programs' order.
    losses = workspace + 1
    tl.store(losses + pid, own)
    tl.debug_barrier()
    if tl.atomic_add(counter_of(workspace), 1, sem="acq_rel", scope="gpu") == programs - 1:
        rest = tl.full([256], 0, tl.float64)
        for p0 in range(0, programs, 256):
            p = p0 + tl.arange(0, 256)
            rest += tl.load(losses + p, mask=p < programs, other=0.0, cache_modifier=".cg")
        whole = tl.sum(rest, 0)
        if FULL:
            whole += 0.5 * (values * channels) * tl.full([], LOG_2PI, tl.int64).to(tl.float64, bitcast=True)
        tl.store(loss, (k * whole).to(loss.dtype.element_ty))


@triton.jit(do_not_specialize=["channels", "m", "eps_bits", "k_bits"])
def alpha_gradient(
    alpha,                      # [C]
    sum_sq,                     # [C] fp64, forward's
    g,                          # scalar
    grad_alpha,                 # [C] in alpha's type
    totals,                     # [2] fp64: M and k, or None: m and k_bits hold
    channels, m: tl.int64, eps_bits: tl.int64, k_bits: tl.int64,
    ALPHA_BLOCK: tl.constexpr,
):  # fmt: skip
    """d/d alpha where nothing else is wanted: no activation is read."""
    write_grad_alpha(
        alpha, sum_sq, g, grad_alpha, totals, channels, values_of(totals, m), eps_bits, k_bits, tl.program_id(0),
        ALPHA_BLOCK,
    )  # fmt: skip
