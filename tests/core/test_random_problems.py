"""Random small problems: any shape, layout, mixture of dtypes and options, on every back end."""

from __future__ import annotations

import itertools

import torch
from bounds import check_call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import Place
from problems import DTYPES, FP16, LAYOUTS, Case
from torch.autograd import gradcheck

ANYWHERE = (
    "contiguous",
    "batch_slice",
    "last_slice",
    "shifted",
    "reversed_order",
    "strange",
    "expanded_batch",
)
WITH_CHANNELS = (
    "channels_last",
    "channel_slice",
    "channels_last_slice",
    "channels_first",
    "expanded_channel",
)


@st.composite
def problems(draw: st.DrawFn) -> Case:
    rank = draw(st.integers(1, 5))
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=rank, max_size=rank)))
    if draw(st.booleans()):  # one long dimension, past vectors, runs and tiles
        at = draw(st.integers(0, rank - 1))
        shape = tuple(
            draw(st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65, 130, 255, 257, 513]))
            if d == at
            else min(n, 4)
            for d, n in enumerate(shape)
        )
    layouts = ANYWHERE + (WITH_CHANNELS if rank >= 2 else ()) + (("transposed_plane",) if rank >= 2 else ())
    channel = draw(st.integers(-rank, rank - 1))
    return Case("random", "", shape, channel, draw(st.sampled_from(layouts)), draw(st.sampled_from(layouts)))


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    problems(),
    st.sampled_from(list(itertools.product(DTYPES, DTYPES, DTYPES))),
    st.sampled_from(["one_pass", "two_pass"]),
    st.sampled_from(["mean", "sum", "batchmean"]),
    st.sampled_from([1.0, -1.0, 3.5, 0.125, 1024.0]),
    st.sampled_from([1.0, -2.25, 0.01]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_random_problems(
    backend: Place, case: Case, dtypes: tuple[torch.dtype, ...], strategy: str, reduction: str,
    g: float, weight: float, full: bool, seed: int,
) -> None:  # fmt: skip
    if reduction == "batchmean" and case.channel_dim % len(case.shape) == 0:
        reduction = "mean"
    if strategy == "one_pass" and FP16 in dtypes[:1]:
        strategy = "two_pass"  # what auto would take: one_pass may leave fp16's range on its way
    tensors = case.tensors(*dtypes, device=backend.device, seed=seed)
    check_call(
        backend, *tensors,
        g=g, strategy=strategy, reduction=reduction, weight=weight, full=full, channel_dim=case.channel_dim,
    )  # fmt: skip


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.data(),
    st.sampled_from(["one_pass", "two_pass"]),
)
def test_random_gradchecks(backend: Place, shape: list[int], data: st.DataObject, strategy: str) -> None:
    channel = data.draw(st.integers(0, len(shape) - 1))
    case = Case("random", "", tuple(shape), channel)
    m, t, a = case.tensors(torch.float64, alpha_dtype=torch.float64, device=backend.device)
    assert gradcheck(
        lambda x, y: backend.nll(x, t, y, strategy=strategy, channel_dim=channel),
        (m.requires_grad_(), a.requires_grad_()),
    )


def test_every_layout_is_drawn() -> None:
    assert set(
        ANYWHERE
        + WITH_CHANNELS
        + ("transposed_plane", "aligned_channel_slice", "shifted_channels_last", "spatial_slice")
    ) == set(LAYOUTS)
