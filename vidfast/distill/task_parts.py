"""The labels' term where a batch is cut into parts: by what a part counts, and whether the loss can be cut at all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .distiller import Distiller
from .processes import Processes
from .task import TaskLoss


class TaskParts:
    """The shares of the parts of a batch in its loss on the labels, over all processes.

    A loss whose divisor is known (`Distiller.task_count`) counts by it. Any other loss counts by images, and then the
    loss of a batch must be the mean of its parts' losses: that is looked at, on random logits, for the parts of one
    process in every step, and for those of all processes in the first `every` steps and then in one of as many.

    accumulation: how many parts each process cuts its part of the batch into.
    """

    def __init__(self, distiller: Distiller, processes: Processes, accumulation: int, every: int) -> None:
        self.distiller, self.processes = distiller, processes
        self.accumulation, self.every = accumulation, every
        self.labels: list[Tensor] = []
        self.classes: tuple[int, ...] | None = None
        self.disagreed = torch.zeros((), dtype=torch.bool, device=processes.device)
        self.steps = 0

    def _looks(self) -> bool:
        """Whether nothing is known of the loss, and a batch is cut."""
        return self.distiller.task_count is None and (self.accumulation > 1 or self.processes.count > 1)

    def shares(self, labels: Sequence[Tensor]) -> list[Tensor | None]:
        """What multiplies the labels' term of each of this process's parts; None for its share of the images.

        The shares of all processes add up to their number, since their gradients are averaged.
        """
        count = self.distiller.task_count
        if count is None or (len(labels) == 1 and self.processes.count == 1):
            return [None] * len(labels)
        device = self.processes.device
        counts = torch.stack(
            [torch.as_tensor(count(part), dtype=torch.float32, device=device) for part in labels]
        )
        total = self.processes.sum(counts.sum())
        return list(torch.where(total > 0, counts * self.processes.count / total, torch.zeros_like(counts)))

    def see(self, logits: Tensor, labels: Tensor) -> None:
        """Keep what a part was until the end of the step, if it must be looked at."""
        self.classes = tuple(logits.shape[1:])
        if self._looks():
            self.labels.append(labels)

    def end_step(self) -> None:
        """Look at the parts of a step. Raises ValueError in the first one, before the optimizer's step."""
        labels, self.labels = self.labels, []
        self.steps += 1
        if not self._looks():
            return
        if self.processes.count > 1 and (self.steps <= self.every or self.steps % self.every == 0):
            found: list[list[Tensor]] = [[] for _ in range(self.processes.count)]
            distributed.all_gather_object(found, [part.cpu() for part in labels])
            labels = [part.to(self.processes.device) for of_process in found for part in of_process]
        if len(labels) > 1:
            assert self.classes is not None
            self.disagreed |= ~parts_agree(self.distiller.task_loss, self.classes, labels)
        if self.steps == 1:
            self.check()

    def check(self) -> None:
        """Raises ValueError, in every process, if the parts did not make the loss of the whole. A synchronisation."""
        if self._looks() and bool(self.processes.sum(self.disagreed.long())):
            raise ValueError(
                "wanted a task_loss that is a mean over images where a batch is cut (accumulation, or several "
                "processes), got one whose value for a batch is not the mean of its parts' values, as where labels are "
                "ignored, classes weighted or images compared; give Distiller(..., task_count=) a function of the "
                "labels that gives what the loss divides by, such as the number of labels that count (task_count=len "
                "counts images, and does not look), or do not cut the batch"
            )

    def cause(self, terms: Sequence[str], inputs: Tensor, labels: Tensor) -> str | None:
        """What in a batch, of all processes, made these terms not finite; None where it is nothing in the batch."""
        if not inputs.isfinite().all():
            return "the inputs of that step's batch are not finite: mend the data, or their augmentation"
        if "task" in terms and not self._is_finite(labels):
            return (
                "the labels of that step's batch alone make the task_loss not finite, whatever the logits are, as "
                "where it ignores all of them: leave such items out, or give Distiller(..., task_count=) the number "
                "of labels that count, so that a batch without any counts nothing"
            )
        if self.distiller.teacher is not None and set(terms) - {"task"}:
            teacher = self.distiller.teacher_activations(inputs)
            for what, found in (*teacher.taps.items(), ("logits", teacher.logits)):
                if not found.isfinite().all():
                    return f"what the teacher gives for that step's batch is not finite ({what!r}): see to its weights"
        return None

    def _is_finite(self, labels: Tensor) -> bool:
        """Whether the loss of every part of a batch, of which these are all the labels, is finite for logits of 0."""
        assert self.classes is not None
        count = self.processes.count
        with torch.no_grad():
            for of_process in (labels[index::count] for index in range(count)):
                for part in of_process.tensor_split(min(self.accumulation, len(of_process))):
                    logits = torch.zeros((len(part), *self.classes), device=labels.device)
                    if not self.distiller.task_loss(logits, part).isfinite().all():
                        return False
        return True


def refuse_sums(distiller: Distiller, accumulation: int, processes: int) -> None:
    """A sum over the batch is not the mean of its parts' sums: it would depend on how the batch is cut.

    Raises ValueError where a batch is cut, and a term or the labels' loss has reduction="sum".
    """
    ways = (("accumulation", accumulation), ("a number of processes", processes))
    cut = [f"{what} of {count}" for what, count in ways if count > 1]
    parts: dict[str, Any] = {**distiller.terms, "task": distiller.task_loss}
    for name, part in parts.items():
        modules = part.modules() if isinstance(part, nn.Module) else ()
        given = part.keywords.get("reduction") if isinstance(part, partial) else None
        found = {given, *(getattr(module, "reduction", None) for module in modules)}
        if cut and "sum" in found:
            raise ValueError(
                f"the term {name!r} has reduction='sum', which does not go with {' or '.join(cut)}: sums "
                "of parts are not averaged; take 'mean' or 'batchmean'"
            )


def parts_agree(task_loss: TaskLoss, classes: Sequence[int], labels: Sequence[Tensor]) -> Tensor:
    """Whether a batch's loss is the mean of its parts' losses, each counted by its images: a bool on the device.

    For random logits (B, *classes), without touching the random state. labels: of each part.
    """
    device = labels[0].device
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        logits = [torch.randn((len(y), *classes), generator=generator, device=device) for y in labels]
        whole = task_loss(torch.cat(logits), torch.cat(list(labels)))
        total = sum(len(part) for part in labels)
        shares = [task_loss(z, y) * (len(y) / total) for z, y in zip(logits, labels, strict=True)]
        difference = (torch.stack(shares).sum() - whole).abs()
        # What is not finite is named by another check.
        return (difference <= 1e-3 * whole.abs() + 1e-5) | ~difference.isfinite()
