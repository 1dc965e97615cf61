"""VID-LP against torch.distributions, and what it gives to autograd and the optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from method_checks import assert_equals_formula, assert_finite_gradients, batch_of, built, calls_of, gradcheck
from small_networks import SmallNet
from torch import Tensor, nn

from vidfast.distill import METHODS, VIDLP, Distiller


def features(dtype: torch.dtype = torch.float64, batch: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 5, dtype=dtype).requires_grad_(), torch.randn(batch, 7, dtype=dtype)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_equation_6(reduction: str, bias: bool) -> None:
    s, t = features()
    batch = batch_of({"pool": s}, teacher_logits=t)
    method = built(VIDLP("pool", bias=bias, init_var=0.7, eps=1e-3, reduction=reduction), batch)
    w, b, alpha = method.regressor.weight, method.regressor.bias, method.likelihood.alpha
    assert (b is not None) is bias
    deviation = (nn.functional.softplus(alpha) + 1e-3).sqrt()
    normal = torch.distributions.Normal(s @ w.T + (b if bias else 0.0), deviation)
    nll = -normal.log_prob(t) - 0.5 * np.log(2 * np.pi)
    formula = {"mean": nll.mean(), "batchmean": nll.sum(1).mean(), "sum": nll.sum()}[reduction]
    calls = calls_of(method.likelihood)
    assert_equals_formula(method, batch, 2.5, 2.5 * formula)
    assert calls == [(2.5, True)]


def test_gradcheck() -> None:
    s, t = features()
    batch = batch_of({"pool": s}, teacher_logits=t)
    assert gradcheck(built(VIDLP("pool", bias=True), batch), batch)


def test_an_output_that_a_hook_keeps_is_not_written_over() -> None:
    s, t = features(torch.float32)
    batch = batch_of({"pool": s}, teacher_logits=t)
    method = VIDLP("pool")
    method.build(batch)
    kept: list[Tensor] = []
    method.regressor.register_forward_hook(lambda m, i, out: kept.append(out))
    method(batch, 1.0).backward()
    torch.testing.assert_close(kept[0].detach(), (s @ method.regressor.weight.T).detach())


def test_the_teachers_logits_are_detached() -> None:
    s, t = features(torch.float32)
    t.requires_grad_()
    batch = batch_of({"pool": s}, teacher_logits=t)
    method = VIDLP("pool")
    method.build(batch)
    method(batch, 1.0).backward()
    assert s.grad is not None
    assert t.grad is None


@pytest.mark.parametrize("alpha", [-1e4, 1e4])
def test_extreme_variances_stay_finite(alpha: float) -> None:
    s, t = features(torch.float32)
    batch = batch_of({"pool": s}, teacher_logits=t)
    method = VIDLP("pool")
    method.build(batch)
    with torch.no_grad():
        method.likelihood.alpha.fill_(alpha)
    assert_finite_gradients(method, method(batch, 1.0), s)


def test_through_a_distiller() -> None:
    """The teacher has other classes than the student; weight and scale are folded in; alpha stands apart."""
    student, teacher = SmallNet(4), SmallNet(6)
    teacher.fc = nn.Linear(12, 5)
    method = VIDLP("second", weight=3.0, alpha_lr=10.0)
    pooled = nn.Sequential(student.second, nn.AdaptiveAvgPool2d(1))
    student.second = pooled
    distiller = Distiller(student, teacher, [method], example=torch.randn(2, 1, 8, 8))
    seen: list[float] = []
    method.likelihood.register_forward_hook(
        lambda module, args, loss: loss.register_hook(lambda g: seen.append(float(g))) and None
    )
    calls = calls_of(method.likelihood)
    distiller(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]), scale=0.5).loss.backward()
    assert seen == [1.0]
    assert calls == [(1.5, True)]
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in method.parameters())
    groups = {g["name"]: g for g in distiller.parameter_groups(lr=0.1, weight_decay=0.01)}
    assert set(groups) == {"student", "vid_lp.regressor", "vid_lp.alpha"}
    assert (groups["vid_lp.alpha"]["lr"], groups["vid_lp.alpha"]["weight_decay"]) == (1.0, 0.0)
    assert method.variance().tolist() == pytest.approx([5.0] * 5)


def test_alpha_learns_which_logits_the_features_do_not_tell() -> None:
    """One logit is linear in the features, the other is noise of variance 4."""
    s = torch.randn(512, 3)
    t = torch.stack([s @ torch.tensor([1.0, -2.0, 0.5]), 2 * torch.randn(512)], 1)
    batch = batch_of({"pool": s}, teacher_logits=t)
    method = VIDLP("pool")
    method.build(batch)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        method(batch, 1.0).backward()
        optimizer.step()
    told, noise = method.variance().tolist()
    assert told < 0.1
    assert noise == pytest.approx(4.0, rel=0.15)


def test_under_autocast_the_loss_is_fp32() -> None:
    s, t = features(torch.float32)
    batch = batch_of({"pool": s}, teacher_logits=t)
    method = VIDLP("pool")
    method.build(batch)
    plain = method(batch, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(batch, 1.0)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, plain, rtol=0.02, atol=0)
    assert float(loss.detach()) != float(plain.detach())  # the linear layer did run in bf16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": "none"}, ValueError, "wanted reduction"),
        ({"alpha_lr": -1.0}, ValueError, "alpha_lr"),
        ({"init_var": 1e-6}, ValueError, "eps < init_var"),
        ({"weight": float("inf")}, ValueError, "finite weight"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VIDLP(**{"layer": "pool", **options})


def test_is_registered() -> None:
    assert METHODS["vid_lp"] is VIDLP
    assert VIDLP("pool").name == "vid_lp"
