"""VID's variants against torch.distributions, against VID in their limits, and at extremes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from method_checks import assert_equals_formula, assert_finite_gradients, batch_of, built, gradcheck
from small_networks import PAIRS, SmallNet
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, Normal, StudentT

from vidfast.distill import (
    METHODS,
    VID,
    Batch,
    Distiller,
    HeteroscedasticVID,
    MixtureVID,
    PointwiseStack,
    StudentTVID,
)
from vidfast.distill.methods.vid_variants import _gamma_ratio

CONSTANT = 0.5 * math.log(2 * math.pi)
REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "batchmean": lambda x: x.flatten(1).sum(1).mean(),
    "sum": torch.sum,
}
SHAPES = {
    "2-D": ((3, 2, 4, 5), (3, 6, 4, 5), 1),
    "vector": ((3, 2), (3, 6), 1),
    "channels last": ((2, 7, 3), (2, 7, 5), -1),
}
VARIANTS: dict[str, Any] = {
    "vid_heteroscedastic": lambda **o: HeteroscedasticVID({"a": "x"}, **o),
    "vid_student_t": lambda **o: StudentTVID({"a": "x"}, **o),
    "vid_student_t learned": lambda **o: StudentTVID({"a": "x"}, learn_nu=True, **o),
    "vid_mixture": lambda **o: MixtureVID({"a": "x"}, **o),
}


def features(shape: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Batch, int]:
    of_student, of_teacher, channel_dim = SHAPES[shape]
    s = torch.randn(of_student, dtype=dtype).requires_grad_()
    t = torch.randn(of_teacher, dtype=dtype)
    return s, t, batch_of({"a": s}, {"x": t}), channel_dim


def per_channel(x: Tensor, like: Tensor, channel_dim: int) -> Tensor:
    """x, (C,), as a tensor of the shape of `like`."""
    return (x if channel_dim == -1 else x.reshape(-1, *[1] * (like.dim() - 2))).expand(like.shape)


def softplus(x: Tensor) -> Tensor:
    return nn.functional.softplus(x, threshold=100)


@pytest.mark.parametrize("reduction", REDUCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_heteroscedastic_equals_the_formula(shape: str, reduction: str) -> None:
    s, t, batch, dim = features(shape)
    method = built(
        HeteroscedasticVID({"a": "x"}, init_var=0.8, eps=1e-3, channel_dim=dim, reduction=reduction), batch
    )
    mean, head = method.regressors[0](s).tensor_split(2, dim)
    variance = softplus(per_channel(method.likelihoods[0].alpha, t, dim) + head) + 1e-3
    formula = REDUCE[reduction](-Normal(mean, variance.sqrt()).log_prob(t) - CONSTANT)
    assert_equals_formula(method, batch, 1.3, 1.3 * formula)


@pytest.mark.parametrize("reduction", REDUCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("learn_nu", [False, True])
@pytest.mark.parametrize("nu", [2.5, 6.0, 900.0])
def test_student_t_equals_the_formula(nu: float, learn_nu: bool, shape: str, reduction: str) -> None:
    s, t, batch, dim = features(shape)
    options = {"nu": nu, "learn_nu": learn_nu, "channel_dim": dim, "reduction": reduction}
    method = built(StudentTVID({"a": "x"}, init_var=0.8, eps=1e-3, **options), batch)
    scale = method.likelihoods[0]
    freedom = 2 + softplus(scale.beta) + 1e-3 if learn_nu else torch.full_like(scale.alpha, nu)
    density = StudentT(
        per_channel(freedom, t, dim),
        method.regressors[0](s),
        per_channel((softplus(scale.alpha) + 1e-3).sqrt(), t, dim),
    )
    assert_equals_formula(method, batch, 1.3, 1.3 * REDUCE[reduction](-density.log_prob(t) - CONSTANT))


@pytest.mark.parametrize("reduction", REDUCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("components", [1, 3])
def test_mixture_equals_the_formula(components: int, shape: str, reduction: str) -> None:
    s, t, batch, dim = features(shape)
    options = {"components": components, "channel_dim": dim, "reduction": reduction}
    method = built(MixtureVID({"a": "x"}, init_var=0.8, eps=1e-3, **options), batch)
    scale = method.likelihoods[0]
    means = torch.stack(method.regressors[0](s).chunk(components, dim), -1)
    deviations, weights = (
        torch.stack([per_channel(x, t, dim) for x in xs], -1)
        for xs in ((softplus(scale.alpha) + 1e-3).sqrt(), scale.logits)
    )
    density = MixtureSameFamily(Categorical(logits=weights), Normal(means, deviations))
    assert_equals_formula(method, batch, 1.3, 1.3 * REDUCE[reduction](-density.log_prob(t) - CONSTANT))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", ["2-D", "channels last"])
def test_gradcheck(variant: str, shape: str) -> None:
    _, _, batch, dim = features(shape)
    method = VARIANTS[variant](regressor=PointwiseStack(2, 0.5, dim), init_var=0.8, channel_dim=dim)
    assert gradcheck(built(method, batch), batch)


def as_vid(method: Any, batch: Batch, outputs: int, **options: Any) -> VID:
    """VID with the variant's alpha, and its regressor's first C outputs as its own."""
    s, t = batch.student.taps["a"], batch.from_teacher.taps["x"]
    vid = VID({"a": "x"}, regressor="linear", **options)
    vid.build(batch_of({"a": s.detach()}, {"x": t}))
    vid.double()
    with torch.no_grad():
        vid.regressors[0][0].weight.copy_(method.regressors[0][0].weight[: t.shape[1]])
        vid.likelihoods[0].alpha.copy_(method.likelihoods[0].alpha.reshape(outputs, -1)[0])
    return vid


@pytest.mark.parametrize("reduction", REDUCE)
@pytest.mark.parametrize("limit", ["constant head", "nu to infinity", "nu learned", "K = 1"])
def test_in_the_limit_they_equal_vid(limit: str, reduction: str) -> None:
    s, _, batch, _ = features("2-D")
    options: Any = {"regressor": "linear", "init_var": 0.8, "reduction": reduction}
    method = {
        "constant head": lambda: HeteroscedasticVID({"a": "x"}, **options),
        "nu to infinity": lambda: StudentTVID({"a": "x"}, nu=1e13, **options),
        "nu learned": lambda: StudentTVID({"a": "x"}, nu=1e13, learn_nu=True, **options),
        "K = 1": lambda: MixtureVID({"a": "x"}, components=1, **options),
    }[limit]()
    method.build(batch)  # not perturbed: the head starts at 0
    method.double()
    vid = as_vid(method, batch, 1, init_var=0.8, reduction=reduction)
    mine, its = method(batch, 1.3), vid(batch, 1.3)
    torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(mine, [s, method.likelihoods[0].alpha])
    expected = torch.autograd.grad(its, [s, vid.likelihoods[0].alpha])
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("half", [1.0005, 2.5, 40.0, 99.9, 100.1, 5e3, 1e8, 1e15])
def test_normalising_constant_of_student_t_against_arbitrary_precision(half: float) -> None:
    """It cancels for large nu, where a difference of lgammas has no digit left, and has two branches."""
    x = torch.tensor(half, dtype=torch.float64, requires_grad=True)
    value = _gamma_ratio(x)
    with mpmath.workdps(60):
        y = mpmath.mpf(half)
        exact = mpmath.log(y) / 2 - mpmath.loggamma(y + 0.5) + mpmath.loggamma(y)
        slope = 1 / (2 * y) - mpmath.digamma(y + 0.5) + mpmath.digamma(y)
    assert float(value.detach()) == pytest.approx(float(exact), rel=1e-9, abs=1e-13)
    assert float(torch.autograd.grad(value, x)[0]) == pytest.approx(float(slope), rel=1e-7, abs=1e-14)


def test_an_outlier_pulls_less_on_student_t_than_on_vid() -> None:
    pulls = {}
    for kind in (VID, StudentTVID):
        torch.manual_seed(0)
        s, t = torch.randn(4, 3, requires_grad=True), torch.randn(4, 2)
        t[0, 0] = 1e3
        batch = batch_of({"a": s}, {"x": t})
        method = kind({"a": "x"}, regressor="linear", init_var=1.0)
        method.build(batch)
        method(batch, 1.0).backward()
        assert s.grad is not None
        pulls[kind] = float(s.grad[0].norm())
    assert pulls[StudentTVID] < 0.01 * pulls[VID]


def test_a_mixture_finds_two_values_that_one_gaussian_averages() -> None:
    """t is +-1 by a coin that the student does not see; the entropy of that choice is log 2."""
    t = torch.randint(0, 2, (256, 1)) * 2.0 - 1
    batch = batch_of({"a": torch.ones(256, 1)}, {"x": t})
    losses = {}
    for method in (
        VID({"a": "x"}, regressor="linear", init_var=1.0),
        MixtureVID({"a": "x"}, components=2, regressor="linear", init_var=1.0, eps=1e-3),
    ):
        method.build(batch)
        optimizer = torch.optim.Adam(method.parameters(), lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            loss = method(batch, 1.0)
            loss.backward()
            optimizer.step()
        losses[method.name] = float(loss.detach())
    assert losses["vid"] == pytest.approx(0.5, abs=0.02)  # 1/2 log 1 + 1/2: unit variance around 0
    assert losses["vid_mixture"] < losses["vid"] - 1.0


def test_heteroscedastic_variance_follows_the_student() -> None:
    """The noise is large where the student's feature is positive; one variance per channel cannot say so."""
    s = torch.randn(1024, 1).sign()
    t = torch.randn(1024, 1) * torch.where(s > 0, 3.0, 0.3)
    batch = batch_of({"a": s}, {"x": t})
    losses = {}
    for method in (
        VID({"a": "x"}, regressor="linear", init_var=1.0),
        HeteroscedasticVID({"a": "x"}, regressor="linear", init_var=1.0),
    ):
        method.build(batch)
        optimizer = torch.optim.Adam(method.parameters(), lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            loss = method(batch, 1.0)
            loss.backward()
            optimizer.step()
        losses[method.name] = float(loss.detach())
    assert losses["vid_heteroscedastic"] < losses["vid"] - 0.5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("alpha", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("distance", [0.0, 1e4])
def test_extremes_stay_finite(variant: str, alpha: float, distance: float) -> None:
    s, t, _, _ = features("2-D", torch.float32)
    batch = batch_of({"a": s}, {"x": t + distance})
    method = VARIANTS[variant](regressor="linear")
    method.build(batch)
    with torch.no_grad():
        for parameter in method.likelihoods.parameters():
            parameter.fill_(alpha)
    assert_finite_gradients(method, method(batch, 1.0), s)


def test_a_head_at_its_extremes_stays_finite() -> None:
    for value in (-1e4, 1e4):
        s, t, batch, _ = features("2-D", torch.float32)
        method = HeteroscedasticVID({"a": "x"}, regressor="linear")
        method.build(batch)
        with torch.no_grad():
            method.regressors[0][0].weight[t.shape[1] :] = value
        assert_finite_gradients(method, method(batch, 1.0), s)


@pytest.mark.parametrize("weight", [-1e4, 1e4])
def test_a_component_of_no_weight_stays_finite(weight: float) -> None:
    s, _, batch, _ = features("2-D", torch.float32)
    method = MixtureVID({"a": "x"}, regressor="linear")
    method.build(batch)
    with torch.no_grad():
        method.likelihoods[0].logits[0] = weight
    assert_finite_gradients(method, method(batch, 1.0), s)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("regressor", ["transposed", "upsampled"])
def test_regressors_that_change_the_resolution(variant: str, regressor: str) -> None:
    s = torch.randn(2, 3, *([] if regressor == "transposed" else [4, 4]), requires_grad=True)
    batch = batch_of({"a": s}, {"x": torch.randn(2, 5, 8, 8)})
    method = VARIANTS[variant](regressor=regressor)
    method.build(batch)
    assert_finite_gradients(method, method(batch, 1.0), s)
    if variant == "vid_heteroscedastic" and regressor == "transposed":
        assert not method.regressors[0](s)[:, 5:].any()  # the head starts at 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_under_autocast_they_compute_in_fp32(variant: str) -> None:
    """Only the regressor runs in bf16: given its output, the value is that of fp32 arithmetic."""
    s, t, batch, _ = features("2-D", torch.float32)
    method = VARIANTS[variant](regressor="linear", init_var=0.8)
    method.build(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(batch, 1.0)
        output = method.regressors[0](s)
    assert output.dtype is torch.bfloat16
    assert loss.dtype is torch.float32
    method.regressors[0] = nn.Identity()
    method.double()
    exact = method(batch_of({"a": output.double()}, {"x": t.double()}), 1.0)
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=2e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_through_a_distiller(variant: str) -> None:
    kind = METHODS[variant.split()[0]]
    options = {"learn_nu": True} if variant.endswith("learned") else {}
    method: Any = kind(PAIRS, weight=2.0, alpha_lr=5.0, init_var=1.0, **options)  # type: ignore[call-arg]
    assert method.name == variant.split()[0]
    teacher = SmallNet(6)
    distiller = Distiller(SmallNet(4), teacher, [method], example=torch.randn(2, 1, 8, 8))
    groups = {g["name"]: g for g in distiller.parameter_groups(lr=0.1, weight_decay=0.01)}
    alphas = groups[f"{method.name}.alpha"]
    assert (alphas["lr"], alphas["weight_decay"]) == (0.5, 0.0)
    assert {id(p) for p in alphas["params"]} == {id(p) for p in method.likelihoods.parameters()}
    images, losses = torch.randn(4, 1, 8, 8), []
    optimizer = torch.optim.Adam(distiller.parameter_groups(lr=0.01))
    for _ in range(25):
        losses.append(distiller(images).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    assert all(p.grad is None for p in teacher.parameters())
    half = distiller(images, scale=0.5).loss
    torch.testing.assert_close(half, 0.5 * distiller(images).loss)


def test_student_t_starts_at_the_variance_asked_for() -> None:
    _, _, batch, _ = features("2-D", torch.float32)
    method = StudentTVID({"a": "x"}, nu=3.0, init_var=2.0, learn_nu=True)
    method.build(batch)
    assert method.variances()["a -> x"].tolist() == pytest.approx([2.0] * 6, rel=1e-4)


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("vid_student_t", {"nu": 2.0}, "nu above 2"),
        ("vid_student_t", {"nu": float("inf")}, "finite degrees of freedom"),
        ("vid_student_t", {"nu": 2.001, "init_var": 1e-3}, "the squared scale at the start"),
        ("vid_mixture", {"components": 0}, "1 or more as components"),
        ("vid_mixture", {"components": 2.0}, "wanted an int"),
        ("vid_heteroscedastic", {"reduction": "none"}, "wanted reduction"),
        ("vid_heteroscedastic", {"channel_dim": 0}, "channel_dim"),
        ("vid_mixture", {"init_var": 0.0}, "eps < init_var"),
    ],
)
def test_bad_options_are_refused(variant: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VARIANTS[variant](**options)


def test_a_regressor_of_too_few_outputs_is_refused() -> None:
    _, _, batch, _ = features("2-D", torch.float32)
    method = MixtureVID({"a": "x"}, regressor=lambda s, t: nn.Conv2d(s[1], 6, 1))
    method.build(batch)
    with pytest.raises(ValueError, match=r"pair 'a' -> 'x': .* gives \(3, 6, 4, 5\), wanted \(3, 18, 4, 5\)"):
        method(batch, 1.0)
