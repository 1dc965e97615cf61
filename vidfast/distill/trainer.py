"""The training loop, on Hugging Face Accelerate.

Everything random in step i follows from (seed, i), so a run continued from a checkpoint is the run that was
not interrupted: the order of the images, their augmentation and dropout need no state to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sized
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .data.base import Augmentation
from .distiller import Distiller
from .files import CheckpointError, load_checkpoint, save_checkpoint, write_csv
from .stream import StreamBatches, generator_for, seed_for

Row = dict[str, Any]

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.csv"


class NonFiniteLossError(FloatingPointError):
    """The loss became inf or nan; the text names the terms and the step."""


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    steps: optimizer steps. batch_size: images a step, over all processes (all images, if there are fewer).
    optimizer: "sgd" (Nesterov momentum) or "adamw"; lr, momentum (of sgd alone), weight_decay. schedule:
    "cosine" (to 0), "steps" (times 0.1 at 60, 80 and 90 % of the steps) or "constant"; warmup: steps of
    linear increase before it. seed: of the order of the images, augmentation and dropout (not of the
    weights). eval_every: steps between rows of the metrics, 0 for the last step alone. checkpoint_every:
    steps between checkpoints, 0 for the last step alone. check_every: steps between looks at whether the loss
    is finite. accumulation: parts that a batch is processed in. mixed_precision: "no", "bf16" or "fp16".
    clip: the largest norm of the gradient, or None. channels_last: the layout of images and networks in
    memory. device: "auto", "cpu" or "cuda". workers: of the loader.
    """

    steps: int = 300
    batch_size: int = 64
    optimizer: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup: int = 0
    seed: int = 0
    eval_every: int = 0
    checkpoint_every: int = 0
    check_every: int = 10
    accumulation: int = 1
    mixed_precision: str = "no"
    clip: float | None = None
    channels_last: bool = False
    device: str = "auto"
    workers: int = 0

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "batch_size": 1, "accumulation": 1, "check_every": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"wanted {name} of {least} or more, got {getattr(self, name)}")
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
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"wanted {name} of 0 or more, got {getattr(self, name)}")
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


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "steps": lambda done: 0.1 ** sum(done >= at for at in (0.6, 0.8, 0.9)),
    "constant": lambda done: 1.0,
}


def _optimizer(groups: list[dict[str, Any]], options: TrainOptions) -> torch.optim.Optimizer:
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr)
    return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0)


class _Meter:
    """The mean of every term since the last row, and the first step at which one was not finite.

    Kept on the device: looking at a number on the host is a synchronisation, so it is done now and then.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums = self.first_bad = torch.zeros(0)
        self.count = 0

    def add(self, terms: Mapping[str, Tensor], step: int, fresh: bool) -> None:
        values = torch.stack([value.float() for value in terms.values()])
        if not self.names:
            self.names = list(terms)
            self.sums = torch.zeros_like(values)
            self.first_bad = torch.full_like(values, -1, dtype=torch.int64)
        self.sums += values
        self.first_bad.masked_fill_((self.first_bad < 0) & ~values.isfinite(), step)
        self.count += fresh

    def check(self) -> None:
        bad = {name: at for name, at in zip(self.names, self.first_bad.tolist(), strict=True) if at >= 0}
        if bad:
            step = min(bad.values())
            terms = ", ".join(repr(name) for name, at in bad.items() if at == step)
            raise NonFiniteLossError(
                f"the loss is not finite: the term {terms} became inf or nan in step {step}; lower the "
                "learning rate or that term's weight"
            )

    def means(self) -> Row:
        means = dict(zip(self.names, (self.sums / max(self.count, 1)).tolist(), strict=True))
        self.sums.zero_()
        self.count = 0
        return {"loss": sum(means.values()), **{f"loss_{name}": value for name, value in means.items()}}


class Trainer:
    """Trains a Distiller on a data set of (inputs, labels).

    evaluate: data sets by name, whose top-1 accuracy in percent becomes the column "<name>_accuracy".
    augment: applied to every training batch, with a generator that follows from the seed and the step.
    folder: where metrics.csv and checkpoint.pt go; None writes nothing.
    progress: True for a bar of its own, a tqdm to advance that, False for none.

    After `fit` the Distiller stands on the device that was trained on.
    """

    def __init__(
        self,
        distiller: Distiller,
        train: Dataset[tuple[Tensor, Tensor]],
        options: TrainOptions,
        *,
        evaluate: Mapping[str, Dataset[tuple[Tensor, Tensor]]] | None = None,
        augment: Augmentation | None = None,
        folder: Path | str | None = None,
        progress: bool | tqdm[Any] = True,
    ) -> None:
        if not isinstance(train, Sized):
            raise TypeError(f"wanted a map-style data set with a length, got {type(train).__name__}")
        self.distiller, self.train, self.options = distiller, train, options
        self.evaluate, self.augment = dict(evaluate or {}), augment
        self.folder = None if folder is None else Path(folder)
        self.progress = progress
        _forget_precision(options.mixed_precision)
        self.accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision=options.mixed_precision)
        self.history: list[Row] = []

    def fit(self, *, resume: bool = False) -> list[Row]:
        """Train to the last step and return the rows of the metrics, one every `eval_every` steps.

        resume: continue from the folder's checkpoint if there is one, exactly.

        Raises NonFiniteLossError, CheckpointError for a damaged checkpoint or one of other options, OSError
        where the folder cannot be written.
        """
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            return self._fit(resume)

    def _fit(self, resume: bool) -> list[Row]:
        options, accelerator = self.options, self.accelerator
        self.distiller.to(accelerator.device)
        if options.channels_last:
            self.distiller.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        groups = self.distiller.parameter_groups(options.lr, options.weight_decay)
        optimizer = _optimizer(groups, options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        model, prepared = accelerator.prepare(self.distiller, optimizer)

        start = self._resume(optimizer, scheduler) if resume else 0
        meter = _Meter()
        bar, owned = self._bar(start)
        try:
            model.train()
            for step, (inputs, labels) in enumerate(self._loader(start), start=start + 1):
                torch.manual_seed(seed_for(options.seed, "step", step, accelerator.process_index))
                self._step(model, prepared, inputs, labels, meter, step)
                scheduler.step()
                if bar is not None:
                    bar.update()
                last = step == options.steps
                row = last or (options.eval_every and step % options.eval_every == 0)
                save = last or (options.checkpoint_every and step % options.checkpoint_every == 0)
                if row or save or step % options.check_every == 0:
                    meter.check()
                if row:
                    self._row(step, optimizer.param_groups[0]["lr"], meter, bar)
                    model.train()
                if save:
                    self._save(step, optimizer, scheduler)
        finally:
            if owned and bar is not None:
                bar.close()
            # Mixed precision wraps the module's forward for the training only.
            accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            self.distiller.eval()
        return self.history

    def _step(
        self, model: torch.nn.Module, optimizer: Any, inputs: Tensor, labels: Tensor, meter: _Meter, step: int
    ) -> None:
        accelerator, options = self.accelerator, self.options
        if self.augment is not None:
            generator = generator_for(options.seed, "augment", step, accelerator.process_index)
            inputs = self.augment(inputs, generator)
        inputs = self._placed(inputs)
        labels = labels.to(accelerator.device, non_blocking=True)
        parts = list(zip(inputs.chunk(options.accumulation), labels.chunk(options.accumulation), strict=True))
        for i, (part, part_labels) in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last else accelerator.no_sync(model):
                losses = model(part, part_labels, scale=len(part) / len(inputs))
                accelerator.backward(losses.loss)
            meter.add(losses.terms, step, fresh=last)
        if options.clip is not None:
            accelerator.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad()

    def accuracy(self, data: Dataset[tuple[Tensor, Tensor]], batch_size: int = 512) -> float:
        """The student's top-1 accuracy on a data set, in percent, in eval mode."""
        accelerator, student = self.accelerator, self.distiller.student
        student.eval()
        correct = total = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        indices = range(accelerator.process_index, len(data), accelerator.num_processes)  # type: ignore[arg-type]
        part = torch.utils.data.Subset(data, list(indices))
        with torch.no_grad():
            for inputs, labels in DataLoader(part, batch_size, num_workers=self.options.workers):
                with accelerator.autocast():
                    logits = self.distiller.pick_logits(student(self._placed(inputs)))
                correct = correct + (logits.argmax(1) == labels.to(accelerator.device)).sum()
                total = total + len(labels)
        counts = accelerator.reduce(torch.stack([correct, total]), "sum")
        right, out_of = (int(count) for count in counts)
        return 100.0 * right / out_of

    def _placed(self, inputs: Tensor) -> Tensor:
        """A batch on the device, in the layout asked for."""
        layout = (
            torch.channels_last if self.options.channels_last and inputs.ndim == 4 else torch.preserve_format
        )
        return inputs.to(self.accelerator.device, non_blocking=True, memory_format=layout)

    def _loader(self, start: int) -> DataLoader[tuple[Tensor, Tensor]]:
        options, accelerator = self.options, self.accelerator
        batches = StreamBatches(
            len(self.train),
            options.batch_size,
            options.steps,
            options.seed,
            start=start,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
        pinned = accelerator.device.type == "cuda"
        return DataLoader(self.train, batch_sampler=batches, num_workers=options.workers, pin_memory=pinned)

    def _lr_factor(self, step: int) -> float:
        options = self.options
        if step < options.warmup:
            return (step + 1) / (options.warmup + 1)
        return SCHEDULES[options.schedule]((step - options.warmup) / max(1, options.steps - options.warmup))

    def _row(self, step: int, lr: float, meter: _Meter, bar: tqdm[Any] | None) -> None:
        size = len(self.train)
        row: Row = {"step": step, "epoch": step * min(self.options.batch_size, size) / size, "lr": lr}
        row |= meter.means()
        row |= {f"{name}_accuracy": self.accuracy(data) for name, data in self.evaluate.items()}
        self.history.append(row)
        if bar is not None:
            accuracies = {k: f"{v:.1f}" for k, v in row.items() if k.endswith("_accuracy")}
            bar.set_postfix({"loss": f"{row['loss']:.3f}", **accuracies})
        if self.folder is not None and self.accelerator.is_main_process:
            write_csv(self.folder / METRICS, self.history)

    def _save(
        self, step: int, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LambdaLR
    ) -> None:
        if self.folder is None or not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "options": asdict(self.options),
            "step": step,
            "distiller": self.distiller.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "history": self.history,
        }
        save_checkpoint(self.folder / CHECKPOINT, state)

    def _resume(self, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LambdaLR) -> int:
        if self.folder is None or not (self.folder / CHECKPOINT).exists():
            return 0
        path = self.folder / CHECKPOINT
        keys = ("options", "step", "distiller", "optimizer", "scheduler", "scaler", "history")
        state = load_checkpoint(path, keys)
        now = asdict(self.options)
        # Where it runs and how often it reports do not change what is learned.
        free = ("device", "workers", "eval_every", "checkpoint_every", "check_every")
        other = [k for k in now if k not in free and state["options"].get(k) != now[k]]
        if other:
            differences = ", ".join(f"{k} {state['options'].get(k)!r} and not {now[k]!r}" for k in other)
            raise CheckpointError(f"{path}: was trained with {differences}")
        try:
            self.distiller.load_state_dict(state["distiller"])
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: is of another model ({str(error).splitlines()[0]})") from error
        scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.history = list(state["history"])
        return int(state["step"])

    def _bar(self, start: int) -> tuple[tqdm[Any] | None, bool]:
        if isinstance(self.progress, bool):
            if not self.progress or not self.accelerator.is_main_process:
                return None, False
            return tqdm(total=self.options.steps, initial=start, unit="step", dynamic_ncols=True), True
        self.progress.update(start)
        return self.progress, False


def _forget_precision(wanted: str) -> None:
    """Accelerate keeps the first precision it was given for the life of a process; trainers may differ."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state()
