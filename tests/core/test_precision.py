"""Rounding, edge values, extremes, and what a loss scaler does to fp16."""

from __future__ import annotations

import math

import pytest
import torch
from bounds import RELATIVE, check_call, check_gradient, check_scalar, check_unbiased, ulp_distance
from oracle import Options, expected
from places import Place
from problems import BF16, FP16, FP32, FP64, Case, short

from vidfast import reference

STRATEGIES = ("one_pass", "two_pass")
# both kernel families; 64 channels so that a scale's own rounding averages out
FAMILIES = (
    Case("planes", "plane family", (4, 64, 16, 16)),
    Case("rows", "channel-fastest family", (256, 256)),
    Case("small", "small planes", (114, 64, 3, 3)),
)


def unit_weight(alpha: torch.Tensor, eps: float = 1e-5) -> float:
    """The weight at which k / v is exactly 1 for reduction="sum", so that d/d mean is r itself, rounded once."""
    return float(reference.variance(alpha.double(), eps)[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("g", [1.0, 3.0, -0.6875])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=short)
@pytest.mark.parametrize("case", FAMILIES, ids=lambda c: c.name)
def test_rounding_is_not_biased(
    backend: Place, case: Case, dtype: torch.dtype, g: float, strategy: str
) -> None:
    backend.need(case.numel)
    mean, target, alpha = case.tensors(dtype, FP32, device=backend.device)
    weight = (
        16.0 if dtype is FP16 else 1.0
    )  # away from fp16's subnormal range, where the last place stops shrinking
    grads = check_call(
        backend, mean, target, alpha, strategy=strategy, g=g, reduction="batchmean", weight=weight
    )
    want = expected(mean, target, alpha, g, Options(reduction="batchmean", weight=weight))
    check_unbiased("d/d mean", grads[1], want.grad_mean)
    if strategy == "two_pass":
        check_unbiased("d/d target", grads[2], want.grad_target)


@pytest.mark.parametrize("shape", [(1, 1, 65536), (64, 1024)], ids=["plane", "rows"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=short)
def test_every_16_bit_value_is_read_and_written_exactly(
    backend: Place, dtype: torch.dtype, strategy: str, shape: tuple[int, ...]
) -> None:
    """With k / v = 1 and target 0, d/d mean is mean: all 65536 bit patterns, subnormals, infinities, NaN."""
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    backend.need(bits.numel())
    mean = bits.to(backend.device).view(shape).requires_grad_()
    target = torch.zeros(shape, device=backend.device)
    alpha = torch.full((shape[1],), 0.3, device=backend.device)
    loss = backend.nll(mean, target, alpha, reduction="sum", weight=unit_weight(alpha), strategy=strategy)
    (grad,) = torch.autograd.grad(loss, mean)
    got, want = grad.cpu().flatten(), bits
    nan = want.isnan()
    assert got[nan].isnan().all()
    distance = ulp_distance(got, want)[~nan]
    if not backend.is_cpu and dtype is BF16:  # a GPU may flush fp32's subnormal range, which is bf16's too
        distance = distance[want[~nan].abs() >= torch.finfo(BF16).tiny]
    assert distance.max() == 0


@pytest.mark.parametrize("shape", [(1, 1, -1), (64, -1)], ids=["plane", "rows"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=short)
def test_rounds_to_nearest_even(
    backend: Place, dtype: torch.dtype, strategy: str, shape: tuple[int, ...]
) -> None:
    """d/d mean = -round(target): ties, both neighbours of ties, the overflow edge and fp16's subnormals."""
    values = torch.arange(0, 32768, 7, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()].float()
    up = torch.nextafter(values.to(dtype), torch.full_like(values, torch.inf).to(dtype)).float()
    tie = (values.double() + up.double()).div(2).float()
    tie = tie[tie.isfinite()]
    inf = torch.full_like(tie, torch.inf)
    edges = torch.tensor(
        [
            65503.9,
            65504.0,
            65519.99,
            65520.0,
            65536.0,
            3.3895e38,
            3.4e38,
            0.0,
            2.0**-25,
            2.0**-26,
            2.9802325e-08,
        ]
    )
    x = torch.cat([values, tie, torch.nextafter(tie, inf), torch.nextafter(tie, -inf), edges])
    x = torch.cat([x, -x])
    if dtype is BF16 and not backend.is_cpu:
        x = x[x.abs() >= torch.finfo(BF16).tiny]
    x = torch.cat([x, x.new_ones(-x.numel() % 1024)])
    backend.need(x.numel())
    target = x.to(backend.device).view(shape).contiguous()
    mean = torch.zeros_like(target, dtype=dtype).requires_grad_()
    alpha = torch.full((target.shape[1],), 0.3, device=backend.device)
    loss = backend.nll(mean, target, alpha, reduction="sum", weight=unit_weight(alpha), strategy=strategy)
    (grad,) = torch.autograd.grad(loss, mean)
    want = (-x).to(dtype)
    wrong = ulp_distance(grad.cpu().flatten(), want).nonzero().flatten()
    assert wrong.numel() == 0, [(x[i].item(), grad.flatten()[i].item(), want[i].item()) for i in wrong[:5]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fp32_differences_keep_their_digits(backend: Place, strategy: str) -> None:
    """mean and target next to each other, far from zero: r is exact, and so is its gradient to 3 ulp."""
    target = torch.rand(2, 8, 20, 20, device=backend.device) + 1000
    mean = torch.nextafter(target, torch.full_like(target, torch.inf))
    check_call(backend, mean, target, torch.randn(8, device=backend.device), strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sums_of_unequal_magnitudes(backend: Place, strategy: str) -> None:
    """One large residual and very many small ones: a running fp32 sum would drop the small."""
    shape = (2, 2, 512, 512)
    backend.need(math.prod(shape))
    mean = torch.full(shape, 1e-3, device=backend.device)
    mean[0, :, 0, 0] = 30.0
    alpha = torch.zeros(2, device=backend.device)
    check_call(backend, mean, torch.zeros_like(mean), alpha, strategy=strategy)
    rows = mean.movedim(1, -1).contiguous()
    check_call(backend, rows, torch.zeros_like(rows), alpha, strategy=strategy, channel_dim=-1)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=short)
def test_constant_residuals_sum_without_drift(backend: Place, dtype: torch.dtype, strategy: str) -> None:
    """Equal terms round the same way each time: the worst case of a sum, where errors do not cancel."""
    shape = (1, 3, 300_000)
    backend.need(math.prod(shape))
    mean = torch.full(shape, 1 / 3, dtype=dtype, device=backend.device)
    check_call(
        backend,
        mean,
        torch.zeros_like(mean),
        torch.full((3,), -2.0, device=backend.device),
        strategy=strategy,
    )


@pytest.mark.parametrize("alpha", [-0.3, 2.0, 7.1])
def test_many_channels_sum_without_drift(backend: Place, alpha: float) -> None:
    """The same term of each of 40,000 channels is rounded the same way each time."""
    m = torch.ones(40000, 1, dtype=FP64, device=backend.device)
    a = torch.full((1,), alpha, dtype=FP64, device=backend.device).expand(40000)
    want = expected(m, m, a, 1.0, Options(channel_dim=0))
    loss = backend.nll(m, m, a, channel_dim=0)
    check_scalar("loss", loss, want.loss, want.loss_scale, RELATIVE[FP64])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("alpha", [1e4, -1e4, 89.0, 88.0, 20.5, -20.5, -104.0, -745.0, 709.0, 0.0])
@pytest.mark.parametrize("dtype", [FP32, FP64, BF16], ids=short)
def test_extreme_alphas_are_finite(backend: Place, dtype: torch.dtype, alpha: float, strategy: str) -> None:
    mean, target, _ = Case("", "", (2, 4, 5, 5)).tensors(dtype, device=backend.device)
    a = torch.full((4,), alpha, device=backend.device)
    results = check_call(backend, mean, target, a, strategy=strategy, g=1.5)
    for x in results:
        assert x.isfinite().all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("eps", [1e-30, 1e-12, 1e-3, 1e6])
def test_eps(backend: Place, eps: float, strategy: str) -> None:
    mean, target, _ = Case("", "", (2, 4, 5, 5)).tensors(FP32, device=backend.device)
    alpha = torch.tensor([-60.0, -10.0, 0.0, 10.0], device=backend.device)
    if eps == 1e-30:
        mean, target = mean * 1e-12, target * 1e-12  # so that r / v stays in fp32's range
    check_call(backend, mean, target, alpha, strategy=strategy, eps=eps)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [(3, 4, 7, 7), (3, 4, 2, 2), (20, 4)], ids=["plane", "small", "rows"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["mean", "target"])
def test_bad_values_come_out_and_stay_in_their_channel(
    backend: Place, where: str, bad: float, shape: tuple[int, ...], strategy: str
) -> None:
    tensors = dict(
        zip(
            ("mean", "target", "alpha"), Case("", "", shape).tensors(FP32, device=backend.device), strict=True
        )
    )
    clean = {name: x.clone() for name, x in tensors.items()}
    tensors[where][1, 2] = bad
    m, a = tensors["mean"].requires_grad_(), tensors["alpha"].requires_grad_()
    loss = backend.nll(m, tensors["target"], a, strategy=strategy)
    assert not loss.isfinite()
    assert loss.isnan() == math.isnan(bad)
    grad_mean, grad_alpha = torch.autograd.grad(loss, (m, a))
    assert not grad_mean[1, 2].isfinite().any()
    assert not grad_alpha[2].isfinite()
    want = expected(clean["mean"], clean["target"], clean["alpha"])
    grad_mean[1, 2] = torch.from_numpy(want.grad_mean)[1, 2].float()
    check_gradient("the others", grad_mean, want.grad_mean, 3)
    others = [0, 1, 3]
    torch.testing.assert_close(
        grad_alpha[others].cpu().double(), torch.from_numpy(want.grad_alpha)[others], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bad_alphas_come_out(backend: Place, strategy: str) -> None:
    mean, target, alpha = Case("", "", (2, 4, 5, 5)).tensors(FP32, device=backend.device)
    for bad in (math.nan, math.inf):
        a = alpha.clone()
        a[1] = bad
        loss, grad_mean, *_, grad_alpha = _run(backend, mean, target, a, strategy)
        assert loss.isnan() if math.isnan(bad) else loss == math.inf
        want = expected(mean, target, a)
        assert torch.equal(grad_alpha.isnan().cpu(), torch.from_numpy(want.grad_alpha).isnan())
        assert torch.equal(grad_mean.isnan().cpu(), torch.from_numpy(want.grad_mean).isnan())
        check_gradient("d/d mean", grad_mean, want.grad_mean, 3)


def _run(
    backend: Place, mean: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor, strategy: str
) -> list[torch.Tensor]:
    m, a = mean.detach().requires_grad_(), alpha.detach().requires_grad_()
    loss = backend.nll(m, target, a, strategy=strategy)
    return [loss, *torch.autograd.grad(loss, (m, a))]


def test_fp16_squares_do_not_overflow(backend: Place) -> None:
    """256^2 is past fp16's largest number; the sum is fp32 or wider."""
    mean = torch.full((2, 4, 10, 10), 300.0, dtype=FP16, device=backend.device)
    target = torch.full_like(mean, -300.0)
    alpha = torch.full((4,), 100.0, device=backend.device)
    loss, *_ = check_call(backend, mean, target, alpha, g=1.0)
    assert loss.item() == pytest.approx(600**2 / 200 + math.log(100) / 2, rel=1e-3)


def test_fp16_with_a_loss_scaler(backend: Place) -> None:
    """The scaled gradients are the fp32 oracle's; written before the factor arrived they would be zeros."""
    shape = (16, 64, 32, 32)
    backend.need(math.prod(shape))
    mean = torch.randn(shape, device=backend.device).to(FP16)
    target = mean.float() + torch.rand(shape, device=backend.device) * 0.01
    alpha = torch.full((64,), 0.5, device=backend.device)
    factor = 2.0**16
    want = expected(mean, target, alpha, factor)
    grads = {}
    for strategy in ("auto", "one_pass"):
        scaler = torch.amp.GradScaler(backend.device.type, init_scale=factor)
        m = mean.clone().requires_grad_()
        a = alpha.clone().requires_grad_()
        scaler.scale(backend.nll(m, target, a, strategy=strategy)).backward()
        grads[strategy] = (m.grad, a.grad)
    assert (grads["one_pass"][0] == 0).double().mean() > 0.9
    got, grad_alpha = grads["auto"]
    check_gradient("d/d mean", got, want.grad_mean, 1)
    check_unbiased("d/d mean", got, want.grad_mean)
    assert (got != 0).double().mean() > 0.9
    torch.testing.assert_close(
        grad_alpha.cpu().double(), torch.from_numpy(want.grad_alpha), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fp64_keeps_fp64_through_a_mixture(backend: Place, strategy: str) -> None:
    mean, target, alpha = Case("", "", (3, 5, 7, 7)).tensors(FP32, FP64, device=backend.device)
    mean = mean * 1e-9
    target = target * 1e-9 + 1  # in fp32 the residual would be gone
    loss, *_ = check_call(backend, mean, target, alpha, strategy=strategy)
    assert loss.dtype == FP64


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=short)
@pytest.mark.parametrize("strategy", ["auto", "one_pass", "two_pass"])
def test_autocast_changes_nothing(backend: Place, dtype: torch.dtype, strategy: str) -> None:
    mean, target, alpha = Case("", "", (3, 5, 7, 7)).tensors(FP32, device=backend.device)
    plain = _run(backend, mean, target, alpha, strategy)
    with torch.autocast(backend.device.type, dtype=dtype):
        cast = _run(backend, mean, target, alpha, strategy)
    for x, y in zip(plain, cast, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_leaves_the_reference_alone(reduction: str) -> None:
    from vidfast import gaussian_nll

    mean, target, alpha = Case("", "", (3, 5, 7, 7)).tensors(FP32)
    plain = gaussian_nll(mean, target, alpha, backend="reference", reduction=reduction)
    with torch.autocast("cpu", dtype=BF16):
        cast = gaussian_nll(mean, target, alpha, backend="reference", reduction=reduction)
    assert torch.equal(plain, cast)
