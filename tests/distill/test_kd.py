"""KD against the divergence written out class by class, and against hand-made numbers."""

from __future__ import annotations

import math

import pytest
import torch
from method_batches import assert_equal_with_gradients, batch_of, built, fp64
from small_networks import PAIRS, SmallNet
from torch import Tensor

from vidfast.distill import AT, KD, Batch, Distiller


def logits(student: Tensor, teacher: Tensor) -> Batch:
    return batch_of(student_logits=student, teacher_logits=teacher)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Hinton's softened outputs as quotients of exponentials, their divergence summed in loops."""
    total = torch.zeros((), dtype=torch.float64)
    samples = student.movedim(1, -1).flatten(0, -2), teacher.movedim(1, -1).flatten(0, -2)
    for z_s, z_t in zip(*samples, strict=True):
        q_s, q_t = ([torch.exp(z / temperature) for z in row] for row in (z_s, z_t))
        for e_s, e_t in zip(q_s, q_t, strict=True):
            p_s, p_t = e_s / sum(q_s), e_t / sum(q_t)
            total = total + p_t * torch.log(p_t / p_s)
    return temperature**2 * total / len(samples[0])


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("places", [(), (2, 3)], ids=["classifier", "segmentation"])
def test_value_and_gradient_are_the_formulas(temperature: float, places: tuple[int, ...]) -> None:
    student, teacher = fp64(3, 5, *places, grad=True), fp64(3, 5, *places)
    ours = built(KD(temperature), logits(student, teacher))(logits(student, teacher), 0.3)
    assert_equal_with_gradients(ours, 0.3 * divergence(student, teacher, temperature), [student])
    assert torch.autograd.gradcheck(lambda s: KD(temperature)(logits(s, teacher), 0.3), student)


def test_a_value_by_hand() -> None:
    """Softened to (3/4, 1/4) and (1/2, 1/2): T^2 (3/4 log 3/2 + 1/4 log 1/2)."""
    teacher = torch.tensor([[2 * math.log(3.0), 0.0]], dtype=torch.float64)
    loss = KD(2.0)(logits(torch.zeros(1, 2, dtype=torch.float64), teacher), 1.0)
    assert float(loss) == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), rel=1e-14)


def test_gradients_of_high_temperatures_do_not_vanish() -> None:
    """The reason for T^2: as T grows the gradient tends to that of the centred squared error, over B."""
    student, teacher = fp64(4, 6, grad=True), fp64(4, 6)
    (gradient,) = torch.autograd.grad(KD(1e5)(logits(student, teacher), 1.0), student)
    difference = (student - teacher).detach()
    expected = (difference - difference.mean(1, keepdim=True)) / (6 * 4)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_softened_in_fp32(dtype: torch.dtype) -> None:
    student, teacher = (20 * torch.randn(8, 10)).to(dtype), (20 * torch.randn(8, 10)).to(dtype)
    loss = KD()(logits(student, teacher), 1.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), divergence(student.double(), teacher.double(), 4.0), rtol=1e-5, atol=0
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(KD()(logits(student, teacher), 1.0), loss, rtol=0, atol=0)


def test_a_teacher_in_lower_precision_and_an_fp64_student() -> None:
    student, teacher = fp64(4, 5), torch.randn(4, 5).bfloat16()
    expected = divergence(student, teacher.double(), 4.0)
    torch.testing.assert_close(KD()(logits(student, teacher), 1.0), expected, rtol=1e-5, atol=0)


def test_huge_logits_stay_finite() -> None:
    """All mass on class 0 against all on class 1: T^2 times the gap over T, and the gradient T / B times +-1."""
    student = torch.tensor([[0.0, 1e6]] * 2, requires_grad=True)
    loss = KD(4.0)(logits(student, torch.tensor([[1e6, 0.0]] * 2)), 1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(4e6)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.tensor([[-2.0, 2.0]] * 2))


def test_equal_logits_cost_nothing() -> None:
    student = 30 * torch.randn(4, 7)
    student.requires_grad_()
    loss = KD()(logits(student, student.detach() + 3), 1.0)
    loss.backward()
    assert student.grad is not None
    assert abs(float(loss.detach())) < 1e-4
    assert student.grad.abs().max() < 1e-5


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = fp64(3, 4, grad=True), fp64(3, 4, grad=True)
    KD()(logits(student, teacher), 1.0).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_in_a_distiller_beside_another_term() -> None:
    student, teacher = SmallNet(4), SmallNet(6).eval()
    calls = []
    student.register_forward_hook(lambda *_: calls.append("student"))
    teacher.register_forward_hook(lambda *_: calls.append("teacher"))
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    distiller = Distiller(student, teacher, [KD(), AT(PAIRS)], example=images, task_weight=0.1)
    calls.clear()
    losses = distiller(images, labels, scale=0.5)
    assert sorted(calls) == ["student", "teacher"]
    with torch.no_grad():
        expected = 0.5 * 0.9 * divergence(losses.logits.double(), teacher(images).double(), 4.0)
    torch.testing.assert_close(losses.terms["kd"].double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.loss.detach(), sum(losses.terms.values()))
    losses.loss.backward()
    assert [g["name"] for g in distiller.parameter_groups(lr=0.1)] == ["student"]


def test_networks_of_other_classes_are_refused_when_built() -> None:
    batch = logits(torch.randn(2, 3), torch.randn(2, 5))
    with pytest.raises(ValueError, match="the student has 3 and the teacher 5"):
        built(KD(), batch)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2,), (2,), r"\(B, classes\) or \(B, classes, ...\), got \(2,\) and \(2,\)"),
        (
            (2, 3, 4, 1),
            (2, 3, 5, 1),
            r"one shape, got the student's \(2, 3, 4, 1\) and the teacher's \(2, 3, 5, 1\)",
        ),
        ((2, 3), (2, 3, 4), "one shape"),
        ((2, 3, 4), (2, 3, 4), r"wanted class_dim for logits of three.*got \(2, 3, 4\).*class_dim=-1 for"),
    ],
)
def test_logits_of_other_shapes_are_refused(
    student: tuple[int, ...], teacher: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        KD()(logits(torch.randn(student), torch.randn(teacher)), 1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="wanted a temperature that is positive and finite"):
        KD(temperature)
