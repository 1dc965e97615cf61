"""How a sweep is cut into programs: the rule, from shapes, strides and dtypes alone.

Nothing here is measured at run time, so the first call of a shape costs no search and the order of summation
never depends on timing. docs/triton.md explains the numbers, docs/kernel-notes.md says what decided each; `Tuning`
holds those that a search may change.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import NamedTuple

# Bytes of one vector access.
VECTOR_BYTES = 16
# A plane of fewer bytes is walked in rows of all channels: a program's reads would be too short.
SHORT_PLANE_BYTES = 512
# Fewer rows than this do not pay for a partial sum per column.
FEW_ROWS = 16
# Rows narrower than this may be joined to fill vectors.
NARROW_ROW = 1024
# Column offsets within one row are 32-bit.
WIDEST_ROW = 1 << 30
# Terms that one fp32 accumulator sums before its sum goes pairwise.
LONGEST_RUN = 64
# Values of a tile that a thread has where positions have weights: these take registers too.
WEIGHTED_VALUES = 8
# Channels of one program that does per-channel work only.
ALPHA_BLOCK = 128
# Weights of positions are added by one program up to so many, more of them in chunks, each by one. 2^17 bytes at most:
# their sum has 32 bits.
ADDED_AT_ONCE = 1 << 17
ADDED_IN_CHUNKS = 1 << 15


class Tuning(NamedTuple):
    """The free numbers of the rule."""

    vectors: int = 2  # vectors of a tensor that a thread has in flight; of the wider one, where they differ
    warps: int = 4
    lanes: int = 32  # threads of a warp: 64 on AMD's data centre GPUs
    programs: int = 1024  # wanted at least, as long as each has `smallest_chunk`
    smallest_chunk: int = 4096
    largest_chunk: int = 65536
    ahead: int = 1  # 1: a tile is loaded while the one before it is computed; 0: behind it
    finish_depth: int = (
        512  # partial sums of a channel that a program of the finish loads at once (rows only)
    )
    overlap: int = 0  # 1: the finish starts while the sweep ends (NVIDIA, compute capability 9.0, Triton 3.4)


RULE = Tuning()


class Planes(NamedTuple):
    """Neighbours of one channel, each channel's values cut into chunks. Extents are in vectors of `vec`."""

    outer: int
    inner: int
    tail: int | None
    mean_stride: int
    target_stride: int
    dense_stride: int
    chunks: int
    programs: int
    vec: int
    tile: int
    chunk: int
    short: bool
    narrow: bool
    warps: int

    @property
    def partials(self) -> tuple[int, int]:
        """(blocks, inner) of the partial sums, [blocks, C, inner]."""
        return 1, self.chunks


class Rows(NamedTuple):
    """Rows of all channels, cut into tiles of columns and blocks of rows. Extents are in vectors of `vec`."""

    rows: int
    inner: int  # in elements
    columns: int
    tail: int | None
    join: int
    mean_stride: int
    target_stride: int
    dense_stride: int
    column_tiles: int
    row_blocks: int
    programs: int
    vec: int
    tile_rows: int
    tile_columns: int
    block_rows: int
    near: int
    warps: int

    @property
    def partials(self) -> tuple[int, int]:
        """(blocks, inner) of the partial sums, [blocks, C, inner]."""
        return self.row_blocks * self.join, self.inner


class Finish(NamedTuple):
    """Programs that add the partial sums, tiles of [channels, depth]."""

    blocks: int
    inner: int
    across: bool
    programs: int
    channels: int
    depth: int
    warps: int


class Flat(NamedTuple):
    """A tensor scaled element by element. Extents are in vectors of `vec`."""

    outer: int
    row: int
    tail: int | None
    src_stride: int
    dst_stride: int
    chunks: int
    vec: int
    tile: int
    chunk: int
    short: bool
    narrow: bool
    warps: int


class Total(NamedTuple):
    """Programs that add weights, tile after tile; where they are several, one more adds their sums."""

    programs: int
    tile: int
    chunk: int
    warps: int


# A tensor that is absent: no chunk of it is scaled.
NOTHING = Flat(
    outer=1,
    row=1,
    tail=None,
    src_stride=1,
    dst_stride=1,
    chunks=0,
    vec=1,
    tile=1,
    chunk=1,
    short=False,
    narrow=True,
    warps=4,
)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@lru_cache(maxsize=4096)
def divisor(d: int) -> int:
    """What a kernel needs for n // d without a division, for 0 <= n < 2^31: a shift, and below it a factor of 32 bits.

    With s = ceil(log2 d) and the factor f = ceil(2^(31 + s) / d), f d exceeds 2^(31 + s) by less than d <= 2^s, so that
    n f / 2^(31 + s) exceeds n / d by less than 1 / d: its floor is n // d (Granlund and Montgomery, PLDI 1994).
    """
    shift = 31 + (d - 1).bit_length()
    return shift << 32 | ceil_div(1 << shift, d)


def _up(n: int) -> int:
    """The power of two at or above n."""
    return 1 << (n - 1).bit_length()


def _down(n: int) -> int:
    """The power of two at or below n, at least 1."""
    return 1 << (max(n, 1).bit_length() - 1)


def _chunk(elements: int, tile: int, tuning: Tuning) -> int:
    """Elements of one program: small enough to fill the device, large enough to amortise its fp64 logarithms."""
    chunk = min(max(_down(elements // tuning.programs), tuning.smallest_chunk), tuning.largest_chunk)
    return max(tile, min(chunk, LONGEST_RUN * tile))


def _warps(tile: int, vec: int, tuning: Tuning) -> int:
    return max(1, min(tuning.warps, tile // (tuning.lanes * vec)))


@lru_cache(maxsize=4096)
def plan(
    outer: int,
    channels: int,
    inner: int,
    mean_stride: int,
    target_stride: int,
    mean_size: int,
    target_size: int,
    tuning: Tuning = RULE,
    weighted: bool = False,
) -> Planes | Rows:
    """The sweep for tensors with elements of so many bytes; strides are in elements. weighted: positions are."""
    width = channels * inner
    size = min(mean_size, target_size)
    tuning = tuning._replace(vectors=max(1, tuning.vectors * size // max(mean_size, target_size)))
    if outer == 1:
        mean_stride = target_stride = width
    dense = mean_stride == target_stride == width
    full = VECTOR_BYTES // size
    if weighted:
        tuning = tuning._replace(vectors=max(1, min(tuning.vectors, WEIGHTED_VALUES // full)))
    if channels == 1 and dense:
        return _planes(1, 1, outer * inner, outer * inner, outer * inner, full, tuning)
    vec = gcd(full, inner)
    if outer > 1:
        vec = gcd(vec, mean_stride, target_stride)
    long = inner * size >= SHORT_PLANE_BYTES
    if (long and vec == full) or width >= WIDEST_ROW or (inner * size >= 64 and outer < FEW_ROWS):
        return _planes(outer, channels, inner, mean_stride, target_stride, full, tuning)
    return _rows(outer, channels, inner, mean_stride, target_stride, full, tuning)


def _planes(
    outer: int, channels: int, inner: int, mean_stride: int, target_stride: int, full: int, tuning: Tuning
) -> Planes:
    width = channels * inner
    tail = 0
    if outer == 1 and channels == 1 and inner >= full:
        vec, tail = full, inner % full
    else:
        vec = gcd(full, inner)
        if outer > 1:
            vec = gcd(vec, mean_stride, target_stride)
    values = outer * inner
    tile = min(tuning.lanes * tuning.warps * full * tuning.vectors, max(_up(values), tuning.lanes * full))
    chunk = max(tile, min(_chunk(values * channels, tile, tuning), _up(values)))
    chunks = ceil_div(values // vec, chunk // vec)
    return Planes(
        outer=outer,
        inner=inner // vec,
        tail=tail or None,
        mean_stride=mean_stride // vec,
        target_stride=target_stride // vec,
        dense_stride=width // vec,
        chunks=chunks,
        programs=channels * chunks,
        vec=vec,
        tile=tile,
        chunk=chunk,
        short=outer > 1 and chunk > inner,
        narrow=chunks * (chunk // vec) < 1 << 31,
        warps=_warps(tile, full, tuning),
    )


def _rows(
    outer: int, channels: int, inner: int, mean_stride: int, target_stride: int, full: int, tuning: Tuning
) -> Rows:
    width = channels * inner
    vec = gcd(full, width)
    if outer > 1:
        vec = gcd(vec, mean_stride, target_stride)
    across = tuning.lanes * full  # columns that one warp reads at once
    join = 1
    if mean_stride == target_stride == width < NARROW_ROW and (vec < full or width < 16):
        step = full // gcd(width, full)
        join = step * max(1, across // (step * width))
        if join > outer:
            join = 1
        else:
            vec = full
    columns = width * join
    rows, tail = outer // join, outer % join * width
    tile = tuning.lanes * tuning.warps * full * tuning.vectors
    tile_columns = min(max(across, tile // _up(rows)), _up(columns))
    tile_rows = min(tile // tile_columns, _up(rows))
    tile = tile_rows * tile_columns
    # Twice the planes' chunk: what a column's partial sum costs is shared by the rows above it.
    chunk = min(2 * _chunk(outer * width, tile, tuning), LONGEST_RUN * tile)
    block_rows = max(tile_rows, chunk // tile_columns)
    if join > 1:
        near = _up(channels)
    elif tile_columns % inner == 0:
        near = tile_columns // inner
    else:
        near = _up(min(channels, (tile_columns - 1) // inner + 2))
    column_tiles, row_blocks = ceil_div(columns, tile_columns), ceil_div(rows, block_rows)
    return Rows(
        rows=rows,
        inner=inner,
        columns=columns // vec,
        tail=tail or None,
        join=join,
        mean_stride=mean_stride * join // vec,
        target_stride=target_stride * join // vec,
        dense_stride=columns // vec,
        column_tiles=column_tiles,
        row_blocks=row_blocks,
        programs=column_tiles * row_blocks,
        vec=vec,
        tile_rows=tile_rows,
        tile_columns=tile_columns,
        block_rows=block_rows,
        near=max(near, 2),
        warps=_warps(tile, full, tuning),
    )


@lru_cache(maxsize=4096)
def plan_finish(blocks: int, channels: int, inner: int, tuning: Tuning = RULE) -> Finish:
    """The programs for partial sums [blocks, C, inner].

    Up to 16 loads in flight a thread, and so few channels a program that many programs share the sums: memory is read
    in sectors of 32 bytes, 8 numbers of fp32.
    """
    across = inner == 1
    depth, most = blocks * inner, _up(channels)
    if across:
        tile_depth = min(_up(depth), tuning.finish_depth)
        tile_channels = min(32 if tile_depth <= 32 else 8, most)
    else:
        tile_depth = min(_up(depth), 4096 if depth > 1024 else 1024)
        tile_channels = max(1, min(1024 // tile_depth, 32, most))
    warps = 8 if tile_channels * tile_depth >= 4096 else 4
    return Finish(blocks, inner, across, ceil_div(channels, tile_channels), tile_channels, tile_depth, warps)


def plan_total(count: int, tuning: Tuning = RULE) -> Total:
    """Programs of 1024 threads for the weights of so many positions, each thread with 16 of them in flight."""
    programs = 1 if count <= ADDED_AT_ONCE else ceil_div(count, ADDED_IN_CHUNKS)
    return Total(programs, 16384, ADDED_IN_CHUNKS, 1024 // tuning.lanes)


@lru_cache(maxsize=4096)
def plan_scale(
    outer: int, row: int, src_stride: int, dst_stride: int, size: int, tuning: Tuning = RULE
) -> Flat:
    """Scaling [outer, row] elements of `size` bytes; strides are in elements."""
    if outer == 1 or src_stride == dst_stride == row:
        outer, row = 1, outer * row
        src_stride = dst_stride = row
    full = VECTOR_BYTES // size
    tail = 0
    if outer == 1 and row >= full:
        vec, tail = full, row % full
    else:
        vec = gcd(full, row, src_stride, dst_stride)
    values = outer * row
    tile = min(tuning.lanes * tuning.warps * full * tuning.vectors, max(_up(values), tuning.lanes * full))
    chunk = _chunk(values, tile, tuning)
    return Flat(
        outer=outer,
        row=row // vec,
        tail=tail or None,
        src_stride=src_stride // vec,
        dst_stride=dst_stride // vec,
        chunks=ceil_div(values // vec, chunk // vec),
        vec=vec,
        tile=tile,
        chunk=chunk,
        short=outer > 1 and chunk > row,
        narrow=values // vec + chunk // vec < 1 << 31,
        warps=_warps(tile, full, tuning),
    )
