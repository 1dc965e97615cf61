"""What methods share that predict the teacher's logits from the student's penultimate features."""

from __future__ import annotations

from torch import Tensor

from ..weighting import fitted
from .base import Batch


def check_layer(layer: str) -> str:
    """The name of the student's penultimate layer. Raises TypeError for what is no name."""
    if not isinstance(layer, str):
        raise TypeError(f"wanted the name of the student's penultimate layer, got {type(layer).__name__}")
    return layer


def penultimate(batch: Batch, layer: str) -> tuple[Tensor, Tensor]:
    """The student's features (B, D) from `layer` and the teacher's logits (B, N), the latter detached.

    A layer may also give (B, D, 1, ...), as an average pool does. Raises ValueError for any other shape: whether
    the classifier averages or flattens a map of more positions is not for a method to guess.
    """
    student, teacher = batch.student.taps[layer], batch.from_teacher.logits.detach()
    if student.dim() < 2 or student.shape[2:].numel() != 1:
        raise ValueError(
            f"wanted penultimate features (B, D) or (B, D, 1, ...) from the student's layer {layer!r}, got "
            f"{tuple(student.shape)}; name the layer whose output the classifier reads, after the pooling, or "
            "what the classifier is called with, such as 'fc.input'"
        )
    if teacher.dim() != 2:
        raise ValueError(f"wanted the teacher's logits as (B, classes), got {tuple(teacher.shape)}")
    if teacher.shape[0] != student.shape[0]:
        raise ValueError(
            f"wanted features from layer {layer!r} and teacher's logits of one batch, got {tuple(student.shape)} "
            f"and {tuple(teacher.shape)}"
        )
    return student.flatten(1), teacher


def sample_weights(batch: Batch, student: Tensor, layer: str) -> Tensor | None:
    """(B, 1): the batch's mask for these features (B, D), the mean weight of each sample's positions."""
    if batch.mask is None:
        return None
    try:
        return fitted(batch.mask, student)
    except ValueError as error:
        raise ValueError(f"student layer {layer!r}: {error}") from None
