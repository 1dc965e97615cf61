"""KD: the softened outputs of the teacher as targets (Hinton, Vinyals and Dean, arXiv 1503.02531, section 2).

    T^2 * KL( softmax(z_t / T) || softmax(z_s / T) ),   summed over classes, averaged over the batch.

The gradients of the softened outputs shrink as 1 / T^2; the factor T^2 keeps their share of the whole as T
changes.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from .base import METHODS, Batch, Method
from .pairs import wide


@METHODS.register("kd")
class KD(Method):
    """T^2 times the Kullback-Leibler divergence of the student's softened outputs from the teacher's.

    temperature: T.
    weight: what the term is multiplied by. With the default 0.9 goes `Distiller(..., task_weight=0.1)`.

    Logits are (B, classes) or (B, classes, ...), as of a segmentation network, averaged over all but the
    classes; any floating dtype, computed in fp32 or wider.

    Raises ValueError for a temperature that is not positive and finite, and, when built, for networks whose
    logits differ in shape.
    """

    default_name: ClassVar[str] = "kd"

    def __init__(self, temperature: float = 4.0, *, weight: float = 0.9, name: str | None = None) -> None:
        super().__init__(weight=weight, name=name)
        self.temperature = check_temperature(temperature)

    def build(self, batch: Batch) -> None:
        self._check(batch.student.logits, batch.from_teacher.logits)

    def forward(self, batch: Batch, factor: float) -> Tensor:
        student, teacher = batch.student.logits, batch.from_teacher.logits.detach()
        self._check(student, teacher)
        log_s = torch.log_softmax(wide(student) / self.temperature, dim=1)
        log_t = torch.log_softmax(wide(teacher) / self.temperature, dim=1)
        divergence = (log_t.exp() * (log_t - log_s)).sum(1).mean()
        return divergence * (factor * self.temperature**2)

    @staticmethod
    def _check(student: Tensor, teacher: Tensor) -> None:
        if student.dim() < 2 or teacher.dim() < 2:
            raise ValueError(
                "wanted logits of shape (B, classes) or (B, classes, ...), got "
                f"{tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"KD compares the same classes, but the student has {student.shape[1]} and the teacher "
                f"{teacher.shape[1]}; LwF and VIDLP take a teacher of other classes"
            )
        if student.shape != teacher.shape:
            raise ValueError(
                f"wanted logits of one shape, got the student's {tuple(student.shape)} and the teacher's "
                f"{tuple(teacher.shape)}"
            )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, {super().extra_repr()}"


def check_temperature(temperature: float) -> float:
    """The temperature as a float. Raises ValueError unless it is positive and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"wanted a temperature that is positive and finite, got {temperature}")
    return float(temperature)
