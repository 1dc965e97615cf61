"""Losses of every method that compares pairs, and their gradients, for features of any layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidfast.distill import (
    AT,
    ITRD,
    MIMKD,
    NST,
    VID,
    Activations,
    Batch,
    FitNet,
    HeteroscedasticVID,
    Method,
    MixtureVID,
    StudentTVID,
)
from vidfast.distill.kinds import UNKNOWN

PAIRED: dict[str, Callable[..., Method]] = {
    "vid": lambda **o: VID({"a": "x"}, **o),
    "vid_heteroscedastic": lambda **o: HeteroscedasticVID({"a": "x"}, **o),
    "vid_student_t": lambda **o: StudentTVID({"a": "x"}, learn_nu=True, **o),
    "vid_mixture": lambda **o: MixtureVID({"a": "x"}, **o),
    "fitnet": lambda **o: FitNet({"a": "x"}, **o),
    "at": lambda **o: AT({"a": "x"}, **o),
    "nst": lambda **o: NST({"a": "x"}, **o),
    "itrd": lambda **o: ITRD({"a": "x"}, **o),
    "mimkd": lambda **o: MIMKD({"a": "x"}, hidden=8, **o),
}
MASKED = ["vid", "vid_heteroscedastic", "vid_student_t", "vid_mixture", "fitnet"]


def batch_of(
    student: Tensor, teacher: Tensor, kinds: Any = (UNKNOWN, UNKNOWN), mask: Tensor | None = None
) -> Batch:
    none = torch.zeros(1)
    return Batch(
        None,
        None,
        Activations({"a": student}, none, {"a": kinds[0]}),
        Activations({"x": teacher}, none, {"x": kinds[1]}),
        mask,
    )


def loss_of(name: str, batch: Batch, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss in fp64, and the gradients of the student's feature and of the parameters, flattened."""
    torch.manual_seed(1)
    method = PAIRED[name](**options)
    method.build(batch)
    method.double()
    loss = method(batch, 1.3)
    found = torch.autograd.grad(loss, [batch.student.taps["a"], *method.parameters()])
    return loss, [found[0], *(g.flatten() for g in found[1:])]


def features(*places: int) -> tuple[Tensor, Tensor]:
    student = torch.randn(4, 3, *places, dtype=torch.float64, requires_grad=True)
    return student, torch.randn(4, 5, *places, dtype=torch.float64)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()
