"""LwF in both forms against their formulas, logit by logit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from method_batches import assert_equal_with_gradients, batch_of, built, fp64
from small_networks import SmallNet
from torch import Tensor, nn

from vidfast.distill import Batch, Distiller, LwF


def penultimate(features: Tensor, teacher_logits: Tensor) -> Batch:
    return batch_of({"pool": features}, teacher_logits=teacher_logits)


def predicted(features: Tensor, parameters: list[Tensor]) -> list[list[Tensor]]:
    """W s (+ b) for every sample, each logit as a sum of products."""
    weight, bias = parameters[0], parameters[1] if len(parameters) > 1 else None
    return [
        [
            sum((w * s for w, s in zip(row, sample, strict=True)), 0 if bias is None else bias[n])
            for n, row in enumerate(weight)
        ]
        for sample in features
    ]


def squared_error(features: Tensor, logits: Tensor, parameters: list[Tensor], reduction: str) -> Tensor:
    rows = predicted(features, parameters)
    total: Tensor = sum(  # type: ignore[assignment]
        (t - m) ** 2 / 2
        for target, row in zip(logits, rows, strict=True)
        for t, m in zip(target, row, strict=True)
    )
    return total / {"mean": logits.numel(), "batchmean": len(logits), "sum": 1}[reduction]


def softened_cross_entropy(features: Tensor, logits: Tensor, parameters: list[Tensor], t: float) -> Tensor:
    """Li and Hoiem's equations 2 and 3: outputs to the power 1/T, normalised anew; the mean over the batch."""
    total = torch.zeros((), dtype=torch.float64)
    for target, row in zip(logits, predicted(features, parameters), strict=True):
        outputs = [torch.exp(v) / sum(map(torch.exp, target)) for v in target]
        student_outputs = [torch.exp(v) / sum(map(torch.exp, row)) for v in row]
        softened = [v ** (1 / t) / sum(u ** (1 / t) for u in outputs) for v in outputs]
        student_softened = [
            v ** (1 / t) / sum(u ** (1 / t) for u in student_outputs) for v in student_outputs
        ]
        for y, y_hat in zip(softened, student_softened, strict=True):
            total = total - y * torch.log(y_hat)
    return total / len(logits)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_the_papers_form_is_half_the_squared_error_of_the_logits(reduction: str, bias: bool) -> None:
    features, logits = fp64(3, 4, grad=True), fp64(3, 5)
    method = built(LwF("pool", bias=bias, reduction=reduction), penultimate(features, logits))
    parameters = list(method.parameters())
    assert [p.shape for p in parameters] == [(5, 4), (5,)][: 1 + bias]
    ours = method(penultimate(features, logits), 0.7)
    expected = 0.7 * squared_error(features, logits, parameters, reduction)
    assert_equal_with_gradients(ours, expected, [features, *parameters])
    assert torch.autograd.gradcheck(
        lambda s, *_: method(penultimate(s, logits), 0.7), (features, *parameters)
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_the_original_form_is_the_softened_cross_entropy(temperature: float, reduction: str) -> None:
    features, logits = fp64(3, 4, grad=True), fp64(3, 5)
    method = built(
        LwF("pool", form="softened", temperature=temperature, reduction=reduction, bias=True),
        penultimate(features, logits),
    )
    parameters = list(method.parameters())
    samples = 3 if reduction == "sum" else 1
    expected = samples * 0.7 * softened_cross_entropy(features, logits, parameters, temperature)
    ours = method(penultimate(features, logits), 0.7)
    assert_equal_with_gradients(ours, expected, [features, *parameters])
    assert torch.autograd.gradcheck(
        lambda s, *_: method(penultimate(s, logits), 0.7), (features, *parameters)
    )


def test_the_square_of_the_temperature_is_there_when_asked_for() -> None:
    features, logits = fp64(3, 4), fp64(3, 5)
    method = built(
        LwF("pool", form="softened", temperature=3.0, scale_by_temperature=True),
        penultimate(features, logits),
    )
    expected = 9 * softened_cross_entropy(features, logits, list(method.parameters()), 3.0)
    torch.testing.assert_close(method(penultimate(features, logits), 1.0), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("form", ["mse", "softened"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(form: str, dtype: torch.dtype) -> None:
    """Errors of 300 have squares above fp16's largest number, 65504."""
    features, logits = torch.randn(3, 4).to(dtype), (300 * torch.randn(3, 5)).to(dtype)
    method = built(LwF("pool", form=form, reduction="batchmean"), penultimate(features, logits))
    nn.init.zeros_(method.head.weight)
    loss = method(penultimate(features, logits), 1.0)
    assert loss.dtype == torch.float32
    expected = logits.double().pow(2).sum() / 6 if form == "mse" else torch.tensor(math.log(5.0)).double()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", ["mse", "softened"])
def test_autocast_trains_an_fp32_layer(form: str) -> None:
    features, logits = torch.randn(8, 16), torch.randn(8, 5)
    method = built(LwF("pool", form=form), penultimate(features, logits))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method(penultimate(features, logits), 1.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, method(penultimate(features, logits), 1.0), rtol=0.01, atol=0)
    loss.backward()
    assert method.head.weight.grad.dtype == torch.float32


def test_huge_logits_stay_finite() -> None:
    features = torch.tensor([[1e6, 0.0]], requires_grad=True)
    batch = penultimate(features, torch.tensor([[0.0, 1e6]]))
    method = built(LwF("pool", form="softened"), batch)
    nn.init.eye_(method.head.weight)
    loss = method(batch, 1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(5e5)
    torch.testing.assert_close(features.grad, torch.tensor([[0.5, -0.5]]))


@pytest.mark.parametrize("form", ["mse", "softened"])
def test_the_teacher_gets_no_gradient(form: str) -> None:
    features, logits = fp64(3, 4, grad=True), fp64(3, 5, grad=True)
    batch = penultimate(features, logits)
    built(LwF("pool", form=form), batch)(batch, 1.0).backward()
    assert features.grad is not None
    assert logits.grad is None


class OtherClasses(SmallNet):
    """A network of five classes instead of three."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.fc = nn.Linear(2 * width, 5)


def test_in_a_distiller_with_a_teacher_of_other_classes() -> None:
    student, teacher = SmallNet(4), OtherClasses(6)
    images = torch.randn(4, 1, 8, 8)
    distiller = Distiller(
        student, teacher, [LwF("drop"), LwF("drop", "softened", name="old")], example=images
    )
    losses = distiller(images, torch.tensor([0, 1, 2, 0]))
    losses.loss.backward()
    groups = {g["name"]: g["params"] for g in distiller.parameter_groups(lr=0.1)}
    assert [p.shape for p in groups["lwf"] + groups["old"]] == [(5, 8), (5, 8)]
    assert all(p.grad.abs().max() > 0 for p in groups["lwf"] + groups["old"])
    assert all(p.grad is None for p in teacher.parameters())
    assert "terms.lwf.head.weight" in distiller.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "hard"}, "wanted form 'mse' or 'softened', got 'hard'"),
        ({"temperature": 0.0}, "temperature"),
        ({"reduction": "none"}, "wanted reduction"),
        ({"weight": math.nan}, "finite weight"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LwF("pool", **options)
