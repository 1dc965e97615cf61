"""What in a batch made a loss not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .distiller import Distiller
from .task import mean_loss


def cause(distiller: Distiller, terms: Sequence[str], inputs: Tensor, parts: Sequence[Tensor]) -> str | None:
    """Why these terms are not finite, and what to do; None where it is nothing in the batch.

    inputs: of the whole batch. parts: the labels of each part that it was processed in.
    """
    if not inputs.isfinite().all():
        return "the inputs of that step's batch are not finite: mend the data, or their augmentation"
    if "task" in terms and not _labels_are_fine(distiller, inputs, parts):
        return (
            "the labels of that step's batch alone make the task_loss not finite, whatever the logits are, as where "
            "it ignores all of them: leave such items out, or give Distiller(..., task_count=) the number of labels "
            "that count, so that a batch without any counts nothing"
        )
    if distiller.teacher is not None and set(terms) - {"task"}:
        teacher = distiller.teacher_activations(inputs)
        for what, found in (*teacher.taps.items(), ("logits", teacher.logits)):
            if not found.isfinite().all():
                return f"the teacher's {what!r} are not finite for that step's batch: mend its weights, or its dtype"
    return None


def _labels_are_fine(distiller: Distiller, inputs: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether the loss of every part is finite for logits of 0 or for random ones."""
    with torch.no_grad():
        shape = distiller.pick_logits(distiller.student(inputs[:1])).shape[1:]
        for labels in parts:
            logits = torch.randn((len(labels), *shape), device=labels.device)
            losses = (
                mean_loss(distiller.task_loss, distiller.task_count, z, labels, 1.0)
                for z in (0 * logits, logits)
            )
            if not any(loss.isfinite() for loss in losses):
                return False
    return True
