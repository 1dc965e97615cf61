"""The kernel that multiplies one-pass gradients by the incoming gradient g. Arguments are as in `kernels`."""

# The body of a kernel is Triton's language: untyped, and what is known at compile time must stand in an `if` of its
# own, since `and` would make it a number of the device.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: SIM102

import triton
import triton.language as tl

from vidfast.backends.triton.math import device_function, place_of, rounded, start_of, widened


@device_function
def _scale_chunk(
    factor, src, dst, outer, row, tail, src_stride, dst_stride, chunks, row_by, pid,
    VEC: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, SHORT: tl.constexpr, NARROW: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    # As `_planes`, with rows for planes.
    UNITS: tl.constexpr = TILE // VEC
    CHUNK_UNITS: tl.constexpr = CHUNK // VEC
    row = row.to(tl.int64)
    begin = pid.to(tl.int64) * CHUNK_UNITS
    count = tl.minimum(outer.to(tl.int64) * row - begin, CHUNK_UNITS).to(tl.int32)
    first = start_of(begin, row, row_by, NARROW)
    within = begin - first * row
    src += first * src_stride * VEC
    dst += first * dst_stride * VEC
    lane = tl.arange(0, VEC)[None, :]
    for u0 in range(0, count, UNITS):
        u = u0 + tl.arange(0, UNITS)
        live = (u < count)[:, None]
        o, i = place_of(within, u, row, row_by, SHORT)
        x = widened(tl.load(src + ((o * src_stride + i) * VEC)[:, None] + lane, mask=live, other=0.0), WIDE)
        tl.store(
            dst + ((o * dst_stride + i) * VEC)[:, None] + lane,
            rounded(x * factor, dst.dtype.element_ty),
            mask=live,
        )
    if tail is not None:
        if pid == chunks - 1:
            end = (within + count) * VEC + tl.arange(0, VEC)
            live = tl.arange(0, VEC) < tail
            x = widened(tl.load(src + end, mask=live, other=0.0), WIDE)
            tl.store(dst + end, rounded(x * factor, dst.dtype.element_ty), mask=live)


@triton.jit(
    do_not_specialize=["outer", "row", "tail", "src_stride", "dst_stride", "chunks", "row_by", "channels"]
)  # fmt: skip
def scale(
    g,                            # scalar
    src, dst,                     # [outer, row]; dst may be src; or None
    grad_alpha, grad_alpha_out,   # [C], fp64 and alpha's type; or None
    outer, row: tl.int64,            # row and strides in vectors of VEC
    tail,                         # values beyond the last vector of the only row, or None: there are none
    src_stride: tl.int64, dst_stride: tl.int64,
    chunks,                       # programs for src; those above are blocks of grad_alpha
    row_by: tl.int64,             # `.plan.divisor` of row
    channels,
    IN_PLACE: tl.constexpr, VEC: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, SHORT: tl.constexpr,
    NARROW: tl.constexpr, WIDE: tl.constexpr, ALPHA_BLOCK: tl.constexpr,
):  # fmt: skip
    """dst = g src and grad_alpha_out = g grad_alpha. In place, a g of exactly 1 touches nothing."""
    pid = tl.program_id(0)
    factor = tl.load(g).to(tl.float64)
    if src is not None:
        if pid < chunks:
            if IN_PLACE:
                if factor != 1.0:
                    _scale_chunk(
                        factor.to(WIDE), src, dst, outer, row, tail, src_stride, dst_stride, chunks, row_by, pid,
                        VEC, TILE, CHUNK, SHORT, NARROW, WIDE,
                    )  # fmt: skip
            else:
                _scale_chunk(
                    factor.to(WIDE), src, dst, outer, row, tail, src_stride, dst_stride, chunks, row_by, pid,
                    VEC, TILE, CHUNK, SHORT, NARROW, WIDE,
                )  # fmt: skip
    if grad_alpha is not None:
        if pid >= chunks:
            c = (pid - chunks) * ALPHA_BLOCK + tl.arange(0, ALPHA_BLOCK)
            value = tl.load(grad_alpha + c, mask=c < channels, other=0.0) * factor
            tl.store(grad_alpha_out + c, rounded(value, grad_alpha_out.dtype.element_ty), mask=c < channels)
