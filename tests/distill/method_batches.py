"""Batches made by hand for the tests of single methods, and the comparison with an independent formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vidfast.distill import Activations, Batch, Method


def batch_of(
    student: Mapping[str, Tensor] | None = None,
    teacher: Mapping[str, Tensor] | None = None,
    *,
    student_logits: Tensor | None = None,
    teacher_logits: Tensor | None = None,
) -> Batch:
    none = torch.zeros(1)
    return Batch(
        None,
        None,
        Activations(student or {}, none if student_logits is None else student_logits),
        Activations(teacher or {}, none if teacher_logits is None else teacher_logits),
    )


def pair(student: Tensor, teacher: Tensor) -> Batch:
    """One pair of features, the student's layer "a" and the teacher's layer "x"."""
    return batch_of({"a": student}, {"x": teacher})


def built(method: Method, batch: Batch) -> Method:
    method.build(batch)
    return method


def fp64(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def assert_equal_with_gradients(
    ours: Tensor, formula: Tensor, inputs: Sequence[Tensor], tolerance: float = 1e-10
) -> None:
    """Value and gradients of two fp64 scalars agree, relatively and absolutely, and no gradient is all zero."""
    assert ours.dtype == formula.dtype == torch.float64
    assert ours.shape == ()
    torch.testing.assert_close(ours, formula, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(formula, inputs), strict=True
    ):
        assert theirs.abs().max() > 1e-6
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
