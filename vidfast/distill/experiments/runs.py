"""One training as plain data: what it is, where its result is kept, and doing it.

A `Job` says everything that its result follows from, so a result is kept under a digest of the job and is not
computed twice, and a job can be done in any process.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..data import ImageData, load
from ..data.sampling import samples_per_class
from ..distiller import Distiller
from ..errors import UserError
from ..files import CheckpointError, load_checkpoint, write_text
from ..fingerprint import add_weights
from ..methods.base import METHODS, Method
from ..models.base import TappedNetwork, build
from ..trainer import CHECKPOINT, NonFiniteLossError, Progress, Trainer, TrainOptions
from .compare import save_network

# Raise it when a change makes the same job give another result.
FORMAT = 1


@dataclass(frozen=True)
class DataSpec:
    """A data set by name.

    classes: those that are kept, renumbered; None keeps all. with_validation: whether the validation images are
    training images too, for the reported runs once everything is chosen.
    """

    name: str
    root: str | None = None
    classes: tuple[int, ...] | None = None
    with_validation: bool = False

    def load(self) -> ImageData:
        return _loaded(self)


@lru_cache(maxsize=4)
def _loaded(spec: DataSpec) -> ImageData:
    data = load(spec.name, root=None if spec.root is None else Path(spec.root))
    data = data if spec.classes is None else data.classes(spec.classes)
    return data.with_validation_in_train() if spec.with_validation else data


@dataclass(frozen=True)
class Term:
    """A method by its registered name, its weight and its further options.

    Layers are the networks' own taps; taps: which of them by number, None for all.
    """

    method: str
    weight: float
    options: Mapping[str, Any] = field(default_factory=dict)
    taps: tuple[int, ...] | None = None

    def build(self, student: TappedNetwork, teacher: TappedNetwork) -> Method:
        """The method over the two networks' tapped layers, paired in order, or on the penultimate layer."""
        kind = METHODS[self.method]
        wanted = inspect.signature(kind).parameters
        layers: dict[str, Any] = {}
        if "pairs" in wanted:
            if len(student.taps) != len(teacher.taps):
                raise UserError(f"wanted networks with as many taps, got {student.taps} and {teacher.taps}")
            pairs = list(zip(student.taps, teacher.taps, strict=True))
            layers["pairs"] = pairs if self.taps is None else [pairs[i] for i in self.taps]
        if "layer" in wanted:
            layers["layer"] = student.penultimate
        return kind(**layers, **self.options, weight=self.weight)

    def __str__(self) -> str:
        options = "".join(f", {name} {value}" for name, value in self.options.items())
        taps = "" if self.taps is None else f", tap {' and '.join(str(i + 1) for i in self.taps)} alone"
        return f"{self.method} weight {self.weight:g}{options}{taps}"


@dataclass(frozen=True)
class Job:
    """One training of a student.

    network: its name. samples: labelled images a class, None for all. seed: of which images those are, the initial
    weights and the order. evaluate: "validation" or "test". teacher, start: files in the experiment's networks
    folder; start holds the weights that the student begins with, its classifier apart.
    """

    network: str
    data: DataSpec
    samples: int | None
    seed: int
    options: TrainOptions
    evaluate: str
    terms: tuple[Term, ...] = ()
    task_weight: float = 1.0
    teacher: str | None = None
    start: str | None = None

    @property
    def digest(self) -> str:
        """A name that follows from all that the result follows from: where and how it is run does not count.

        The data enter by their name, which follows from what the images are and not from where they lie.
        """
        made_by = {
            "format": FORMAT,
            **asdict(self),
            "data": self.data.load().name,
            "options": self.options.what_counts(),
        }
        return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """A training's outcome: top-1 accuracy in percent after the last step, or None and why it failed."""

    accuracy: float | None
    failure: str = ""


def stored(job: Job, folder: Path) -> Result | None:
    """The result that an earlier run left in the experiment's folder, if there is one."""
    try:
        found = json.loads((folder / "runs" / job.digest / "result.json").read_text())
        accuracy, failure = found["accuracy"], str(found["failure"])
        return Result(None if accuracy is None else _percent(accuracy), failure)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _percent(value: object) -> float:
    """Raises ValueError for what is no accuracy."""
    if not isinstance(value, (int, float)) or not 0 <= value <= 100:
        raise ValueError(f"wanted an accuracy in percent, got {value!r}")
    return float(value)


def execute(job: Job, folder: Path, progress: bool | Progress = False) -> Result:
    """Do the training, from its last checkpoint if it was stopped, and store the result.

    A damaged checkpoint is removed, and the training begins anew.
    """
    here = folder / "runs" / job.digest
    here.mkdir(parents=True, exist_ok=True)
    if not sound(here / CHECKPOINT):
        (here / CHECKPOINT).unlink(missing_ok=True)
    data = job.data.load()
    labelled = data.train if job.samples is None else samples_per_class(data.train, job.samples, job.seed)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(job.seed)
        student = fresh(job.network, data)
        if job.start is not None:
            begin_with(student, folder / "networks" / job.start)
        teacher = (
            None if job.teacher is None or not job.terms else restored(folder / "networks" / job.teacher)
        )
        terms = [] if teacher is None else [term.build(student, teacher) for term in job.terms]
        example = labelled.example(2) if terms else None
        distiller = Distiller(student, teacher, terms, example=example, task_weight=job.task_weight)
    trainer = Trainer(
        distiller,
        labelled,
        job.options,
        evaluate={job.evaluate: getattr(data, job.evaluate)},
        augment=data.augment,
        folder=here,
        progress=progress,
    )
    try:
        history = trainer.fit(resume=True)
        result = Result(history[-1][f"{job.evaluate}_accuracy"])
        save_network(here / "student.safetensors", student.cpu(), job.network, data)
    except NonFiniteLossError as error:
        result = Result(None, str(error))
    finally:
        distiller.remove_taps()
    write_text(here / "job.json", json.dumps(asdict(job), indent=2, default=str) + "\n")
    write_text(here / "result.json", json.dumps(asdict(result), indent=2) + "\n")
    (here / CHECKPOINT).unlink(missing_ok=True)
    return result


def sound(path: Path) -> bool:
    """Whether there is such a checkpoint, and it can be read."""
    try:
        load_checkpoint(path)
    except CheckpointError:
        return False
    return True


def fresh(network: str, data: ImageData) -> TappedNetwork:
    """A network for the data, with weights from torch's random state."""
    return build(
        network, in_channels=data.in_channels, num_classes=data.num_classes, image_size=data.image_size
    )


def keep_network(folder: Path, role: str, network: TappedNetwork, name: str, data: ImageData) -> str:
    """Write a network to the experiment's networks folder; the file's name says what it holds."""
    digest = hashlib.sha256()
    add_weights(digest, network.state_dict())
    file = f"{role}-{name}-{digest.hexdigest()[:12]}.safetensors"
    (folder / "networks").mkdir(parents=True, exist_ok=True)
    save_network(folder / "networks" / file, network, name, data)
    return file


def restored(path: Path) -> TappedNetwork:
    """The network that `keep_network` wrote, in eval mode. Raises CheckpointError for a damaged file."""
    weights, made_by = _weights(path)
    with torch.random.fork_rng(devices=[]):
        network = build(
            made_by["network"],
            in_channels=made_by["in_channels"],
            num_classes=made_by["num_classes"],
            image_size=tuple(made_by["image_size"]),
        )
    network.load_state_dict(weights)
    return network.eval()


def _weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights that `save_network` wrote, and what made their network."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            made_by = json.loads(file.metadata()["vidfast"])
        return safetensors.torch.load_file(path), made_by
    except (safetensors.SafetensorError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged, or not a network that was kept here ({error})") from error


def begin_with(student: TappedNetwork, path: Path) -> None:
    """Load a pretrained student's weights, but not its classifier: the classes are others."""
    classifier = [name for name, module in student.named_modules() if isinstance(module, nn.Linear)][-1]
    weights, _ = _weights(path)
    own = {k: v for k, v in student.state_dict().items() if k.startswith(f"{classifier}.")}
    student.load_state_dict(weights | own)
