"""Weights of positions: their part in a sweep's tiles, and the kernels that add all of them.

A sweep without weights passes None for them: nothing is then left of what is here.
"""

# The body of a kernel is Triton's language: untyped, and what is known at compile time must stand in an `if` of its
# own, since `and` would make it a number of the device.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: SIM108

import triton
import triton.language as tl

from vidfast.backends.triton.math import device_function, float64_of, quotient, widened


@device_function
def weights_at(positions, at, live):
    """A tile's weights, 0 where nothing is live, or None: there are none."""
    if positions is not None:
        w = tl.load(positions + at, mask=live, other=0)
    else:
        w = None
    return w


@device_function
def residual(x, y, w, WIDE: tl.constexpr):
    """r = mean - target of a tile, and w r, in the type that it is computed in. Where w is 0 both are."""
    r = widened(x, WIDE) - widened(y, WIDE)
    if w is not None:
        r = tl.where(w != 0, r, 0.0)
        weighted = w.to(WIDE) * r
    else:
        weighted = r
    return r, weighted


@device_function
def selected(gradient, w):
    """A tile's gradient, and 0 where w is: 0 times a scale that is not finite would not be."""
    if w is not None:
        gradient = tl.where(w != 0, gradient, 0.0)
    return gradient


@device_function
def needed_units(w, live):
    """[UNITS, 1], which of the live vectors are to be loaded: those with a weight that is not 0, w is [UNITS, VEC].

    A mask that is the same for a whole vector keeps it one access.
    """
    if w is not None:
        live = tl.max(tl.abs(w), 1)[:, None] != 0
    return live


@device_function
def needed_ones(w, live):
    """The same, element by element."""
    if w is not None:
        live = live & (w != 0)
    return live


@device_function
def places_of_columns(j, width, inner, inner_by, channels_by, JOINED: tl.constexpr):
    """How many positions a row of `width` columns has, and of which of them columns j are."""
    run = quotient(j, inner_by)
    if JOINED:
        a_row = quotient(quotient(width, inner_by), channels_by) * inner
        place = j - run * inner + quotient(run, channels_by) * inner
    else:
        a_row = inner
        place = j - run * inner
    return a_row.to(tl.int64), place[None, :]


@device_function
def weights_of_rows(positions, in_positions, of_column, there, live, EACH: tl.constexpr):
    """The weights of a tile of rows: [ROWS, COLS], or [ROWS, 1] where each row has one for all of its columns."""
    if EACH:
        w = tl.load(positions + in_positions, mask=there, other=0)
    else:
        w = tl.load(positions + (in_positions + of_column), mask=live, other=0)
    return w


@device_function
def needed_columns(w, live, EACH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr):
    """[ROWS, COLS], as needed_units, for vectors that are VEC neighbours in a row."""
    if w is None:
        needed = live
    elif EACH or VEC == 1:
        needed = live & (w != 0)
    else:
        vectors = tl.reshape(tl.abs(w), [ROWS, COLS // VEC, VEC])
        found = tl.broadcast_to(tl.max(vectors, 2)[:, :, None], [ROWS, COLS // VEC, VEC])
        # the compiler does not see through the change of shape that neighbours are the same
        needed = tl.max_constancy(tl.reshape(found, [ROWS, COLS]) != 0, [1, VEC])
    return needed


@device_function
def _sum(positions, begin, count, TILE: tl.constexpr):
    # Bytes are added in int32, exactly: 2^17 of them have less than 2^31. Other weights in fp64.
    positions += begin
    if positions.dtype.element_ty == tl.uint8:
        added = tl.zeros([TILE], tl.int32)
    else:
        added = tl.zeros([TILE], tl.float64)
    for first in range(0, count, TILE):
        at = first + tl.arange(0, TILE)
        added += tl.load(positions + at, mask=at < count, other=0).to(added.dtype)
    return tl.sum(added).to(tl.float64)


# How many weights a thread loads at once must not follow from their address: it is part of the order of summation.
@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["positions"])
def sum_positions(
    positions,                # [count]
    sums,                     # [programs] fp64
    count: tl.int64,
    CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The sums of the weights of CHUNK positions each."""
    pid = tl.program_id(0)
    begin = pid.to(tl.int64) * CHUNK
    tl.store(sums + pid, _sum(positions, begin, tl.minimum(count - begin, CHUNK).to(tl.int32), TILE))


@triton.jit(
    do_not_specialize=["count", "values", "channels", "k_bits"], do_not_specialize_on_alignment=["positions"]
)
def total(
    positions,                # [count]: weights, or sums of them; None: M is `values`
    factor,                   # one number that k is multiplied by, or None
    totals,                   # [2] fp64: M and k
    count: tl.int64,
    values: tl.int64,
    channels: tl.int64,       # if not 0, k is divided by M times this; with positions k is 0 where M is
    k_bits: tl.int64,
    TILE: tl.constexpr,
):  # fmt: skip
    """M and k, by one program."""
    k = float64_of(k_bits)
    if factor is not None:
        k *= widened(tl.load(factor), tl.float64)
    if positions is not None:
        m = _sum(positions, 0, count.to(tl.int32), TILE)
    else:
        m = values.to(tl.float64)
    divisor = m * channels.to(tl.float64)
    k = k / tl.where(divisor == 0.0, 1.0, divisor)
    if positions is not None:  # whatever the factor is: one over nothing, say
        k = tl.where(m == 0.0, 0.0, k)
    tl.store(totals, m)
    tl.store(totals + 1, k)
