"""One variance an element on every back end: values and gradients in every layout, dtype and transform."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from masks import mask_for, spoil
from places import Place
from problems import BF16, BY_NAME, CASES, DTYPES, FP16, FP32, FP64, WAYS, Case, short
from torch import Tensor
from variances import BETAS, TRANSFORMS, check_call, check_results, computed_in, expected, tensors_of

import vidfast

STRATEGIES = ("one_pass", "two_pass")
name_of = lambda case: case.name  # noqa: E731


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_shapes(backend: Place, case: Case, strategy: str) -> None:
    backend.need(case.numel)
    check_call(backend, *tensors_of(case, device=backend.device), strategy=strategy, **TRANSFORMS["softplus"])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_shapes_in_other_dtypes(backend: Place, case: Case) -> None:
    backend.need(case.numel)
    if case.numel > 1_000_000:
        backend.need(10 * case.numel)
    for i, dtype in enumerate((BF16, FP16, FP64)):
        tensors = tensors_of(case, dtype=dtype, device=backend.device, seed=i)
        check_call(
            backend,
            *tensors,
            strategy=STRATEGIES[i % 2],
            g=512.0,
            reduction="mean",
            full=True,
            **TRANSFORMS["exp"],
        )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_transforms(backend: Place, strategy: str, kind: str, beta: float) -> None:
    for case, dtype in itertools.product(WAYS[::3], DTYPES):
        tensors = tensors_of(case, kind, dtype, device=backend.device)
        for full in (False, True):
            check_call(
                backend, *tensors, strategy=strategy, beta=beta, full=full, g=-3.0, weight=0.5, reduction="sum" if full
                else "batchmean", **TRANSFORMS[kind],
            )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("target_dtype", DTYPES, ids=short)
def test_dtype_mixtures(backend: Place, dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    for raw_dtype, case in zip(DTYPES, itertools.cycle(WAYS)):
        tensors = tensors_of(case, "softplus", dtype, target_dtype, raw_dtype, device=backend.device)
        for strategy in STRATEGIES:
            check_call(backend, *tensors, strategy=strategy, **TRANSFORMS["softplus"])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_masks(backend: Place, case: Case, strategy: str) -> None:
    """A weight a position, with NaN where nothing is to be read; then numbers."""
    backend.need(case.numel)
    for i, dtype in enumerate((torch.bool, FP32)):
        mask = mask_for(case, dtype, device=backend.device)
        tensors = tensors_of(case, device=backend.device)
        layouts = case.mean_layout, case.target_layout or case.mean_layout, case.mean_layout
        for x, layout in zip(tensors, layouts, strict=True):
            spoil(x, mask, case, layout)
        check_call(
            backend, *tensors, strategy=strategy, channel_dim=case.channel_dim, mask=mask, reduction=("mean", "sum")[i],
            full=True, beta=0.5 * i, **TRANSFORMS["softplus"],
        )  # fmt: skip


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_masks_of_elements(backend: Place, kind: str) -> None:
    """Without channels a mask has a weight for each element, for a row, or for a sample."""
    for case in WAYS if backend.limit is None else WAYS[:2]:
        tensors = tensors_of(case, kind, device=backend.device)
        shape = case.shape
        for given in (shape, (1, *shape[1:]), (shape[0], *[1] * (len(shape) - 1)), (shape[0],)):
            mask = (torch.arange(math.prod(given)).view(given) % 3).to(torch.uint8).to(backend.device)
            if int(mask.sum()) == 0:
                mask = mask + 1
            for strategy in STRATEGIES:
                check_call(backend, *tensors, strategy=strategy, mask=mask, **TRANSFORMS[kind])


def halves(
    case_shape: tuple[int, ...], dim: int, dtype: torch.dtype, order: str, device: torch.device
) -> Tensor:
    """A leaf whose two halves along `dim` are mean and raw."""
    shape = list(case_shape)
    shape[dim] *= 2
    whole = torch.randn(shape, dtype=FP64).to(device, dtype)
    if order == "channels_last":
        whole = whole.movedim(1, -1).contiguous().movedim(-1, 1)
    return whole.requires_grad_()


HALVES = [
    ((3, 5, 6, 7), 1, "contiguous"), ((3, 16, 8, 8), 1, "contiguous"), ((3, 5, 6, 7), 1, "channels_last"),
    ((2, 9, 32), -1, "contiguous"), ((40, 1), 1, "contiguous"), ((7, 300), 1, "contiguous"), ((6, 5), 0, "contiguous"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "dim", "order"), HALVES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=short)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_halves_of_one_tensor(
    backend: Place, strategy: str, dtype: torch.dtype, shape: tuple[int, ...], dim: int, order: str
) -> None:
    """Nothing is copied, and the whole's gradient is what the kernel wrote, in the whole's layout."""
    for g in (1.0, -2.5):
        whole = halves(shape, dim, dtype, order, backend.device)
        mean, raw = whole.chunk(2, dim)
        target = torch.randn(mean.shape).to(mean)
        loss = vidfast.heteroscedastic_nll(mean, target, raw, strategy=strategy, backend=backend.name)
        loss.backward(torch.tensor(g, dtype=loss.dtype, device=loss.device))
        assert whole.grad is not None
        assert whole.grad.stride() == whole.stride()
        want = expected(mean, target, raw, g)
        check_results(want, computed_in(mean, target), loss, *(None, None, None))
        of_mean, of_raw = whole.grad.chunk(2, dim)
        check_results(want, computed_in(mean, target), loss, of_mean, None, of_raw)


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_in_place(backend: Place, kind: str) -> None:
    """The gradients are written over mean and raw, halves of one tensor or not."""
    for dtype, g in ((FP32, 1.0), (BF16, 3.0)):
        start = halves((3, 6, 7, 9), 1, dtype, "contiguous", backend.device)
        base = (start.abs() + 0.1) if kind == "identity" else start * 1
        mean, raw = base.chunk(2, 1)
        target = torch.randn(mean.shape).to(mean)
        want = expected(mean, target, raw, g, **TRANSFORMS[kind])
        options = {"strategy": "one_pass", "inplace": True, "backend": backend.name, **TRANSFORMS[kind]}
        loss = vidfast.heteroscedastic_nll(mean, target, raw, **options)
        (grad,) = torch.autograd.grad(loss, base, torch.tensor(g, dtype=loss.dtype, device=loss.device))
        assert mean.data_ptr() == base.data_ptr()
        check_results(want, FP32, loss, grad.chunk(2, 1)[0], None, grad.chunk(2, 1)[1])
        # two tensors of their own; of the first alone
        one, two = (x.detach().clone().requires_grad_() for x in (mean, raw))
        one, two = one * 1, (two.abs() + 0.1 if kind == "identity" else two * 1)
        want = expected(one, target, two, 1.0, **TRANSFORMS[kind])
        address = one.data_ptr(), two.data_ptr()
        loss = vidfast.heteroscedastic_nll(one, target, two, **options)
        first, second = torch.autograd.grad(loss, (one, two))
        assert (first.data_ptr(), second.data_ptr()) == address
        check_results(want, FP32, loss, first, None, second)


def test_one_gradient_alone(backend: Place) -> None:
    case = BY_NAME["plane_49"]
    mean, target, raw = tensors_of(case, device=backend.device)
    want = expected(mean, target, raw)
    for strategy in STRATEGIES:
        for which in ("mean", "raw"):
            m, u = mean.clone(), raw.clone()
            asked = (m if which == "mean" else u).requires_grad_()
            loss = vidfast.heteroscedastic_nll(m, target, u, strategy=strategy, backend=backend.name)
            (grad,) = torch.autograd.grad(loss, asked)
            check_results(
                want, FP32, loss, grad if which == "mean" else None, None, grad if which == "raw" else None
            )
    t = target.clone().requires_grad_()
    (grad,) = torch.autograd.grad(vidfast.heteroscedastic_nll(mean, t, raw, backend=backend.name), t)
    check_results(
        want, FP32, vidfast.heteroscedastic_nll(mean, target, raw, backend=backend.name), None, grad, None
    )


EXTREMES = (
    0.0,
    -0.0,
    1e-30,
    1e-4,
    1.0,
    20.0,
    88.0,
    89.5,
    104.0,
    1e4,
    -1e-30,
    -1.0,
    -20.0,
    -88.0,
    -104.0,
    -1e4,
)


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("dtype", [FP32, FP64, BF16], ids=short)
def test_extremes_of_raw(backend: Place, dtype: torch.dtype, kind: str) -> None:
    """Every finite raw gives what the formula gives, where that is a number of the dtype."""
    raw = torch.tensor(
        [x for x in EXTREMES if x >= 0 or kind != "identity"], dtype=dtype, device=backend.device
    )
    if kind == "log_variance":  # beyond, 1 / v is no number
        raw = raw[raw.abs() < 80]
    for residual in (0.0, 0.25, 3.0):
        mean = torch.full_like(raw, residual)
        for strategy in STRATEGIES:
            for i in range(raw.numel()):  # one by one: none hides another
                check_call(
                    backend, mean[i : i + 1], torch.zeros_like(mean[i : i + 1]), raw[i : i + 1].clone(),
                    strategy=strategy, reduction="sum", **TRANSFORMS[kind],
                )  # fmt: skip


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_what_is_not_finite_shows(backend: Place, kind: str) -> None:
    """NaN and infinity among the inputs come out as they do from the reference, and only where they went in."""
    for bad in (math.nan, math.inf, -math.inf):
        for place in range(3):
            tensors = [torch.full((37,), 0.5, device=backend.device) for _ in range(3)]
            tensors[place][5] = bad
            grads = {}
            for name in (backend.name, "reference"):
                leaves = [x.clone().requires_grad_() for x in tensors]
                loss = vidfast.heteroscedastic_nll(*leaves, reduction="sum", backend=name, **TRANSFORMS[kind])
                grads[name] = [loss.detach(), *torch.autograd.grad(loss, leaves)]
            for got, want in zip(grads[backend.name], grads["reference"], strict=True):
                if got.dim():
                    others = torch.arange(37, device=got.device) != 5
                    assert torch.allclose(got[others], want[others], rtol=1e-5)
                else:
                    assert bool(got.isfinite()) == bool(want.isfinite())
                    assert bool(got.isnan()) == bool(want.isnan()) or bad != bad
            if bad != bad:
                assert all(bool(x.isnan().any()) for x in grads[backend.name])


def test_a_residual_of_zero_stays_zero_where_the_precision_overflows(backend: Place) -> None:
    """exp(-raw) is no number of fp32 below raw = -88; of no residual it makes none."""
    raw = torch.full((5,), -150.0, device=backend.device)
    mean = torch.zeros(5, device=backend.device)
    for strategy in STRATEGIES:
        check_call(
            backend, mean, mean.clone(), raw, strategy=strategy, reduction="sum", **TRANSFORMS["log_variance"]
        )


def test_no_floor_that_is_a_normal_number(backend: Place) -> None:
    """eps may be smaller than any normal number of fp32."""
    raw = torch.tensor([0.0, 1e-42, 1.0, 2e-38], device=backend.device)
    zero = torch.zeros_like(raw)
    for i in range(1, 4):
        check_call(
            backend, zero[i : i + 1], zero[i : i + 1].clone(), raw[i : i + 1].clone(),
            transform="identity", eps=1e-44, reduction="sum",
        )  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_weight_on_the_device(backend: Place, strategy: str) -> None:
    tensors = tensors_of(BY_NAME["plane_49"], device=backend.device)
    weight = torch.tensor([0.25], device=backend.device)
    mask = mask_for(BY_NAME["plane_49"], device=backend.device)
    check_call(backend, *tensors, strategy=strategy, weight=weight)
    check_call(backend, *tensors, strategy=strategy, weight=weight, mask=mask, channel_dim=1, reduction="sum")


def test_nothing_to_score(backend: Place) -> None:
    for shape in ((0, 3), (4, 0, 2)):
        leaves = [torch.zeros(shape, device=backend.device, requires_grad=True) for _ in range(3)]
        loss = vidfast.heteroscedastic_nll(*leaves, reduction="sum")
        assert loss.item() == 0
        assert all(x.shape == shape for x in torch.autograd.grad(loss, leaves))
        assert math.isnan(vidfast.heteroscedastic_nll(*leaves).item())
        assert vidfast.heteroscedastic_nll(*leaves, reduction="none").shape == shape
    tensors = [x.requires_grad_() for x in tensors_of(BY_NAME["plane_49"], device=backend.device)]
    nothing = torch.zeros(tensors[0].shape[0], dtype=torch.bool, device=backend.device)
    for reduction in ("mean", "sum", "batchmean"):
        loss = vidfast.heteroscedastic_nll(
            *tensors, mask=nothing, channel_dim=1, reduction=reduction, backend=backend.name
        )
        assert loss.item() == 0
        assert not any(bool(x.any()) for x in torch.autograd.grad(loss, tensors))
