"""FitNet against equation 7 of the VID paper, summed element by element."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from method_batches import assert_equal_with_gradients, batch_of, built, fp64, pair
from small_networks import PAIRS, SmallNet
from torch import Tensor, nn

from vidfast.distill import Distiller, FitNet, PointwiseStack


def equation_7(student: Tensor, teacher: Tensor, weight: Tensor, reduction: str) -> Tensor:
    """1/2 (t - W s)^2 at one element after another, W a matrix (teacher's channels, student's channels)."""
    total = torch.zeros((), dtype=torch.float64)
    s, t = student.reshape(*student.shape[:2], -1), teacher.reshape(*teacher.shape[:2], -1)
    for b, c, p in product(*map(range, t.shape)):
        predicted = sum(weight[c, k] * s[b, k, p] for k in range(s.shape[1]))
        total = total + (t[b, c, p] - predicted) ** 2 / 2
    return total / {"mean": t.numel(), "batchmean": t.shape[0], "sum": 1}[reduction]


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("spatial", [(), (3,), (2, 3), (2, 1, 2)], ids=["vector", "1-D", "2-D", "3-D"])
def test_value_and_gradient_are_equation_7(reduction: str, spatial: tuple[int, ...]) -> None:
    student, teacher = fp64(2, 3, *spatial, grad=True), fp64(2, 4, *spatial)
    method = built(FitNet({"a": "x"}, channel_dim=1, reduction=reduction), pair(student, teacher))
    ours = method(pair(student, teacher), 0.7)
    (weight,) = method.parameters()
    formula = 0.7 * equation_7(student, teacher, weight.reshape(4, 3), reduction)
    assert_equal_with_gradients(ours, formula, [student, weight])
    assert torch.autograd.gradcheck(lambda s, w: method(pair(s, teacher), 0.7), (student, weight))


def test_pairs_add_up_each_with_its_own_regressor() -> None:
    student = {"a": fp64(2, 3, 2, 2), "b": fp64(2, 5)}
    teacher = {"x": fp64(2, 4, 2, 2), "y": fp64(2, 2)}
    method = built(FitNet({"a": "x", "b": "y"}), batch_of(student, teacher))
    first, second = (p.reshape(p.shape[:2]) for p in method.parameters())
    expected = equation_7(student["a"], teacher["x"], first, "mean") + equation_7(
        student["b"], teacher["y"], second, "mean"
    )
    torch.testing.assert_close(method(batch_of(student, teacher), 1.0), expected, rtol=1e-10, atol=0)


def test_maps_of_different_size_are_pooled_to_the_smaller() -> None:
    student, teacher = fp64(2, 3, 4, 2), fp64(2, 2, 2, 4)
    method = built(FitNet({"a": "x"}), pair(student, teacher))
    (weight,) = method.parameters()
    small = student.reshape(2, 3, 2, 2, 2).mean(3), teacher.reshape(2, 2, 2, 2, 2).mean(4)
    expected = equation_7(*small, weight.reshape(2, 3), "mean")
    torch.testing.assert_close(method(pair(student, teacher), 1.0), expected, rtol=1e-10, atol=0)


def test_channels_last_features_as_of_a_transformer() -> None:
    student, teacher = fp64(2, 4, 3), fp64(2, 4, 5)
    method = built(FitNet({"a": "x"}, channel_dim=-1), pair(student, teacher))
    (weight,) = method.parameters()
    expected = equation_7(student.mT, teacher.mT, weight, "batchmean") / (4 * 5)
    torch.testing.assert_close(method(pair(student, teacher), 1.0), expected, rtol=1e-10, atol=0)


def test_a_deeper_regressor_and_one_that_changes_the_resolution() -> None:
    student, teacher = fp64(2, 3, 2, 2), fp64(2, 4, 4, 4)
    method = built(FitNet({"a": "x"}, regressor=PointwiseStack(2)), pair(student, teacher))
    assert len(list(method.parameters())) == 2
    assert torch.isfinite(method(pair(student, teacher), 1.0))

    method = built(
        FitNet({"a": "x"}, regressor=lambda s, t: nn.ConvTranspose2d(s[1], t[1], 4, 2, 1)),
        pair(student, teacher),
    )
    mean = method.regressors[0](student)
    torch.testing.assert_close(method(pair(student, teacher), 1.0), 0.5 * (mean - teacher).pow(2).mean())


def test_a_vector_reaches_a_map_by_transposed_convolutions() -> None:
    """An MLP's hidden layer and a convolutional teacher, as in table 4 of the VID paper."""
    student, teacher = fp64(2, 7, grad=True), fp64(2, 3, 8, 8)
    method = built(FitNet({"a": "x"}, regressor="transposed"), pair(student, teacher))
    loss = method(pair(student, teacher), 1.0)
    mean = method.regressors[0](student)
    torch.testing.assert_close(loss, 0.5 * (mean - teacher).pow(2).mean())
    loss.backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0


def test_fp16_squares_do_not_overflow() -> None:
    """A difference of 300 squared is above fp16's largest number, 65504."""
    student, teacher = torch.zeros(2, 3, 2, 2).half(), torch.full((2, 4, 2, 2), 300.0).half()
    method = built(FitNet({"a": "x"}), pair(student, teacher))
    loss = method(pair(student, teacher), 1.0)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(45000)


def test_differences_are_formed_in_fp32() -> None:
    """1 - (1 - 2^-8) is lost if bf16 squares are averaged in bf16; here every digit of it is kept."""
    student, teacher = torch.ones(2, 1, 4, 4).bfloat16(), torch.full((2, 1, 4, 4), 1 - 2.0**-8).bfloat16()
    method = built(FitNet({"a": "x"}), pair(student, teacher))
    nn.init.ones_(next(method.parameters()))
    assert float(method(pair(student, teacher), 1.0).detach()) == 0.5 * 2.0**-16


def test_autocast_trains_an_fp32_regressor() -> None:
    student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 4, 4, 4)
    method = built(FitNet({"a": "x"}), pair(student, teacher))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method(pair(student, teacher), 1.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, method(pair(student, teacher), 1.0), rtol=0.02, atol=0)
    loss.backward()
    assert next(method.parameters()).grad.dtype == torch.float32  # type: ignore[union-attr]


def test_a_teacher_of_another_precision() -> None:
    student, teacher = torch.randn(2, 3, 2, requires_grad=True), fp64(2, 4, 2)
    method = built(FitNet({"a": "x"}, channel_dim=1), pair(student, teacher))
    loss = method(pair(student, teacher), 1.0)
    loss.backward()
    assert loss.dtype == torch.float64
    assert student.grad is not None


def test_in_a_distiller_the_regressors_learn_and_the_teacher_does_not() -> None:
    student, teacher = SmallNet(4), SmallNet(6)
    images = torch.randn(4, 1, 8, 8)
    distiller = Distiller(student, teacher, [FitNet(PAIRS, weight=1.0)], example=images)
    groups = {g["name"]: g["params"] for g in distiller.parameter_groups(lr=0.5)}
    assert [p.shape for p in groups["fitnet"]] == [(6, 4, 1, 1), (12, 8, 1, 1)]
    optimizer = torch.optim.SGD(groups["fitnet"], lr=0.5)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = distiller(images).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": {}}, "at least one pair"),
        ({"reduction": "none"}, "wanted reduction"),
        ({"channel_dim": 0}, "channel_dim"),
        ({"regressor": "cubic"}, "unknown regressor"),
        ({"weight": float("inf")}, "finite weight"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FitNet(**{"pairs": {"a": "x"}, **options})


def test_features_that_do_not_fit_are_refused_with_the_pair_named() -> None:
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="pair 'a' -> 'x': "):
        built(FitNet({"a": "x"}, channel_dim=1), pair(student, teacher))
    method = built(
        FitNet({"a": "x"}, channel_dim=1, regressor=lambda s, t: nn.Identity()), pair(student, student)
    )
    with pytest.raises(ValueError, match=r"'a' -> 'x': the regressor gives \(2, 3, 4\), wanted \(2, 5, 4\)"):
        method(pair(student, torch.randn(2, 5, 4)), 1.0)
