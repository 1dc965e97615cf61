"""VID-I against equation 5 written out in numpy, and what it gives to autograd and the optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from method_checks import assert_equals_formula, batch_of, calls_of, gradcheck
from method_checks import built as built_in_fp64
from small_networks import PAIRS, SmallNet
from torch import Tensor, nn

from vidfast.distill import VID, Activations, Batch, Distiller, PointwiseStack


def built(vid: VID, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> tuple[VID, Batch]:
    logits = torch.zeros(1)
    batch = Batch(None, None, Activations(student, logits), Activations(teacher, logits))
    vid.build(batch)
    return vid, batch


def equation_5(mean: Tensor, target: Tensor, alpha: Tensor, eps: float, reduction: str) -> float:
    """-log q(t|s) without its constant, element by element, in fp64."""
    mu, t, a = (x.detach().double().numpy() for x in (mean, target, alpha))
    total = 0.0
    for c in range(t.shape[1]):
        sigma_squared = np.logaddexp(a[c], 0.0) + eps
        r = t[:, c] - mu[:, c]
        total += (np.log(np.sqrt(sigma_squared)) + r**2 / (2 * sigma_squared)).sum()
    return float({"mean": total / t.size, "batchmean": total / t.shape[0], "sum": total}[reduction])


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("spatial", [(), (5,), (3, 4), (2, 3, 2)], ids=["vector", "1-D", "2-D", "3-D"])
def test_value_is_equation_5_summed_over_pairs(reduction: str, spatial: tuple[int, ...]) -> None:
    student = {"a": torch.randn(3, 2, *spatial), "b": torch.randn(3, 5, *spatial)}
    teacher = {"x": torch.randn(3, 4, *spatial), "y": torch.randn(3, 6, *spatial)}
    vid, batch = built(
        VID(
            {"a": "x", "b": "y"},
            channel_dim=1,
            regressor="conv2",
            init_var=0.7,
            eps=1e-3,
            reduction=reduction,
        ),
        student,
        teacher,
    )
    expected = 0.0
    for i, (s, t) in enumerate([("a", "x"), ("b", "y")]):
        with torch.no_grad():
            vid.likelihoods[i].alpha += torch.randn(teacher[t].shape[1])
        expected += equation_5(
            vid.regressors[i](student[s]), teacher[t], vid.likelihoods[i].alpha, 1e-3, reduction
        )
    assert float(vid(batch, 2.5)) == pytest.approx(2.5 * expected, rel=1e-5)


def test_reduction_mean_is_the_papers_divided_by_the_elements() -> None:
    """lambda_mean = lambda_paper * C * H * W."""
    student, teacher = {"a": torch.randn(3, 2, 4, 5)}, {"x": torch.randn(3, 6, 4, 5)}
    losses = {}
    for reduction in ("mean", "batchmean"):
        torch.manual_seed(1)
        vid, batch = built(VID({"a": "x"}, reduction=reduction), student, teacher)
        losses[reduction] = float(vid(batch, 1.0))
    assert losses["batchmean"] == pytest.approx(losses["mean"] * 6 * 4 * 5, rel=1e-5)


def test_gradients_are_those_of_the_formula() -> None:
    """Through the kernel's in-place path, against autograd on the formula."""
    s, t = torch.randn(3, 2, 4, 5, requires_grad=True), torch.randn(3, 6, 4, 5)
    vid, batch = built(VID({"a": "x"}, regressor="conv3", init_var=2.0), {"a": s}, {"x": t})
    parameters = [s, *vid.parameters()]
    calls = calls_of(*vid.likelihoods)
    vid(batch, 3.0).backward()
    assert calls == [(3.0, True)]
    ours = [p.grad.clone() for p in parameters]  # type: ignore[union-attr]

    alpha = vid.likelihoods[0].alpha
    variance = (torch.nn.functional.softplus(alpha) + 1e-5)[:, None, None]
    loss = 3.0 * (0.5 * variance.log() + (t - vid.regressors[0](s)) ** 2 / (2 * variance)).mean()
    for mine, theirs in zip(ours, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


class _Keeping(torch.nn.Sequential):
    """A regressor that reads its own output afterwards."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = super().forward(x)
        return self.last


@pytest.mark.parametrize("kept_by", ["hook", "subclass"])
def test_an_output_that_somebody_keeps_is_not_written_over(kept_by: str) -> None:
    s, t = torch.randn(3, 2, 4, 5, requires_grad=True), torch.randn(3, 6, 4, 5)
    kind = torch.nn.Sequential if kept_by == "hook" else _Keeping
    regressor = kind(torch.nn.Conv2d(2, 6, 1, bias=False))
    vid, batch = built(VID({"a": "x"}, regressor=lambda *_: regressor), {"a": s}, {"x": t})
    kept: list[torch.Tensor] = []
    if kept_by == "hook":
        regressor[0].register_forward_hook(lambda m, i, out: kept.append(out))
    vid(batch, 1.0).backward()
    seen = kept[0] if kept_by == "hook" else regressor.last
    torch.testing.assert_close(seen.detach(), torch.nn.functional.conv2d(s, regressor[0].weight).detach())


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = SmallNet(4), SmallNet(6)
    distiller = Distiller(student, teacher, [VID(PAIRS)], example=torch.randn(2, 1, 8, 8))
    distiller(torch.randn(4, 1, 8, 8)).loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.first.parameters())


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_kernel_sees_an_incoming_gradient_of_one(scale: float) -> None:
    """Weight and scale are folded in, so that one_pass has nothing left to do in backward."""
    vid = VID(PAIRS, weight=7.0)
    distiller = Distiller(SmallNet(4), SmallNet(6), [vid], example=torch.randn(2, 1, 8, 8))
    seen: list[float] = []
    for nll in vid.likelihoods:
        nll.register_forward_hook(
            lambda module, args, loss: loss.register_hook(lambda g: seen.append(float(g))) and None
        )
    distiller(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]), scale=scale).loss.backward()
    assert seen == [1.0, 1.0]


def test_parameter_groups_keep_alpha_apart() -> None:
    vid = VID(PAIRS, alpha_lr=10.0)
    distiller = Distiller(SmallNet(4), SmallNet(6), [vid], example=torch.randn(2, 1, 8, 8))
    groups = {g["name"]: g for g in distiller.parameter_groups(lr=0.1, weight_decay=0.01)}
    assert set(groups) == {"student", "vid.regressor", "vid.alpha"}
    assert [(g["lr"], g["weight_decay"]) for g in groups.values()] == [(0.1, 0.01), (0.1, 0.01), (1.0, 0.0)]
    assert [p.shape for p in groups["vid.alpha"]["params"]] == [(6,), (12,)]
    assert vid.variances()["first -> first"].tolist() == pytest.approx([5.0] * 6)


def test_alpha_learns_the_residual_variance() -> None:
    """With mean fixed at 0 the best variance of each channel is the target's mean square."""
    scales = torch.tensor([0.5, 1.0, 3.0])
    target = torch.randn(64, 3, 4, 4) * scales[:, None, None]
    vid, batch = built(
        VID({"a": "x"}, regressor="linear", reduction="mean"), {"a": torch.zeros(64, 2, 4, 4)}, {"x": target}
    )
    optimizer = torch.optim.Adam(vid.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        vid(batch, 1.0).backward()
        optimizer.step()
    torch.testing.assert_close(vid.variances()["a -> x"], target.pow(2).mean((0, 2, 3)), rtol=0.02, atol=0)


def test_channels_last_features_as_of_a_transformer() -> None:
    student, teacher = {"a": torch.randn(2, 7, 3)}, {"x": torch.randn(2, 7, 5)}
    vid, batch = built(VID({"a": "x"}, channel_dim=-1, init_var=1.5), student, teacher)
    mean = vid.regressors[0](student["a"])
    expected = equation_5(mean.mT, teacher["x"].mT, vid.likelihoods[0].alpha, 1e-5, "mean")
    assert float(vid(batch, 1.0)) == pytest.approx(expected, rel=1e-5)


def test_maps_of_different_size_are_pooled_to_the_smaller() -> None:
    student, teacher = {"a": torch.randn(2, 3, 8, 4)}, {"x": torch.randn(2, 5, 4, 8)}
    vid, batch = built(VID({"a": "x"}, regressor="linear"), student, teacher)
    pool = nn.AdaptiveAvgPool2d(4)
    expected = equation_5(
        vid.regressors[0](pool(student["a"])), pool(teacher["x"]), vid.likelihoods[0].alpha, 1e-5, "mean"
    )
    assert float(vid(batch, 1.0)) == pytest.approx(expected, rel=1e-5)


class Upsampling(nn.Sequential):
    """A regressor of one's own that changes the resolution and ends in what it does not own."""

    def __init__(self, student: Any, teacher: Any) -> None:
        super().__init__(
            nn.ConvTranspose2d(student[1], teacher[1], 4, stride=2, padding=1),
            nn.Sigmoid(),
        )


def test_own_regressor_that_changes_the_resolution() -> None:
    student, teacher = {"a": torch.randn(2, 3, 4, 4)}, {"x": torch.rand(2, 5, 8, 8)}
    vid, batch = built(VID({"a": "x"}, regressor=Upsampling), student, teacher)
    calls = calls_of(*vid.likelihoods)
    vid(batch, 1.0).backward()
    assert calls == [(1.0, False)]
    assert vid.regressors[0][0].weight.grad.abs().sum() > 0
    with pytest.raises(
        ValueError, match=r"'a' -> 'x': the regressor gives \(2, 5, 8, 8\), wanted \(2, 5, 8, 9\)"
    ):
        vid(Batch(None, None, batch.student, Activations({"x": torch.rand(2, 5, 8, 9)}, torch.zeros(1))), 1.0)


def test_a_layer_may_be_paired_twice() -> None:
    vid = VID([("first", "first"), ("first", "second.0")], regressor=PointwiseStack(1))
    distiller = Distiller(SmallNet(4), SmallNet(6), [vid], example=torch.randn(2, 1, 8, 8))
    assert torch.isfinite(distiller(torch.randn(4, 1, 8, 8)).loss)
    assert list(vid.variances()) == ["first -> first", "first -> second.0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": {}}, "at least one pair"),
        ({"weight": float("nan")}, "finite weight"),
        ({"reduction": "none"}, "wanted reduction"),
        ({"channel_dim": 2}, "channel_dim"),
        ({"alpha_lr": -1.0}, "alpha_lr"),
        ({"init_var": 1e-6}, "eps < init_var"),
        ({"eps": 0.0}, "0 < eps"),
        ({"regressor": "cubic"}, "unknown regressor"),
        ({"name": "a.b"}, "no dot"),
        ({"name": "pop"}, "has an attribute 'pop' of its own"),
        ({"name": "forward"}, "has an attribute 'forward' of its own"),
        ({"name": "training"}, "has an attribute 'training' of its own"),
        ({"alpha_lr": float("inf")}, "alpha_lr"),
        ({"init_var": float("inf")}, "finite"),
        ({"backend": "gpu"}, "backend must be one of"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VID(**{"pairs": {"a": "x"}, **options})


def test_features_that_do_not_match_are_refused_with_the_pair_named() -> None:
    with pytest.raises(ValueError, match="pair 'fc' -> 'first'"):
        Distiller(SmallNet(4), SmallNet(6), [VID({"fc": "first"})], example=torch.randn(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regressor": nn.Conv2d(2, 6, 1)}, "got the module Conv2d"),
        ({"regressor": 3}, "got int"),
        ({"name": 3}, "wanted a str as name, got int"),
        ({"pairs": "group3"}, "wanted {student layer: teacher layer}"),
    ],
)
def test_things_of_the_wrong_kind_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        VID(**{"pairs": {"a": "x"}, **options})


REGRESSED = {
    "conv3": ((3, 2, 4, 5), (3, 6, 4, 5)),
    "linear": ((3, 2), (3, 6)),
    "transposed": ((2, 3), (2, 2, 8, 8)),
    "upsampled": ((2, 3, 2, 3), (2, 2, 4, 4)),
}


@pytest.mark.parametrize("regressor", REGRESSED)
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_equals_the_formula_in_fp64(regressor: str, reduction: str) -> None:
    """In place over each of our regressors' outputs; the formula is torch.distributions'."""
    s, t = (torch.randn(shape, dtype=torch.float64) for shape in REGRESSED[regressor])
    s.requires_grad_()
    batch = batch_of({"a": s}, {"x": t})
    vid = built_in_fp64(VID({"a": "x"}, regressor=regressor, init_var=0.8, reduction=reduction), batch)
    deviation = (nn.functional.softplus(vid.likelihoods[0].alpha) + 1e-5).sqrt()
    normal = torch.distributions.Normal(
        vid.regressors[0](s), deviation.reshape(-1, *[1] * (t.dim() - 2)).expand(t.shape)
    )
    nll = -normal.log_prob(t) - 0.5 * np.log(2 * np.pi)
    formula = {"mean": nll.mean(), "batchmean": nll.sum() / len(t), "sum": nll.sum()}[reduction]
    calls = calls_of(*vid.likelihoods)
    assert_equals_formula(vid, batch, 1.3, 1.3 * formula)
    assert calls == [(1.3, True)]


@pytest.mark.parametrize("regressor", ["conv3", "transposed", "upsampled"])
def test_gradcheck(regressor: str) -> None:
    shapes = {**REGRESSED, "transposed": ((2, 2), (2, 2, 4, 4))}[regressor]
    s, t = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    batch = batch_of({"a": s}, {"x": t})
    options = {"regressor": PointwiseStack(2, 1.0) if regressor == "conv3" else regressor}
    assert gradcheck(built_in_fp64(VID({"a": "x"}, init_var=0.8, **options), batch), batch)


def test_a_vector_teaches_a_map_through_a_distiller() -> None:
    """The paper's multilayer perceptron: a vector of the student predicts the teacher's map."""
    vid = VID({"flat": "first"}, regressor="transposed", init_var=0.3)
    student = nn.Sequential()
    student.add_module("flat", nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()))
    student.add_module("fc", nn.Linear(16, 3))
    distiller = Distiller(student, SmallNet(6), [vid], example=torch.randn(2, 1, 8, 8))
    optimizer = torch.optim.Adam(distiller.parameters(), lr=0.01)
    images, losses = torch.randn(4, 1, 8, 8), []
    for _ in range(60):
        loss = distiller(images).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.3
