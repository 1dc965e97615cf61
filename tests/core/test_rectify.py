"""What lies between a head's products in native code, against torch, for every instruction set of this processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import BF16, FP16, FP32, FP64, short

from vidfast import backends, memory

pytestmark = pytest.mark.skipif(memory._C is None, reason="the extension is not built")
_C: Any = memory._C
SIZES = (1, 7, 16, 63, 4096, 4097, 33000)
ODD = (float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-8, -1e-8, 65504.0, -65504.0)


def values(n: int, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(n)
    x = torch.randn(n)
    x[: len(ODD)] = torch.tensor(ODD)[:n]
    return x.to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    """NaN has many; a zero has two, and a ReLU may give either."""
    return torch.where(x == 0, torch.zeros_like(x), x).nan_to_num(nan=123.0)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(
    ("dtype", "rounded"),
    [(FP32, FP32), (FP32, BF16), (FP32, FP16), (BF16, BF16), (FP16, FP16), (FP64, FP64)],
    ids=short,
)
def test_relu_and_its_gradient_are_torchs(isa: str, dtype: torch.dtype, rounded: torch.dtype, n: int) -> None:
    backend: Any = backends.load("cpu")
    x, gradient = values(n, dtype), values(n, dtype).flip(0)
    for positive in (True, False):
        ours = x.clone()
        backend.rectify(ours, rounded, positive)
        wanted = (x.relu() if positive else x).to(rounded).to(dtype)
        assert torch.equal(bits(ours), bits(wanted))
    activation = x.relu()
    wanted = torch.where(activation == 0, torch.zeros_like(gradient), gradient).to(rounded).to(dtype)
    for place in ("new memory", "the gradient's", "the activation's"):
        g, a = gradient.clone(), activation.clone()
        out = {"new memory": torch.full_like(x, 5.0), "the gradient's": g, "the activation's": a}[place]
        backend.rectify_backward(g, a, out, rounded)
        assert torch.equal(bits(out), bits(wanted)), place


def test_a_gradient_goes_through_where_the_activation_is_nan(isa: str) -> None:
    """As in torch: what is not a number shows in every gradient that it has to do with."""
    backend: Any = backends.load("cpu")
    for dtype in (FP32, BF16, FP16):
        x = torch.tensor([float("nan"), 1.0, 0.0], dtype=dtype)
        backend.rectify(x, dtype, True)
        assert x.isnan().tolist() == [True, False, False]
        out = torch.ones_like(x)
        backend.rectify_backward(torch.full_like(x, 3.0), x, out, dtype)
        assert out.tolist() == [3.0, 3.0, 0.0]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_nothing_is_written_beside_what_was_given(isa: str, threads: int) -> None:
    before = torch.get_num_threads()
    backend: Any = backends.load("cpu")
    try:
        torch.set_num_threads(threads)
        for dtype in (FP32, BF16, FP16):
            whole = torch.full((40_000,), -1.0, dtype=dtype)
            backend.rectify(whole[16:39_001], dtype, True)
            assert bool((whole[:16] == -1).all())
            assert bool((whole[16:39_001] == 0).all())
            assert bool((whole[39_001:] == -1).all())
            ones = torch.ones(40_000, dtype=dtype)
            backend.rectify_backward(ones[16:39_001], ones[16:39_001], whole[16:39_001], dtype)
            assert bool((whole[:16] == -1).all())
            assert bool((whole[16:39_001] == 1).all())
            assert bool((whole[39_001:] == -1).all())
    finally:
        torch.set_num_threads(before)
