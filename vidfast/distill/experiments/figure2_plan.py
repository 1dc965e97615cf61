"""What figure 2 is made of."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..trainer import TrainOptions
from .runs import DataSpec, Term

# Where the heat maps of (b, c, d) are taken, as parts of the steps.
STAGES = (0.0, 0.2, 1.0)


@dataclass(frozen=True)
class Plan:
    """What the figure is made of.

    samples: M, the labelled images a class. layer: the teacher's layer of the heat maps; every pair is trained and
    measured. shown: how many test images are drawn. vid: of VID training, and of q on the student without transfer.
    alone: of that student.
    """

    data: DataSpec
    teacher: str
    student: str
    samples: int
    seeds: tuple[int, ...]
    term: Term
    teacher_training: TrainOptions
    alone: TrainOptions
    vid: TrainOptions
    layer: str = "group2"
    shown: int = 4
    budget: str = "quick"

    @property
    def stages(self) -> tuple[int, ...]:
        """The steps of the heat maps."""
        return self.at(STAGES)

    def at(self, parts: Collection[float]) -> tuple[int, ...]:
        """Parts of the training as steps."""
        return tuple(sorted({round(part * self.vid.steps) for part in parts}))
