"""The training loop, on Hugging Face Accelerate.

Everything random in step i follows from (seed, i), so a run continued from a checkpoint is the run that was
not interrupted: the order of the images, their augmentation and dropout need no state to be saved.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sized
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .data.augment import Augmentation
from .data.base import LabelledImages
from .distiller import Distiller
from .files import CheckpointError, load_checkpoint, remove_leftovers, save_checkpoint, write_csv
from .fingerprint import differences, fingerprint
from .meter import Meter, NonFiniteLossError
from .modes import compiled, frozen_parts, synchronise_batchnorm, train_mode
from .options import SCHEDULES, TrainOptions
from .processes import on_cpu
from .stream import SeededItems, StreamBatches, generator_for, kept_random_state, seed_everything, seed_for

__all__ = ["SCHEDULES", "NonFiniteLossError", "Progress", "Row", "TrainOptions", "Trainer"]

Row = dict[str, Any]

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.csv"
TENSORBOARD = "tensorboard"


class Progress(Protocol):
    """What a Trainer tells that steps are done: a tqdm, or anything else with such a method."""

    def update(self, n: int, /) -> object: ...


class Trainer:
    """Trains a Distiller on a data set of (inputs, labels).

    evaluate: data sets by name, whose top-1 accuracy in percent becomes the column "<name>_accuracy".
    augment: applied to every training batch, with a generator that follows from the seed and the step. It
        treats every image by itself, and sees as many as the whole batch has, over all processes.
    folder: where metrics.csv and checkpoint.pt go; None writes nothing.
    progress: True for a bar of its own, a `Progress` (such as a tqdm) to advance that, False for none.
    tensorboard: also write the rows of the metrics under folder/tensorboard.

    `fit` trains in whatever processes `torchrun` or `accelerate launch` started; all of them must make the
    same networks and data, and only the first writes. After `fit` the Distiller stands on the device that was
    trained on.

    Raises TypeError or ValueError for arguments that do not fit, ModuleNotFoundError for tensorboard=True where
    that package is not installed.
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
        progress: bool | Progress = True,
        tensorboard: bool = False,
    ) -> None:
        if not isinstance(train, Sized):
            raise TypeError(f"wanted a map-style data set with a length, got {type(train).__name__}")
        if not isinstance(progress, bool) and not callable(getattr(progress, "update", None)):
            raise TypeError(
                f"wanted progress as a bool or with a method update(n), got {type(progress).__name__}"
            )
        self.distiller, self.train = distiller, train
        self.size = len(train)
        if self.size < 1:
            raise ValueError("wanted at least one training image, got none")
        for name, data in (evaluate or {}).items():
            if isinstance(data, Sized) and len(data) < 1:
                raise ValueError(f"wanted at least one image to evaluate on, {name!r} has none")
        self.options = options.of_data(self.size)
        self.evaluate, self.augment = dict(evaluate or {}), augment
        self.folder = None if folder is None else Path(folder)
        self.progress, self.tensorboard = progress, tensorboard
        if tensorboard and self.folder is None:
            raise ValueError("tensorboard=True needs folder=, under which it writes")
        if tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ModuleNotFoundError(
                "tensorboard=True needs the package tensorboard: pip install tensorboard"
            )
        _forget_precision(options.mixed_precision)
        self.accelerator = Accelerator(cpu=on_cpu(options.device), mixed_precision=options.mixed_precision)
        if options.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":
            raise ValueError("mixed_precision='fp16' needs a GPU; on the CPU take 'bf16' or 'no'")
        self._refuse_sums()
        if (
            options.sync_batchnorm
            and self.accelerator.num_processes > 1
            and self.accelerator.device.type == "cpu"
        ):
            raise ValueError("sync_batchnorm needs GPUs: torch's SyncBatchNorm does not run on the CPU")
        self.history: list[Row] = []
        self._frozen: list[nn.Module] | None = None

    def fit(self, *, resume: bool = False) -> list[Row]:
        """Train to the last step and return the rows of the metrics, one every `eval_every` steps.

        Submodules of the student that you froze stay in eval mode: those in eval mode while the student is in
        training mode, and, where all of it is in eval mode, those without a parameter that requires a gradient.

        resume: continue from the folder's checkpoint if there is one, exactly. Without it, fit begins anew,
        with the weights as they are.

        Raises NonFiniteLossError, CheckpointError for a damaged checkpoint or one of another run, OSError
        where the folder cannot be written.
        """
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.accelerator.is_main_process:
                remove_leftovers(self.folder, (CHECKPOINT, METRICS))
        self.history = []
        # A second fit finds all of the student in eval mode, as the first one left it.
        if self._frozen is None or self.distiller.student.training:
            self._frozen = frozen_parts(self.distiller.student)
        with kept_random_state():
            return self._fit(resume)

    def _fit(self, resume: bool) -> list[Row]:
        options, accelerator = self.options, self.accelerator
        self.distiller.to(accelerator.device)
        if options.channels_last:
            self.distiller.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if options.sync_batchnorm and accelerator.num_processes > 1:
            synchronise_batchnorm(self.distiller)
        run = {} if self.folder is None else fingerprint(self.distiller, self.train, self.size, self.augment)
        optimizer = options.make_optimizer(self.distiller.parameter_groups(options.lr, options.weight_decay))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, options.lr_factor)
        model, prepared = accelerator.prepare(self.distiller, optimizer)

        frozen = self._frozen or []
        meter = Meter(accelerator)
        start = self._resume(optimizer, scheduler, meter, run) if resume else 0
        bar, owned = self._bar(start)
        writer = self._writer(start)
        try:
            with compiled(self.distiller, options.compile):
                train_mode(model, frozen)
                for step, (inputs, labels) in enumerate(self._loader(start), start=start + 1):
                    seed_everything(seed_for(options.seed, "step", step, accelerator.process_index))
                    self._step(model, prepared, inputs, labels, meter, step)
                    scheduler.step()
                    if bar is not None:
                        bar.update(1)
                    row = options.row_due(step, self.size)
                    save = options.checkpoint_due(step, self.size)
                    if row or save or step % options.check_every == 0:
                        meter.check()
                    if row:
                        self._row(step, optimizer.param_groups[0]["lr"], meter, bar, writer)
                        train_mode(model, frozen)
                    if save:
                        self._save(step, optimizer, scheduler, meter, run)
        finally:
            if owned and isinstance(bar, tqdm):
                bar.close()
            if writer is not None:
                writer.close()
            # Mixed precision wraps the module's forward for the training only.
            accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            self.distiller.eval()
        return self.history

    def _step(
        self, model: nn.Module, optimizer: Any, inputs: Tensor, labels: Tensor, meter: Meter, step: int
    ) -> None:
        accelerator, options = self.accelerator, self.options
        world, whole = accelerator.num_processes, min(options.batch_size, self.size)
        if self.augment is not None:
            inputs = self._augmented(self.augment, inputs, step, whole)
        inputs = self._placed(inputs)
        labels = labels.to(accelerator.device, non_blocking=True)
        count = min(options.accumulation, len(inputs))
        parts = list(zip(inputs.tensor_split(count), labels.tensor_split(count), strict=True))
        for i, (part, part_labels) in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last else accelerator.no_sync(model):
                # Processes' gradients are averaged: with `world` a part counts by its share of the whole batch.
                losses = model(part, part_labels, scale=len(part) * world / whole)
                accelerator.backward(losses.loss)
            meter.add(losses.terms, step, fresh=last)
        if options.clip is not None:
            accelerator.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad()

    def _augmented(self, augment: Augmentation, inputs: Tensor, step: int, whole: int) -> Tensor:
        """This process's images as they would be augmented if it had the whole batch."""
        generator = generator_for(self.options.seed, "augment", step)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if world == 1:
            return augment(inputs, generator)
        # Every process makes the draws of the whole batch: the others' places hold nothing.
        batch = inputs.new_zeros((whole, *inputs.shape[1:]))
        batch[rank::world] = inputs
        return augment(batch, generator)[rank::world]

    def accuracy(self, data: Dataset[tuple[Tensor, Tensor]], batch_size: int = 512) -> float:
        """The student's top-1 accuracy on a data set, in percent, in eval mode. Called in all processes."""
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
            self.size,
            options.batch_size,
            options.steps,
            options.seed,
            start=start,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
        pinned = accelerator.device.type == "cuda"
        data = self.train if _draws_nothing(self.train) else SeededItems(self.train, options.seed)
        return DataLoader(data, batch_sampler=batches, num_workers=options.workers, pin_memory=pinned)

    def _row(self, step: int, lr: float, meter: Meter, bar: Progress | None, writer: Any) -> None:
        row: Row = {
            "step": step,
            "epoch": step * min(self.options.batch_size, self.size) / self.size,
            "lr": lr,
        }
        row |= meter.means()
        if self.accelerator.num_processes > 1:
            # BatchNorm's statistics differ by process; the first one's are those that are saved.
            for buffer in self.distiller.buffers():
                torch.distributed.broadcast(buffer, 0)
        row |= {f"{name}_accuracy": self.accuracy(data) for name, data in self.evaluate.items()}
        self.history.append(row)
        if isinstance(bar, tqdm):
            accuracies = {k: f"{v:.1f}" for k, v in row.items() if k.endswith("_accuracy")}
            bar.set_postfix({"loss": f"{row['loss']:.3f}", **accuracies})
        if self.folder is not None and self.accelerator.is_main_process:
            write_csv(self.folder / METRICS, self.history)
        if writer is not None:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, step)
            writer.flush()

    def _save(
        self,
        step: int,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        meter: Meter,
        run: Mapping[str, Any],
    ) -> None:
        if self.folder is None:
            return
        scaler = self.accelerator.scaler
        state = {
            "options": asdict(self.options),
            "run": dict(run),
            "step": step,
            "distiller": self.distiller.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "meter": meter.state(),
            "history": self.history,
        }
        if self.accelerator.is_main_process:
            save_checkpoint(self.folder / CHECKPOINT, state)

    def _resume(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        meter: Meter,
        run: Mapping[str, Any],
    ) -> int:
        if self.folder is None or not (self.folder / CHECKPOINT).exists():
            return 0
        path = self.folder / CHECKPOINT
        keys = ("options", "run", "step", "distiller", "optimizer", "scheduler", "scaler", "meter", "history")
        state = load_checkpoint(path, keys)
        now = self.options.what_counts()
        if not isinstance(state["options"], Mapping) or not isinstance(state["distiller"], Mapping):
            raise CheckpointError(f"{path}: not a checkpoint of this kind, its options or weights are none")
        other = [k for k in now if state["options"].get(k) != now[k]]
        found = [f"{k} {state['options'].get(k)!r} and not {now[k]!r}" for k in other]
        found += differences(state["run"], run)
        if found:
            raise CheckpointError(f"{path}: was trained with {', '.join(found)}")
        try:
            self.distiller.load_state_dict(state["distiller"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: is of another model ({str(error).splitlines()[0]})") from error
        try:
            optimizer.load_state_dict(state["optimizer"])
            _check_optimizer(optimizer)
            scheduler.load_state_dict(state["scheduler"])
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            meter.load(state["meter"])
            self.history, step = [dict(row) for row in state["history"]], int(state["step"])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise CheckpointError(
                f"{path}: its state of the training does not fit this run ({type(error).__name__}: {reason})"
            ) from error
        return step

    def _bar(self, start: int) -> tuple[Progress | None, bool]:
        if not self.accelerator.is_main_process or self.progress is False:
            return None, False
        if isinstance(self.progress, bool):
            return tqdm(total=self.options.steps, initial=start, unit="step", dynamic_ncols=True), True
        self.progress.update(start)
        return self.progress, False

    def _writer(self, start: int) -> Any:
        """A SummaryWriter, whose rows after the step that is continued from are dropped, or None."""
        if not self.tensorboard or not self.accelerator.is_main_process:
            return None
        from torch.utils.tensorboard import SummaryWriter

        assert self.folder is not None
        return SummaryWriter(str(self.folder / TENSORBOARD), purge_step=start + 1)

    def _refuse_sums(self) -> None:
        """A sum over the batch is not the mean of its parts' sums: it would depend on how the batch is cut."""
        cut = [
            f"{what} of {count}"
            for what, count in (
                ("accumulation", self.options.accumulation),
                ("a number of processes", self.accelerator.num_processes),
            )
            if count > 1
        ]
        parts: dict[str, Any] = {**self.distiller.terms, "task": self.distiller.task_loss}
        for name, part in parts.items():
            modules = part.modules() if isinstance(part, nn.Module) else ()
            given = part.keywords.get("reduction") if isinstance(part, partial) else None
            found = {given, *(getattr(module, "reduction", None) for module in modules)}
            if cut and "sum" in found:
                raise ValueError(
                    f"the term {name!r} has reduction='sum', which does not go with {' or '.join(cut)}: sums "
                    "of parts are not averaged; take 'mean' or 'batchmean'"
                )


def _draws_nothing(data: Dataset[Any]) -> bool:
    """Whether reading an item is known to draw no random numbers, so that no seeding is needed."""
    of_class = isinstance(data, LabelledImages) and type(data).__getitem__ is LabelledImages.__getitem__
    return of_class or type(data) is torch.utils.data.TensorDataset


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """torch takes any tensors as an optimizer's state, and fails or broadcasts in the next step."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise ValueError(f"{name} is {tuple(value.shape)} for a parameter {tuple(parameter.shape)}")


def _forget_precision(wanted: str) -> None:
    """Accelerate keeps the first precision it was given for the life of a process; trainers may differ."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state()
