"""AT against the paper's attention maps written out position by position."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from method_batches import assert_equal_with_gradients, batch_of, built, fp64, pair
from small_networks import PAIRS, SmallNet
from torch import Tensor

from vidfast.distill import AT, Distiller


def attention(features: Tensor) -> list[list[Tensor]]:
    """Each sample's list of mean squares over the channels, over its length, position after position."""
    maps = []
    for sample in features:
        places = product(*map(range, sample.shape[1:]))
        energies = [sum(channel[p] ** 2 for channel in sample) / len(sample) for p in places]
        length = sum(e**2 for e in energies) ** 0.5
        maps.append([e / length for e in energies])
    return maps


def formula(student: Tensor, teacher: Tensor) -> Tensor:
    terms = [
        (s - t) ** 2
        for q_s, q_t in zip(attention(student), attention(teacher), strict=True)
        for s, t in zip(q_s, q_t, strict=True)
    ]
    total: Tensor = sum(terms[1:], terms[0])
    return total / len(terms)


@pytest.mark.parametrize("spatial", [(5,), (3, 2), (2, 3, 2)], ids=["1-D", "2-D", "3-D"])
def test_value_and_gradient_are_the_formulas(spatial: tuple[int, ...]) -> None:
    student, teacher = fp64(3, 2, *spatial, grad=True), fp64(3, 4, *spatial)
    method = built(AT({"a": "x"}, channel_dim=1), pair(student, teacher))
    ours = method(pair(student, teacher), 0.7)
    assert_equal_with_gradients(ours, 0.7 * formula(student, teacher), [student])
    assert torch.autograd.gradcheck(lambda s: method(pair(s, teacher), 100.0), student)


def test_pairs_add_up() -> None:
    student = {"a": fp64(2, 3, 4), "b": fp64(2, 5, 2, 2)}
    teacher = {"x": fp64(2, 4, 4), "y": fp64(2, 2, 2, 2)}
    method = built(AT({"a": "x", "b": "y"}, channel_dim=1), batch_of(student, teacher))
    expected = formula(student["a"], teacher["x"]) + formula(student["b"], teacher["y"])
    torch.testing.assert_close(method(batch_of(student, teacher), 1.0), expected, rtol=1e-10, atol=0)


def test_both_sides_are_pooled_where_they_are_larger() -> None:
    student, teacher = fp64(2, 3, 4, 2), fp64(2, 2, 2, 4)
    small = student.reshape(2, 3, 2, 2, 2).mean(3), teacher.reshape(2, 2, 2, 2, 2).mean(4)
    ours = AT({"a": "x"})(pair(student, teacher), 1.0)
    torch.testing.assert_close(ours, formula(*small), rtol=1e-10, atol=0)


def test_a_map_of_zeros_is_zero_and_has_no_gradient() -> None:
    """After a ReLU a sample may have no activation at all: 0/0 in the formula."""
    student, teacher = torch.randn(3, 2, 2, 2), torch.randn(3, 4, 2, 2)
    student[0], teacher[1] = 0, 0
    student.requires_grad_()
    loss = AT({"a": "x"})(pair(student, teacher), 12.0)
    loss.backward()
    # Against a map of zeros the other side's is of length one, whatever it is.
    third = formula(student[2:].double(), teacher[2:].double()) * 4
    torch.testing.assert_close(loss.double(), 1 + 1 + third, rtol=1e-6, atol=0)
    assert student.grad is not None
    assert student.grad[0].abs().max() == 0
    assert torch.isfinite(student.grad).all()
    assert student.grad[2].abs().max() > 0


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_the_map_does_not_depend_on_the_activations_scale(scale: float) -> None:
    student, teacher = torch.randn(3, 2, 4, 4, requires_grad=True), torch.randn(3, 4, 4, 4)
    method = AT({"a": "x"})
    loss = method(pair(student, teacher), 1.0)
    (gradient,) = torch.autograd.grad(loss, student)
    scaled = (student.detach() * scale).requires_grad_()
    other = method(pair(scaled, teacher), 1.0)
    (scaled_gradient,) = torch.autograd.grad(other, scaled)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled_gradient * scale, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_squared_in_fp32(dtype: torch.dtype) -> None:
    """Activations of 300: their squares are above fp16's largest number, 65504."""
    student, teacher = (300 * torch.randn(3, 2, 4, 4)).to(dtype), torch.randn(3, 4, 4, 4).to(dtype)
    student.requires_grad_()
    method = AT({"a": "x"})
    loss = method(pair(student, teacher), 1.0)
    assert loss.dtype == torch.float32
    expected = formula(student.double(), teacher.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(method(pair(student, teacher), 1.0), loss, rtol=1e-6, atol=0)
    loss.backward()
    assert torch.isfinite(student.grad).all()  # type: ignore[arg-type]


def test_not_a_number_is_not_hidden() -> None:
    student = torch.randn(2, 2, 2, 2)
    student[1, 0, 0, 0] = torch.nan
    assert torch.isnan(AT({"a": "x"})(pair(student, torch.randn(2, 2, 2, 2)), 1.0))


def test_in_a_distiller() -> None:
    student, teacher = SmallNet(4), SmallNet(6)
    images = torch.randn(4, 1, 8, 8)
    distiller = Distiller(student, teacher, [AT(PAIRS)], example=images)
    student_maps: dict[str, Tensor] = {}
    teacher_maps: dict[str, Tensor] = {}
    for name in PAIRS:
        for network, maps in ((student, student_maps), (teacher, teacher_maps)):
            layer = network.get_submodule(name)
            layer.register_forward_hook(lambda m, i, out, n=name, into=maps: into.update({n: out}))
    losses = distiller(images)
    losses.loss.backward()
    with torch.no_grad():
        expected = sum(formula(student_maps[n].double(), teacher_maps[n].double()) for n in PAIRS)
    torch.testing.assert_close(losses.terms["at"].double(), 1e3 * expected, rtol=1e-5, atol=0)
    assert student.first[0].weight.grad.abs().max() > 0
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1, 1)], ids=["vector", "one position"])
def test_features_without_positions_are_refused(shape: tuple[int, ...]) -> None:
    features = torch.randn(shape)
    with pytest.raises(ValueError, match=r"pair 'a' -> 'x': AT compares maps .* at least two positions"):
        built(AT({"a": "x"}), pair(features, features))
