"""What a new Gaussian method gets from its base: options, likelihood, groups, the fused loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_checks import assert_equals_formula, batch_of, calls_of
from small_networks import SmallNet
from torch import Tensor, nn
from torch.distributions import Normal

from vidfast.distill import Batch, Distiller
from vidfast.distill.methods.variational import GaussianMethod


class Doubling(GaussianMethod):
    """Predicts twice a layer from itself."""

    default_name = "doubling"
    needs_teacher = False

    def __init__(self, layer: str, **options: Any) -> None:
        super().__init__(**options)
        self.student_layers = (layer,)

    def build(self, batch: Batch) -> None:
        channels = batch.student.taps[self.student_layers[0]].shape[1]
        self.regressor = nn.Conv2d(channels, channels, 1)
        self.likelihood = self.make_likelihood(channels)

    def forward(self, batch: Batch, factor: float) -> Tensor:
        s = batch.student.taps[self.student_layers[0]]
        return self.gaussian_nll(self.regressor, self.likelihood, s, 2 * s.detach(), factor)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_the_loss_is_equation_5(reduction: str) -> None:
    s = torch.randn(3, 4, 2, 5, dtype=torch.float64, requires_grad=True)
    method = Doubling("a", init_var=0.7, eps=1e-2, reduction=reduction).double()
    batch = batch_of({"a": s})
    method.build(batch)
    method.double()
    deviation = (nn.functional.softplus(method.likelihood.alpha) + 1e-2).sqrt()[:, None, None]
    log_q = Normal(method.regressor(s), deviation).log_prob(2 * s.detach()) + 0.5 * torch.log(
        torch.tensor(2 * torch.pi, dtype=torch.float64)
    )
    formula = -{"mean": log_q.mean(), "batchmean": log_q.sum() / 3, "sum": log_q.sum()}[reduction]
    calls = calls_of(method.likelihood)
    assert_equals_formula(method, batch, 1.3, 1.3 * formula)
    assert calls == [(1.3, True)]


def test_alpha_has_a_group_of_its_own_without_decay() -> None:
    method = Doubling("first", alpha_lr=10.0, weight=2.0, name="own")
    distiller = Distiller(SmallNet(4), None, [method], example=torch.randn(2, 1, 8, 8))
    groups = {g["name"]: g for g in distiller.parameter_groups(lr=0.1, weight_decay=0.01)}
    assert list(groups) == ["student", "own.regressor", "own.alpha"]
    assert [(g["lr"], g["weight_decay"]) for g in groups.values()] == [(0.1, 0.01), (0.1, 0.01), (1.0, 0.0)]
    assert [id(p) for p in groups["own.alpha"]["params"]] == [id(method.likelihood.alpha)]
    assert method.extra_repr() == "weight=2, init_var=5, reduction=mean"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "none"}, "wanted reduction"),
        ({"alpha_lr": float("nan")}, "alpha_lr"),
        ({"init_var": 1e-6}, "eps < init_var"),
        ({"eps": -1.0}, "0 < eps"),
        ({"backend": "gpu"}, "backend must be one of"),
        ({"weight": float("inf")}, "finite weight"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Doubling("a", **options)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'initial_variance'"):
        Doubling("a", initial_variance=1.0)
