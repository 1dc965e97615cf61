"""An empty selection, batch or map: torch's conventions. A sum is 0, a mean is NaN, and every gradient is 0."""

from __future__ import annotations

import math

import pytest
import torch
from places import Place
from torch import Tensor

import vidfast

SHAPES = [(0, 6, 4, 4), (3, 6, 0, 4), (0, 6), (2, 6, 3, 0, 1), (3, 0, 4), (0, 0)]


def tensors(shape: tuple[int, ...], backend: Place, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    m, t = (torch.zeros(shape, dtype=dtype, device=backend.device, requires_grad=True) for _ in range(2))
    return m, t, torch.zeros(shape[1], device=backend.device, requires_grad=True)


@pytest.mark.parametrize("strategy", ["auto", "one_pass", "two_pass"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_a_scalar(
    backend: Place, reduction: str, shape: tuple[int, ...], inplace: bool, strategy: str
) -> None:
    m, t, a = tensors(shape, backend)
    given = t.detach() if strategy == "one_pass" else t
    for named in (backend.name, "auto", "reference"):
        mean = m * 1 if inplace else m
        loss = vidfast.gaussian_nll(
            mean, given, a, reduction=reduction, inplace=inplace, strategy=strategy, backend=named, full=True
        )
        assert loss.shape == ()
        assert loss.dtype is torch.float32
        without = reduction == "mean" or (reduction == "batchmean" and shape[0] == 0)
        assert math.isnan(loss.item()) if without else loss.item() == 0
        for x, grad in zip((m, a), torch.autograd.grad(loss, (m, a), allow_unused=False), strict=True):
            assert grad.shape == x.shape
            assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_per_element(shape: tuple[int, ...], backend: Place) -> None:
    m, t, a = tensors(shape, backend)
    loss = vidfast.gaussian_nll(m, t, a, reduction="none")
    assert loss.shape == shape
    loss.sum().backward()
    assert a.grad is not None
    assert torch.equal(a.grad, torch.zeros_like(a))


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.bfloat16, torch.float64)])
def test_dtypes_are_as_ever(dtypes: tuple[torch.dtype, torch.dtype], backend: Place) -> None:
    m, t = (torch.zeros(0, 6, dtype=dtype, device=backend.device) for dtype in dtypes)
    loss = vidfast.gaussian_nll(m, t, torch.zeros(6, device=backend.device), reduction="sum")
    assert loss.dtype is torch.float64


def test_a_selection_of_nothing(backend: Place) -> None:
    m = torch.randn(4, 7, 6, device=backend.device, requires_grad=True)
    t, a = torch.randn(4, 7, 6, device=backend.device), torch.zeros(6, device=backend.device)
    nothing = torch.zeros(4, 7, dtype=torch.bool, device=backend.device)
    loss = vidfast.gaussian_nll(m[nothing], t[nothing], a, channel_dim=-1, reduction="sum", weight=3.0)
    loss.backward()
    assert loss.item() == 0
    assert m.grad is not None
    assert torch.equal(m.grad, torch.zeros_like(m))


def test_of_torchs_own_loss() -> None:
    """The conventions are those of torch.nn.functional.gaussian_nll_loss."""
    empty = torch.zeros(0, 6)
    for reduction in ("sum", "mean", "none"):
        ours = vidfast.gaussian_nll(empty, empty, torch.zeros(6), reduction=reduction)
        theirs = torch.nn.functional.gaussian_nll_loss(empty, empty, torch.ones(0, 6), reduction=reduction)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("reduction", "want"), [("sum", 0.0), ("mean", math.nan)])
@pytest.mark.parametrize("batch", [(0, 5, 4, 4), (0, 5)])
def test_modules(batch: tuple[int, ...], reduction: str, want: float, inplace: bool) -> None:
    module = vidfast.VIDLoss(5, 8, 6, reduction=reduction, inplace=inplace)
    student = torch.zeros(batch, requires_grad=True)
    loss = module(student, torch.zeros(0, 6, *batch[2:]))
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(want), equal_nan=True)
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_the_map_of_log_likelihoods() -> None:
    assert vidfast.log_likelihood_map(torch.zeros(0, 6, 4), torch.zeros(0, 6, 4), torch.zeros(6)).shape == (
        0,
        4,
    )
