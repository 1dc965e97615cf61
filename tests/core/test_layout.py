"""Layouts against a brute-force reading of memory, and which layouts are walked where they lie."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import BY_NAME, FP32, Case
from torch import Tensor

from vidfast.layout import rows_of
from vidfast.memory import empty_dense
from vidfast.primitives import as_walked as prepare

PROPERTY = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def by_address(x: Tensor, outer: int, channels: int, inner: int, stride: int) -> Tensor:
    """What a kernel reads: element (o, c, i) at x's address + o * stride + c * inner + i."""
    last = (outer - 1) * stride + channels * inner - 1
    assert x.storage_offset() + last < x.untyped_storage().nbytes() // x.element_size(), (
        "reads past the memory"
    )
    return x.as_strided((outer, channels, inner), (stride, inner, 1))


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64).view(shape)


def check_prepared(mean: Tensor, target: Tensor, channel: int) -> tuple[Tensor, Tensor]:
    """mean and target hold the same numbers, distinct ones unless expanded."""
    m, t, layout = prepare(mean, target, channel)
    assert layout.channels == mean.shape[channel]
    assert layout.outer * layout.channels * layout.inner == mean.numel()
    read_mean = by_address(m, layout.outer, layout.channels, layout.inner, layout.mean_stride)
    read_target = by_address(t, layout.outer, layout.channels, layout.inner, layout.target_stride)
    assert torch.equal(read_mean, read_target), "mean and target are paired wrongly"
    whose = torch.arange(mean.shape[channel]).view([-1 if d == channel else 1 for d in range(mean.dim())])
    pairs = torch.stack([mean.flatten(), whose.expand(mean.shape).flatten().double()])
    owners = torch.arange(layout.channels).view(1, -1, 1).expand(read_mean.shape)
    read = torch.stack([read_mean.flatten(), owners.flatten().double()])
    assert sorted(read.T.tolist()) == sorted(pairs.T.tolist()), (
        "an element is missing, repeated or in another channel"
    )
    assert layout.outer == 1 or layout.mean_stride >= layout.channels * layout.inner
    # what is made like mean is walked by the same description
    dense = empty_dense(m, layout.dense, m.dtype)
    assert dense.shape == mean.shape
    walked = rows_of(dense, channel)
    assert not walked.copies
    row = layout.channels * layout.inner
    assert walked[0] * walked[1] == mean.numel()
    dense.copy_(m)
    assert torch.equal(by_address(dense, layout.outer, layout.channels, layout.inner, row), read_mean)
    return m, t


@st.composite
def places(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """The numbers 0, 1, ... of that shape in memory of any order, cut out of bigger memory."""
    rank = len(shape)
    order = draw(st.permutations(range(rank)))
    steps = [draw(st.sampled_from([1, 1, 1, 1, 2])) for _ in range(rank)]
    before = [draw(st.sampled_from([0, 0, 0, 1])) for _ in range(rank)]
    after = [draw(st.sampled_from([0, 0, 0, 2])) for _ in range(rank)]
    sizes = [b + n * s + a for n, s, b, a in zip(shape, steps, before, after, strict=True)]
    big = torch.full([sizes[d] for d in order], math.nan, dtype=torch.float64)
    big = big.permute([list(order).index(d) for d in range(rank)])
    view = big[tuple(slice(b, b + n * s, s) for n, s, b in zip(shape, steps, before, strict=True))]
    assert view.shape == shape
    return view.copy_(numbered(shape))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    channel = draw(st.integers(0, len(shape) - 1))
    mean = draw(places(shape))
    target = draw(st.one_of(places(shape), st.just(mean.clone()), st.just(mean)))
    return mean, target, channel


@PROPERTY
@given(pairs())
def test_any_pair_is_walked_rightly(pair: tuple[Tensor, Tensor, int]) -> None:
    mean, target, channel = pair
    before = mean.clone(), target.clone()
    check_prepared(mean, target, channel)
    assert torch.equal(mean, before[0])
    assert torch.equal(target, before[1])


@PROPERTY
@given(st.data())
def test_any_expanded_pair_is_walked_rightly(data: st.DataObject) -> None:
    """Dimensions of stride 0: the same numbers many times, still paired and counted right."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    narrow = tuple(data.draw(st.sampled_from([n, 1])) for n in shape)
    mean = data.draw(places(narrow)).expand(shape)
    target = data.draw(st.sampled_from([mean, mean.contiguous()]))
    pair = data.draw(st.permutations([mean, target]))
    check_prepared(*pair, data.draw(st.integers(0, len(shape) - 1)))


@settings(PROPERTY, max_examples=150)
@given(st.data())
def test_overlapping_memory_is_walked_rightly(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    strides = tuple(data.draw(st.integers(0, 20)) for _ in shape)
    mean = torch.arange(512, dtype=torch.float64).as_strided(shape, strides)
    check_prepared(mean, mean.contiguous(), data.draw(st.integers(0, len(shape) - 1)))


NOT_COPIED = (
    "plane_49", "logits", "transformer", "vector", "channels_in_front", "conv_1d", "conv_3d",
    "channels_last", "channels_last_3d", "channels_last_1", "channels_last_slice", "batch_slice",
    "batch_slice_rows", "batch_slice_1", "channel_slice", "token_slice", "misaligned", "misaligned_rows",
    "one_strided", "other_strided", "transposed_plane", "channels_first_memory", "reversed_logits",
)  # fmt: skip


@pytest.mark.parametrize("name", NOT_COPIED)
def test_dense_layouts_are_walked_where_they_lie(name: str) -> None:
    case = BY_NAME[name]
    mean, target, _ = case.tensors()
    m, t, _ = prepare(mean, target, case.channel_dim % mean.dim())
    assert m is mean
    assert t is target


@pytest.mark.parametrize(
    ("shape", "channel", "layout", "want"),
    [
        ((3, 6, 7, 5), 1, "contiguous", (3, 6, 35)),
        ((3, 6, 7, 5), 1, "channels_last", (105, 6, 1)),
        ((33, 10), 1, "contiguous", (33, 10, 1)),
        ((3, 9, 16), 2, "contiguous", (27, 16, 1)),
        ((3, 9, 16), 2, "last_slice", (27, 16, 1)),
        ((4, 6, 37), 1, "contiguous", (4, 6, 37)),
        ((2, 5, 3, 4, 7), 1, "contiguous", (2, 5, 84)),
        ((3, 6, 7, 5), 1, "channels_first", (1, 6, 105)),
        ((3, 6, 7, 5), 1, "channel_slice", (3, 6, 35)),
    ],
)
def test_extents(shape: tuple[int, ...], channel: int, layout: str, want: tuple[int, ...]) -> None:
    mean, target, _ = Case("", "", shape, channel, layout).tensors()
    assert tuple(prepare(mean, target, channel)[2][:3]) == want


def test_means_layout_wins() -> None:
    for mean_layout, target_layout in (("contiguous", "channels_last"), ("channels_last", "contiguous")):
        mean, target, _ = Case("", "", (3, 6, 7, 5), 1, mean_layout, target_layout).tensors()
        m, t, _ = prepare(mean, target, 1)
        assert m is mean
        assert t is not target
        assert t.stride() == mean.stride()
        assert torch.equal(t, target)


def test_copies_are_detached() -> None:
    mean, target, _ = Case("", "", (3, 6, 7, 5), 1, "spatial_slice").tensors(FP32)
    m, t, _ = prepare(mean.requires_grad_(), target.requires_grad_(), 1)
    assert not m.requires_grad
    assert not t.requires_grad


@pytest.mark.parametrize("name", ["expanded_mean", "target_channels_last", "strange"])
def test_what_is_not_walked_comes_back_as_it_is(name: str) -> None:
    case = BY_NAME[name]
    mean, target, _ = case.tensors()
    m, t, layout = prepare(mean, target, 1, walks=False)
    assert m is mean
    assert t is target
    assert (layout.channels, layout.outer * layout.inner) == (case.channels, case.numel // case.channels)


@pytest.mark.parametrize("walks", [True, False])
def test_in_place_nothing_is_copied(walks: bool) -> None:
    mean, target, _ = BY_NAME["expanded_mean"].tensors()
    with pytest.raises(RuntimeError, match="needs a mean whose memory is dense"):
        prepare(mean, target, 1, walks, inplace=True)


@pytest.mark.parametrize("name", ["plane_49", "channels_last", "channel_slice", "reversed_memory"])
def test_new_memory_has_the_strides_that_the_layout_tells(name: str) -> None:
    mean, target, _ = BY_NAME[name].tensors()
    m, _, layout = prepare(mean, target, 1)
    made = empty_dense(m, layout.dense, m.dtype)
    assert made.stride() == (layout.dense or made.contiguous().stride())
    if layout.dense is not None:
        turned = empty_dense(m, tuple(made.contiguous().stride()), m.dtype)
        assert turned.is_contiguous(), "the strides decide, and not what the memory is like"
