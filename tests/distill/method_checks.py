"""What the tests of single methods share: batches from tensors, and gradients of a whole method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vidfast.distill import Activations, Batch, Method


def batch_of(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor] | None = None,
    *,
    teacher_logits: Tensor | None = None,
    inputs: Any = None,
) -> Batch:
    logits = torch.zeros(1)
    taught = None if teacher is None else Activations(teacher, logits)
    if teacher_logits is not None:
        taught = Activations(teacher or {}, teacher_logits)
    return Batch(inputs, None, Activations(student, logits), taught)


def built(method: Method, batch: Batch) -> Method:
    """The method with its parameters, in fp64 and away from where they start, so that no term vanishes."""
    method.build(batch)
    method.double()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return method


def calls_of(*likelihoods: nn.Module) -> list[tuple[float, bool]]:
    """(weight, inplace) of every call of these GaussianNLLs from now on."""
    seen: list[tuple[float, bool]] = []
    for likelihood in likelihoods:
        likelihood.register_forward_hook(lambda module, *_: seen.append((module.weight, module.inplace)))
    return seen


def assert_equals_formula(method: Method, batch: Batch, factor: float, formula: Tensor) -> None:
    """Value and every gradient, of student features and parameters, to 1e-10; `formula` needs the same leaves."""
    leaves = [x for x in batch.student.taps.values() if x.requires_grad] + list(method.parameters())
    theirs = torch.autograd.grad(formula, leaves)
    loss = method(batch, factor)
    assert loss.dtype is torch.float64
    assert loss.shape == ()
    torch.testing.assert_close(loss, formula, rtol=1e-10, atol=1e-10)
    for mine, other in zip(torch.autograd.grad(loss, leaves), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)
    assert any(bool(g.abs().sum() > 0) for g in theirs)


def gradcheck(method: Method, batch: Batch, factor: float = 1.7) -> bool:
    """torch.autograd.gradcheck over the student's features and the method's parameters, all fp64."""
    layers = list(batch.student.taps)
    names = [name for name, _ in method.named_parameters()]

    def loss(*values: Tensor) -> Tensor:
        taps = dict(zip(layers, values, strict=False))
        replaced = dict(zip(names, values[len(layers) :], strict=True))
        inner = Batch(batch.inputs, None, Activations(taps, batch.student.logits), batch.teacher)
        out: Tensor = functional_call(method, replaced, (inner, factor))
        return out

    leaves: Sequence[Tensor] = [*batch.student.taps.values(), *method.parameters()]
    values = tuple(x.detach().clone().requires_grad_() for x in leaves)
    return torch.autograd.gradcheck(loss, values)


def assert_finite_gradients(method: Method, loss: Tensor, *leaves: Tensor) -> None:
    assert torch.isfinite(loss)
    for g in torch.autograd.grad(loss, [*leaves, *method.parameters()]):
        assert torch.isfinite(g).all()
