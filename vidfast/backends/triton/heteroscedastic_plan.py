"""How a sweep over elements with variances of their own is cut into programs: from shapes, strides and dtypes alone.

No program has anything to prepare that many elements would have to share, so chunks are smaller than in `plan`, and
nothing but rows is told apart. docs/kernel-notes.md says what decided the numbers.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import NamedTuple

from vidfast.backends.triton.plan import LONGEST_RUN, RULE, VECTOR_BYTES, Tuning, ceil_div
from vidfast.heteroscedastic.layout import Rows

# Programs wanted at least, as a multiple of `Tuning.programs`: several for each place that a GPU has for one, so that
# the last ones end together.
TIMES_AS_MANY = 4
# Partial sums that the finish loads at once, 16 a thread.
FINISH_TILE = 4096

# How the weights of positions are stored beside the elements.
NO_WEIGHTS = 0
NEIGHBOURS = 1  # one for each element, in the elements' order
IN_PLANES = 2  # a vector's are neighbours
SHARED = 3  # a vector has one
SINGLE = 4  # each is looked for by itself


class Elements(NamedTuple):
    """Rows of neighbours, cut into chunks. Extents and strides are in vectors of `vec`."""

    outer: int
    row: int
    tail: int | None  # elements beyond the last vector of the only row
    mean_stride: int
    target_stride: int
    raw_stride: int
    grad_mean_stride: int
    grad_raw_stride: int
    programs: int
    vec: int
    tile: int
    chunk: int
    short: bool
    narrow: bool
    warps: int


class Weighing(NamedTuple):
    """Where the weights are: of a run of elements that has `step` positions, one for each of its channels' planes.

    Both are in vectors, or for SINGLE in elements.
    """

    kind: int = NO_WEIGHTS
    run: int = 1
    step: int = 1
    short: bool = False  # a chunk may be longer than a run
    narrow: bool = True  # all extents are below 2^31
    small: bool = True  # a run is


class Ending(NamedTuple):
    """One program that adds the partial sums, `tile` at once."""

    tile: int
    warps: int


@lru_cache(maxsize=4096)
def plan_elements(rows: Rows, sizes: tuple[int, int, int], tuning: Tuning = RULE) -> Elements:
    """The sweep for tensors with elements of so many bytes: one vector of each a thread, of the narrowest one's."""
    outer, row = rows.outer, rows.row
    strides = rows[2:7]
    if outer == 1 or all(stride == row for stride in strides):
        outer, row = 1, outer * row
        strides = (row,) * 5
    # fp64 takes registers: two vectors of the widest at most
    full = VECTOR_BYTES // max(min(sizes), max(sizes) // 2)
    tail = 0
    if outer == 1 and row >= full:
        vec, tail = full, row % full
    else:
        vec = gcd(full, row, *(strides if outer > 1 else ()))
    values = outer * row
    tile = min(tuning.lanes * tuning.warps * full, max(_up(values), tuning.lanes * full))
    wanted = TIMES_AS_MANY * tuning.programs
    chunk = max(tile, min(_down(values // wanted), LONGEST_RUN * tile))
    programs = ceil_div(values // vec, chunk // vec)
    return Elements(
        outer=outer,
        row=row // vec,
        tail=tail or None,
        mean_stride=strides[0] // vec,
        target_stride=strides[1] // vec,
        raw_stride=strides[2] // vec,
        grad_mean_stride=strides[3] // vec,
        grad_raw_stride=strides[4] // vec,
        programs=programs,
        vec=vec,
        tile=tile,
        chunk=chunk,
        short=outer > 1 and chunk > row,
        narrow=programs * (chunk // vec) < 1 << 31,
        warps=max(1, min(tuning.warps, tile // (tuning.lanes * full))),
    )


@lru_cache(maxsize=4096)
def plan_weights(rows: Rows, cut: Elements) -> Weighing:
    """How a sweep that is cut like this finds the weights of its positions."""
    channels, inner, vec = rows.channels, rows.inner, cut.vec
    if channels == 1:
        return Weighing(NEIGHBOURS)
    if inner % vec == 0:
        kind, unit = IN_PLANES, vec
    elif inner == 1 and channels % vec == 0:
        kind, unit = SHARED, vec
    else:
        kind, unit = SINGLE, 1
    run, chunk = channels * inner // unit, cut.chunk // unit
    return Weighing(
        kind, run, max(inner // unit, 1),
        short=chunk > run,
        narrow=rows.outer * rows.row // unit + chunk < 1 << 31,
        small=run < 1 << 31,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def plan_ending(programs: int, tuning: Tuning = RULE) -> Ending:
    """The program for so many partial sums."""
    tile = min(_up(programs), FINISH_TILE)
    return Ending(tile, max(1, min(8, tile // tuning.lanes)))


def _up(n: int) -> int:
    """The power of two at or above n."""
    return 1 << (n - 1).bit_length()


def _down(n: int) -> int:
    """The power of two at or below n, at least 1."""
    return 1 << (max(n, 1).bit_length() - 1)
