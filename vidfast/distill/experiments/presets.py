"""What the tables share: how students and teachers are trained, and the candidates of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import UserError
from ..trainer import TrainOptions
from .arms import Arm, Rate, alone, chosen, combination, transfer
from .base import Options
from .runs import DataSpec

Rates = Sequence[Rate]

# Candidates of the quick budget. VID's and FitNet's losses at these weights diverge with the student's best SGD
# rate, so every row may choose between the two optimizers.
RATES: tuple[Rate, ...] = (("sgd", 0.1), ("adamw", 0.003), ("adamw", 0.02))
# The paper's optimizer with a rate around the usual one.
FULL_RATES: tuple[Rate, ...] = (("sgd", 0.01), ("sgd", 0.1))


def data_spec(options: Options, name: str | None = None, classes: Sequence[int] | None = None) -> DataSpec:
    """The student's data; name replaces the option's where a table needs other inputs."""
    root = None if options.root is None else str(options.root)
    return DataSpec(name or options.data, root, None if classes is None else tuple(classes))


def students(options: Options, steps: int) -> TrainOptions:
    """How students are trained; the search sets the optimizer and the rate."""
    quick = TrainOptions(
        steps=options.steps or steps,
        batch_size=64,
        channels_last=True,
        checkpoint_every=max(1, (options.steps or steps) // 4),
        device=options.device,
    )
    if options.quick:
        return quick
    return replace(
        quick,
        batch_size=128,
        schedule="steps",
        checkpoint_every="epoch",
        mixed_precision="bf16" if options.on_gpu else "no",
        workers=2 if options.on_gpu else 0,
    )


def teachers(options: Options, steps: int) -> TrainOptions:
    """How teachers are trained, and students that are fine-tuned afterwards."""
    training = students(options, steps)
    return replace(
        training, steps=options.teacher_steps or steps, optimizer="sgd", lr=0.1, checkpoint_every=0
    )


def regressor(options: Options, quick: str, full: str) -> dict[str, Any]:
    """VID's mean function and initial variance: the paper's in the full budget."""
    if options.quick:
        return {"regressor": quick, "init_var": 1.0}
    return {"regressor": full, "init_var": 5.0}


def student(options: Options) -> Arm:
    return alone("Student", (*RATES, ("sgd", 0.03)) if options.quick else FULL_RATES)


def kd(options: Options) -> Arm:
    return transfer("KD", "kd", all_rates(options), (0.9,), task_weight=0.1, options={"temperature": 4.0})


def fitnet(options: Options, mean_function: str = "linear", *, rates: Rates | None = None) -> Arm:
    weights = (1.0, 3.0, 30.0) if options.quick else (1.0, 10.0, 100.0)
    return transfer(
        "FitNet", "fitnet", rates or all_rates(options), weights, options={"regressor": mean_function}
    )


def at(options: Options, taps: tuple[int, ...] | None = None, *, rates: Rates | None = None) -> Arm:
    weights = (10.0, 100.0, 1000.0) if options.quick else (100.0, 1000.0, 10000.0)
    return transfer("AT", "at", rates or all_rates(options), weights, taps=taps)


def nst(options: Options, taps: tuple[int, ...] | None = None, *, rates: Rates | None = None) -> Arm:
    weights = (5.0, 50.0, 500.0)
    return transfer("NST", "nst", rates or all_rates(options), weights, taps=taps)


def lwf(options: Options, *, rates: Rates | None = None) -> Arm:
    return transfer("LwF", "lwf", rates or all_rates(options), (0.01, 0.1, 1.0))


def vid_lp(options: Options, *, rates: Rates | None = None) -> Arm:
    weights = (0.1, 1.0, 10.0)
    return transfer("VID-LP", "vid_lp", rates or all_rates(options), weights, options={"init_var": 1.0})


def vid_i(options: Options, mean_function: dict[str, Any], *, rates: Rates | None = None) -> Arm:
    weights = (1.0, 3.0, 30.0) if options.quick else (1.0, 10.0, 100.0)
    return transfer("VID-I", "vid", rates or all_rates(options), weights, options=mean_function)


def all_rates(options: Options) -> Rates:
    return RATES if options.quick else FULL_RATES


def distillation_rows(options: Options) -> tuple[Arm, ...]:
    """The rows of tables 1 and 2, those that were asked for."""
    return rows(
        options,
        student(options),
        kd(options),
        fitnet(options),
        at(options),
        nst(options),
        vid_i(options, regressor(options, "linear", "conv3")),
        combination("KD", "AT"),
        combination("KD", "VID-I"),
    )


def rows(options: Options, *arms: Arm) -> tuple[Arm, ...]:
    """The arms that were asked for. Raises UserError for a row that is not in the table."""
    try:
        return chosen(arms, options.arms)
    except ValueError as error:
        raise UserError(f"--rows: {error}") from None


def seeds(options: Options, default: int) -> tuple[int, ...]:
    return tuple(range(options.seeds if options.seeds is not None else default))


def search_seeds(options: Options, quick: int) -> tuple[int, ...]:
    """Far from 0, 1, 2, ..., with which results are reported. quick: how many in that budget; the full one has two."""
    return tuple(1000 + i for i in range(quick if options.quick else 2))
