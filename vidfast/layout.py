"""How a tensor is stored, as `(outer, C, inner)`: one description for every dense layout.

Contiguous NCHW is (B, C, H*W), channels_last is (B*H*W, C, 1), logits are (B, N, 1), a transformer's
(B, L, D) with `channel_dim=-1` is (B*L, D, 1). Each tensor keeps its own outer stride, so that a batch or
channel slice of a bigger tensor is walked where it is. Here is the arithmetic; nothing is allocated or copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """Extents and outer strides, in elements, of a matched pair of tensors as the kernels walk them.

    mean's layout wins. A mean that is not dense (expanded, overlapping, a slice of its inner dimensions) has to be
    copied, and so has a target that is stored otherwise than mean; the numbers are those of the copies.

    Attributes:
        outer: Rows of C * inner neighbours.
        channels: C.
        inner: Neighbouring elements of one channel.
        mean_stride: From one row of mean to the next.
        target_stride: Likewise of target.
        dense: The strides of new memory in mean's order of dimensions; None: contiguous.
        copies_mean: Whether mean has to be copied, to contiguous memory.
        copies_target: Whether target has to be copied, to memory with the strides `dense`.
    """

    outer: int
    channels: int
    inner: int
    mean_stride: int
    target_stride: int
    dense: tuple[int, ...] | None = None
    copies_mean: bool = False
    copies_target: bool = False


class RowLayout(NamedTuple):
    """A tensor as `outer` rows of `row` neighbours, `stride` elements apart.

    `dense` is as in :class:`Layout`. `copies`: the tensor has to be copied to contiguous memory, which this describes.
    """

    outer: int
    row: int
    stride: int
    dense: tuple[int, ...] | None = None
    copies: bool = False


class _Collapsed(NamedTuple):
    outer: int
    inner: int
    stride: int
    order: tuple[int, ...]


def layout_of(mean: Tensor, target: Tensor, channel: int, walks: bool = True) -> Layout:
    """The layout of a matched pair.

    Args:
        mean: Any shape, with elements if they are walked.
        target: mean's shape.
        channel: The dimension of the channels, not negative.
        walks: Whether they are walked by this layout. Otherwise nothing has to be copied, and no stride is told.
    """
    shape = mean.shape
    if not walks:
        return layout_without(shape, channel)
    mean_is_contiguous = mean.is_contiguous()
    if mean_is_contiguous and target.is_contiguous():
        return _contiguous_layout(shape, channel)
    return _layout_of(shape, mean.stride(), target.stride(), channel, mean_is_contiguous)


def rows_of(x: Tensor, channel: int) -> RowLayout:
    """The rows of one tensor with elements, whose channels are in dimension `channel`."""
    if x.is_contiguous():
        return _one_row(x.numel())
    return _rows_of(x.shape, x.stride(), channel)


def layout_without(shape: Sequence[int], channel: int) -> Layout:
    """What is known of a pair that is not there, or has no elements: outer * inner, and the channels."""
    channels = shape[channel]
    return Layout(math.prod(shape) // max(channels, 1), channels, 1, channels, channels)


@lru_cache(maxsize=4096)
def position_strides(shape: tuple[int, ...], channel: int, dense: tuple[int, ...] | None) -> tuple[int, ...]:
    """The strides of one number a position, [outer, inner] without gaps in mean's order of dimensions.

    Args:
        shape: Of mean.
        channel: The dimension of its channels, which the result leaves out.
        dense: As `Layout.dense`.
    """
    dims = [d for d in range(len(shape)) if d != channel]
    order = dims if dense is None else sorted(dims, key=lambda d: -dense[d])
    strides = dense_strides(shape, tuple(order))
    return tuple(strides[d] for d in dims)


@lru_cache(maxsize=4096)
def _contiguous_layout(shape: tuple[int, ...], channel: int) -> Layout:
    row = math.prod(shape[channel:])
    return Layout(math.prod(shape[:channel]), shape[channel], row // shape[channel], row, row)


@lru_cache(maxsize=4096)
def _one_row(values: int) -> RowLayout:
    return RowLayout(1, values, values)


@lru_cache(maxsize=4096)
def _layout_of(
    shape: tuple[int, ...],
    mean_strides: tuple[int, ...],
    target_strides: tuple[int, ...],
    channel: int,
    mean_is_contiguous: bool,
) -> Layout:
    as_mean = _collapse(shape, mean_strides, channel)
    copies_mean = as_mean is None
    if as_mean is None:
        as_mean = _contiguous(shape, channel)
    as_target = _collapse(shape, target_strides, channel)
    row = shape[channel] * as_mean.inner
    copies_target = as_target is None or as_target.order != as_mean.order
    return Layout(
        outer=as_mean.outer,
        channels=shape[channel],
        inner=as_mean.inner,
        mean_stride=as_mean.stride,
        target_stride=row if as_target is None or copies_target else as_target.stride,
        dense=None if mean_is_contiguous or copies_mean else dense_strides(shape, as_mean.order),
        copies_mean=copies_mean,
        copies_target=copies_target,
    )


@lru_cache(maxsize=4096)
def _rows_of(shape: tuple[int, ...], strides: tuple[int, ...], channel: int) -> RowLayout:
    found = _collapse(shape, strides, channel)
    if found is None:
        collapsed = _contiguous(shape, channel)
        row = shape[channel] * collapsed.inner
        return RowLayout(collapsed.outer, row, collapsed.stride, copies=True)
    return RowLayout(
        found.outer, shape[channel] * found.inner, found.stride, dense_strides(shape, found.order)
    )


def _collapse(shape: tuple[int, ...], strides: tuple[int, ...], channel: int) -> _Collapsed | None:
    """The (outer, C, inner) view of these strides, or None where the elements are not stored so."""
    order = [d for d in range(len(shape)) if shape[d] != 1 and d != channel]
    order.sort(key=lambda d: -strides[d])
    if shape[channel] == 1:  # its stride means nothing: it goes behind the dimensions before it
        at = next((i for i, d in enumerate(order) if d > channel), len(order))
    else:
        at = next((i for i, d in enumerate(order) if strides[d] < strides[channel]), len(order))
    order.insert(at, channel)

    inner = 1
    for d in reversed(order[at + 1 :]):
        if strides[d] != inner:
            return None
        inner *= shape[d]
    if shape[channel] != 1 and strides[channel] != inner:
        return None
    row = shape[channel] * inner
    outer, stride = 1, row
    for d in reversed(order[:at]):
        if outer == 1:
            stride = strides[d]
            if stride < row:  # expanded or overlapping
                return None
        elif strides[d] != stride * outer:
            return None
        outer *= shape[d]
    return _Collapsed(outer, inner, stride, tuple(order))


def _contiguous(shape: tuple[int, ...], channel: int) -> _Collapsed:
    """The view of contiguous memory."""
    collapsed = _collapse(shape, dense_strides(shape, tuple(range(len(shape)))), channel)
    assert collapsed is not None, "a contiguous tensor always collapses"
    return collapsed


def dense_strides(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of memory without gaps, the dimensions in this order; 1 for those of size 1 that it leaves out."""
    dense = [1] * len(shape)
    step = 1
    for d in reversed(order):
        dense[d] = step
        step *= shape[d]
    return tuple(dense)
