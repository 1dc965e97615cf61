"""What a training has besides its networks: optimizer, schedule, means and rows, saved in a checkpoint and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .distiller import Distiller
from .files import CheckpointError, load_checkpoint, save_checkpoint
from .fingerprint import differences
from .meter import Meter
from .options import TrainOptions

Row = dict[str, Any]

_KEYS = ("options", "run", "step", "distiller", "optimizer", "scheduler", "scaler", "meter", "history")


class TrainingState:
    """All that the rest of a training follows from.

    run: the fingerprint of what is trained. history: the rows of the metrics so far.
    """

    def __init__(
        self,
        distiller: Distiller,
        options: TrainOptions,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        meter: Meter,
        run: Mapping[str, Any],
    ) -> None:
        self.distiller, self.options = distiller, options
        self.optimizer, self.scaler, self.meter, self.run = optimizer, scaler, meter, run
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, options.lr_factor)
        self.history: list[Row] = []

    @property
    def lr(self) -> float:
        """The student's learning rate in the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def save(self, path: Path, step: int, *, write: bool) -> None:
        """Save the state after `step`. Called in all processes; write: in the one that writes."""
        state = {
            "options": asdict(self.options),
            "run": dict(self.run),
            "step": step,
            "distiller": self.distiller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            "meter": self.meter.state(),
            "history": self.history,
        }
        if write:
            save_checkpoint(path, state)

    def load(self, path: Path) -> int:
        """Continue from a checkpoint; returns the step that it was saved after.

        Raises CheckpointError for a file that is damaged, or of another training.
        """
        state = load_checkpoint(path, _KEYS)
        now = self.options.what_counts()
        if not isinstance(state["options"], Mapping) or not isinstance(state["distiller"], Mapping):
            raise CheckpointError(f"{path}: not a checkpoint of this kind, its options or weights are none")
        other = [k for k in now if state["options"].get(k) != now[k]]
        found = [f"{k} {state['options'].get(k)!r} and not {now[k]!r}" for k in other]
        found += differences(state["run"], self.run)
        if found:
            raise CheckpointError(f"{path}: was trained with {', '.join(found)}")
        try:
            self.distiller.load_state_dict(state["distiller"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: is of another model ({str(error).splitlines()[0]})") from error
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            _check_optimizer(self.optimizer)
            self.scheduler.load_state_dict(state["scheduler"])
            if self.scaler.is_enabled() and state["scaler"] is not None:
                self.scaler.load_state_dict(state["scaler"])
            self.meter.load(state["meter"])
            self.history, step = [dict(row) for row in state["history"]], int(state["step"])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise CheckpointError(
                f"{path}: its state of the training does not fit this run ({type(error).__name__}: {reason})"
            ) from error
        return step


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """torch takes any tensors as an optimizer's state, and fails or broadcasts in the next step."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise ValueError(f"{name} is {tuple(value.shape)} for a parameter {tuple(parameter.shape)}")
