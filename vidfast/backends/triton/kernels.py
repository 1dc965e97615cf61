"""The Triton kernels: here one sweep for each family of layouts; `finish` adds its partial sums, `scale` scales by g.

Pointers carry their extents as [..]; mean, target and their gradients are [outer, C, inner], element (o, c, i)
at o * stride + c * inner + i. C = channels, M = outer * inner values of one channel. Sizes that decide alignment
arrive in units of VEC elements, so that the compiler sees the divisibility in the arithmetic; fp64 numbers
arrive as their bit patterns in int64, since Triton passes a Python float as fp32.

The order of summation follows from CHUNK, TILE and the shape alone: every program sums its own chunk, `finish`
adds the partial sums of one channel in fp64. The only atomic counts programs; nothing is summed by it.
"""

# The body of a kernel is Triton's language: untyped, and what is known at compile time must stand in an `if` of its
# own, since `and` would make it a number of the device.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: SIM102, SIM108

import triton
import triton.language as tl

from vidfast.backends.triton.finish import alpha_gradient as alpha_gradient
from vidfast.backends.triton.finish import begin_sweep
from vidfast.backends.triton.finish import finish as finish
from vidfast.backends.triton.heteroscedastic import heteroscedastic_finish as heteroscedastic_finish
from vidfast.backends.triton.heteroscedastic import heteroscedastic_sweep as heteroscedastic_sweep
from vidfast.backends.triton.math import (
    device_function,
    grad_scale,
    place_of,
    quotient,
    rounded,
    start_of,
    values_of,
    write_grad_alpha,
)
from vidfast.backends.triton.positions import (
    needed_columns,
    needed_ones,
    needed_units,
    places_of_columns,
    residual,
    selected,
    weights_at,
    weights_of_rows,
)
from vidfast.backends.triton.positions import sum_positions as sum_positions
from vidfast.backends.triton.positions import total as total
from vidfast.backends.triton.scale import scale as scale


@device_function
def _shifted(base, offset):
    """base + offset, or None."""
    if base is not None:
        moved = base + offset
    else:
        moved = None
    return moved


@device_function
def _load(mean, target, in_mean, in_target, live):
    """One tile of both."""
    x = tl.load(mean + in_mean, mask=live, other=0.0)
    y = tl.load(target + in_target, mask=live, other=0.0)
    return x, y


@device_function
def _store_gradients(weighted, w, scale, grad_mean, grad_target, live):
    """Of one tile: scale * w r, and its negative, where one is wanted."""
    if grad_mean is not None:
        gradient = selected(weighted * scale, w)
        tl.store(grad_mean, rounded(gradient, grad_mean.dtype.scalar.element_ty), mask=live)
    if grad_target is not None:
        gradient = selected(-weighted * scale, w)
        tl.store(grad_target, rounded(gradient, grad_target.dtype.scalar.element_ty), mask=live)


@device_function
def _planes(
    mean, target, grad_mean, grad_target, positions, alpha, g, totals, partial,
    outer, channels, inner, tail, mean_stride, target_stride, grad_mean_stride, grad_target_stride,
    chunks, channels_by, inner_by, eps_bits, k_bits, pid,
    VEC: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, SHORT: tl.constexpr, NARROW: tl.constexpr,
    AHEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # One channel's values in memory order, cut into chunks: small planes share a program, big ones are split.
    # Everything is counted in vectors of VEC neighbours, which never cross a plane's end. The first tile is on its way
    # while the channel's variance is computed, and with AHEAD every other while the one before it is. The weights of a
    # chunk's positions are neighbours; vectors without a weight are not loaded.
    UNITS: tl.constexpr = TILE // VEC
    CHUNK_UNITS: tl.constexpr = CHUNK // VEC
    inner = inner.to(tl.int64)
    turn = quotient(pid, channels_by)
    chunk = turn.to(tl.int64)
    channel = (pid - turn * channels).to(tl.int64)
    begin = chunk * CHUNK_UNITS
    count = tl.minimum(outer.to(tl.int64) * inner - begin, CHUNK_UNITS).to(tl.int32)
    first = start_of(begin, inner, inner_by, NARROW)
    within = begin - first * inner
    plane = channel * inner

    mean += (first * mean_stride + plane) * VEC
    target += (first * target_stride + plane) * VEC
    grad_mean = _shifted(grad_mean, (first * grad_mean_stride + plane) * VEC)
    grad_target = _shifted(grad_target, (first * grad_target_stride + plane) * VEC)
    lane = tl.arange(0, VEC)[None, :]
    unit = tl.arange(0, UNITS)
    live = (unit < count)[:, None]
    o, i = place_of(within, unit, inner, inner_by, SHORT)
    o = (o * VEC)[:, None]
    i = (i * VEC)[:, None] + lane
    positions = _shifted(positions, begin * VEC)
    w = weights_at(positions, (unit * VEC)[:, None] + lane, live)
    x, y = _load(mean, target, o * mean_stride + i, o * target_stride + i, needed_units(w, live))
    if grad_mean is not None or grad_target is not None:
        scale = grad_scale(alpha + channel, g, totals, eps_bits, k_bits, True, WIDE)
    else:
        scale = None
    total = tl.full([UNITS, VEC], 0, WIDE)
    for u0 in range(0, count, UNITS):
        r, weighted = residual(x, y, w, WIDE)
        u = u0 + UNITS + unit
        next_live = (u < count)[:, None]
        next_o, next_i = place_of(within, u, inner, inner_by, SHORT)
        next_o = (next_o * VEC)[:, None]
        next_i = (next_i * VEC)[:, None] + lane
        if AHEAD:
            next_w = weights_at(positions, (u * VEC)[:, None] + lane, next_live)
            needed = needed_units(next_w, next_live)
            x, y = _load(mean, target, next_o * mean_stride + next_i, next_o * target_stride + next_i, needed)
        to_mean = _shifted(grad_mean, o * grad_mean_stride + i)
        to_target = _shifted(grad_target, o * grad_target_stride + i)
        _store_gradients(weighted, w, scale, to_mean, to_target, live)
        if partial is not None:
            total += r * weighted
        if not AHEAD:
            next_w = weights_at(positions, (u * VEC)[:, None] + lane, next_live)
            needed = needed_units(next_w, next_live)
            x, y = _load(mean, target, next_o * mean_stride + next_i, next_o * target_stride + next_i, needed)
        o, i, live = next_o, next_i, next_live
        if positions is not None:
            w = next_w
    if tail is not None:  # one plane of one channel, whose last VEC - 1 values or fewer fill no vector
        if chunk == chunks - 1:
            end = (within + count) * VEC + lane + tl.full([UNITS, 1], 0, tl.int64)
            last = (tl.arange(0, UNITS) == 0)[:, None] & (lane < tail)
            last_w = weights_at(positions, count * VEC + lane + tl.full([UNITS, 1], 0, tl.int32), last)
            last_x, last_y = _load(mean, target, end, end, needed_ones(last_w, last))
            r, weighted = residual(last_x, last_y, last_w, WIDE)
            to_mean = _shifted(grad_mean, end)
            _store_gradients(weighted, last_w, scale, to_mean, _shifted(grad_target, end), last)
            if partial is not None:
                total += r * weighted
    if partial is not None:
        tl.store(partial + channel * chunks + chunk, tl.sum(total))


@triton.jit(
    do_not_specialize=["partials_at", "outer", "channels", "inner", "tail", "mean_stride", "target_stride",
                       "grad_mean_stride", "grad_target_stride", "chunks", "channels_by", "inner_by", "m", "eps_bits",
                       "k_bits", "programs"]
)  # fmt: skip
def sweep_planes(
    mean, target,            # [outer, C, inner]
    grad_mean, grad_target,  # the same, or None: not wanted; grad_mean may be mean
    positions,               # [outer, inner], uint8 or WIDE, the weight of each; None: 1
    alpha,                   # [C]
    g,                       # scalar; None is 1
    sum_sq,                  # [C] fp64, forward's: with grad_alpha
    grad_alpha,              # [C] in alpha's type, or None: not wanted
    totals,                  # [2] fp64: M and k, with positions always; None: m and k_bits hold
    workspace,               # fp64, [C, chunks] of it receive sums of r^2, or None: not wanted
    partials_at,             # where in it these begin
    outer, channels, inner,  # inner and strides in vectors of VEC
    tail,                    # values beyond the last vector, or None: there are none
    mean_stride: tl.int64, target_stride: tl.int64, grad_mean_stride: tl.int64, grad_target_stride: tl.int64,
    chunks,
    channels_by: tl.int64, inner_by: tl.int64,  # `.plan.divisor` of channels and inner
    m: tl.int64, eps_bits: tl.int64, k_bits: tl.int64,
    programs,                # C * chunks; the programs above it are blocks of grad_alpha
    VEC: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, SHORT: tl.constexpr, NARROW: tl.constexpr,
    AHEAD: tl.constexpr, WIDE: tl.constexpr, ALPHA_BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A pass over planes: neighbours belong to one channel."""
    pid = tl.program_id(0)
    partial = begin_sweep(workspace, partials_at, pid, WIDE, OVERLAP)
    if pid < programs:
        _planes(
            mean, target, grad_mean, grad_target, positions, alpha, g, totals, partial,
            outer, channels, inner, tail, mean_stride, target_stride, grad_mean_stride, grad_target_stride,
            chunks, channels_by, inner_by, eps_bits, k_bits, pid, VEC, TILE, CHUNK, SHORT, NARROW, AHEAD, WIDE,
        )  # fmt: skip
    if grad_alpha is not None:
        if pid >= programs:
            write_grad_alpha(
                alpha, sum_sq, g, grad_alpha, totals, channels, values_of(totals, m), eps_bits, k_bits, pid - programs,
                ALPHA_BLOCK,
            )  # fmt: skip


@device_function
def _rows(
    mean, target, grad_mean, grad_target, positions, alpha, g, totals, partial,
    rows, channels, inner, columns, tail, mean_stride, target_stride, grad_mean_stride, grad_target_stride,
    column_tiles, row_blocks, channels_by, inner_by, tiles_by, eps_bits, k_bits, pid,
    VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, NEAR: tl.constexpr,
    JOINED: tl.constexpr, EACH: tl.constexpr, AHEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # A tile of columns, column j of channel (j / inner) % C, down a block of rows: neighbours in memory are
    # neighbours in the tile whatever the plane's size, and every column has a sum of its own. Tiles are on their way
    # as in `_planes`.
    turn = quotient(pid, tiles_by)
    block = turn.to(tl.int64)
    first = (pid - turn * column_tiles) * COLS
    j = first + tl.arange(0, COLS)
    width = columns * VEC
    begin = block * BLOCK_ROWS
    count = tl.minimum(rows - begin, BLOCK_ROWS).to(tl.int32)

    mean += begin * mean_stride * VEC
    target += begin * target_stride * VEC
    grad_mean = _shifted(grad_mean, begin * grad_mean_stride * VEC)
    grad_target = _shifted(grad_target, begin * grad_target_stride * VEC)
    down = tl.arange(0, ROWS)
    here = (j < width)[None, :]
    there = (down < count)[:, None]
    live = there & here
    # Offsets of rows step, one for each tensor: a product of 64 bits takes four instructions.
    row = (down.to(tl.int64) * VEC)[:, None]
    step = ROWS * VEC
    in_mean = row * mean_stride
    in_target = row * target_stride
    in_grad_mean = row * grad_mean_stride
    in_grad_target = row * grad_target_stride
    column = j[None, :]
    if positions is not None:
        if EACH:
            to_next = 1
            of_column = None
        else:
            to_next, of_column = places_of_columns(j, width, inner, inner_by, channels_by, JOINED)
        positions += begin * to_next
        in_positions = down.to(tl.int64)[:, None] * to_next
        w = weights_of_rows(positions, in_positions, of_column, there, live, EACH)
    else:
        w = None
    needed = needed_columns(w, live, EACH, ROWS, COLS, VEC)
    x, y = _load(mean, target, in_mean + column, in_target + column, needed)
    if grad_mean is not None or grad_target is not None:
        # fp64 logarithms for NEAR channels, each once, then handed out to their columns
        run = quotient(j, inner_by)
        if JOINED:
            near = 0
            of = run - quotient(run, channels_by) * channels
        else:
            near = quotient(first, inner_by)
            of = tl.minimum(run - near, NEAR - 1)  # past the width a column has no channel
        c = near + tl.arange(0, NEAR)
        scale = grad_scale(alpha + c, g, totals, eps_bits, k_bits, c < channels, WIDE)
        scale = tl.gather(scale, of, 0)[None, :]
    else:
        scale = None
    total = tl.full([ROWS, COLS], 0, WIDE)
    for row0 in range(0, count, ROWS):
        r, weighted = residual(x, y, w, WIDE)
        in_mean += step * mean_stride
        in_target += step * target_stride
        next_there = (row0 + ROWS + down < count)[:, None]
        next_live = next_there & here
        if positions is not None:
            in_positions += ROWS * to_next
        if AHEAD:
            if positions is not None:
                next_w = weights_of_rows(positions, in_positions, of_column, next_there, next_live, EACH)
            else:
                next_w = None
            needed = needed_columns(next_w, next_live, EACH, ROWS, COLS, VEC)
            x, y = _load(mean, target, in_mean + column, in_target + column, needed)
        to_target = _shifted(grad_target, in_grad_target + column)
        _store_gradients(weighted, w, scale, _shifted(grad_mean, in_grad_mean + column), to_target, live)
        in_grad_mean += step * grad_mean_stride
        in_grad_target += step * grad_target_stride
        if partial is not None:
            total += r * weighted
        if not AHEAD:
            if positions is not None:
                next_w = weights_of_rows(positions, in_positions, of_column, next_there, next_live, EACH)
            else:
                next_w = None
            needed = needed_columns(next_w, next_live, EACH, ROWS, COLS, VEC)
            x, y = _load(mean, target, in_mean + column, in_target + column, needed)
        live = next_live
        if positions is not None:
            w = next_w
    if tail is not None:  # the last joined row is shorter than the others
        if block == row_blocks - 1:
            end = (rows - begin) * width + j[None, :] + tl.full([ROWS, 1], 0, tl.int64)
            last = (tl.arange(0, ROWS) == 0)[:, None] & (j < tail)[None, :]
            if positions is not None:
                end_in_positions = (rows - begin) * to_next + tl.full([ROWS, 1], 0, tl.int64)
                last_w = weights_of_rows(positions, end_in_positions, of_column, last, last, EACH)
            else:
                last_w = None
            last_x, last_y = _load(mean, target, end, end, needed_ones(last_w, last))
            r, weighted = residual(last_x, last_y, last_w, WIDE)
            to_mean = _shifted(grad_mean, end)
            _store_gradients(weighted, last_w, scale, to_mean, _shifted(grad_target, end), last)
            if partial is not None:
                total += r * weighted
    if partial is not None:
        tl.store(partial + block * width + j, tl.sum(total, 0), mask=j < width)


@triton.jit(
    do_not_specialize=["partials_at", "rows", "channels", "inner", "columns", "tail", "mean_stride", "target_stride",
                       "grad_mean_stride", "grad_target_stride", "column_tiles", "row_blocks", "channels_by",
                       "inner_by", "tiles_by", "m", "eps_bits", "k_bits", "programs"]
)  # fmt: skip
def sweep_rows(
    mean, target,                 # [rows, columns], in memory order
    grad_mean, grad_target,       # the same, or None: not wanted; grad_mean may be mean
    positions,                    # [outer, inner], uint8 or WIDE, the weight of each; None: 1
    alpha,                        # [C]
    g,                            # scalar; None is 1
    sum_sq,                       # [C] fp64, forward's: with grad_alpha
    grad_alpha,                   # [C] in alpha's type, or None: not wanted
    totals,                       # [2] fp64: M and k, with positions always; None: m and k_bits hold
    workspace,                    # fp64, [row blocks, columns] of it receive sums of r^2, or None: not wanted
    partials_at,                  # where in it these begin
    rows: tl.int64, channels, inner,
    columns,                      # of one row, joined or not, and the strides: in vectors of VEC
    tail,                         # values in the short last row, or None: there is none
    mean_stride: tl.int64, target_stride: tl.int64, grad_mean_stride: tl.int64, grad_target_stride: tl.int64,
    column_tiles, row_blocks,
    channels_by: tl.int64, inner_by: tl.int64, tiles_by: tl.int64,  # `.plan.divisor` of channels, inner, column_tiles
    m: tl.int64, eps_bits: tl.int64, k_bits: tl.int64,
    programs,                     # row blocks * column tiles; the programs above it are blocks of grad_alpha
    VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, NEAR: tl.constexpr,
    JOINED: tl.constexpr,
    EACH: tl.constexpr,           # positions: one for each row, of all its columns
    AHEAD: tl.constexpr, WIDE: tl.constexpr, ALPHA_BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A pass over rows: channels are neighbours (inner = 1), or planes are too small or odd to be walked."""
    pid = tl.program_id(0)
    partial = begin_sweep(workspace, partials_at, pid, WIDE, OVERLAP)
    if pid < programs:
        _rows(
            mean, target, grad_mean, grad_target, positions, alpha, g, totals, partial,
            rows, channels, inner, columns, tail,
            mean_stride, target_stride, grad_mean_stride, grad_target_stride,
            column_tiles, row_blocks, channels_by, inner_by, tiles_by, eps_bits, k_bits, pid,
            VEC, ROWS, COLS, BLOCK_ROWS, NEAR, JOINED, EACH, AHEAD, WIDE,
        )  # fmt: skip
    if grad_alpha is not None:
        if pid >= programs:
            write_grad_alpha(
                alpha, sum_sq, g, grad_alpha, totals, channels, values_of(totals, m), eps_bits, k_bits, pid - programs,
                ALPHA_BLOCK,
            )  # fmt: skip
