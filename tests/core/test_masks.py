"""Positions that count: a mask's weights on every back end, in every layout and dtype; and weights on the device."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from bounds import check_call
from masks import MASK_DTYPES, in_blocks, mask_for, positions, spoilt
from oracle import Options, expected
from places import Place
from problems import BF16, BY_NAME, CASES, DTYPES, FP16, FP32, FP64, WAYS, Case, short
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import vidfast

STRATEGIES = ("one_pass", "two_pass")
REDUCTIONS = ("mean", "sum", "batchmean")
# In place such a mean would have to be copied.
COPIED = ("spatial_slice", "expanded_batch", "expanded_channel", "strange")
name_of = lambda case: case.name  # noqa: E731


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_shapes(backend: Place, case: Case, strategy: str) -> None:
    """Some positions, with NaN where nothing is to be read; then fractional weights."""
    backend.need(case.numel)
    mask = mask_for(case, device=backend.device)
    tensors = spoilt(case, mask, device=backend.device)
    check_call(backend, *tensors, strategy=strategy, channel_dim=case.channel_dim, mask=mask)
    weights = mask_for(case, FP32, device=backend.device)
    tensors = spoilt(case, weights, math.inf, device=backend.device)
    check_call(
        backend, *tensors,
        strategy=strategy, channel_dim=case.channel_dim, mask=weights, g=-2.5, reduction="sum", full=True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [FP16, BF16, FP64], ids=short)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_shapes_in_other_dtypes(backend: Place, case: Case, dtype: torch.dtype) -> None:
    backend.need(case.numel)
    if case.numel > 1_000_000:
        backend.need(10 * case.numel)
    g = 1024.0 if dtype is FP16 else -2.5
    mask = mask_for(case, device=backend.device)
    tensors = spoilt(case, mask, dtype=dtype, device=backend.device, seed=1)
    check_call(backend, *tensors, strategy="two_pass", channel_dim=case.channel_dim, g=g, mask=mask)
    weights = mask_for(case, FP32, device=backend.device)
    tensors = spoilt(case, weights, dtype=dtype, device=backend.device, seed=1)
    check_call(
        backend, *tensors, strategy="one_pass", channel_dim=case.channel_dim, g=g, weight=64.0, mask=weights
    )


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_stretches_of_nothing(backend: Place, case: Case) -> None:
    """Whole tiles are left out, wherever the mapping of the layout has them."""
    backend.need(case.numel)
    mask = in_blocks(case).to(backend.device)
    for dtype, strategy in ((FP32, "one_pass"), (BF16, "two_pass")):
        tensors = spoilt(case, mask, dtype=dtype, device=backend.device)
        check_call(backend, *tensors, strategy=strategy, channel_dim=case.channel_dim, mask=mask)


@pytest.mark.parametrize("case", [c for c in CASES if c.mean_layout not in COPIED], ids=name_of)
def test_in_place(backend: Place, case: Case) -> None:
    backend.need(case.numel)
    for dtype, kind, g in ((FP32, torch.bool, 1.0), (BF16, FP32, 3.0)):
        mask = mask_for(case, kind, device=backend.device)
        tensors = spoilt(case, mask, dtype=dtype, device=backend.device)
        check_call(
            backend, *tensors, strategy="one_pass", inplace=True, g=g, channel_dim=case.channel_dim, mask=mask
        )


@pytest.mark.parametrize("kind", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dtypes_of_masks(backend: Place, strategy: str, kind: torch.dtype) -> None:
    for i, (case, dtype) in enumerate(zip(WAYS, itertools.cycle(DTYPES))):
        backend.need(case.numel)
        mask = mask_for(case, kind, seed=i, device=backend.device)
        tensors = spoilt(case, mask, dtype=dtype, device=backend.device)
        check_call(
            backend, *tensors,
            strategy=strategy, channel_dim=case.channel_dim, g=(1.0, 512.0)[i % 2], reduction="batchmean", mask=mask,
        )  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("dtype", "target_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=short)
def test_dtype_mixtures(backend: Place, dtype: torch.dtype, target_dtype: torch.dtype, strategy: str) -> None:
    for i, case in enumerate(WAYS):
        backend.need(case.numel)
        mask = mask_for(case, (torch.bool, FP32)[i % 2], seed=i, device=backend.device)
        tensors = spoilt(case, mask, dtype=dtype, target_dtype=target_dtype, device=backend.device)
        check_call(backend, *tensors, strategy=strategy, channel_dim=case.channel_dim, mask=mask)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_shapes_of_masks(backend: Place, strategy: str, reduction: str) -> None:
    """Without the channels, with 1 in their place, other sizes of 1, a weight a sample; any strides."""
    case = BY_NAME["plane_49"]
    b, _, h, w = case.shape
    random = torch.Generator().manual_seed(3)
    for shape in ((b, h, w), (b, 1, h, w), (1, 1, h, w), (b, 1, 1, 1), (b, 1, 1, w), (1, 1, 1, 1), (b,)):
        mask = torch.randint(0, 3, shape, generator=random).to(FP32).to(backend.device)
        mask.view(-1)[0] = 1
        tensors = spoilt(case, mask, device=backend.device)
        check_call(backend, *tensors, strategy=strategy, reduction=reduction, mask=mask)
    for mask in (
        mask_for(case).transpose(1, 2).contiguous().transpose(1, 2),
        mask_for(Case("wide", "", (b, 1, h, 2 * w)))[..., ::2],
        mask_for(Case("one", "", (1, 1, h, w))).expand(b, h, w),
    ):
        given = mask.to(backend.device)
        check_call(backend, *spoilt(case, given, device=backend.device), strategy=strategy, mask=given)


@pytest.mark.parametrize(
    "name", ["transformer", "channels_in_front", "channels_last", "reversed_memory", "vector"]
)
def test_positions_in_the_order_of_mean(backend: Place, name: str) -> None:
    """A weight of its own at each position, so that none can stand for another."""
    case = BY_NAME[name]
    shape = positions(case)
    mask = (torch.arange(math.prod(shape)).view(shape) % 251).to(FP32).to(backend.device)
    if not shape:
        mask = mask + 2
    for strategy in STRATEGIES:
        tensors = spoilt(case, mask, device=backend.device)
        check_call(backend, *tensors, strategy=strategy, channel_dim=case.channel_dim, mask=mask)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", [torch.bool, FP32], ids=str)
def test_nothing_selected(
    backend: Place, kind: torch.dtype, reduction: str, full: bool, strategy: str
) -> None:
    for case in WAYS:
        mask = torch.zeros(positions(case), dtype=kind, device=backend.device)
        mean, target, alpha = spoilt(case, mask, device=backend.device)
        inputs = [
            mean.requires_grad_(),
            target.requires_grad_(strategy == "two_pass"),
            alpha.requires_grad_(),
        ]
        loss = backend.nll(
            *inputs,
            strategy=strategy,
            full=full,
            reduction=reduction,
            channel_dim=case.channel_dim,
            mask=mask,
        )
        assert loss.item() == 0
        wanted = [x for x in inputs if x.requires_grad]
        for grad in torch.autograd.grad(loss, wanted, torch.full_like(loss, 3.0)):
            assert not grad.any()


@pytest.mark.parametrize("weight", [math.inf, math.nan])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_selected_and_one_over_nothing(backend: Place, strategy: str, weight: float) -> None:
    """A weight that is one over what is selected: of nothing everything is 0, on the reference too."""
    case = BY_NAME["plane_49"]
    mask = torch.zeros(positions(case), dtype=torch.bool, device=backend.device)
    factor = torch.tensor(weight, device=backend.device)
    for named, reduction in itertools.product((backend.name, "reference"), REDUCTIONS):
        mean, target, alpha = spoilt(case, mask, device=backend.device)
        inputs = [mean.requires_grad_(), alpha.requires_grad_()]
        loss = vidfast.gaussian_nll(
            inputs[0], target, inputs[1],
            mask=mask, weight=factor, reduction=reduction, strategy=strategy, full=True, backend=named,
        )  # fmt: skip
        assert loss.item() == 0
        assert not any(grad.any() for grad in torch.autograd.grad(loss, inputs))
    none = vidfast.gaussian_nll(inputs[0], target, inputs[1], mask=mask, weight=factor, reduction="none")
    assert not none.any()


def test_per_sample_gradients_of_the_reference() -> None:
    """torch.func goes through masks whose values must not be looked at."""
    mean, target, alpha = torch.randn(5, 4, 3), torch.randn(5, 4, 3), torch.zeros(3)
    for mask in (torch.rand(5, 4), torch.randint(0, 3, (5, 4)), torch.rand(5, 4) < 0.5):

        def loss(m: Tensor, t: Tensor, w: Tensor) -> Tensor:
            return vidfast.gaussian_nll(m, t, alpha, channel_dim=-1, mask=w, backend="reference")

        found = torch.func.vmap(torch.func.grad(loss))(mean, target, mask)
        for i in range(5):
            m = mean[i].clone().requires_grad_()
            loss(m, target[i], mask[i]).backward()
            torch.testing.assert_close(found[i], m.grad)


def test_everything_selected_is_no_mask(backend: Place) -> None:
    for case in WAYS:
        tensors = case.tensors(device=backend.device)
        ones = torch.ones(positions(case), dtype=torch.bool, device=backend.device)
        options = {"channel_dim": case.channel_dim, "full": True}
        without, *_ = check_call(backend, *tensors, strategy="one_pass", **options)
        with_mask, *_ = check_call(backend, *tensors, strategy="one_pass", mask=ones, **options)
        torch.testing.assert_close(with_mask, without, rtol=1e-6, atol=1e-7)


def test_weights_are_those_of_repeated_samples(backend: Place) -> None:
    """An integer weight is as many samples, whatever the reduction divides by."""
    mean, target, alpha = BY_NAME["plane_49"].tensors(FP64, device=backend.device)
    times = torch.tensor([2, 0, 1, 3, 1], device=backend.device)
    repeated = [x.repeat_interleave(times, 0) for x in (mean, target)]
    for reduction in ("mean", "sum"):
        got = backend.nll(mean, target, alpha, mask=times, reduction=reduction)
        want = backend.nll(*repeated, alpha, reduction=reduction)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("named", [None, "reference"])
def test_reduction_none(named: str | None) -> None:
    case = BY_NAME["plane_49"]
    mask = mask_for(case, FP32)
    mean, target, alpha = (x.requires_grad_() for x in spoilt(case, mask))
    options = {"backend": named} if named else {}
    out = vidfast.gaussian_nll(mean, target, alpha, reduction="none", mask=mask, weight=2.0, **options)
    assert out.shape == mean.shape
    assert not out.movedim(1, -1)[mask == 0].any()
    grads = torch.autograd.grad(out.sum(), (mean, target, alpha))
    want = expected(mean, target, alpha, 1.0, Options(weight=2.0, reduction="sum", mask=mask))
    for got, exact in zip(grads, (want.grad_mean, want.grad_target, want.grad_alpha), strict=True):
        torch.testing.assert_close(got.double(), torch.from_numpy(exact), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.sum().double(), torch.from_numpy(want.loss), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [torch.bool, FP64], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradcheck(backend: Place, strategy: str, reduction: str, kind: torch.dtype) -> None:
    for case in (Case("plane", "", (2, 3, 5)), Case("rows", "", (5, 3)), Case("tokens", "", (2, 4, 3), -1)):
        mask = mask_for(case, kind, seed=5, device=backend.device)
        tensors = case.tensors(FP64, alpha_dtype=FP64, device=backend.device)
        m, t, a = (x.requires_grad_() for x in tensors)

        def loss(
            mean: Tensor,
            alpha: Tensor,
            target: Tensor = t.detach(),  # noqa: B008
            mask: Tensor = mask,
            channel_dim: int = case.channel_dim,
        ) -> Tensor:
            return backend.nll(
                mean, target, alpha,
                strategy=strategy, reduction=reduction, full=True, weight=1.5, channel_dim=channel_dim, mask=mask,
            )  # fmt: skip

        assert gradcheck(loss, (m, a))
        if strategy == "two_pass":
            assert gradcheck(loss, (m, a, t))
            assert gradgradcheck(loss, (m, a, t))
            assert gradgradcheck(lambda alpha, loss=loss, m=m: loss(m.detach(), alpha), (a,))


def test_a_second_derivative_with_nan_under_the_mask(backend: Place) -> None:
    case = BY_NAME["plane_49"]
    mask = mask_for(case, device=backend.device)
    mean, target, alpha = spoilt(case, mask, dtype=FP64, alpha_dtype=FP64, device=backend.device)
    m, a = mean.requires_grad_(), alpha.requires_grad_()
    loss = backend.nll(m, target, a, mask=mask, strategy="two_pass")
    of_m, of_a = torch.autograd.grad(loss, (m, a), create_graph=True)
    for grad in torch.autograd.grad(of_m.sum() + of_a.sum(), (m, a)):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32, FP64, torch.int64], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_weight_on_the_device(backend: Place, strategy: str, reduction: str, dtype: torch.dtype) -> None:
    for i, case in enumerate(WAYS):
        weight = torch.full([(), (1,), (1, 1)][i % 3], 3 if dtype is torch.int64 else 0.375, dtype=dtype)
        weight = weight.to(backend.device)
        mask = mask_for(case, device=backend.device) if i % 2 else None
        tensors = (
            spoilt(case, mask, device=backend.device)
            if mask is not None
            else case.tensors(device=backend.device)
        )
        check_call(
            backend, *tensors,
            strategy=strategy, reduction=reduction, channel_dim=case.channel_dim, weight=weight, mask=mask, g=1.25,
            full=True,
        )  # fmt: skip


def test_a_weight_on_the_device_that_changes(backend: Place) -> None:
    """It is read where the kernels run, at every call."""
    mean, target, _ = BY_NAME["plane_49"].tensors(device=backend.device)
    weight = torch.ones((), device=backend.device)
    module = vidfast.GaussianNLL(24, weight=weight, backend=backend.name, device=backend.device)
    first = module(mean, target).item()
    for value in (2.0, -0.5, 0.0):
        weight.fill_(value)
        assert module(mean, target).item() == pytest.approx(value * first, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_module(backend: Place, strategy: str) -> None:
    case = BY_NAME["transformer"]
    module = vidfast.GaussianNLL(
        96, channel_dim=-1, strategy=strategy, backend=backend.name, device=backend.device
    )
    mask = mask_for(case, torch.int64, device=backend.device)
    mean, target, _ = spoilt(case, mask, device=backend.device)
    got = module(mean, target, mask=mask)
    want = backend.nll(mean, target, module.alpha, channel_dim=-1, strategy=strategy, mask=mask)
    assert torch.equal(got, want)
    assert torch.isfinite(got)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bitwise_repeatable(backend: Place, strategy: str) -> None:
    for name, kind in (("plane_16385", FP32), ("rows_many", FP32), ("plane_49", torch.bool)):
        case = BY_NAME[name]
        backend.need(case.numel)
        mask = mask_for(case, kind, device=backend.device)
        found = []
        for _ in range(3):
            mean, target, alpha = spoilt(case, mask, device=backend.device)
            m, a = mean.requires_grad_(), alpha.requires_grad_()
            loss = backend.nll(m, target, a, strategy=strategy, channel_dim=case.channel_dim, mask=mask)
            found.append([loss, *torch.autograd.grad(loss, (m, a))])
        for again in found[1:]:
            assert all(torch.equal(x, y) for x, y in zip(found[0], again, strict=True))


def test_many_positions_are_counted_exactly(backend: Place) -> None:
    """More than one fp32 counter could hold."""
    backend.need(1 << 25)
    n = (1 << 24) + 3
    mean = torch.zeros(n, 1, device=backend.device)
    target = torch.ones(n, 1, dtype=BF16, device=backend.device)
    for mask in (torch.ones(n, dtype=torch.bool), torch.full((n,), 0.5)):
        want = mask.double().sum().item()
        alpha = torch.full((1,), 0.5413, dtype=FP64, device=backend.device)  # a variance of about 1
        loss = backend.nll(mean.double(), target, alpha, reduction="sum", mask=mask.to(backend.device))
        v = math.log1p(math.exp(0.5413)) + 1e-5
        assert loss.item() == pytest.approx(0.5 * want * (math.log(v) + 1 / v), rel=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_mask_changed_before_backward(backend: Place, strategy: str) -> None:
    """One pass has used it; two passes refuse it, as autograd does for what it saved."""
    mean, target, alpha = BY_NAME["plane_49"].tensors(device=backend.device)
    mask = mask_for(BY_NAME["plane_49"], device=backend.device)
    m = mean.requires_grad_()
    loss = backend.nll(m, target, alpha, strategy=strategy, mask=mask)
    want = torch.autograd.grad(loss, m, retain_graph=True)[0].clone()
    mask.logical_not_()
    if strategy == "one_pass":
        assert torch.equal(torch.autograd.grad(loss, m)[0], want)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, m)


@pytest.mark.parametrize("kind", [torch.bool, FP32], ids=str)
def test_saved_tensor_hooks(backend: Place, kind: torch.dtype) -> None:
    """What hooks give back may be stored otherwise."""
    case = BY_NAME["plane_49"]
    mask = mask_for(case, kind, device=backend.device)
    mean, target, alpha = spoilt(case, mask, device=backend.device)
    want = expected(mean, target, alpha, 1.0, Options(mask=mask))

    def unpack(x: Tensor) -> Tensor:
        if x.dim() < 2:
            return x.clone()
        wide = torch.empty(*x.shape, 2, dtype=x.dtype, device=x.device)
        wide[..., 0] = x
        return wide[..., 0]

    m = mean.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        loss = backend.nll(m, target, alpha, strategy="two_pass", mask=mask)
    grad = torch.autograd.grad(loss, m)[0]
    torch.testing.assert_close(grad.cpu().double(), torch.from_numpy(want.grad_mean), rtol=1e-6, atol=1e-12)


def test_an_integer_weight_of_a_module_is_read_at_every_call() -> None:
    mean, target, _ = BY_NAME["plane_49"].tensors()
    weight = torch.tensor(1)
    module = vidfast.GaussianNLL(24, weight=weight)
    first = module(mean, target).item()
    weight.fill_(5)
    assert module(mean, target).item() == pytest.approx(5 * first, rel=1e-6)
    assert module.weight is weight


def test_masks_of_inference_mode(backend: Place) -> None:
    case = BY_NAME["plane_49"]
    with torch.inference_mode():
        mask = mask_for(case, device=backend.device)
        weight = torch.full((), 0.5, device=backend.device)
    mean, target, alpha = case.tensors(device=backend.device)
    for strategy in STRATEGIES:
        check_call(backend, mean, target, alpha, strategy=strategy, mask=mask, weight=weight)
    for reduction in ("none", "mean"):
        leaf = mean.clone().requires_grad_()
        loss = vidfast.gaussian_nll(
            leaf, target, alpha, reduction=reduction, backend="reference", mask=mask.float(), weight=weight
        )
        loss.sum().backward()
        assert torch.isfinite(leaf.grad).all()
