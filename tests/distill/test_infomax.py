"""Infomax against torch.distributions, its inputs and its resolutions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from method_checks import assert_equals_formula, assert_finite_gradients, batch_of, built, calls_of, gradcheck
from small_networks import SmallNet
from torch import Tensor, nn

from vidfast.distill import METHODS, Batch, Distiller, Infomax, TransposedStack


def features(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], Tensor, Batch]:
    student = {
        "low": torch.randn(2, 4, 8, 6, dtype=dtype, requires_grad=True),
        "high": torch.randn(2, 5, 4, 3, dtype=dtype, requires_grad=True),
    }
    x = torch.randn(2, 3, 8, 6, dtype=dtype)
    return student, x, batch_of(student, inputs=x)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_equals_the_formula_summed_over_layers(reduction: str) -> None:
    student, x, batch = features()
    method = built(Infomax(["low", "high"], init_var=0.7, eps=1e-3, reduction=reduction), batch)
    formula = torch.zeros((), dtype=torch.float64)
    for (layer, s), regressor, likelihood in zip(
        student.items(), method.regressors, method.likelihoods, strict=True
    ):
        convolutions = [m for m in regressor if isinstance(m, nn.Conv2d)]
        hidden = torch.einsum("oi,bihw->bohw", convolutions[0].weight[:, :, 0, 0], s).relu()
        mean = torch.einsum("oi,bihw->bohw", convolutions[1].weight[:, :, 0, 0], hidden)
        if layer == "high":
            mean = nn.functional.interpolate(mean, (8, 6), mode="bilinear")
        deviation = (nn.functional.softplus(likelihood.alpha) + 1e-3).sqrt()[:, None, None]
        nll = -torch.distributions.Normal(mean, deviation).log_prob(x) - 0.5 * np.log(2 * np.pi)
        formula = formula + {"mean": nll.mean(), "batchmean": nll.sum() / 2, "sum": nll.sum()}[reduction]
    calls = calls_of(*method.likelihoods)
    assert_equals_formula(method, batch, 1.4, 1.4 * formula)
    assert calls == [(1.4, True)] * 2


def test_gradcheck() -> None:
    _, _, batch = features()
    assert gradcheck(built(Infomax(["low", "high"]), batch), batch)


@pytest.mark.parametrize("spatial", [(6,), (4, 6), (2, 4, 3)], ids=["1-D", "2-D", "3-D"])
def test_signals_images_and_volumes(spatial: tuple[int, ...]) -> None:
    s = torch.randn(2, 4, *[n // 2 for n in spatial], requires_grad=True)
    batch = batch_of({"a": s}, inputs=torch.randn(2, 3, *spatial))
    method = Infomax("a", channel_dim=1)
    method.build(batch)
    assert_finite_gradients(method, method(batch, 1.0), s)


def test_a_vector_reaches_the_image_by_transposed_convolutions() -> None:
    s, x = torch.randn(2, 4, requires_grad=True), torch.randn(2, 3, 8, 8)
    batch = batch_of({"a": s}, inputs=x)
    with pytest.raises(ValueError, match=r"student layer 'a' -> input: .* regressor='transposed'"):
        Infomax("a").build(batch)
    method = Infomax("a", regressor=TransposedStack(width=4.0))
    method.build(batch)
    assert_finite_gradients(method, method(batch, 1.0), s)


@pytest.mark.parametrize(
    ("inputs", "which"),
    [
        (lambda x: x, None),
        (lambda x: (x,), None),
        (lambda x: [torch.zeros(2, dtype=torch.long), x], 1),
        (lambda x: {"pixels": x}, None),
        (lambda x: {"mask": torch.zeros(1), "pixels": x}, "pixels"),
    ],
    ids=["tensor", "lone of a tuple", "one of a list", "lone of a mapping", "one of a mapping"],
)
def test_the_input_is_picked(inputs: Any, which: int | str | None) -> None:
    student, x, plain = features()
    expected = built(Infomax("low"), plain)
    batch = batch_of(student, inputs=inputs(x))
    method = Infomax("low", which=which)
    method.build(batch)
    method.double()
    method.load_state_dict(expected.state_dict())
    assert float(method(batch, 1.0).detach()) == float(expected(plain, 1.0).detach())


@pytest.mark.parametrize(
    ("inputs", "which", "error", "message"),
    [
        (
            (torch.zeros(1), torch.zeros(1)),
            None,
            ValueError,
            r"wanted which= to pick one of .*\[0, 1\], got None",
        ),
        ((torch.zeros(1), torch.zeros(1)), 2, ValueError, "got 2"),
        ({"a": torch.zeros(1), "b": 1}, "c", ValueError, r"\['a', 'b'\], got 'c'"),
        (torch.zeros(1), 0, ValueError, "wanted no which= for inputs that are one Tensor"),
        (torch.zeros(2, 3, dtype=torch.long), None, TypeError, "got torch.int64"),
        ({"a": torch.zeros(1), "b": 1}, "b", TypeError, "got int"),
        (torch.zeros(3), None, ValueError, r"wanted an input \(batch, channels, ...\), got \(3,\)"),
    ],
)
def test_inputs_that_cannot_be_predicted_are_refused(
    inputs: Any, which: int | str | None, error: type[Exception], message: str
) -> None:
    batch = batch_of({"a": torch.randn(2, 3, 4)}, inputs=inputs)
    with pytest.raises(error, match=message):
        Infomax("a", which=which).build(batch)


def test_a_regressor_that_misses_the_inputs_resolution_is_refused() -> None:
    _, _, batch = features(torch.float32)
    method = Infomax("high", regressor=lambda s, t: nn.Conv2d(s[1], t[1], 1))
    method.build(batch)
    with pytest.raises(
        ValueError, match=r"'high' -> input: the regressor gives \(2, 3, 4, 3\), .* \(2, 3, 8, 6\)"
    ):
        method(batch, 1.0)


def test_without_teacher_and_labels_through_a_distiller() -> None:
    """It learns to reconstruct, through the layers of the student, and leaves the images alone."""
    method = Infomax(["first", "second"], weight=2.0, init_var=1.0, alpha_lr=3.0)
    student = SmallNet(4)
    distiller = Distiller(student, None, [method], example=torch.randn(2, 1, 8, 8))
    groups = {g["name"]: g for g in distiller.parameter_groups(lr=0.01, weight_decay=0.1)}
    assert set(groups) == {"student", "infomax.regressor", "infomax.alpha"}
    assert groups["infomax.alpha"]["weight_decay"] == 0.0
    assert groups["infomax.alpha"]["lr"] == pytest.approx(0.03)
    optimizer = torch.optim.Adam(distiller.parameter_groups(lr=0.02))
    images = torch.randn(8, 1, 8, 8)
    before, losses = images.clone(), []
    for _ in range(40):
        losses.append(distiller(images).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    assert torch.equal(images, before)
    assert list(method.variances()) == ["first", "second"]
    assert (
        method.variances()["first"] < method.variances()["second"]
    )  # the early layer holds more of the input


def test_the_kernel_sees_an_incoming_gradient_of_one() -> None:
    method = Infomax("first", weight=4.0)
    distiller = Distiller(SmallNet(4), None, [method], example=torch.randn(2, 1, 8, 8))
    seen: list[float] = []
    method.likelihoods[0].register_forward_hook(
        lambda module, args, loss: loss.register_hook(lambda g: seen.append(float(g))) and None
    )
    calls = calls_of(method.likelihoods[0])
    distiller(torch.randn(4, 1, 8, 8), scale=0.5).loss.backward()
    assert seen == [1.0]
    assert calls == [(2.0, True)]


def test_under_autocast_the_loss_is_fp32() -> None:
    student, _, batch = features(torch.float32)
    method = Infomax("high")
    method.build(batch)
    plain = method(batch, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(batch, 1.0)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, plain, rtol=0.02, atol=0)
    assert_finite_gradients(method, loss, student["high"])


@pytest.mark.parametrize("alpha", [-1e4, 1e4])
def test_extreme_variances_stay_finite(alpha: float) -> None:
    student, _, batch = features(torch.float32)
    method = Infomax("high")
    method.build(batch)
    with torch.no_grad():
        method.likelihoods[0].alpha.fill_(alpha)
    assert_finite_gradients(method, method(batch, 1.0), student["high"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": []}, ValueError, "at least one layer"),
        ({"layers": [1]}, TypeError, "names of the student's layers"),
        ({"layers": None}, TypeError, "names of the student's layers, got None"),
        ({"regressor": nn.Conv2d(1, 1, 1)}, TypeError, "got the module Conv2d"),
        ({"reduction": "none"}, ValueError, "wanted reduction"),
        ({"eps": 0.0}, ValueError, "0 < eps"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Infomax(**{"layers": "a", **options})


def test_is_registered_and_builds_again() -> None:
    assert METHODS["infomax"] is Infomax
    _, _, batch = features(torch.float32)
    method = Infomax(["low", "high"])
    method.build(batch)
    method.build(batch)
    assert len(method.regressors) == len(method.likelihoods) == 2
