"""How three matched tensors are stored, as rows of neighbours, where they are walked element by element.

No channel has a number of its own here, so that everything dense is one row, and every slice of a dense tensor along
one dimension `outer` rows of `row` neighbours: the two halves of `chunk(2, 1)`, of `chunk(2, -1)`, a part of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from vidfast.layout import dense_strides


class Rows(NamedTuple):
    """Extents and strides, in elements, of mean, target and raw as kernels walk them; element e is (e // row, e % row).

    mean's order of dimensions wins. What is stored otherwise has to be copied, and the numbers are those of the copies.

    Attributes:
        outer: Rows.
        row: Neighbouring elements of each.
        mean_stride: From one row of mean to the next.
        target_stride: Likewise of target.
        raw_stride: Likewise of raw.
        grad_mean_stride: Likewise of d/d mean; `row` where it has no gaps.
        grad_raw_stride: Likewise of d/d raw. d/d target never has gaps.
        channels: Of what a mask has one weight for all: element e has that of position
            e // (channels * inner) * inner + e % inner.
        inner: As above.
        dense: The strides of new memory in mean's order of dimensions; None: contiguous.
        copies_mean: Whether mean has to be copied, to contiguous memory.
        copies_target: Whether target has to be copied, to memory with the strides `dense`.
        copies_raw: Likewise raw.
    """

    outer: int
    row: int
    mean_stride: int
    target_stride: int
    raw_stride: int
    grad_mean_stride: int
    grad_raw_stride: int
    channels: int = 1
    inner: int = 1
    dense: tuple[int, ...] | None = None
    copies_mean: bool = False
    copies_target: bool = False
    copies_raw: bool = False


def rows_of(mean: Tensor, target: Tensor, raw: Tensor, channel: int | None) -> Rows:
    """The rows of three tensors of one shape, with elements.

    Args:
        mean: Any shape.
        target: mean's shape.
        raw: mean's shape.
        channel: The dimension of the channels, not negative; None: there is none.
    """
    if mean.is_contiguous() and target.is_contiguous() and raw.is_contiguous():
        return _contiguous(mean.shape, channel)
    return _rows_of(mean.shape, mean.stride(), target.stride(), raw.stride(), channel)


def rows_without(shape: Sequence[int], channel: int | None) -> Rows:
    """What is known of tensors that are not walked: their number of elements."""
    count = math.prod(shape)
    return Rows(1, count, count, count, count, count, count, *_around(shape, channel, range(len(shape))))


def is_dense(x: Tensor) -> bool:
    """Whether x is stored without gaps, its dimensions in any order."""
    if x.is_contiguous():
        return True
    shape, strides = x.shape, x.stride()
    return _collapsed(shape, strides, _in_memory(shape, strides)) == (x.numel(), 0)


@lru_cache(maxsize=4096)
def _contiguous(shape: tuple[int, ...], channel: int | None) -> Rows:
    return rows_without(shape, channel)


@lru_cache(maxsize=4096)
def _rows_of(
    shape: tuple[int, ...],
    mean_strides: tuple[int, ...],
    target_strides: tuple[int, ...],
    raw_strides: tuple[int, ...],
    channel: int | None,
) -> Rows:
    order = _in_memory(shape, mean_strides)
    count = math.prod(shape)
    whole = count, count
    of_mean = _collapsed(shape, mean_strides, order)
    copies_mean = of_mean is None
    if of_mean is None:  # expanded, overlapping, or with gaps in two places
        order, of_mean = [d for d in range(len(shape)) if shape[d] != 1], whole
    of_target, of_raw = (_collapsed(shape, strides, order) for strides in (target_strides, raw_strides))
    row = of_mean[0]
    copies = [False, False]
    found = [of_target, of_raw]
    for at, other in enumerate(found):
        if other is None or (other[0] != count and row != count and other[0] != row):
            copies[at], found[at] = True, whole
        elif other[0] != count:
            row = other[0]
    strides = [row if size == count else stride for size, stride in (of_mean, *found)]  # type: ignore[misc]
    in_order = order == sorted(order)
    channels, inner = _around(shape, channel, order)
    return Rows(
        count // row, row, strides[0], strides[1], strides[2], row, row, channels, inner,
        None if in_order else dense_strides(shape, tuple(order)), copies_mean, copies[0], copies[1],
    )  # fmt: skip


def _in_memory(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The dimensions that have more than one element, in the order in which they are stored."""
    return sorted((d for d in range(len(shape)) if shape[d] != 1), key=lambda d: -strides[d])


def _collapsed(
    shape: tuple[int, ...], strides: tuple[int, ...], order: Sequence[int]
) -> tuple[int, int] | None:
    """(neighbours in a row, from one row to the next) of these strides, or None where two numbers cannot say it."""
    row, stride, outer = 1, 0, 1
    for d in reversed(order):
        if stride == 0 and strides[d] == row:
            row *= shape[d]
        elif stride == 0:
            stride, outer = strides[d], shape[d]
            if stride < row:  # expanded or overlapping
                return None
        elif strides[d] == stride * outer:
            outer *= shape[d]
        else:
            return None
    return row, stride


def _around(shape: Sequence[int], channel: int | None, order: Sequence[int]) -> tuple[int, int]:
    """(channels, elements of one channel that are neighbours) in memory of this order of dimensions without gaps."""
    if channel is None:
        return 1, 1
    if shape[channel] == 1 or channel not in order:
        return 1, 1
    inner = math.prod(shape[d] for d in list(order)[list(order).index(channel) + 1 :])
    return shape[channel], inner
