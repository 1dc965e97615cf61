"""How a tensor lies in memory, as `(outer, C, inner)`: one description for every dense layout.

Contiguous NCHW is (B, C, H*W), channels_last is (B*H*W, C, 1), logits are (B, N, 1), a transformer's
(B, L, D) with `channel_dim=-1` is (B*L, D, 1). Each tensor keeps its own outer stride, so that a batch or
channel slice of a bigger tensor is walked where it lies.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vidfast import memory


class Layout(NamedTuple):
    """Extents and outer strides, in elements, of a matched pair of tensors; `channel` is the dimension of C."""

    outer: int
    channels: int
    inner: int
    mean_stride: int
    target_stride: int
    channel: int


class _Collapsed(NamedTuple):
    outer: int
    inner: int
    stride: int
    order: tuple[int, ...]


@lru_cache(maxsize=4096)
def _collapse(shape: tuple[int, ...], strides: tuple[int, ...], channel: int) -> _Collapsed | None:
    """The (outer, C, inner) view of these strides, or None where the elements do not lie so."""
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


def prepare(mean: Tensor, target: Tensor, channel: int) -> tuple[Tensor, Tensor, Layout]:
    """mean and target as the kernels can walk them, and how.

    mean's layout wins: a target laid out otherwise is copied to it, and a mean that is not dense (expanded,
    overlapping, a slice of its inner dimensions) is copied first. Copies are detached.

    :param channel: the channel dimension, not negative.
    """
    shape = mean.shape
    if mean.is_contiguous() and target.is_contiguous():
        outer = 1
        for size in shape[:channel]:
            outer *= size
        channels = shape[channel]
        row = mean.numel() // outer
        return mean, target, Layout(outer, channels, row // channels, row, row, channel)

    as_mean = _collapse(shape, mean.stride(), channel)
    if as_mean is None:
        mean = mean.detach().contiguous()
        as_mean = _collapse(shape, mean.stride(), channel)
        assert as_mean is not None, "a contiguous tensor always collapses"
    as_target = _collapse(shape, target.stride(), channel)
    if as_target is None or as_target.order != as_mean.order:
        target = dense_like(mean, channel, target.dtype).copy_(target.detach())
        as_target = _collapse(shape, target.stride(), channel)
        assert as_target is not None, "a copy has the layout of what it was made like"
    return (
        mean,
        target,
        Layout(as_mean.outer, shape[channel], as_mean.inner, as_mean.stride, as_target.stride, channel),
    )


def walk(x: Tensor, channel: int) -> tuple[int, int, int] | None:
    """(outer, row, stride): `outer` rows of `row` neighbouring elements, `stride` elements apart, or None."""
    collapsed = _collapse(x.shape, x.stride(), channel)
    if collapsed is None:
        return None
    return collapsed.outer, x.shape[channel] * collapsed.inner, collapsed.stride


def dense_like(x: Tensor, channel: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory of x's shape, dense in x's order of dimensions: its outer stride is C * inner. Its values are anything."""
    if x.is_cpu and x.numel() * x.element_size() >= memory.KEPT_FROM:
        kept = memory.empty_kept(x, dense_strides(x.shape, x.stride(), channel), dtype or x.dtype)
        if kept is not None:
            return kept
    if x.is_contiguous():
        return torch.empty_like(x, dtype=dtype)
    return torch.empty_strided(
        x.shape, dense_strides(x.shape, x.stride(), channel), dtype=dtype or x.dtype, device=x.device
    )


@lru_cache(maxsize=4096)
def dense_strides(shape: tuple[int, ...], strides: tuple[int, ...], channel: int) -> tuple[int, ...]:
    """The strides of `dense_like`, for a tensor that `prepare` would not copy."""
    collapsed = _collapse(shape, strides, channel)
    assert collapsed is not None, f"strides {strides} are not (outer, C, inner)"
    dense = [1] * len(shape)
    step = 1
    for d in reversed(collapsed.order):
        dense[d] = step
        step *= shape[d]
    return tuple(dense)
