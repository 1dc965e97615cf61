"""Accuracy: which labels it judges, and over which data sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from .modes import eval_mode
from .processes import Processes
from .task import TaskLoss, ignored_label, knows_its_classes

BATCH_SIZE = 512


def check(logits: Tensor, labels: Tensor, task_loss: TaskLoss) -> None:
    """Whether top-1 accuracy means something for these: class numbers, one for each sample or position.

    logits: (B, C) or (B, C, ...). labels: (B,) or (B, ...), of integers. task_loss: a loss of torch's says that
    dimension 1 of (B, C, L) holds the classes where shapes alone do not.

    Raises ValueError for anything else.
    """
    shapes = f"got labels {tuple(labels.shape)}, {labels.dtype}, for logits {tuple(logits.shape)}"
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"wanted labels as class numbers to measure the accuracy, {shapes}: what soft or multi-label targets and "
            "regressions are measured by is another number; leave evaluate= out, and measure it yourself"
        )
    if logits.dim() < 2 or logits.shape[1] < 2:
        raise ValueError(
            f"wanted logits (B, classes) of two or more classes to measure the accuracy, {shapes}: of one logit the "
            "largest is always the first; give two, or leave evaluate= out, and measure it yourself"
        )
    if labels.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"wanted labels of the logits' shape without the classes, which are dimension 1, to measure the accuracy, "
            f"{shapes}; give labels (B,) for logits (B, C), (B, H, W) for (B, C, H, W), and for classes in another "
            "dimension Distiller(..., logits=), a function that moves them there"
        )
    if logits.dim() == 3 and logits.shape[1] == logits.shape[2] and not knows_its_classes(task_loss):
        raise ValueError(
            f"wanted logits whose classes are dimension 1 to measure the accuracy, {shapes}: both dimensions have "
            f"{logits.shape[1]}, and the task_loss does not tell which are the classes; take torch's cross_entropy "
            "with logits= that gives (B, classes, positions), or leave evaluate= out"
        )


class Counts:
    """What is right among the labels that count, on the device: looking at a number on the host is a synchronisation.

    Labels that count are all but the one that the task's loss ignores.
    """

    def __init__(self, task_loss: TaskLoss, device: torch.device) -> None:
        self.task_loss, self.ignored = task_loss, ignored_label(task_loss)
        self.numbers = torch.zeros(3, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch. Raises ValueError for labels that cannot be judged."""
        check(logits, labels, self.task_loss)
        labels = labels.long()  # of bytes, -100 is 156
        counts = labels != self.ignored
        right = (logits.argmax(1) == labels) & counts
        strange = ((labels < 0) | (labels >= logits.shape[1])) & counts
        self.numbers += torch.stack([right.sum(), counts.sum(), strange.sum()])

    def accuracy(self, processes: Processes) -> float:
        """In percent, over all processes. Raises ValueError for labels that are no classes, and if none counts."""
        right, counted, strange = processes.sum(self.numbers).tolist()
        self._refuse(strange)
        if not counted:
            raise ValueError(
                "wanted at least one label that is not ignored to measure the accuracy, got none"
            )
        return 100.0 * float(right) / float(counted)

    def check(self) -> None:
        """Raises ValueError if a label of this process was no class."""
        self._refuse(int(self.numbers[2]))

    def _refuse(self, strange: int) -> None:
        if strange:
            raise ValueError(
                f"wanted labels from 0 to below the number of classes, or {self.ignored}, which is ignored, got "
                f"{strange} others; name the label that does not count in the loss, as in "
                "task_loss=functools.partial(torch.nn.functional.cross_entropy, ignore_index=255), or by an attribute "
                "ignore_index of a loss of your own"
            )


class Evaluation:
    """The accuracy of a student, in eval mode and without gradients, over the processes of a training.

    network: the student. logits: (inputs) -> logits, in the training's precision and on its device.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        logits: Callable[[Any], Tensor],
        task_loss: TaskLoss,
        processes: Processes,
        workers: int,
    ) -> None:
        self.network, self.logits, self.task_loss = network, logits, task_loss
        self.processes, self.workers = processes, workers

    def accuracy(self, data: Dataset[Any], batch_size: int = BATCH_SIZE) -> float:
        """Top-1 accuracy on a data set, in percent. Called in all processes."""
        counts = Counts(self.task_loss, self.processes.device)
        self._add(counts, data, batch_size, every=True)
        return counts.accuracy(self.processes)

    def attempt(self, name: str, data: Dataset[Any]) -> None:
        """Evaluate the first batch of a data set, to find what cannot work. Raises ValueError, naming the data set."""
        counts = Counts(self.task_loss, self.processes.device)
        try:
            self._add(counts, data, BATCH_SIZE, every=False)
            counts.check()
        except ValueError as error:
            raise ValueError(f"the evaluation set {name!r}: {error}") from error
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11 and later
                error.add_note(
                    f"in the first batch of the evaluation set {name!r}, tried before the training"
                )
            raise

    def _add(self, counts: Counts, data: Dataset[Any], batch_size: int, *, every: bool) -> None:
        indices = range(self.processes.index, len(data), self.processes.count)  # type: ignore[arg-type]
        if not every:
            indices = indices[:batch_size]
        loader = DataLoader(Subset(data, list(indices)), batch_size, num_workers=self.workers)
        with eval_mode(self.network), torch.no_grad():
            for inputs, labels in loader:
                counts.add(self.logits(inputs), labels.to(self.processes.device))
