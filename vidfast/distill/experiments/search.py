"""The search that chose VID-I's defaults on the digits, on images that are neither test nor training images.

    python -m vidfast.distill.experiments.search --out docs/vid-search.csv

Stages, each over its own small grid and continuing from the best of the stages before: the optimizer and
learning rate of the student alone; VID-I's weight and regressor, with the best rate of either optimizer;
VID-I's own rate; its initial variance and alpha's learning rate. A row of the record is the mean accuracy
over seeds and M on the validation images, 0 if a run diverged; the seeds are not those of the reported runs.
A search that is stopped continues from its record.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from tqdm.auto import tqdm

from ..choices import Optimizer
from ..data import load
from ..files import write_csv
from ..trainer import NonFiniteLossError, Row, TrainOptions
from .compare import Arm, VIDOptions, train_student
from .teacher import default_cache, trained_teacher

# Far from 0, 1, 2, ..., with which results are reported.
SEARCH_SEEDS = (1000, 1001)
SAMPLES = (5, 10)
RATES: tuple[tuple[Optimizer, float], ...] = (
    ("sgd", 0.01),
    ("sgd", 0.03),
    ("sgd", 0.1),
    ("sgd", 0.3),
    ("adamw", 0.001),
    ("adamw", 0.003),
    ("adamw", 0.01),
    ("adamw", 0.02),
    ("adamw", 0.04),
)


@dataclass(frozen=True)
class Candidate:
    """One point of the search. vid is None for the student alone."""

    stage: str
    optimizer: Optimizer
    lr: float
    vid: VIDOptions | None

    def key(self) -> Row:
        shown = ("weight", "regressor", "init_var", "alpha_lr")
        vid = asdict(self.vid) if self.vid else {}
        return {
            "stage": self.stage,
            "optimizer": self.optimizer,
            "lr": self.lr,
            **{name: vid.get(name, "") for name in shown},
        }


def student_alone() -> list[Candidate]:
    return [Candidate("alone", optimizer, lr, None) for optimizer, lr in RATES]


def vid_weights(
    rates: Iterable[Candidate], weights: Iterable[float], regressors: Iterable[str]
) -> list[Candidate]:
    return [
        replace(rate, stage="weight", vid=VIDOptions(weight, regressor, init_var=1.0, alpha_lr=1.0))
        for rate, regressor, weight in itertools.product(rates, regressors, weights)
    ]


def vid_rates(best: Candidate) -> list[Candidate]:
    return [replace(best, stage="rate", optimizer=optimizer, lr=lr) for optimizer, lr in RATES]


def vid_variances(best: Candidate) -> list[Candidate]:
    assert best.vid is not None
    return [
        replace(best, stage="variance", vid=replace(best.vid, init_var=init_var, alpha_lr=alpha_lr))
        for init_var, alpha_lr in itertools.product((0.2, 1.0, 5.0), (0.1, 1.0, 10.0))
    ]


class Search:
    """Evaluates candidates and keeps the record, `out`, up to date."""

    def __init__(
        self, out: Path, teacher_network: str, student_network: str, options: TrainOptions, steps_teacher: int
    ):
        self.out, self.student_network, self.options = out, student_network, options
        self.data = load("digits")
        self.teacher, _, _ = trained_teacher(
            teacher_network,
            self.data,
            replace(options, steps=steps_teacher),
            cache=default_cache(),
            progress=True,
        )
        self.record: list[Row] = []
        if out.exists():
            with out.open(newline="") as file:
                self.record = list(csv.DictReader(file))

    def accuracy(self, candidate: Candidate) -> float:
        """Mean validation accuracy; a diverged candidate counts as 0."""
        key = {name: str(value) for name, value in candidate.key().items()}
        for row in self.record:
            if all(row[name] == value for name, value in key.items() if name != "stage"):
                return float(row["validation_accuracy"])
        arm = Arm("vid", "", candidate.vid.terms) if candidate.vid else Arm("alone", "")
        values: dict[int, list[float]] = {samples: [] for samples in SAMPLES}
        try:
            for samples, seed in itertools.product(SAMPLES, SEARCH_SEEDS):
                options = replace(self.options, optimizer=candidate.optimizer, lr=candidate.lr, seed=seed)
                _, run = train_student(
                    arm,
                    self.student_network,
                    self.teacher,
                    self.data,
                    samples,
                    seed,
                    options,
                    {"validation": self.data.validation},
                )
                values[samples].append(run.history[-1]["validation_accuracy"])
            by_samples = {samples: mean(found) for samples, found in values.items()}
        except NonFiniteLossError:
            by_samples = dict.fromkeys(SAMPLES, 0.0)
        row = {**key, **{f"m{samples}": f"{found:.2f}" for samples, found in by_samples.items()}}
        row["validation_accuracy"] = f"{mean(by_samples.values()):.2f}"
        self.record.append(row)
        write_csv(self.out, self.record)
        return float(row["validation_accuracy"])

    def best(self, candidates: list[Candidate]) -> Candidate:
        bar = tqdm(candidates, desc=candidates[0].stage)
        scored = [(self.accuracy(candidate), -i) for i, candidate in enumerate(bar)]
        accuracy, index = max(scored)
        print(f"{candidates[0].stage}: {accuracy:.2f} with {candidates[-index].key()}")
        return candidates[-index]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the record, a CSV file")
    parser.add_argument("--teacher", default="wrn-16-2")
    parser.add_argument("--student", default="wrn-10-1")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--teacher-steps", type=int, default=300)
    parser.add_argument("--weights", type=float, nargs="+", default=[1.0, 10.0, 30.0, 100.0])
    parser.add_argument("--regressors", nargs="+", default=["linear", "conv2", "conv3"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    options = TrainOptions(steps=arguments.steps, channels_last=True, device="cpu")
    search = Search(arguments.out, arguments.teacher, arguments.student, options, arguments.teacher_steps)
    alone = student_alone()
    search.best(alone)
    rates = [search.best([c for c in alone if c.optimizer == optimizer]) for optimizer in ("sgd", "adamw")]
    best = search.best(vid_weights(rates, arguments.weights, arguments.regressors))
    best = search.best(vid_rates(best))
    search.best(vid_variances(best))


if __name__ == "__main__":
    main()
