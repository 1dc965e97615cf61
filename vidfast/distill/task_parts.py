"""The labels' term where a batch is cut into parts: by what a part counts, and whether the loss can be cut at all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .distiller import Distiller
from .processes import Processes
from .task import TaskLoss, on_device


class TaskParts:
    """The shares of the parts of a batch in its loss on the labels, over all processes.

    A loss whose divisor is known (`Distiller.task_count`) counts by it. Any other loss counts by images, and then the
    loss of a batch must be the mean of its parts' losses. That is looked at in every step for the parts of one process,
    and in the first `every` steps for those of all processes.

    accumulation: how many parts each process cuts its part of the batch into.
    """

    def __init__(self, distiller: Distiller, processes: Processes, accumulation: int, every: int) -> None:
        self.task_loss, self.count = distiller.task_loss, distiller.task_count
        self.processes, self.every = processes, every
        # Nothing is known of the loss, and a batch is cut.
        self.looks = self.count is None and (accumulation > 1 or processes.count > 1)
        self.parts: list[tuple[Tensor, Tensor]] = []
        self.disagreed = torch.zeros((), dtype=torch.bool, device=processes.device)
        self.steps = 0

    def shares(self, labels: Sequence[Tensor]) -> list[Tensor | None]:
        """What multiplies the labels' term of each of this process's parts; None for its share of the images.

        The shares of all processes add up to their number, since their gradients are averaged.
        """
        count = self.count
        if count is None or (len(labels) == 1 and self.processes.count == 1):
            return [None] * len(labels)
        device = self.processes.device
        counts = torch.stack([on_device(count(part), device).float() for part in labels])
        total = self.processes.sum(counts.sum())
        return list(torch.where(total > 0, counts * self.processes.count / total, torch.zeros_like(counts)))

    def see(self, logits: Tensor, labels: Tensor) -> None:
        """Keep what a part was until the end of the step, if it must be looked at."""
        if self.looks:
            self.parts.append((logits.detach(), labels))

    def end_step(self) -> None:
        """Look at the parts of a step. Raises ValueError in the first one, before the optimizer's step."""
        parts, self.parts = self.parts, []
        self.steps += 1
        if not self.looks:
            return
        if self.processes.count > 1 and self.steps <= self.every:
            found = self.processes.gather_objects([(z.cpu(), y.cpu()) for z, y in parts])
            device = self.processes.device
            parts = [(z.to(device), y.to(device)) for of_process in found for z, y in of_process]
        if len(parts) > 1:
            self.disagreed |= ~parts_agree(self.task_loss, parts).to(self.disagreed.device)
        if self.steps == 1:
            self.check()

    def check(self) -> None:
        """Raises ValueError, in every process, if the parts did not make the loss of the whole. A synchronisation."""
        if self.looks and bool(self.processes.sum(self.disagreed.long())):
            raise ValueError(
                "wanted a task_loss that is a mean over images where a batch is cut (accumulation, or several "
                "processes), got one whose value for a batch is not the mean of its parts' values, as where labels are "
                "ignored, classes weighted or images compared; give Distiller(..., task_count=) a function of the "
                "labels that gives what the loss divides by, such as the number of labels that count (task_count=len "
                "counts images, and does not look), or do not cut the batch"
            )


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


def parts_agree(task_loss: TaskLoss, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Whether a batch's loss is the mean of its parts' losses, each counted by its images: a bool on the device.

    parts: logits, detached, and labels. A module is copied for it, so that what it keeps of its calls stays as it is.
    """
    if isinstance(task_loss, nn.Module) and next(task_loss.buffers(), None) is not None:
        task_loss = copy.deepcopy(task_loss)
    with torch.no_grad():
        total = sum(len(labels) for _, labels in parts)
        whole = task_loss(torch.cat([z.float() for z, _ in parts]), torch.cat([y for _, y in parts]))
        shares = [task_loss(z.float(), y) * (len(y) / total) for z, y in parts]
        difference = (torch.stack(shares).sum() - whole).abs()
        # What is not finite is named by another check.
        return (difference <= 1e-3 * whole.abs() + 1e-5) | ~difference.isfinite()
