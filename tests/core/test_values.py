"""Values and gradients on every back end: shapes by regime, dtypes, reductions, weights, strategies."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from bounds import check_call, check_results
from oracle import Options, expected
from places import Place
from problems import BF16, BY_NAME, CASES, DTYPES, FP16, FP32, FP64, WAYS, Case, short

import vidfast

STRATEGIES = ("one_pass", "two_pass")
name_of = lambda case: case.name  # noqa: E731


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_shapes(backend: Place, case: Case, strategy: str) -> None:
    backend.need(case.numel)
    tensors = case.tensors(FP32, device=backend.device)
    check_call(backend, *tensors, strategy=strategy, channel_dim=case.channel_dim)
    check_call(backend, *tensors, strategy=strategy, channel_dim=case.channel_dim, g=-2.5, reduction="sum")


@pytest.mark.parametrize("dtype", [FP16, BF16, FP64], ids=short)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_shapes_in_other_dtypes(backend: Place, case: Case, dtype: torch.dtype) -> None:
    backend.need(case.numel)
    if case.numel > 1_000_000:
        backend.need(10 * case.numel)
    mean, target, alpha = case.tensors(dtype, device=backend.device)
    g = 1024.0 if dtype is FP16 else -2.5
    check_call(backend, mean, target, alpha, strategy="two_pass", channel_dim=case.channel_dim, g=g)
    check_call(
        backend, mean, target, alpha, strategy="one_pass", channel_dim=case.channel_dim, g=g, weight=64.0
    )


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES
        if c.mean_layout not in ("spatial_slice", "expanded_batch", "expanded_channel", "strange")
    ],
    ids=name_of,
)
def test_inplace_shapes(backend: Place, case: Case) -> None:
    backend.need(case.numel)
    for dtype, g in ((FP32, 1.0), (FP32, -2.5), (BF16, 3.0)):
        tensors = case.tensors(dtype, device=backend.device)
        check_call(backend, *tensors, strategy="one_pass", inplace=True, g=g, channel_dim=case.channel_dim)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("dtype", "target_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=short)
def test_dtype_mixtures(backend: Place, dtype: torch.dtype, target_dtype: torch.dtype, strategy: str) -> None:
    for i, (case, alpha_dtype) in enumerate(zip(WAYS, itertools.cycle(DTYPES))):
        backend.need(case.numel)
        tensors = case.tensors(dtype, target_dtype, alpha_dtype, backend.device, seed=i)
        g = (1.0, 512.0)[i % 2]
        check_call(
            backend, *tensors, strategy=strategy, channel_dim=case.channel_dim, g=g, reduction="batchmean"
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("alpha_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=short)
def test_alpha_dtypes(backend: Place, dtype: torch.dtype, alpha_dtype: torch.dtype, strategy: str) -> None:
    for case in (BY_NAME["plane_49"], BY_NAME["rows_tail"]):
        tensors = case.tensors(dtype, None, alpha_dtype, backend.device)
        check_call(backend, *tensors, strategy=strategy, g=-0.75)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.0, -3.7, 1e-3, 7])
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_reductions(backend: Place, reduction: str, weight: float, full: bool, strategy: str) -> None:
    for name in ("plane_49", "rows_tail", "channels_last", "transformer"):
        case = BY_NAME[name]
        for dtype, eps in ((FP32, 1e-5), (FP64, 0.5)):
            tensors = case.tensors(dtype, device=backend.device)
            check_call(
                backend, *tensors,
                strategy=strategy, reduction=reduction, full=full, weight=weight, eps=eps,
                channel_dim=case.channel_dim, g=1.25,
            )  # fmt: skip


def test_reduction_none_is_the_reference_with_every_gradient() -> None:
    mean, target, alpha = (x.requires_grad_() for x in BY_NAME["plane_49"].tensors(FP32))
    out = vidfast.gaussian_nll(mean, target, alpha, reduction="none", weight=2.0)
    assert out.shape == mean.shape
    assert out.dtype == FP32
    grads = torch.autograd.grad(out.mean(), (mean, target, alpha))
    want = expected(mean, target, alpha, 1.0, Options(weight=2.0))
    for got, exact in zip(grads, (want.grad_mean, want.grad_target, want.grad_alpha), strict=True):
        torch.testing.assert_close(got.double(), torch.from_numpy(exact), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(out.mean().double(), torch.from_numpy(want.loss), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("g", [1.0, -1.0, 0.0, 2.0**-20, -3.3, 2.0**16])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=short)
def test_incoming_gradients(backend: Place, dtype: torch.dtype, strategy: str, g: float) -> None:
    for case in (BY_NAME["small_3x3"], BY_NAME["channel_slice"], BY_NAME["channels_last"]):
        check_call(backend, *case.tensors(dtype, device=backend.device), strategy=strategy, g=g)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("strategy", ["auto", "two_pass"])
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=short)
def test_only_what_needs_a_gradient_gets_one(
    backend: Place, dtype: torch.dtype, strategy: str, needs: tuple[bool, bool, bool]
) -> None:
    tensors = BY_NAME["plane_49"].tensors(dtype, device=backend.device)
    want = expected(*tensors, 1.0)
    for x, need in zip(tensors, needs, strict=True):
        x.requires_grad_(need)
    loss = backend.nll(*tensors, strategy=strategy)
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    for x, need in zip(tensors, needs, strict=True):
        assert (x.grad is not None) == need
    check_results(want, loss, *(x.grad for x in tensors))


@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
def test_no_grad_gives_the_same_loss(backend: Place, strategy: str) -> None:
    mean, target, alpha = BY_NAME["plane_49"].tensors(FP32, device=backend.device)
    with_grad = backend.nll(mean.clone().requires_grad_(), target, alpha, strategy=strategy)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = backend.nll(mean.clone().requires_grad_(), target, alpha, strategy=strategy)
        assert not loss.requires_grad
        assert torch.equal(loss, with_grad.detach())


@pytest.mark.parametrize(
    "name", ["channels_last", "reversed_memory", "channels_last_slice", "batch_slice", "plane_49"]
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_lie_in_means_order(backend: Place, name: str, strategy: str) -> None:
    """channels_last in gives channels_last out; a slice's gradient is dense in the same order."""
    mean, target, alpha = BY_NAME[name].tensors(FP32, device=backend.device)
    m, t = mean.requires_grad_(), target.requires_grad_(strategy == "two_pass")
    loss = backend.nll(m, t, alpha, strategy=strategy)
    for grad in torch.autograd.grad(loss, (m, t) if strategy == "two_pass" else (m,)):
        assert sorted(range(4), key=lambda d: -grad.stride(d)) == sorted(range(4), key=lambda d: -m.stride(d))
        assert (
            grad.stride() == torch.empty_like(m, memory_format=torch.preserve_format).stride()
            or "slice" in name
        )
        order = sorted(range(4), key=lambda d: -grad.stride(d))
        assert grad.permute(order).is_contiguous()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_alpha_may_be_strided(backend: Place, strategy: str) -> None:
    mean, target, alpha = BY_NAME["plane_49"].tensors(FP32, device=backend.device)
    wide = torch.full((24, 3), math.nan, device=backend.device)
    wide[:, 1] = alpha
    check_call(backend, mean, target, wide[:, 1], strategy=strategy)
    check_call(backend, mean, target, alpha[:1].expand(24), strategy=strategy)


def test_a_negative_loss_is_not_clamped(backend: Place) -> None:
    target = torch.randn(4, 8, 6, 6, device=backend.device)
    mean = target.clone()
    alpha = torch.full((8,), -1e4, device=backend.device)
    loss, *_ = check_call(backend, mean, target, alpha, strategy="one_pass")
    assert loss.item() == pytest.approx(math.log(1e-5) / 2, rel=1e-6)  # the floor, per element


def test_gradients_accumulate_and_meet_other_users_of_mean(backend: Place) -> None:
    mean, target, alpha = BY_NAME["plane_49"].tensors(FP32, device=backend.device)
    want = expected(mean, target, alpha, 2.0)
    m = mean.requires_grad_()
    for strategy in STRATEGIES:
        m.grad = None
        total = (
            2 * backend.nll(m, target, alpha, strategy=strategy)
            + m.sum()
            + backend.nll(m, target, alpha, strategy=strategy, weight=0.0)
        )
        total.backward()
        backend.nll(m, target, alpha, strategy=strategy, weight=2.0).backward()
        torch.testing.assert_close(
            m.grad.cpu().double(), torch.from_numpy(2 * want.grad_mean + 1), rtol=1e-6, atol=0
        )
