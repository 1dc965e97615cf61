"""One variance an element, by the interpreted kernels: test_heteroscedastic.py runs this file, in a process of its own.

Every way through the kernels is taken, in tiles so small that each has several, by the back end's methods as they are.
"""

from __future__ import annotations

import math

import pytest
import torch
from bounds import check_scalar
from element_problems import (
    BF16,
    BY_NAME,
    F16,
    F32,
    F64,
    SHAPES,
    TRANSFORMS,
    K,
    Problem,
    Shape,
    run_all,
    run_in_place,
)
from torch import Tensor

from vidfast.backends.triton import TritonBackend, heteroscedastic_plan
from vidfast.backends.triton.plan import RULE, Tuning
from vidfast.heteroscedastic import reference
from vidfast.heteroscedastic.arguments import LOG_VARIANCE, HeteroscedasticCall
from vidfast.heteroscedastic.layout import Rows
from vidfast.positions import Counts

BACKEND = TritonBackend()
assert BACKEND.unavailable() is None, BACKEND.unavailable()
SMALL_TILES = RULE._replace(warps=1, programs=1)
WEIGHTS = ("", "bytes", "fractions", "halves")
SOME = [BY_NAME[name] for name in ("tail", "odd_rows", "long_halves")]


@pytest.fixture(autouse=True)
def _start(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(BACKEND, "rule", SMALL_TILES)
    monkeypatch.setattr(heteroscedastic_plan, "TIMES_AS_MANY", 1)
    heteroscedastic_plan.plan_elements.cache_clear()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_way_through_the_kernels(shape: Shape, weights: str) -> None:
    run_all(BACKEND, Problem(shape, weights=weights))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_place(shape: Shape) -> None:
    for weights in ("", "bytes"):
        run_in_place(BACKEND, Problem(shape, (F32, BF16, F32), weights=weights))


@pytest.mark.parametrize("weights", ["", "fractions"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (BF16,) * 3,
        (F16,) * 3,
        (F64,) * 3,
        (BF16, F32, F16),
        (F32, BF16, BF16),
        (BF16, BF16, F64),
        (F32, F64, F32),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SOME, ids=str)
def test_dtypes(shape: Shape, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], weights: str) -> None:
    run_all(BACKEND, Problem(shape, dtypes, weights=weights))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 0.7, 2.5])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_and_powers(transform: str, beta: float, dtype: torch.dtype) -> None:
    for weights in ("", "bytes"):
        run_all(BACKEND, Problem(BY_NAME["tail"], (dtype,) * 3, transform, beta, weights, full=bool(weights)))


@pytest.mark.parametrize("weights", ["", "bytes"])
def test_a_negative_variance_that_is_nan(weights: str) -> None:
    problem = Problem(BY_NAME["tail"], transform="clamp", negative_is_nan=True, weights=weights)
    run_all(BACKEND, problem)
    x = problem.made()
    at = 5 if not weights else int((x.w[0] != 0).nonzero()[0])
    x.raw[0, at] = -1e-3
    loss, grads = torch.empty(()), [x.empty(y) for y in (x.mean, x.raw)]
    BACKEND.heteroscedastic_forward_grad(
        *x.given(), loss=loss, grad_mean=grads[0], grad_raw=grads[1], counts=x.counts
    )
    assert loss.isnan()
    for grad in grads:
        assert grad.isnan().nonzero().tolist() == [[0, at]]


@pytest.mark.parametrize("weights", ["numbers", "one", "none"])
@pytest.mark.parametrize("shape", [*SOME, BY_NAME["planes"], BY_NAME["channels_last"]], ids=str)
def test_few_positions_and_none(shape: Shape, weights: str) -> None:
    run_all(BACKEND, Problem(shape, (F32, BF16, F32), weights=weights))


@pytest.mark.parametrize("rule", [RULE, SMALL_TILES._replace(ahead=0)], ids=["as_chosen", "behind"])
@pytest.mark.parametrize("weights", ["", "bytes"])
@pytest.mark.parametrize("shape", SOME, ids=str)
def test_other_free_numbers(
    monkeypatch: pytest.MonkeyPatch, shape: Shape, weights: str, rule: Tuning
) -> None:
    monkeypatch.setattr(BACKEND, "rule", rule)
    run_all(BACKEND, Problem(shape, weights=weights))


@pytest.mark.parametrize("wanted", ["mean", "target", "raw"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_one_gradient(transform: str, wanted: str) -> None:
    x = Problem(BY_NAME["tail"], transform=transform, weights="fractions").made()
    given = x.given()
    grads = {f"grad_{name}": None for name in ("mean", "target", "raw")}
    grads[f"grad_{wanted}"] = x.empty(getattr(x, wanted))
    BACKEND.heteroscedastic_backward(torch.tensor(-2.5, dtype=BF16), *given, **grads, counts=x.counts)
    x.check(**grads, g=-2.5)
    if wanted != "target":
        loss = torch.empty(())
        del grads["grad_target"]
        grads[f"grad_{wanted}"].fill_(7.0)
        BACKEND.heteroscedastic_forward_grad(*given, loss=loss, **grads, counts=x.counts)
        x.check(loss, **grads)


@pytest.mark.parametrize("g", [math.inf, math.nan])
@pytest.mark.parametrize("shape", SOME, ids=str)
def test_gradients_are_0_where_nothing_counts_whatever_arrives(shape: Shape, g: float) -> None:
    """A loss scaler's factor may be infinite."""
    x = Problem(shape, weights="bytes").made()
    grads = [x.empty(y) for y in (x.mean, x.target, x.raw)]
    BACKEND.heteroscedastic_backward(
        torch.tensor(g), *x.given(),
        grad_mean=grads[0], grad_target=grads[1], grad_raw=grads[2], counts=x.counts,
    )  # fmt: skip
    for grad in grads:
        assert not grad[x.w == 0].count_nonzero()
        assert not grad[x.w != 0].isfinite().any()


@pytest.mark.parametrize("shape", SOME, ids=str)
def test_totals_without_positions(shape: Shape) -> None:
    """A weight on the device: k is read there, everything else is as without."""
    x = Problem(shape).made()
    x.counts = Counts(None, torch.tensor([math.nan, K], dtype=F64))
    x.call = x.call._replace(k=math.nan)
    loss, grad = torch.empty(()), x.empty(x.raw)
    BACKEND.heteroscedastic_forward_grad(
        *x.given(), loss=loss, grad_mean=None, grad_raw=grad, counts=x.counts
    )
    x.check(loss, grad_raw=grad)


@pytest.mark.parametrize(
    ("transform", "eps"),
    [("softplus", 1e-40), ("exp", 1e-300), ("clamp", 1e-40), ("softplus", 1e39), ("clamp", 1e39)],
)
def test_a_smallest_variance_beyond_fp32(transform: str, eps: float) -> None:
    """Where its inverse would be no normal number all is computed in fp64."""
    x = Problem(BY_NAME["tail"], transform=transform, eps=eps).made()
    given = x.given()
    loss, grad = torch.empty(()), x.empty(x.raw)
    BACKEND.heteroscedastic_forward_grad(*given, loss=loss, grad_mean=None, grad_raw=grad)
    x.check(loss, grad_raw=grad)


def elements(
    r: float, raw: Tensor, transform: str, beta: float, eps: float = 1e-5
) -> tuple[list[float], Tensor, Tensor, HeteroscedasticCall]:
    """Each element's own loss, and d/d mean and d/d raw, where mean - target is r."""
    floor = 0.0 if TRANSFORMS[transform] == LOG_VARIANCE else eps
    call = HeteroscedasticCall(TRANSFORMS[transform], floor, beta, reduction="sum", k=1.0)
    mean, target = torch.full_like(raw, r), torch.zeros_like(raw)
    losses = []
    for i in range(raw.numel()):
        loss = torch.empty(())
        one = [x[i : i + 1] for x in (mean, target, raw)]
        BACKEND.heteroscedastic_forward(*one, Rows(1, *[1] * 6), call, loss=loss)
        losses.append(float(loss))
    grad_mean, grad_raw = torch.empty_like(mean), torch.empty_like(raw)
    BACKEND.heteroscedastic_forward_grad(
        mean, target, raw, Rows(1, *[raw.numel()] * 6), call,
        loss=torch.empty(()), grad_mean=grad_mean, grad_raw=grad_raw,
    )  # fmt: skip
    return losses, grad_mean, grad_raw, call


@pytest.mark.parametrize("r", [1.5, 0.0, 1e-12, 1e10])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_nothing_overflows_whose_result_is_finite(transform: str, beta: float, r: float) -> None:
    """Variances from e^-100 to e^170: one over them does, and so does their square."""
    raw = torch.tensor([-100.0, -87.0, -60.0, -1.0, 0.0, 1.0, 60.0, 88.0, 100.0, 170.0])
    if transform == "clamp":
        raw = torch.tensor([0.0, 1e-30, 1.0, 1e20, 1e37, 3e38])
    losses, grad_mean, grad_raw, call = elements(r, raw, transform, beta)
    mean = torch.full_like(raw, r).double().requires_grad_()
    u = raw.double().requires_grad_()
    want = reference.elementwise(mean, torch.zeros_like(u), u, call)
    exact = torch.autograd.grad(want.sum(), (mean, u))
    v = reference.variance(u.detach(), call.transform, call.eps)
    power, ratio = v**beta, r * r / v
    # fp32 has no normal number for e^-88: what is lost with it
    lost = 2.0**-120 * power.clamp(min=1) * max(r, 1.0)
    size = power * (v.log().abs() + ratio + 0.1) + lost * 1e6  # 0.1: where v is almost 1
    check_scalar("loss", torch.tensor(losses), want.detach().numpy(), size.numpy(), 1e-6)
    check_scalar("d/d mean", grad_mean, exact[0].numpy(), (exact[0].abs() + lost * 1e6).numpy(), 1e-6)
    lost = lost * (1 + ratio) / torch.minimum(v, torch.ones_like(v))
    check_scalar("d/d raw", grad_raw, exact[1].numpy(), (exact[1].abs() + lost * 1e6).numpy(), 2e-6)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_extremes(transform: str) -> None:
    raw = torch.tensor([1e4, -1e4, math.inf, -math.inf, math.nan, 0.5])
    losses, grad_mean, grad_raw, _ = elements(1.5, raw, transform, 0.0)
    floor = 0.5 * (math.log(1e-5) + 2.25e5)
    log_of_large = math.log(1e4) if transform in ("softplus", "clamp") else 1e4
    assert losses[0] == pytest.approx(
        0.5 * (log_of_large + 2.25 / math.exp(min(log_of_large, 700))), rel=1e-6
    )
    assert losses[1] == pytest.approx(math.inf if transform == "log_variance" else floor, rel=1e-6)
    assert losses[2] == math.inf
    if transform == "log_variance":  # log v + r^2 / v, of opposite signs
        assert math.isnan(losses[3])
    else:
        assert losses[3] == pytest.approx(floor, rel=1e-6)
    assert math.isnan(losses[4])
    assert grad_mean[2] == 0
    for grad in (grad_mean, grad_raw):
        assert grad[4].isnan()
        assert not grad[[0, 1, 2, 3, 5]].isnan().any()
        assert grad[[0, 5]].isfinite().all()
    losses, grad_mean, grad_raw, _ = elements(0.0, raw, transform, 0.0)
    assert math.isfinite(losses[1])
    assert grad_mean[:4].tolist() == [0.0] * 4
    assert grad_raw[4].isnan()
    if transform == "log_variance":
        assert losses[1] == -5000.0
        assert grad_raw[:4].tolist() == [0.5] * 4


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 0.7])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_nan_stays_nan(transform: str, beta: float) -> None:
    """Of each of the three, in the loss and in this element's gradients alone."""
    for which in range(3):
        x = Problem(BY_NAME["seven"], transform=transform, beta=beta).made()
        (x.mean, x.target, x.raw)[which][0, 3] = math.nan
        loss, grads = torch.empty(()), [x.empty(y) for y in (x.mean, x.target, x.raw)]
        given = x.given()
        BACKEND.heteroscedastic_forward(*given, loss=loss)
        BACKEND.heteroscedastic_backward(
            torch.tensor(1.0), *given, grad_mean=grads[0], grad_target=grads[1], grad_raw=grads[2]
        )
        assert loss.isnan()
        by_mean_alone = beta == 1.0 and which == 2  # d/d mean is k r there
        for grad in grads[2 if by_mean_alone else 0 :]:
            assert grad.isnan().nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("shape", [*SOME, BY_NAME["vectors"]], ids=str)
def test_the_same_bits_again(shape: Shape) -> None:
    x = Problem(shape, weights="fractions").made()
    losses = [torch.empty(()) for _ in range(3)]
    BACKEND.heteroscedastic_forward(*x.given(), loss=losses[0], counts=x.counts)
    for loss in losses[1:]:
        BACKEND.heteroscedastic_forward_grad(
            *x.given(),
            loss=loss, grad_mean=x.empty(x.mean), grad_raw=None, counts=x.counts,
        )  # fmt: skip
        assert torch.equal(loss, losses[1])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
