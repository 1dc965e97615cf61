"""The kernels of the second family, one variance an element: a sweep over elements, and the sum of its partial sums.

Pointers carry their extents as [..]; element (o, j) of a tensor is stored at o * stride + j. Extents and strides arrive
in vectors of VEC elements, fp64 numbers as their bit patterns, as in `kernels`. The order of summation follows from
CHUNK, TILE and the shape alone: every program sums its own chunk, `heteroscedastic_finish` adds their sums in fp64.
"""

# The body of a kernel is Triton's language: untyped, and what is known at compile time must stand in an `if` of its
# own, since `and` would make it a number of the device.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: SIM102, SIM108

import triton
import triton.language as tl

from vidfast.backends.triton import heteroscedastic_plan
from vidfast.backends.triton.heteroscedastic_math import element, twice_the_loss, twice_the_slope
from vidfast.backends.triton.math import (
    device_function,
    float64_of,
    k_of,
    place_of,
    quotient,
    rounded,
    start_of,
    widened,
)
from vidfast.backends.triton.positions import needed_ones, needed_units, selected, weights_at

NEIGHBOURS: tl.constexpr = tl.constexpr(heteroscedastic_plan.NEIGHBOURS)
IN_PLANES: tl.constexpr = tl.constexpr(heteroscedastic_plan.IN_PLANES)
SHARED: tl.constexpr = tl.constexpr(heteroscedastic_plan.SHARED)
SINGLE: tl.constexpr = tl.constexpr(heteroscedastic_plan.SINGLE)


@device_function
def _shifted(base, offset):
    """base + offset, or None."""
    if base is not None:
        moved = base + offset
    else:
        moved = None
    return moved


@device_function
def _place(within, u, row, row_by, VEC: tl.constexpr, ONE_ROW: tl.constexpr, SHORT: tl.constexpr):
    """(row, element in it) of a chunk's vectors u: what a stride is multiplied by, [UNITS, 1], and [UNITS, VEC]."""
    if ONE_ROW:
        o = u * 0
        i = u * VEC
    else:
        o, i = place_of(within, u, row, row_by, SHORT)
        o *= VEC
        i *= VEC
    return o[:, None], i[:, None] + tl.arange(0, VEC)[None, :]


@device_function
def _offset(o, i, stride, ONE_ROW: tl.constexpr):
    """Of an element of a tensor with this stride."""
    if ONE_ROW:
        offset = i
    else:
        offset = o * stride + i
    return offset


@device_function
def _weights(
    positions, within, u, run, step, run_by, step_by, live,
    VEC: tl.constexpr, WEIGHTS: tl.constexpr, SHORT: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """The weights of a chunk's vectors u: [UNITS, VEC], SHARED [UNITS, 1], or None."""
    lane = tl.arange(0, VEC)[None, :]
    if positions is None:
        w = None
    elif WEIGHTS == NEIGHBOURS:
        w = weights_at(positions, (u * VEC)[:, None] + lane, live)
    elif WEIGHTS == SHARED:
        block, _ = place_of(within, u, run, run_by, SHORT)
        w = weights_at(positions, block[:, None], live)
    else:
        if WEIGHTS == IN_PLANES:
            at = u
        else:
            at = (u * VEC)[:, None] + lane
        block, i = place_of(within, at, run, run_by, SHORT)
        if SMALL:
            plane = quotient(i.to(tl.int32), step_by).to(tl.int64)
        else:
            plane = i // step
        place = block * step + (i - plane * step)
        if WEIGHTS == IN_PLANES:
            place = (place * VEC)[:, None] + lane
        w = weights_at(positions, place, live)
    return w


@device_function
def _needed(w, live, WEIGHTS: tl.constexpr):
    """Which of the live vectors are to be loaded: those with a weight that is not 0."""
    if w is None:
        needed = live
    elif WEIGHTS == SHARED:
        needed = needed_ones(w, live)
    else:
        needed = needed_units(w, live)
    return needed


@device_function
def _load(mean, target, raw, o, i, mean_stride, target_stride, raw_stride, needed, ONE_ROW: tl.constexpr):
    """One tile of the three."""
    x = tl.load(mean + _offset(o, i, mean_stride, ONE_ROW), mask=needed, other=0.0)
    y = tl.load(target + _offset(o, i, target_stride, ONE_ROW), mask=needed, other=0.0)
    z = tl.load(raw + _offset(o, i, raw_stride, ONE_ROW), mask=needed, other=0.0)
    return x, y, z


@device_function
def _tile(
    x, y, z, w, live, to_mean, to_target, to_raw, scale, eps, beta,
    TRANSFORM: tl.constexpr, BETA: tl.constexpr, FULL: tl.constexpr, NEGATIVE_IS_NAN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Stores the wanted gradients of a tile, and returns twice its loss, element by element, but for k."""
    r = widened(x, WIDE) - widened(y, WIDE)
    u = widened(z, WIDE)
    if w is not None:  # what does not count is not used, whatever it is
        r = tl.where(w != 0, r, 0.0)
        u = tl.where(w != 0, u, 0.0)
    log_v, power, a, p = element(r, u, eps, beta, TRANSFORM, BETA, NEGATIVE_IS_NAN, to_raw is not None, WIDE)
    if w is not None:
        w_wide = w.to(WIDE)
        factor = scale * w_wide
    else:
        w_wide = None
        factor = scale
    if to_mean is not None:
        gradient = selected(factor * a, w)
        tl.store(to_mean, rounded(gradient, to_mean.dtype.scalar.element_ty), mask=live)
    if to_target is not None:
        gradient = selected(-(factor * a), w)
        tl.store(to_target, rounded(gradient, to_target.dtype.scalar.element_ty), mask=live)
    if to_raw is not None:
        gradient = selected((0.5 * factor) * twice_the_slope(power, a, r, p), w)
        tl.store(to_raw, rounded(gradient, to_raw.dtype.scalar.element_ty), mask=live)
    loss = twice_the_loss(log_v, power, a, r, FULL)
    if w is not None:
        loss *= w_wide
    return loss


@triton.jit(
    do_not_specialize=["outer", "row", "tail", "mean_stride", "target_stride", "raw_stride", "grad_mean_stride",
                       "grad_raw_stride", "programs", "row_by", "run", "step", "run_by", "step_by", "eps_bits",
                       "beta_bits", "k_bits"]
)  # fmt: skip
def heteroscedastic_sweep(
    mean, target, raw,                  # [outer, row]
    grad_mean, grad_target, grad_raw,   # the same, or None: not wanted; may be mean, and raw
    positions,                          # uint8 or fp32 or fp64, the weight of each; None: 1
    g,                                  # scalar; None is 1
    totals,                             # [2] fp64: M and k, with positions always; None: k_bits holds
    workspace,                          # [programs] WIDE, receives the chunks' sums; None: no loss is wanted
    outer, row: tl.int64,
    tail,                               # elements beyond the last vector of the only row, or None: there are none
    mean_stride: tl.int64, target_stride: tl.int64, raw_stride: tl.int64,
    grad_mean_stride: tl.int64, grad_raw_stride: tl.int64,  # of d/d target: row
    programs, row_by: tl.int64,         # `.plan.divisor` of row
    run: tl.int64, step: tl.int64,      # `.heteroscedastic_plan.Weighing`
    run_by: tl.int64, step_by: tl.int64,
    eps_bits: tl.int64, beta_bits: tl.int64, k_bits: tl.int64,
    VEC: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    ONE_ROW: tl.constexpr,              # all is stored without gaps
    SHORT: tl.constexpr, NARROW: tl.constexpr, AHEAD: tl.constexpr,
    WEIGHTS: tl.constexpr, RUN_SHORT: tl.constexpr, RUN_NARROW: tl.constexpr, RUN_SMALL: tl.constexpr,
    TRANSFORM: tl.constexpr, BETA: tl.constexpr, FULL: tl.constexpr, NEGATIVE_IS_NAN: tl.constexpr,
    WIDE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Twice the loss but for k, and the gradients that are wanted: every element is read once and written once."""
    # Everything is counted in vectors of VEC neighbours, which never cross a row's end. With AHEAD a tile is on its
    # way while the one before it is computed. Vectors without a weight are not loaded.
    UNITS: tl.constexpr = TILE // VEC
    CHUNK_UNITS: tl.constexpr = CHUNK // VEC
    pid = tl.program_id(0)
    if workspace is not None:
        if OVERLAP:  # the finish may come, and waits for this sweep's end
            tl.extra.cuda.gdc_launch_dependents()
    begin = pid.to(tl.int64) * CHUNK_UNITS
    count = tl.minimum(outer.to(tl.int64) * row - begin, CHUNK_UNITS).to(tl.int32)
    if ONE_ROW:
        within = begin
        mean += begin * VEC
        target += begin * VEC
        raw += begin * VEC
        grad_mean = _shifted(grad_mean, begin * VEC)
        grad_target = _shifted(grad_target, begin * VEC)
        grad_raw = _shifted(grad_raw, begin * VEC)
    else:
        first = start_of(begin, row, row_by, NARROW)
        within = begin - first * row
        mean += first * mean_stride * VEC
        target += first * target_stride * VEC
        raw += first * raw_stride * VEC
        grad_mean = _shifted(grad_mean, first * grad_mean_stride * VEC)
        grad_target = _shifted(grad_target, first * row * VEC)
        grad_raw = _shifted(grad_raw, first * grad_raw_stride * VEC)
    of_run = begin
    if positions is not None:
        if WEIGHTS == NEIGHBOURS:
            positions += begin * VEC
        else:  # where in a run the chunk begins, in the unit of `run`
            if WEIGHTS == SINGLE:
                of_run = begin * VEC
            first_run = start_of(of_run, run, run_by, RUN_NARROW)
            of_run -= first_run * run
            if WEIGHTS == IN_PLANES:
                positions += first_run * step * VEC
            else:
                positions += first_run * step

    unit = tl.arange(0, UNITS)
    live = (unit < count)[:, None]
    o, i = _place(within, unit, row, row_by, VEC, ONE_ROW, SHORT)
    w = _weights(
        positions, of_run, unit, run, step, run_by, step_by, live, VEC, WEIGHTS, RUN_SHORT, RUN_SMALL,
    )  # fmt: skip
    needed = _needed(w, live, WEIGHTS)
    x, y, z = _load(
        mean, target, raw, o, i, mean_stride, target_stride, raw_stride, needed, ONE_ROW,
    )  # fmt: skip
    k = k_of(totals, k_bits)
    if g is not None:
        k = k * tl.load(g).to(tl.float64)
    scale = k.to(WIDE)
    eps = float64_of(eps_bits).to(WIDE)
    beta = float64_of(beta_bits).to(WIDE)
    total = tl.zeros([UNITS], WIDE)
    for u0 in range(0, count, UNITS):
        u = u0 + UNITS + unit
        next_live = (u < count)[:, None]
        next_o, next_i = _place(within, u, row, row_by, VEC, ONE_ROW, SHORT)
        if AHEAD:
            next_w = _weights(
                positions, of_run, u, run, step, run_by, step_by, next_live, VEC, WEIGHTS, RUN_SHORT, RUN_SMALL,
            )  # fmt: skip
            needed = _needed(next_w, next_live, WEIGHTS)
            next_x, next_y, next_z = _load(
                mean, target, raw, next_o, next_i, mean_stride, target_stride, raw_stride, needed, ONE_ROW,
            )  # fmt: skip
        loss = _tile(
            x, y, z, w, live,
            _shifted(grad_mean, _offset(o, i, grad_mean_stride, ONE_ROW)),
            _shifted(grad_target, _offset(o, i, row, ONE_ROW)),
            _shifted(grad_raw, _offset(o, i, grad_raw_stride, ONE_ROW)),
            scale, eps, beta, TRANSFORM, BETA, FULL, NEGATIVE_IS_NAN, WIDE,
        )  # fmt: skip
        if workspace is not None:
            total += tl.where(unit < count - u0, tl.sum(loss, 1), 0.0)
        if not AHEAD:
            next_w = _weights(
                positions, of_run, u, run, step, run_by, step_by, next_live, VEC, WEIGHTS, RUN_SHORT, RUN_SMALL,
            )  # fmt: skip
            needed = _needed(next_w, next_live, WEIGHTS)
            next_x, next_y, next_z = _load(
                mean, target, raw, next_o, next_i, mean_stride, target_stride, raw_stride, needed, ONE_ROW,
            )  # fmt: skip
        x, y, z, o, i, live = next_x, next_y, next_z, next_o, next_i, next_live
        if positions is not None:
            w = next_w
    if tail is not None:  # the only row's last VEC - 1 elements or fewer fill no vector
        if pid == programs - 1:
            end_units = count + tl.zeros([UNITS], tl.int32)
            last = (unit == 0)[:, None] & (tl.arange(0, VEC) < tail)[None, :]
            first_end, end = _place(within, end_units, row, row_by, VEC, ONE_ROW, SHORT)
            last_w = _weights(
                positions, of_run, end_units, run, step, run_by, step_by, last, VEC, WEIGHTS, RUN_SHORT, RUN_SMALL,
            )  # fmt: skip
            last_needed = needed_ones(last_w, last)
            last_x, last_y, last_z = _load(
                mean, target, raw, first_end, end, mean_stride, target_stride, raw_stride, last_needed, ONE_ROW,
            )  # fmt: skip
            last_loss = _tile(
                last_x, last_y, last_z, last_w, last,
                _shifted(grad_mean, end), _shifted(grad_target, end), _shifted(grad_raw, end),
                scale, eps, beta, TRANSFORM, BETA, FULL, NEGATIVE_IS_NAN, WIDE,
            )  # fmt: skip
            if workspace is not None:
                total += tl.sum(tl.where(last, last_loss, 0.0), 1)
    if workspace is not None:
        tl.store(workspace.to(tl.pointer_type(WIDE), bitcast=True) + pid, tl.sum(total))


@triton.jit(do_not_specialize=["programs", "k_bits"])
def heteroscedastic_finish(
    workspace,                # [programs] WIDE, a sweep's
    loss,                     # scalar
    totals,                   # [2] fp64: M and k, or None: k_bits holds
    programs, k_bits: tl.int64,
    TILE: tl.constexpr, WIDE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The loss, by one program: the sum over the sweep's partial sums, in fp64."""
    partial = workspace.to(tl.pointer_type(WIDE), bitcast=True)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    t = tl.arange(0, TILE)
    total = tl.load(partial + t, mask=t < programs, other=0.0).to(tl.float64)
    for t0 in range(TILE, programs, TILE):
        t = t0 + tl.arange(0, TILE)
        total += tl.load(partial + t, mask=t < programs, other=0.0).to(tl.float64)
    tl.store(loss, ((0.5 * k_of(totals, k_bits)) * tl.sum(total)).to(loss.dtype.element_ty))
