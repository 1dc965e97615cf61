"""The training loop, on torch's own means: DistributedDataParallel, autocast and GradScaler.

Everything random in step i follows from (seed, i), so a run continued from a checkpoint is the run that was
not interrupted: the order of the images, their augmentation and dropout need no state to be saved.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sized
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .conversion import compiled, synchronise_batchnorm
from .data.augment import Augmentation
from .diagnosis import cause
from .distiller import Distiller
from .evaluation import BATCH_SIZE, Evaluation
from .files import CheckpointError, remove_leftovers, write_csv
from .fingerprint import fingerprint, refuse_unlike
from .meter import Meter, NonFiniteLossError
from .modes import eval_mode, frozen_parts, kept_modes, train_mode
from .options import SCHEDULES, TrainOptions
from .processes import Processes, refuse_prepared
from .stream import (
    SeededItems,
    StreamBatches,
    draws_nothing,
    generator_for,
    kept_random_state,
    seed_everything,
    seed_for,
)
from .task_parts import TaskParts, refuse_sums
from .training_state import Row, TrainingState

__all__ = ["SCHEDULES", "NonFiniteLossError", "Progress", "Row", "TrainOptions", "Trainer"]

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.csv"
TENSORBOARD = "tensorboard"


class Progress(Protocol):
    """What a Trainer tells that steps are done: a tqdm, or anything else with such a method."""

    def update(self, n: int, /) -> object: ...


class Trainer:
    """Trains a Distiller on a data set of (inputs, labels).

    evaluate: data sets by name, whose top-1 accuracy in percent becomes the column "<name>_accuracy". Their labels are
        class numbers, one an item or one a position; the label that the task's loss ignores does not count.
    augment: applied to every training batch, with a generator that follows from the seed and the step. It
        treats every image by itself, and sees as many as the whole batch has, over all processes.
    folder: where metrics.csv and checkpoint.pt go; None writes nothing.
    progress: True for a bar of its own, a `Progress` (such as a tqdm) to advance that, False for none.
    tensorboard: also write the rows of the metrics under folder/tensorboard.

    `fit` trains in whatever processes `torchrun` or `accelerate launch` started, or have joined by
    `torch.distributed`; all of them must make the same networks and data, and only the first writes. What is learned
    follows from the arguments alone: no Accelerator, no training beside it and none of Accelerate's settings in the
    environment change it. A process that was started with others joins them when the Trainer is made, and stays joined.
    After `fit` the Distiller is on the device that was trained on, in the modes that it had.

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
        self.processes = Processes(options.device, options.mixed_precision)
        refuse_prepared(distiller)
        refuse_sums(distiller, self.options.accumulation, self.processes.count)
        if options.sync_batchnorm and self.processes.count > 1 and self.processes.device.type == "cpu":
            raise ValueError("sync_batchnorm needs GPUs: torch's SyncBatchNorm does not run on the CPU")
        self.history: list[Row] = []

    def fit(self, *, resume: bool = False) -> list[Row]:
        """Train to the last step and return the rows of the metrics, one every `eval_every` steps.

        Submodules of the student, and of the terms, that you froze stay in eval mode: those in eval mode while the
        student is in training mode, and, where all of it is in eval mode, those whose parameters all require no
        gradient. Before the first step a batch of every evaluation set is tried.

        resume: continue from the folder's checkpoint if there is one, exactly. Without it, fit begins anew,
        with the weights as they are, in a folder that holds no training.

        Raises NonFiniteLossError; FileExistsError where the folder holds a training that is not resumed;
        CheckpointError for a damaged checkpoint or one of another run; OSError where the folder cannot be written;
        ValueError for labels whose accuracy cannot be measured, and for a task_loss that is not the mean of its parts'
        losses where the batch is cut.
        """
        if not resume:
            self._refuse_to_overwrite()
        self.history = []
        if self.options.sync_batchnorm and self.processes.count > 1:
            synchronise_batchnorm(self.distiller)
        with kept_random_state(), kept_modes(self.distiller), self.processes.own_modes():
            return self._fit(resume)

    def _fit(self, resume: bool) -> list[Row]:
        options, processes, distiller = self.options, self.processes, self.distiller
        distiller.to(processes.device)
        if options.channels_last:
            distiller.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._try_evaluation()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if processes.is_main:
                remove_leftovers(self.folder, (CHECKPOINT, METRICS))
        alone = self.folder is None and processes.count == 1
        run = {} if alone else fingerprint(distiller, self.train, self.size, self.augment)
        refuse_unlike(processes, options, run)
        if not any(parameter.requires_grad for parameter in distiller.parameters()):
            raise ValueError(
                "wanted a parameter that requires a gradient, of the student or of a term, got none"
            )
        optimizer = options.make_optimizer(distiller.parameter_groups(options.lr, options.weight_decay))
        # What the caller's own steps left is no gradient of the first one here.
        optimizer.zero_grad()
        state = TrainingState(distiller, options, optimizer, processes.scaler(), Meter(processes), run)
        frozen = [m for part in (distiller.student, *distiller.terms.values()) for m in frozen_parts(part)]
        model = processes.wrapped(distiller)
        start = 0
        if resume and self.folder is not None and (self.folder / CHECKPOINT).exists():
            start = state.load(self.folder / CHECKPOINT)
        starts = processes.gather(torch.tensor(start, device=processes.device)).tolist()
        if len(set(starts)) > 1:
            raise CheckpointError(
                f"{self.folder}: wanted a folder that all processes see, got checkpoints after the steps {starts} (0 "
                "for none); copy the first process's to the others"
            )
        self.history = state.history
        # A run that was stopped between its checkpoint and the row of the same step.
        last_row = self.history[-1]["step"] if self.history else 0
        row_lacks = last_row < start and options.row_due(start, self.size)
        task = TaskParts(distiller, processes, options.accumulation, options.check_every)
        bar, owned = self._bar(start)
        writer = self._writer(start if row_lacks else start + 1)
        try:
            with compiled(distiller, options.compile):
                train_mode(model, frozen)
                if row_lacks:
                    self._row(start, state, bar, writer)
                    if start == options.steps:
                        self._save(state, start)
                for step, (inputs, labels) in enumerate(self._loader(start), start=start + 1):
                    seed_everything(seed_for(options.seed, "step", step, processes.index))
                    self._step(model, state, task, inputs, labels, step)
                    state.scheduler.step()
                    if bar is not None:
                        bar.update(1)
                    self._end_step(step, state, task, bar, writer)
        finally:
            optimizer.zero_grad()
            if owned and isinstance(bar, tqdm):
                bar.close()
            if writer is not None:
                writer.close()
        return self.history

    def _step(
        self,
        model: nn.Module,
        state: TrainingState,
        task: TaskParts,
        inputs: Tensor,
        labels: Tensor,
        step: int,
    ) -> None:
        processes, options, scaler = self.processes, self.options, state.scaler
        whole = min(options.batch_size, self.size)
        if self.augment is not None:
            inputs = self._augmented(self.augment, inputs, step, whole)
        inputs = self._placed(inputs)
        labels = labels.to(processes.device, non_blocking=True)
        count = min(options.accumulation, len(inputs))
        parts = list(zip(inputs.tensor_split(count), labels.tensor_split(count), strict=True))
        shares = task.shares([part_labels for _, part_labels in parts])
        for i, ((part, part_labels), share) in enumerate(zip(parts, shares, strict=True)):
            last = i == len(parts) - 1
            with nullcontext() if last else processes.unsent(model):
                with processes.autocast():
                    # Processes' gradients are averaged: with their number a part counts by its share of the whole.
                    scale = len(part) * processes.count / whole
                    losses = model(part, part_labels, scale=scale, task_scale=share)
                scaler.scale(losses.loss).backward()
            task.see(losses.logits, part_labels)
            state.meter.add(losses.terms, step, fresh=last)
        task.end_step()
        if options.clip is not None:
            scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        scaler.step(state.optimizer)
        scaler.update()
        state.optimizer.zero_grad()
        # Autocast keeps weights in 16 bits until its outermost block ends, which is `own_modes`, around the training.
        torch.clear_autocast_cache()

    def _augmented(self, augment: Augmentation, inputs: Tensor, step: int, whole: int) -> Tensor:
        """This process's images as they would be augmented if it had the whole batch."""
        generator = generator_for(self.options.seed, "augment", step)
        index, count = self.processes.index, self.processes.count
        if count == 1:
            return augment(inputs, generator)
        # Every process makes the draws of the whole batch: the others' places hold nothing.
        batch = inputs.new_zeros((whole, *inputs.shape[1:]))
        batch[index::count] = inputs
        return augment(batch, generator)[index::count]

    def _try_evaluation(self) -> None:
        """A batch of every evaluation set. Raises what fails there, in every process."""
        failed: Exception | None = None
        try:
            for name, data in self.evaluate.items():
                self._evaluation().attempt(name, data)
        except Exception as error:
            failed = error
        texts = self.processes.gather_objects(
            None if failed is None else f"{type(failed).__name__}: {failed}"
        )
        if failed is not None:
            raise failed
        for index, text in enumerate(texts):
            if text is not None:
                raise RuntimeError(f"process {index} could not evaluate: {text}")

    def accuracy(self, data: Dataset[tuple[Tensor, Tensor]], batch_size: int = BATCH_SIZE) -> float:
        """The student's top-1 accuracy on a data set, in percent, in eval mode. Called in all processes.

        Raises ValueError for labels that are not class numbers, one for each item or position of the logits.
        """
        with self.processes.own_modes(), kept_random_state():
            return self._evaluation().accuracy(data, batch_size)

    def _evaluation(self) -> Evaluation:
        distiller = self.distiller

        def logits(inputs: Tensor) -> Tensor:
            with self.processes.autocast():
                return distiller.pick_logits(distiller.student(self._placed(inputs)))

        return Evaluation(
            distiller.student, logits, distiller.task_loss, self.processes, self.options.workers
        )

    def _placed(self, inputs: Tensor) -> Tensor:
        """A batch on the device, in the layout asked for."""
        layout = (
            torch.channels_last if self.options.channels_last and inputs.ndim == 4 else torch.preserve_format
        )
        return inputs.to(self.processes.device, non_blocking=True, memory_format=layout)

    def _loader(self, start: int, *, whole: bool = False) -> DataLoader[tuple[Tensor, Tensor]]:
        """The batches of the steps after `start`, of this process's part; whole: of all processes' together."""
        options, processes = self.options, self.processes
        batches = StreamBatches(
            self.size,
            options.batch_size,
            options.steps,
            options.seed,
            start=start,
            rank=0 if whole else processes.index,
            world=1 if whole else processes.count,
        )
        pinned = processes.device.type == "cuda"
        workers = 0 if whole else options.workers
        data = self.train if draws_nothing(self.train) else SeededItems(self.train, options.seed)
        return DataLoader(data, batch_sampler=batches, num_workers=workers, pin_memory=pinned)

    def _check(self, meter: Meter, task: TaskParts) -> None:
        """Raises NonFiniteLossError, with what is the matter, or ValueError for a loss that the parts do not make."""
        task.check()
        try:
            meter.check()
        except NonFiniteLossError as error:
            found = None
            with kept_random_state(), suppress(Exception):  # what fails here is not what is to be told
                inputs, labels = next(iter(self._loader(error.step - 1, whole=True)))
                if self.augment is not None:
                    inputs = self.augment(inputs, generator_for(self.options.seed, "augment", error.step))
                count, world = self.options.accumulation, self.processes.count
                labels = labels.to(self.processes.device)
                parts = [p for i in range(world) for p in labels[i::world].tensor_split(count) if len(p)]
                with self.processes.autocast(), eval_mode(self.distiller.student):
                    found = cause(self.distiller, error.terms, self._placed(inputs), parts)
            raise error if found is None else error.because(found) from None

    def _end_step(
        self, step: int, state: TrainingState, task: TaskParts, bar: Progress | None, writer: Any
    ) -> None:
        """What is due after a step. A checkpoint comes before the evaluation, which may fail."""
        row, save = self.options.row_due(step, self.size), self.options.checkpoint_due(step, self.size)
        if row or save or step % self.options.check_every == 0:
            self._check(state.meter, task)
        if save:
            self._save(state, step)
        if row:
            try:
                self._row(step, state, bar, writer)
            except Exception:
                # Of several processes the others know nothing of it, and would wait for what they save together.
                if not save and self.processes.count == 1:
                    self._save(state, step)
                raise
        if step == self.options.steps:
            self._save(state, step)  # with the last row

    def _row(self, step: int, state: TrainingState, bar: Progress | None, writer: Any) -> None:
        # BatchNorm's statistics differ by process; the first one's are those that are saved.
        self.processes.copy_from_first(self.distiller.buffers())
        # Data sets that draw random numbers give the same in a row that is made anew.
        seed_everything(seed_for(self.options.seed, "row", step, self.processes.index))
        accuracies = {f"{name}_accuracy": self.accuracy(data) for name, data in self.evaluate.items()}
        row: Row = {
            "step": step,
            "epoch": step * min(self.options.batch_size, self.size) / self.size,
            "lr": state.lr,
            **state.meter.means(),
            **accuracies,
        }
        self.history.append(row)
        if isinstance(bar, tqdm):
            shown = {name: f"{accuracy:.1f}" for name, accuracy in accuracies.items()}
            bar.set_postfix({"loss": f"{row['loss']:.3f}", **shown})
        if self.folder is not None and self.processes.is_main:
            write_csv(self.folder / METRICS, self.history)
        if writer is not None:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, step)
            writer.flush()

    def _save(self, state: TrainingState, step: int) -> None:
        if self.folder is not None:
            state.save(self.folder / CHECKPOINT, step, write=self.processes.is_main)

    def _refuse_to_overwrite(self) -> None:
        if self.folder is None:
            return
        for path in (self.folder / CHECKPOINT, self.folder / METRICS):
            if path.exists():
                raise FileExistsError(
                    f"{path}: wanted a folder without a training, and this one holds one; continue it by "
                    "fit(resume=True), choose another folder, or remove the file"
                )

    def _bar(self, start: int) -> tuple[Progress | None, bool]:
        if not self.processes.is_main or self.progress is False:
            return None, False
        if isinstance(self.progress, bool):
            return tqdm(total=self.options.steps, initial=start, unit="step", dynamic_ncols=True), True
        self.progress.update(start)
        return self.progress, False

    def _writer(self, first: int) -> Any:
        """A SummaryWriter, whose rows of the steps from `first` on are dropped, or None."""
        if not self.tensorboard or not self.processes.is_main:
            return None
        from torch.utils.tensorboard import SummaryWriter

        assert self.folder is not None
        return SummaryWriter(str(self.folder / TENSORBOARD), purge_step=first)
