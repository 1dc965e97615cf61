"""The rule that cuts rows of elements into programs: every element once with its own weight, vectors where they fit."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from vidfast.backends.triton import heteroscedastic_plan
from vidfast.backends.triton.heteroscedastic_plan import (
    IN_PLANES,
    NEIGHBOURS,
    SHARED,
    SINGLE,
    Elements,
    Weighing,
    plan_elements,
    plan_ending,
    plan_weights,
)
from vidfast.backends.triton.plan import LONGEST_RUN, RULE, VECTOR_BYTES, Tuning, divisor
from vidfast.heteroscedastic.layout import Rows

SIZES = [(2, 2, 2), (4, 4, 4), (8, 8, 8), (2, 2, 4), (4, 2, 2), (2, 8, 4)]
SMALL = RULE._replace(warps=1, programs=1)


def rows(outer: int, row: int, gaps: tuple[int, ...] = (0,) * 5, channels: int = 1, inner: int = 1) -> Rows:
    return Rows(outer, row, *(row + gap for gap in gaps), channels=channels, inner=inner)


# Small enough to walk.
WALKED = [
    rows(1, 1), rows(1, 7), rows(1, 8), rows(1, 1003), rows(1, 4096), rows(64, 1, (1, 0, 1, 0, 0)),
    rows(33, 3, (3, 0, 3, 0, 0), 3), rows(5, 96, (96, 0, 96, 0, 96), 6, 16), rows(3, 2000, (2000, 0, 0, 0, 0), 10, 200),
    rows(7, 33, (2, 5, 0, 0, 1), 3, 11), rows(4, 40, channels=5, inner=8), rows(1, 9 * 5 * 49, channels=5, inner=49),
    rows(1, 70 * 24, channels=24), rows(1, 501 * 3, channels=3), rows(1, 3 * 1600, channels=1600),
    rows(61, 24, (8, 16, 24, 8, 0), 24), rows(2, 3000, (8, 8, 8, 8, 8), 1500),
]  # fmt: skip
LARGE = [
    rows(1, 64 * 256 * 56 * 56), rows(1, 1 << 33), rows(64, 1 << 20, (1 << 20, 0, 1 << 20, 0, 0)),
    rows(1 << 13, 1 << 20, (1 << 20, 0, 1 << 20, 0, 0), 1 << 10, 1 << 10), rows(1 << 20, 49, (49, 0, 49, 0, 0), 1, 49),
]  # fmt: skip


def quotient(n: np.ndarray, d: int) -> np.ndarray:
    """As the kernels divide: n below 2^31."""
    assert n.max(initial=0) < 1 << 31
    by = divisor(d)
    return n * (by & 0xFFFFFFFF) >> (by >> 32)


def place_of(within: int, u: np.ndarray, row: int, short: bool) -> tuple[np.ndarray, np.ndarray]:
    t = within + u
    o = quotient(t, row) if short else (t >= row).astype(np.int64)
    return o, t - o * row


def start_of(begin: int, row: int, narrow: bool) -> int:
    return int(quotient(np.array(begin), row)) if narrow else begin // row


def walked(cut: Elements, at: Weighing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, element in it, position) of everything that the programs touch, in their order."""
    vec, found = cut.vec, []
    lane = np.arange(vec)
    for pid in range(cut.programs):
        begin = pid * (cut.chunk // vec)
        count = min(cut.outer * cut.row - begin, cut.chunk // vec)
        units = np.arange(count)
        last = cut.tail is not None and pid == cut.programs - 1
        if last:
            units = np.arange(count + 1)
        if cut.outer == 1:
            o, i = np.zeros_like(units), begin + units
        else:
            first = start_of(begin, cut.row, cut.narrow)
            o, i = place_of(begin - first * cut.row, units, cut.row, cut.short)
            o = first + o
        j = i[:, None] * vec + lane
        if at.kind == NEIGHBOURS:
            position = (begin + units)[:, None] * vec + lane
        else:
            start = begin * vec if at.kind == SINGLE else begin
            run = start_of(start, at.run, at.narrow)
            u = units[:, None] * vec + lane if at.kind == SINGLE else units
            block, within = place_of(start - run * at.run, u, at.run, at.short)
            if at.kind == SHARED:
                position = np.broadcast_to((run + block)[:, None], j.shape)
            else:
                plane = quotient(within, at.step) if at.small else within // at.step
                position = (run + block) * at.step + within - plane * at.step
                if at.kind == IN_PLANES:
                    position = position[:, None] * vec + lane
        here = np.ones(j.shape, bool)
        if last:
            here[-1] = lane < cut.tail
        found.append([x[here] for x in (np.broadcast_to(o[:, None], j.shape), j, position)])
    o, j, position = (np.concatenate(x) for x in zip(*found, strict=True))
    return o, j, position


@pytest.mark.parametrize("tuning", [RULE, SMALL, SMALL._replace(lanes=64)], ids=["rule", "small", "small64"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("given", WALKED, ids=lambda r: f"{r.outer}x{r.row}-{r.channels}-{r.inner}")
def test_every_element_once_with_its_weight(
    monkeypatch: pytest.MonkeyPatch, given: Rows, sizes: tuple[int, int, int], tuning: Tuning
) -> None:
    if tuning.programs == 1:
        monkeypatch.setattr(heteroscedastic_plan, "TIMES_AS_MANY", 1)
    cut = plan_elements.__wrapped__(given, sizes, tuning)
    o, j, position = walked(cut, plan_weights(given, cut))
    e = np.arange(given.outer * given.row)
    # dense in all: one row
    assert np.array_equal(o * (cut.row * cut.vec) + j, e)
    if cut.outer > 1:
        assert np.array_equal(o, e // given.row)
        assert np.array_equal(j, e % given.row)
    assert np.array_equal(position, e // (given.channels * given.inner) * given.inner + e % given.inner)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("lanes", [32, 64])
@pytest.mark.parametrize(
    "given", [*WALKED, *LARGE], ids=lambda r: f"{r.outer}x{r.row}-{r.channels}-{r.inner}"
)
def test_extents(given: Rows, lanes: int, sizes: tuple[int, int, int]) -> None:
    cut = plan_elements(given, sizes, RULE._replace(lanes=lanes))
    at = plan_weights(given, cut)
    values = given.outer * given.row
    assert cut.outer * cut.row * cut.vec + (cut.tail or 0) == values
    assert (cut.programs - 1) * cut.chunk < cut.outer * cut.row * cut.vec <= cut.programs * cut.chunk
    assert cut.programs < 1 << 31
    assert cut.chunk % cut.tile == cut.tile % cut.vec == 0
    assert cut.chunk <= LONGEST_RUN * cut.tile
    assert cut.tile >= cut.warps * lanes * cut.vec, "a thread would read what another writes in place"
    assert cut.vec * min(sizes) <= VECTOR_BYTES
    assert cut.short or cut.outer == 1 or cut.chunk <= cut.row * cut.vec, "a chunk crosses one end at most"
    assert not cut.short or cut.row + cut.chunk < 1 << 31
    assert not cut.narrow or cut.programs * cut.chunk // cut.vec < 1 << 31
    if cut.outer > 1:
        strides = cut[3:8]
        assert [stride * cut.vec for stride in strides] == list(given[2:7])
    unit = 1 if at.kind == SINGLE else cut.vec
    assert at.short or at.kind == NEIGHBOURS or cut.chunk // unit <= at.run
    assert not at.short or at.run + cut.chunk // unit < 1 << 31
    assert cut.tail is None or at.kind in (NEIGHBOURS, SINGLE), (
        "a tail would be cut out of one weight's vector"
    )
    if values >= 1 << 23:
        assert cut.programs >= 4096


@pytest.mark.parametrize(
    ("given", "sizes", "vec", "kind"),
    [
        (rows(1, 1 << 20), (2, 2, 2), 8, NEIGHBOURS),
        (rows(1, (1 << 20) + 5), (2, 4, 4), 8, NEIGHBOURS),
        (rows(1, 1 << 20), (8, 2, 2), 4, NEIGHBOURS),
        (rows(64, 4096, (4096, 0, 4096, 0, 0), 16, 256), (2, 2, 2), 8, IN_PLANES),
        (rows(64, 4096, (4094, 0, 4096, 0, 0), 16, 256), (2, 2, 2), 2, IN_PLANES),
        (rows(64, 4096, (4096, 0, 4096, 0, 1), 16, 256), (4, 4, 4), 1, IN_PLANES),
        (rows(1, 1 << 20, channels=32), (4, 4, 4), 4, SHARED),
        (rows(1, 10 << 20, channels=10), (4, 4, 4), 4, SINGLE),
        (rows(1, 49 << 16, channels=64, inner=49), (4, 4, 4), 4, SINGLE),
        (rows(512, 49, (49, 0, 49, 0, 0), 1, 49), (2, 2, 2), 1, NEIGHBOURS),
    ],
)
def test_vectors_and_weights(given: Rows, sizes: tuple[int, int, int], vec: int, kind: int) -> None:
    cut = plan_elements(given, sizes)
    assert cut.vec == vec
    assert plan_weights(given, cut).kind == kind


def test_rows_without_gaps_are_one() -> None:
    for outer, row in product((1, 3, 100), (1, 33, 64)):
        cut = plan_elements(rows(outer, row), (4, 4, 4))
        assert cut.outer == 1
        assert cut.row * cut.vec + (cut.tail or 0) == outer * row


@pytest.mark.parametrize("programs", [1, 2, 33, 4096, 100_000])
def test_the_finish_loads_what_a_thread_holds(programs: int) -> None:
    ending = plan_ending(programs)
    assert ending.tile >= min(programs, 4096)
    assert ending.tile <= 16 * RULE.lanes * ending.warps
