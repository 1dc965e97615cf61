"""The rule that cuts a shape into programs: every element once, vectors where they fit, enough programs."""

from __future__ import annotations

from math import prod

import pytest

from vidfast.backends.triton.plan import (
    FEW_ROWS,
    LONGEST_RUN,
    RULE,
    Finish,
    Flat,
    Planes,
    Rows,
    divisor,
    plan,
    plan_finish,
    plan_scale,
)

# outer, channels, inner
SHAPES = [
    (64, 256, 3136), (256, 256, 196), (128, 64, 1024), (16, 256, 16384), (200704, 256, 1), (4096, 10, 1), (3, 10, 1),
    (1, 1, 100001), (7, 1, 33333), (2, 3, 1000001), (5, 24, 49), (64, 16, 4), (1027, 1, 1), (1, 1000, 1), (3, 257, 25),
    (1, 1, 1), (1, 5, 1), (1 << 12, 512, 1024), (2, 1 << 16, 1 << 15),
]  # fmt: skip
SIZES = [(2, 2), (4, 4), (8, 8), (2, 4), (2, 8)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lanes", [32, 64])
def test_every_element_belongs_to_one_program(
    lanes: int, shape: tuple[int, int, int], sizes: tuple[int, int]
) -> None:
    _, channels, inner = shape
    p = plan(*shape, channels * inner, channels * inner, *sizes, RULE._replace(lanes=lanes))
    assert p.programs < 2**31
    if isinstance(p, Planes):
        assert p.outer * p.inner * p.vec * channels + (p.tail or 0) == prod(shape)
        assert (p.chunks - 1) * p.chunk < p.outer * p.inner * p.vec <= p.chunks * p.chunk
        assert p.programs == p.chunks * channels
        assert p.chunk % p.tile == p.tile % p.vec == 0
        assert p.chunk <= LONGEST_RUN * p.tile
        # without 32-bit divisions a chunk must cross one plane's end at most
        assert p.short or p.outer == 1 or p.chunk <= p.inner * p.vec
    else:
        assert p.rows * p.columns * p.vec + (p.tail or 0) == prod(shape)
        assert p.columns * p.vec == channels * inner * p.join
        assert (p.row_blocks - 1) * p.block_rows < p.rows <= p.row_blocks * p.block_rows
        assert (p.column_tiles - 1) * p.tile_columns < p.columns * p.vec <= p.column_tiles * p.tile_columns
        assert p.block_rows % p.tile_rows == 0
        assert p.block_rows <= LONGEST_RUN * p.tile_rows
        # the channels of any tile fit its table
        tiles = range(0, p.columns * p.vec, p.tile_columns)
        for first in [*tiles[:3], tiles[-1]]:
            last = min(first + p.tile_columns, p.columns * p.vec) - 1
            assert p.near >= (channels if p.join > 1 else last // inner - first // inner + 1)
    blocks, depth = p.partials
    end = plan_finish(blocks, channels, depth)
    assert (end.programs - 1) * end.channels < channels <= end.programs * end.channels


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if prod(s) >= 1 << 23], ids=str)
def test_large_problems_fill_a_gpu(shape: tuple[int, int, int], sizes: tuple[int, int]) -> None:
    width = shape[1] * shape[2]
    assert plan(*shape, width, width, *sizes).programs >= 512


@pytest.mark.parametrize(
    ("shape", "sizes", "family", "vec"),
    [
        ((64, 256, 3136), (2, 2), Planes, 8),
        ((256, 256, 196), (4, 4), Planes, 4),
        ((256, 256, 196), (2, 2), Rows, 8),  # 392 bytes are no whole number of vectors, a row is
        ((64, 512, 49), (2, 2), Rows, 8),
        ((200704, 256, 1), (2, 4), Rows, 8),
        ((4096, 10, 1), (4, 4), Rows, 4),  # joined
        ((7, 1, 33333), (2, 2), Planes, 8),  # with a tail
        ((FEW_ROWS - 1, 24, 49), (4, 4), Planes, 1),
    ],
)
def test_family_and_vectors(
    shape: tuple[int, int, int], sizes: tuple[int, int], family: type, vec: int
) -> None:
    width = shape[1] * shape[2]
    p = plan(*shape, width, width, *sizes)
    assert isinstance(p, family)
    assert p.vec == vec


def test_strides_decide_alignment() -> None:
    outer, channels, inner = 64, 6, 1024
    width = channels * inner
    assert plan(outer, channels, inner, width + 2 * inner, width, 4, 4).vec == 4
    assert plan(outer, channels, inner, width + 2, width, 4, 4).vec == 2
    strided = plan(4096, 10, 1, 20, 10, 4, 4)
    assert isinstance(strided, Rows)
    assert strided.join == 1, "rows that do not lie back to back cannot be joined"


@pytest.mark.parametrize(
    ("outer", "row", "stride"), [(1, 1000001, 1000001), (64, 3136, 3136), (5, 49, 98), (3, 7, 8), (1, 1, 1)]
)
def test_scaling_covers_every_element(outer: int, row: int, stride: int) -> None:
    flat = plan_scale(outer, row, stride, stride, 2)
    assert isinstance(flat, Flat)
    assert flat.outer * flat.row * flat.vec + (flat.tail or 0) == outer * row
    assert (flat.chunks - 1) * flat.chunk < flat.outer * flat.row * flat.vec <= flat.chunks * flat.chunk
    assert flat.short or flat.outer == 1 or flat.chunk <= flat.row * flat.vec


@pytest.mark.parametrize("d", [1, 2, 3, 5, 7, 49, 196, 255, 1000, 65537, 6700417, (1 << 31) - 1])
def test_a_divisor_divides_exactly(d: int) -> None:
    """At the multiples of d and beside them, up to 2^31; as the kernels compute it, in int64."""
    by = divisor(d)
    factor, shift = by & 0xFFFFFFFF, by >> 32
    assert factor * ((1 << 31) - 1) < 1 << 63
    largest = ((1 << 31) - 1) // d
    for multiple in {0, 1, 2, largest - 1, largest, *(largest * i // 97 for i in range(97))}:
        for n in (multiple * d - 1, multiple * d, multiple * d + 1, (1 << 31) - 1):
            if 0 <= n < 1 << 31:
                assert n * factor >> shift == n // d


def test_extents_beyond_32_bits_are_divided_in_64() -> None:
    """A chunk's first vector is divided by its plane's: by multiplication where that is exact."""
    plane = 1 << 20
    for outer, narrow in ((1 << 12, True), (1 << 14, False)):
        planes = plan(outer, 1, plane, 2 * plane, plane, 4, 4)  # with gaps: no single plane
        assert isinstance(planes, Planes)
        assert planes.narrow is narrow
        assert plan_scale(outer, plane, 2 * plane, plane, 4).narrow is narrow


@pytest.mark.parametrize(
    ("partials", "wanted"),
    [
        ((784, 256, 1), Finish(784, 1, True, 32, 8, 512, 8)),  # channels last, 56x56
        ((16, 1000, 1), Finish(16, 1, True, 32, 32, 16, 4)),  # logits
        ((1, 256, 7), Finish(1, 7, False, 8, 32, 8, 4)),  # planes
        ((1, 1, 5000), Finish(1, 5000, False, 1, 1, 4096, 8)),  # one channel
    ],
)
def test_the_finish_is_as_wide_as_its_sums(partials: tuple[int, int, int], wanted: Finish) -> None:
    assert plan_finish(*partials) == wanted
    assert wanted.channels * wanted.depth <= 16 * 32 * wanted.warps, "more loads in flight than a thread has"
