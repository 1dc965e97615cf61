"""MIMKD against its bound written image by image, and what the bound says of dependent features."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from method_checks import assert_equals_formula, assert_finite_gradients, batch_of, built, gradcheck
from small_networks import PAIRS, SmallNet
from torch import Tensor, nn

from vidfast.distill import METHODS, MIMKD, Batch, Distiller
from vidfast.distill.methods.mimkd import negative_bound


def features(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], dict[str, Tensor], Batch]:
    student = {
        "s1": torch.randn(3, 2, 4, 6, dtype=dtype, requires_grad=True),
        "s2": torch.randn(3, 4, 2, 3, dtype=dtype, requires_grad=True),
    }
    teacher = {
        "t1": torch.randn(3, 3, 2, 6, dtype=dtype),
        "t2": torch.randn(3, 5, 4, 3, dtype=dtype),
    }
    return student, teacher, batch_of(student, teacher)


def score(critic: Any, kind: str, t: Tensor, s: Tensor) -> Tensor:
    """T(t, s) of one vector of each network."""
    if kind == "separable":
        embedded = [
            net[2].weight @ (net[0].weight @ x + net[0].bias).relu() + net[2].bias
            for net, x in ((critic.phi, t), (critic.psi, s))
        ]
        return torch.dot(*embedded) / math.sqrt(len(embedded[0]))
    joined = nn.Linear(len(t) + len(s), critic.student.out_features).double()
    weight = torch.cat([critic.teacher.weight, critic.student.weight], 1)
    hidden = nn.functional.linear(torch.cat([t, s]), weight, critic.student.bias)
    assert hidden.shape == (joined.out_features,)
    return (critic.head.weight @ hidden.relu() + critic.head.bias)[0]


def bound_by_loops(critic: Any, kind: str, t: Tensor, s: Tensor) -> Tensor:
    """The bound's negative; t (B, C, P or 1), s (B, C, P). Image b's negative is the teacher's image b - 1."""
    positive, negative, count = 0.0, 0.0, 0
    for b in range(len(s)):
        for p in range(s.shape[2]):
            place = p if t.shape[2] > 1 else 0
            positive = positive + torch.log1p(torch.exp(-score(critic, kind, t[b, :, place], s[b, :, p])))
            negative = negative + torch.log1p(torch.exp(score(critic, kind, t[b - 1, :, place], s[b, :, p])))
            count += 1
    return (positive + negative) / count  # type: ignore[operator, return-value]


@pytest.mark.parametrize("critic", ["separable", "concat"])
@pytest.mark.parametrize(
    "weights", [(0.7, 0.8, 0.9), (1.0, 0.0, 0.3), (0.0, 1.0, 0.5)], ids=["all", "no local", "no global"]
)
def test_equals_the_bounds_of_all_levels(critic: str, weights: tuple[float, float, float]) -> None:
    student, teacher, batch = features()
    method = built(
        MIMKD(
            {"s1": "t1", "s2": "t2"},
            global_weight=weights[0],
            local_weight=weights[1],
            feature_weight=weights[2],
            critic=critic,
            hidden=4,
        ),
        batch,
    )
    pool = nn.functional.adaptive_avg_pool2d
    first = [pool(x, (2, 6)).flatten(2) for x in (teacher["t1"], student["s1"])]
    last = [pool(x, (2, 3)).flatten(2) for x in (teacher["t2"], student["s2"])]
    vectors = [x.sum((2, 3))[:, :, None] / (x.shape[2] * x.shape[3]) for x in (teacher["t2"], student["s2"])]
    levels = [
        (weights[2], 0, "feature", first),
        (weights[2], 1, "feature", last),
        (weights[0], 1, "global", vectors),
        (weights[1], 1, "local", [vectors[0], student["s2"].flatten(2)]),
    ]
    formula = torch.zeros((), dtype=torch.float64)
    for weight, pair, level, views in levels:
        if weight:
            formula = formula + weight * bound_by_loops(method.critics[pair][level], critic, *views)
        else:
            assert level not in method.critics[pair]
    assert_equals_formula(method, batch, 1.6, 1.6 * formula)


@pytest.mark.parametrize("critic", ["separable", "concat"])
def test_gradcheck(critic: str) -> None:
    _, _, batch = features()
    assert gradcheck(built(MIMKD({"s1": "t1", "s2": "t2"}, critic=critic, hidden=3), batch), batch)


@pytest.mark.parametrize("spatial", [(), (5,), (2, 2, 3)], ids=["vector", "1-D", "3-D"])
@pytest.mark.parametrize("critic", ["separable", "concat"])
def test_other_numbers_of_axes(spatial: tuple[int, ...], critic: str) -> None:
    s = torch.randn(3, 4, *spatial, requires_grad=True)
    batch = batch_of({"a": s}, {"x": torch.randn(3, 5, *spatial)})
    method = MIMKD({"a": "x"}, channel_dim=1, critic=critic, hidden=8)
    method.build(batch)
    assert_finite_gradients(method, method(batch, 1.0), s)


def test_a_critic_that_says_nothing_gives_two_log_two_and_extremes_are_finite() -> None:
    zeros = torch.zeros(4, 3, dtype=torch.float64)
    assert float(negative_bound(zeros, zeros)) == pytest.approx(2 * math.log(2), rel=1e-14)
    for value in (-1e30, -30.0, 30.0, 1e30):
        matched, mismatched = (torch.full((4, 3), value, requires_grad=True) for _ in range(2))
        loss = negative_bound(matched, mismatched)
        assert float(loss.detach()) == pytest.approx(abs(value), rel=1e-6)
        for g in torch.autograd.grad(loss, [matched, mismatched]):
            assert torch.isfinite(g).all()


@pytest.mark.parametrize("critic", ["separable", "concat"])
@pytest.mark.parametrize("levels", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)], ids=["g", "l", "f"])
def test_critics_tell_dependent_features_from_independent_ones(
    critic: str, levels: tuple[float, float, float]
) -> None:
    """On features that tell nothing of each other the bound stays at -2 log 2; on others it rises."""
    losses = {}
    for dependent in (True, False):
        torch.manual_seed(0)
        method: Any = None
        held: list[float] = []
        for step in range(140):
            t = torch.randn(64, 2, 2)
            noise = torch.randn(64, 2, 2)
            # every position tells, so that averages do
            t = t[:, :, :1].expand(-1, -1, 2).contiguous()
            batch = batch_of({"a": t + 0.1 * noise if dependent else noise}, {"x": t})
            if method is None:
                weights = dict(zip(("global_weight", "local_weight", "feature_weight"), levels, strict=True))
                method = MIMKD({"a": "x"}, channel_dim=1, critic=critic, hidden=16, **weights)
                method.build(batch)
                optimizer = torch.optim.Adam(method.parameters(), lr=0.02)
            loss = method(batch, 1.0)
            if step >= 110:
                held.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[dependent] = sum(held) / len(held)
    assert losses[True] < 2 * math.log(2) - 0.3
    assert losses[False] > 2 * math.log(2) - 0.05


def test_under_autocast_the_loss_is_fp32() -> None:
    student, _, batch = features(torch.float32)
    for critic in ("separable", "concat"):
        method = MIMKD({"s1": "t1", "s2": "t2"}, critic=critic, hidden=8)
        method.build(batch)
        plain = method(batch, 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = method(batch, 1.0)
        assert loss.dtype is torch.float32
        assert float(loss.detach()) != float(plain.detach())
        torch.testing.assert_close(loss, plain, rtol=0.02, atol=0)
        assert_finite_gradients(method, loss, *student.values())


@pytest.mark.parametrize("critic", ["separable", "concat"])
def test_a_teacher_in_lower_precision(critic: str) -> None:
    student, teacher, images = SmallNet(4), SmallNet(6), torch.randn(4, 1, 8, 8)
    term = MIMKD(PAIRS, critic=critic, hidden=8)
    distiller = Distiller(student, teacher, [term], example=images, teacher_dtype=torch.bfloat16)
    loss = distiller(images).loss
    assert loss.dtype is torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in term.parameters())


def test_through_a_distiller() -> None:
    teacher = SmallNet(6)
    distiller = Distiller(
        SmallNet(4), teacher, [MIMKD(PAIRS, weight=0.5, hidden=16)], example=torch.randn(1, 1, 8, 8)
    )
    groups = {g["name"]: g for g in distiller.parameter_groups(lr=0.1)}
    method = distiller.terms["mimkd"]
    assert len(groups["mimkd"]["params"]) == len(list(method.parameters())) == 4 * 8
    images = torch.randn(8, 1, 8, 8)
    optimizer = torch.optim.Adam(distiller.parameter_groups(lr=0.01))
    losses = []
    for _ in range(30):
        losses.append(distiller(images).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.2
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in method.parameters())
    torch.testing.assert_close(distiller(images, scale=0.5).loss, 0.5 * distiller(images).loss)
    with pytest.raises(ValueError, match="pair 'first' -> 'first': wanted a batch of 2 or more"):
        distiller(images[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": {}}, "at least one pair"),
        ({"local_weight": -1.0}, "local_weight of 0 or more"),
        ({"feature_weight": float("nan")}, "finite feature_weight"),
        ({"global_weight": 0, "local_weight": 0, "feature_weight": 0}, "got 0 for all"),
        ({"pairs": {"a": "x", "b": "y"}, "feature_weight": 0}, "wanted one pair where feature_weight is 0"),
        ({"critic": "bilinear"}, "wanted critic"),
        ({"hidden": 0}, "1 or more as hidden"),
        ({"hidden": 2.5}, "wanted an int"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MIMKD(**{"pairs": {"a": "x"}, **options})


def test_a_vector_and_a_map_have_no_feature_level() -> None:
    batch = batch_of({"a": torch.randn(3, 4)}, {"x": torch.randn(3, 5, 2, 2)})
    with pytest.raises(ValueError, match="pair 'a' -> 'x': wanted features with as many axes"):
        MIMKD({"a": "x"}).build(batch)
    method = MIMKD({"a": "x"}, feature_weight=0.0)
    method.build(batch)
    assert torch.isfinite(method(batch, 1.0))


def test_is_registered_and_builds_again() -> None:
    assert METHODS["mimkd"] is MIMKD
    _, _, batch = features(torch.float32)
    method = MIMKD({"s1": "t1", "s2": "t2"}, hidden=2)
    method.build(batch)
    method.build(batch)
    assert [list(critics) for critics in method.critics] == [["feature"], ["global", "local", "feature"]]
