"""What every experiment is given: where its data are, how much to spend, and the folder it writes."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from ..choices import Device


@dataclass(frozen=True)
class Options:
    """How to run an experiment. None leaves a value to the experiment and its budget.

    data, root: the data set's name and, for one on disk, its folder. source_data, source_root: the teacher's data in
    table 3, where it is another data set than the student's. budget: "quick" (minutes on two cores) or
    "full" (the paper's sizes). seeds: how many, 0, 1, ... samples: the numbers M of labelled images a class.
    steps, teacher_steps: of every student's training, and the teacher's. arms: labels of the table's rows to
    run. folder: where everything goes; what it holds already is not done again. jobs: trainings at once, each
    in a process of its own. cache: where trained teachers are kept; None: in the folder. device: "auto", "cpu" or
    "cuda".
    """

    folder: Path
    data: str = "digits"
    root: Path | None = None
    source_data: str | None = None
    source_root: Path | None = None
    budget: str = "quick"
    seeds: int | None = None
    samples: tuple[int, ...] | None = None
    steps: int | None = None
    teacher_steps: int | None = None
    arms: tuple[str, ...] | None = None
    jobs: int | None = None
    cache: Path | None = None
    device: Device = "auto"
    quiet: bool = False

    @property
    def quick(self) -> bool:
        return self.budget == "quick"

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu" and torch.cuda.is_available()

    @property
    def workers(self) -> int:
        """Trainings at once: one for each core, since small networks do not fill two; one on a GPU."""
        if self.jobs is not None:
            return self.jobs
        return 1 if self.on_gpu else min(cores(), 8)

    @property
    def teachers(self) -> Path:
        """Where trained teachers are kept, so that a call that was stopped goes on with the same one."""
        return self.cache or self.folder / "teachers"

    def command(self, name: str) -> str:
        """The command of experiment `name` with these options, without what is this machine's own."""
        parts = ["vidfast", "experiment", name, "--data", self.data]
        parts += ["--root", "DIR"] if self.root is not None else []
        parts += ["--source-data", self.source_data] if self.source_data is not None else []
        parts += ["--source-root", "DIR"] if self.source_root is not None else []
        parts += ["--budget", self.budget]
        for option, value in (
            ("--seeds", self.seeds),
            ("--steps", self.steps),
            ("--teacher-steps", self.teacher_steps),
        ):
            parts += [option, str(value)] if value is not None else []
        parts += ["--samples", *map(str, self.samples)] if self.samples else []
        parts += ["--rows", *self.arms] if self.arms else []
        return shlex.join(parts)


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
