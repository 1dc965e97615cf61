"""A student alone and the same student with a method, on M labelled images a class, for several seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import safetensors.torch
import torch
from torch import nn
from tqdm.auto import tqdm

from vidfast.arguments import BackendName, ScalarReduction

from ..choices import Optimizer
from ..data.base import ImageData, LabelledImages
from ..data.sampling import samples_per_class
from ..distiller import Distiller
from ..files import replacing, write_csv
from ..methods.base import Method
from ..methods.vid import VID
from ..models.base import TappedNetwork, build
from ..processes import is_main
from ..trainer import Progress, Row, Trainer, TrainOptions

Terms = Callable[[TappedNetwork, TappedNetwork], list[Method]]

# What was found best on the digits' validation images (docs/vid-search.csv) for each arm: its optimizer, and
# with either optimizer its learning rate; VID's for sgd was found at weight 10.
TUNED_OPTIMIZER: dict[str, Optimizer] = {"alone": "sgd", "vid": "adamw"}
TUNED_LR: dict[str, dict[Optimizer, float]] = {
    "alone": {"sgd": 0.1, "adamw": 0.003},
    "vid": {"sgd": 0.01, "adamw": 0.02},
}


@dataclass(frozen=True)
class VIDOptions:
    """VID-I's hyperparameters, as in `VID`. The defaults were chosen on the digits' validation images."""

    weight: float = 30.0
    regressor: str = "linear"
    init_var: float = 1.0
    alpha_lr: float = 1.0
    reduction: ScalarReduction = "mean"
    backend: BackendName = "auto"

    def terms(self, student: TappedNetwork, teacher: TappedNetwork) -> list[Method]:
        """One VID term over the two networks' layers of interest, paired in order."""
        if len(student.taps) != len(teacher.taps):
            raise ValueError(
                f"wanted networks with as many tapped layers, got {student.taps} and {teacher.taps}"
            )
        return [
            VID(
                list(zip(student.taps, teacher.taps, strict=True)),
                weight=self.weight,
                regressor=self.regressor,
                init_var=self.init_var,
                alpha_lr=self.alpha_lr,
                reduction=self.reduction,
                backend=self.backend,
            )
        ]


@dataclass(frozen=True)
class Config:
    """Everything that a comparison's numbers follow from. training: of the students, by arm."""

    data: str = "digits"
    teacher: str = "wrn-16-2"
    student: str = "wrn-10-1"
    samples_per_class: tuple[int, ...] = (5, 10)
    seeds: tuple[int, ...] = (0, 1, 2)
    vid: VIDOptions = field(default_factory=VIDOptions)
    training: Mapping[str, TrainOptions] = field(default_factory=lambda: tuned(TrainOptions()))
    teacher_training: TrainOptions = field(default_factory=TrainOptions)

    def as_json(self) -> dict[str, Any]:
        """The config as JSON has it: lists for tuples."""
        config = asdict(self)
        return config | {name: list(config[name]) for name in ("samples_per_class", "seeds")}


def tuned(
    options: TrainOptions, optimizer: Optimizer | None = None, lr: float | None = None
) -> dict[str, TrainOptions]:
    """The options with each arm's best optimizer and learning rate, so far as they are not given."""
    arms = {}
    for arm, best in TUNED_OPTIMIZER.items():
        chosen = optimizer or best
        arms[arm] = replace(options, optimizer=chosen, lr=TUNED_LR[arm][chosen] if lr is None else lr)
    return arms


@dataclass(frozen=True)
class Arm:
    """One side of a comparison. terms: makes the methods; None for the student alone."""

    name: str
    label: str
    terms: Terms | None = None


@dataclass(frozen=True)
class Run:
    """One training of one arm, and its rows of metrics."""

    arm: str
    samples_per_class: int
    seed: int
    history: list[Row] = field(compare=False)

    def rows(self) -> Iterator[Row]:
        for row in self.history:
            yield {"arm": self.arm, "samples_per_class": self.samples_per_class, "seed": self.seed, **row}


def train_student(
    arm: Arm,
    network: str,
    teacher: TappedNetwork,
    data: ImageData,
    samples: int,
    seed: int,
    options: TrainOptions,
    evaluate: Mapping[str, LabelledImages],
    *,
    folder: Path | None = None,
    resume: bool = False,
    progress: bool | Progress = False,
) -> tuple[nn.Module, Run]:
    """Train one student. The seed sets the labelled images, the initial weights and the order.

    Arms with the same seed get the same images and the same initial student.
    """
    labelled = samples_per_class(data.train, samples, seed)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        student = build(
            network,
            in_channels=data.in_channels,
            num_classes=data.num_classes,
            image_size=data.image_size,
        )
        terms = [] if arm.terms is None else arm.terms(student, teacher)
        # On the CPU, where the student is: a teacher used by the arm before stands where that was trained.
        distiller = Distiller(
            student, teacher.cpu() if terms else None, terms, example=labelled.example() if terms else None
        )
    trainer = Trainer(
        distiller,
        labelled,
        options,
        evaluate=evaluate,
        augment=data.augment,
        folder=folder,
        progress=progress,
    )
    history = trainer.fit(resume=resume)
    distiller.remove_taps()
    return student.cpu(), Run(arm.name, samples, seed, history)


@dataclass(frozen=True)
class Summary:
    """The last step's test accuracy, in percent, by seed."""

    arm: str
    samples_per_class: int
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.accuracies)


def summaries(runs: list[Run], column: str = "test_accuracy") -> list[Summary]:
    """One summary for each arm and M, in order of appearance."""
    cells: dict[tuple[str, int], list[float]] = {}
    for run in runs:
        cells.setdefault((run.arm, run.samples_per_class), []).append(run.history[-1][column])
    return [Summary(arm, samples, tuple(values)) for (arm, samples), values in cells.items()]


def compare(
    config: Config,
    data: ImageData,
    teacher: TappedNetwork,
    folder: Path,
    *,
    resume: bool = False,
    progress: bool | Progress = False,
    each: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Train every arm, M and seed; write metrics.csv and checkpoints/ in the folder.

    each: called with every run that is done. With resume, what the folder's checkpoints hold is not done
    again.
    """
    runs: list[Run] = []
    for samples in config.samples_per_class:
        for seed in config.seeds:
            for arm in arms(config):
                if isinstance(progress, tqdm):
                    progress.set_description(f"M={samples} seed {seed} {arm.label}")
                of_run = folder / "checkpoints" / f"{arm.name}-m{samples}-seed{seed}"
                student, run = train_student(
                    arm,
                    config.student,
                    teacher,
                    data,
                    samples,
                    seed,
                    replace(config.training[arm.name], seed=seed),
                    {"test": data.test},
                    folder=of_run,
                    resume=resume,
                    progress=progress,
                )
                runs.append(run)
                if is_main():
                    save_network(of_run / "student.safetensors", student, config.student, data)
                    write_csv(folder / "metrics.csv", [row for run in runs for row in run.rows()])
                each(run)
    return runs


def arms(config: Config) -> list[Arm]:
    """The student alone, and with VID-I."""
    return [Arm("alone", "student alone"), Arm("vid", "student + VID-I", config.vid.terms)]


def save_network(path: Path, network: nn.Module, name: str, data: ImageData) -> None:
    """A network's weights as safetensors; the metadata's "vidfast" is JSON with what `models.build` needs."""
    made_by = {
        "network": name,
        "in_channels": data.in_channels,
        "num_classes": data.num_classes,
        "image_size": data.image_size,
        "data": data.name,
    }
    # One entry, because safetensors writes several in random order, and equal runs should give equal files.
    metadata = {"vidfast": json.dumps(made_by)}
    weights = {key: value.contiguous() for key, value in network.state_dict().items()}
    with replacing(path) as file:
        file.write(safetensors.torch.save(weights, metadata=metadata))
