"""How to train: the options of a run, and what follows from them alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from .choices import Device, Optimizer, Precision, Schedule

# At most this many of the checkpoints of checkpoint_every="epoch", for data sets whose epoch is a few steps.
MOST_CHECKPOINTS = 100

SCHEDULES: dict[Schedule, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "steps": lambda done: 0.1 ** sum(done >= at for at in (0.6, 0.8, 0.9)),
    "constant": lambda done: 1.0,
}


# These do not change what is learned.
FREE = ("device", "workers", "eval_every", "checkpoint_every", "check_every")


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    steps: optimizer steps; epochs: passes through the data instead, which `steps` is then worked out from.
    batch_size: images a step, over all processes (all images, if there are fewer).
    optimizer: "sgd" (Nesterov momentum) or "adamw"; lr, momentum (of sgd alone), weight_decay. schedule:
    "cosine" (to 0), "steps" (times 0.1 at 60, 80 and 90 % of the steps) or "constant"; warmup: steps of
    linear increase before it. seed: of the order of the images, augmentation and dropout (not of the
    weights). eval_every: steps between rows of the metrics, or "epoch"; 0 for the last step alone.
    checkpoint_every: likewise between checkpoints; "epoch" makes at most 100 of them, at ends of epochs.
    check_every: steps between looks at whether the loss is finite. accumulation: parts that a batch is
    processed in. mixed_precision: "no", "bf16" or "fp16". clip: the largest norm of the gradient, or None.
    channels_last: the layout of images and networks in memory. compile: whether torch.compile runs both
    networks (the losses stay eager: there they need fewer passes over memory), or a backend of its by name.
    sync_batchnorm: BatchNorm's statistics over all processes, on GPUs. device: "auto", "cpu" or "cuda".
    workers: of the loader.
    """

    steps: int = 300
    batch_size: int = 64
    optimizer: Optimizer = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    warmup: int = 0
    seed: int = 0
    eval_every: int | Literal["epoch"] = 0
    checkpoint_every: int | Literal["epoch"] = 0
    check_every: int = 10
    accumulation: int = 1
    mixed_precision: Precision = "no"
    clip: float | None = None
    channels_last: bool = False
    device: Device = "auto"
    workers: int = 0
    epochs: int | None = None
    compile: bool | str = False
    sync_batchnorm: bool = False

    def __post_init__(self) -> None:
        for name, kind in {
            **dict.fromkeys(("steps", "batch_size", "accumulation", "check_every", "workers", "seed"), int),
            **dict.fromkeys(("warmup", "epochs", "eval_every", "checkpoint_every"), int),
            **dict.fromkeys(("lr", "momentum", "weight_decay", "clip"), float),
        }.items():
            value = getattr(self, name)
            if isinstance(value, str) and name.endswith("_every"):
                continue
            fits = isinstance(value, int) if kind is int else isinstance(value, (int, float))
            if value is not None and (isinstance(value, bool) or not fits):
                number = "a whole number" if kind is int else "a number"
                raise ValueError(f"wanted {name} as {number}, got {value!r}")
        for name in ("steps", "batch_size", "accumulation", "check_every", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"wanted {name} of 1 or more, got {value}")
        for name in ("eval_every", "checkpoint_every"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "epoch":
                raise ValueError(f"wanted {name} as a number of steps or 'epoch', got {value!r}")
        for name in (
            "lr",
            "momentum",
            "weight_decay",
            "warmup",
            "eval_every",
            "checkpoint_every",
            "workers",
            "seed",
        ):
            value = getattr(self, name)
            if not isinstance(value, str) and not 0 <= value < math.inf:
                raise ValueError(f"wanted {name} of 0 or more, got {value}")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"wanted clip above 0, or None, got {self.clip}")
        for name, choices in {
            "optimizer": ("sgd", "adamw"),
            "schedule": tuple(SCHEDULES),
            "mixed_precision": ("no", "bf16", "fp16"),
            "device": ("auto", "cpu", "cuda"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"wanted {name} as one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("wanted device 'cuda', and torch sees no CUDA device")

    def what_counts(self) -> dict[str, Any]:
        """The options by name, without those that say where it runs and how often it reports."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}

    def of_data(self, size: int) -> TrainOptions:
        """The options with `steps` worked out for a data set of this size, if `epochs` was given."""
        if self.epochs is None:
            return self
        return replace(self, steps=math.ceil(self.epochs * size / min(self.batch_size, size)))

    def lr_factor(self, step: int) -> float:
        """What the learning rate is multiplied by after `step` steps."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return SCHEDULES[self.schedule]((step - self.warmup) / max(1, self.steps - self.warmup))

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0)

    def row_due(self, step: int, size: int) -> bool:
        """Whether a row of the metrics follows this step, with `size` images to train on."""
        return step == self.steps or self._due(self.eval_every, step, size, math.inf)

    def checkpoint_due(self, step: int, size: int) -> bool:
        """Whether a checkpoint follows this step."""
        return step == self.steps or self._due(self.checkpoint_every, step, size, MOST_CHECKPOINTS)

    def _due(self, every: int | Literal["epoch"], step: int, size: int, most: float) -> bool:
        if isinstance(every, int):
            return every > 0 and step % every == 0
        batch = min(self.batch_size, size)
        # In images, so that it is the step in which an epoch ends although batches run across its end.
        interval = size * max(1, math.ceil(self.steps * batch / size / most))
        return step * batch // interval > (step - 1) * batch // interval
