"""KD: the softened outputs of the teacher as targets (Hinton, Vinyals and Dean, arXiv 1503.02531, section 2).

    T^2 * KL( softmax(z_t / T) || softmax(z_s / T) ),   summed over classes, averaged over the batch.

The gradients of the softened outputs shrink as 1 / T^2; the factor T^2 keeps their share of the whole as T
changes.
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from ..divergence import divergence
from ..weighting import Factor, counted, fitted, times
from .base import METHODS, Batch, Method


@METHODS.register("kd")
class KD(Method):
    """T^2 times the Kullback-Leibler divergence of the student's softened outputs from the teacher's.

    temperature: T.
    class_dim: the logits' dimension of the classes; None for dimension 1, which logits of three dimensions must be
        told, since they may be (B, classes, positions) or, as a language model's, (B, positions, classes).
    ignore_index: the label whose positions are left out, such as 255 of a segmentation's border or -100 of padded
        tokens. Labels are then class numbers, one for each position of the logits: a language model's shifted as the
        logits are. None: labels are not looked at. A batch without labels counts whole.
    weight: what the term is multiplied by. With the default 0.9 goes `Distiller(..., task_weight=0.1)`.

    Logits are (B, classes) or (B, classes, ...), as of a segmentation network, averaged over all but the
    classes; any floating dtype, computed in fp32 or wider. Large ones, as of a language model, are computed in parts
    (`divergence.py`), so that there is no second copy of all in fp32.

    Raises TypeError for a class_dim or ignore_index that is no whole number, ValueError for a temperature that is not
    positive and finite, and, when built, for networks whose logits differ in shape or have one class, for three
    dimensions without class_dim, and for a class_dim that they do not have; when called, for labels that do not fit.
    """

    default_name: ClassVar[str] = "kd"
    takes_mask: ClassVar[bool] = True

    def __init__(
        self,
        temperature: float = 4.0,
        *,
        class_dim: int | None = None,
        ignore_index: int | None = None,
        weight: float = 0.9,
        name: str | None = None,
    ) -> None:
        super().__init__(weight=weight, name=name)
        self.temperature = check_temperature(temperature)
        for option, value in (("class_dim", class_dim), ("ignore_index", ignore_index)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"wanted {option} as a whole number, or None, got {value!r}")
        self.class_dim, self.ignore_index = class_dim, ignore_index

    def build(self, batch: Batch) -> None:
        self._check(batch.student.logits, batch.from_teacher.logits)

    def forward(self, batch: Batch, factor: Factor) -> Tensor:
        student, teacher = batch.student.logits, batch.from_teacher.logits.detach()
        dim = self._check(student, teacher)
        weights = self._weights(batch, student, dim)
        total = divergence(student, teacher, dim, self.temperature, weights)
        positions = student.numel() // student.shape[dim]
        count = positions if weights is None else counted(weights, positions, total.dtype)
        return times(total / count, factor * self.temperature**2)

    def _weights(self, batch: Batch, logits: Tensor, dim: int) -> Tensor | None:
        """How much each position counts, of the logits' shape with 1 in the place of the classes; None: all alike."""
        weights = None
        if batch.mask is not None:
            try:
                weights = fitted(batch.mask, logits, dim)
            except ValueError as error:
                raise ValueError(f"logits of {self.name!r}: {error}") from None
        if self.ignore_index is None or batch.labels is None:
            return weights
        wanted = tuple(n for d, n in enumerate(logits.shape) if d != dim)
        if tuple(batch.labels.shape) != wanted or batch.labels.is_floating_point():
            raise ValueError(
                f"wanted labels {wanted} of classes, one for each position of logits {tuple(logits.shape)}, for "
                f"ignore_index={self.ignore_index}, got {batch.labels.dtype} {tuple(batch.labels.shape)}; give a mask "
                "in its place: distiller(..., mask=)"
            )
        kept = (batch.labels.to(logits.device).long() != self.ignore_index).unsqueeze(dim)
        return kept if weights is None else weights * kept

    def _check(self, student: Tensor, teacher: Tensor) -> int:
        """The dimension of the classes, from 1 on."""
        if student.dim() < 2 or teacher.dim() < 2:
            raise ValueError(
                "wanted logits of shape (B, classes) or (B, classes, ...), got "
                f"{tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        if self.class_dim is None and student.dim() == 3:
            raise ValueError(
                f"wanted class_dim for logits of three dimensions, got {tuple(student.shape)} without: give KD(..., "
                "class_dim=1) for (B, classes, positions), class_dim=-1 for (B, positions, classes)"
            )
        given = 1 if self.class_dim is None else self.class_dim
        dim = given + student.dim() if given < 0 else given
        if not 1 <= dim < student.dim():
            raise ValueError(
                f"wanted a class_dim of logits {tuple(student.shape)} that is not the batch's, got {given}"
            )
        if student.dim() == teacher.dim() and student.shape[dim] != teacher.shape[dim]:
            raise ValueError(
                f"KD compares the same classes, but the student has {student.shape[dim]} and the teacher "
                f"{teacher.shape[dim]}; LwF and VIDLP take a teacher of other classes"
            )
        if student.dim() == teacher.dim() and student.shape[dim] == 1:
            raise ValueError(
                f"wanted logits of two or more classes, got {tuple(student.shape)}: the softmax of one logit is 1, "
                "whatever it is, and nothing is learned; give two logits, z and 0, by Distiller(..., logits=)"
            )
        if student.shape != teacher.shape:
            raise ValueError(
                f"wanted logits of one shape, got the student's {tuple(student.shape)} and the teacher's "
                f"{tuple(teacher.shape)}"
            )
        return dim

    def extra_repr(self) -> str:
        classes = "" if self.class_dim is None else f", class_dim={self.class_dim}"
        ignored = "" if self.ignore_index is None else f", ignore_index={self.ignore_index}"
        return f"temperature={self.temperature:g}{classes}{ignored}, {super().extra_repr()}"


def check_temperature(temperature: float) -> float:
    """The temperature as a float. Raises ValueError unless it is positive and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"wanted a temperature that is positive and finite, got {temperature}")
    return float(temperature)
