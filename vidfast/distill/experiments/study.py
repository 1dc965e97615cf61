"""One of the papers' tables: choose every row's settings on validation images, then train with several seeds.

Every row of a table gets its settings by the same rule: the candidate with the best mean accuracy on the
validation images, over the search's seeds, in the panel's tuning column. The reported runs have other seeds, and
are evaluated on the test images once, after the last step.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import mean, stdev
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.sampling import samples_per_class
from ..distiller import Distiller
from ..errors import UserError
from ..files import write_csv
from ..trainer import Row, TrainOptions
from .arms import Arm, Setting
from .base import Options
from .pool import run_all
from .runs import DataSpec, Job, Result, fresh, keep_network
from .teacher import trained_teacher


@dataclass(frozen=True)
class Column:
    """One column: a student network, and how many labelled images a class it gets (None: all)."""

    label: str
    student: str
    samples: int | None


@dataclass(frozen=True)
class Panel:
    """Columns under one title, whose rows share their settings, chosen in the column `tune`."""

    title: str
    columns: tuple[Column, ...]
    tune: Column


@dataclass(frozen=True)
class Plan:
    """What a table is made of.

    axis: what the columns are. target: the data that students learn; source: the data of the teacher. training:
    of students, whose optimizer and rate the settings replace. validation_trains: whether the reported runs train
    on the validation images too, as a table with all images of a class needs. paper: published accuracies by panel, row
    and column. notes: how this differs from the paper, as Markdown.
    """

    name: str
    title: str
    axis: str
    target: DataSpec
    source: DataSpec
    teacher: str
    panels: tuple[Panel, ...]
    arms: tuple[Arm, ...]
    training: TrainOptions
    teacher_training: TrainOptions
    seeds: tuple[int, ...]
    search_seeds: tuple[int, ...]
    validation_trains: bool = False
    paper: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    notes: str = ""

    @property
    def reported(self) -> DataSpec:
        """The students' data in the reported runs."""
        return replace(self.target, with_validation=self.validation_trains)


@dataclass(frozen=True)
class Cell:
    """The reported runs of one row in one column; a run that diverged has None."""

    panel: str
    arm: str
    column: str
    accuracies: tuple[float | None, ...]

    @property
    def reached(self) -> tuple[float, ...]:
        return tuple(accuracy for accuracy in self.accuracies if accuracy is not None)

    @property
    def complete(self) -> bool:
        """Whether no run diverged."""
        return len(self.reached) == len(self.accuracies)

    @property
    def mean(self) -> float | None:
        return mean(self.reached) if self.reached else None

    @property
    def spread(self) -> float:
        """The sample standard deviation, 0 for a single run."""
        return stdev(self.reached) if len(self.reached) > 1 else 0.0


@dataclass(frozen=True)
class Outcome:
    """What a study found. best: the setting of each (panel, row). search: the record, a row a candidate."""

    cells: tuple[Cell, ...]
    best: Mapping[tuple[str, str], Setting]
    search: tuple[Row, ...]
    teacher_accuracy: float
    teacher_classes: int


def check(plan: Plan) -> None:
    """Find what cannot work before anything is trained, by building every row of every column.

    Raises UserError.
    """
    target, source = plan.target.load(), plan.source.load()
    try:
        with torch.random.fork_rng(devices=[]):
            teacher = fresh(plan.teacher, source)
            for column in {c.student: c for p in plan.panels for c in (p.tune, *p.columns)}.values():
                for arm in plan.arms:
                    student = fresh(column.student, target)
                    terms = [
                        t.build(student, teacher) for t in (arm.settings or (Setting("sgd", 1.0),))[0].terms
                    ]
                    Distiller(student, teacher, terms, example=target.train.example(2)).remove_taps()
        for panel in plan.panels:
            for data, columns in ((target, (panel.tune,)), (plan.reported.load(), panel.columns)):
                for column in columns:
                    if column.samples is not None:
                        samples_per_class(data.train, column.samples, seed=0)
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error).splitlines()[0]) from error


def run_study(plan: Plan, options: Options, bar: tqdm[Any]) -> Outcome:
    """Do all of it, or what the folder does not hold yet."""
    return _Study(plan, options, bar).outcome()


class _Study:
    def __init__(self, plan: Plan, options: Options, bar: tqdm[Any]) -> None:
        self.plan, self.options, self.folder = plan, options, options.folder
        self.bar = bar
        self.pretrained: dict[str, str] = {}
        self.search: list[Row] = []
        self.best: dict[tuple[str, str], Setting] = {}
        self.cells: dict[tuple[str, str, str], Cell] = {}

    def outcome(self) -> Outcome:
        plan = self.plan
        source = plan.source.load()
        self.bar.set_description("teacher")
        teacher, metrics, _ = trained_teacher(
            plan.teacher,
            source,
            plan.teacher_training,
            cache=self.options.teachers,
            progress=False,
            say=self._say,
        )
        accuracy = float(metrics["test_accuracy"])
        self._say(f"teacher {plan.teacher}: test accuracy {accuracy:.1f} %")
        self.teacher = keep_network(self.folder, "teacher", teacher, plan.teacher, source)
        self.bar.total = _steps(plan)
        for panel in plan.panels:
            self._tune(panel)
        for panel in plan.panels:
            self._report(panel)
        return Outcome(
            tuple(self.cells.values()), self.best, tuple(self.search), accuracy, source.num_classes
        )

    def _tune(self, panel: Panel) -> None:
        """Choose every row's setting. Rows that combine others come after them."""
        diverged: dict[str, list[Setting]] = {}
        for combined in (False, True):
            arms = [arm for arm in self.plan.arms if bool(arm.parts) == combined]
            if not arms:
                continue
            best = {label: setting for (title, label), setting in self.best.items() if title == panel.title}
            tries = [(arm, setting) for arm in arms for setting in arm.candidates(best, diverged)]
            jobs = [
                self._job(panel.tune, arm, setting, seed, "validation")
                for arm, setting in tries
                for seed in self.plan.search_seeds
            ]
            self.bar.set_description(f"{panel.title}: search")
            results = self._run(jobs)
            every = len(self.plan.search_seeds)
            scored: dict[str, list[tuple[float, Setting]]] = {}
            for i, (arm, setting) in enumerate(tries):
                found = [result.accuracy for result in results[i * every : (i + 1) * every]]
                # A setting that diverges is never the best of a row.
                score = mean(0.0 if accuracy is None else accuracy for accuracy in found)
                scored.setdefault(arm.label, []).append((score, setting))
                if None in found:
                    diverged.setdefault(arm.label, []).append(setting)
                self.search.append(
                    {
                        "panel": panel.title,
                        "row": arm.label,
                        **setting.describe(),
                        "validation_accuracy": f"{score:.2f}",
                        "diverged": sum(accuracy is None for accuracy in found),
                    }
                )
            for label, of_arm in scored.items():
                score, setting = max(of_arm, key=lambda pair: pair[0])
                self.best[panel.title, label] = setting
                described = ", ".join(f"{k} {v}" for k, v in setting.describe().items() if v)
                self._say(f"{panel.title}: {label}: {score:.1f} % on validation with {described}")
            write_csv(self.folder / "search.csv", self.search)

    def _report(self, panel: Panel) -> None:
        """Train every row in every column with the reported seeds, and evaluate on the test images."""
        places = [(column, arm) for column in panel.columns for arm in self.plan.arms]
        jobs: dict[str, tuple[Column, Arm]] = {}
        flat: list[Job] = []
        for column, arm in places:
            for seed in self.plan.seeds:
                job = self._job(column, arm, self.best[panel.title, arm.label], seed, "test")
                jobs[job.digest] = (column, arm)
                flat.append(job)
        self.bar.set_description(f"{panel.title}: runs")

        def each(job: Job, result: Result) -> None:
            column, arm = jobs[job.digest]
            reached = "diverged" if result.accuracy is None else f"{result.accuracy:5.1f} %"
            self._say(f"{panel.title}: {column.label:<10} seed {job.seed}  {arm.label:<16} {reached}")

        results = self._run(flat, each)
        every = len(self.plan.seeds)
        for i, (column, arm) in enumerate(places):
            found = tuple(result.accuracy for result in results[i * every : (i + 1) * every])
            self.cells[panel.title, arm.label, column.label] = Cell(
                panel.title, arm.label, column.label, found
            )
        write_csv(
            self.folder / "results.csv",
            [
                {
                    "panel": cell.panel,
                    "row": cell.arm,
                    "column": cell.column,
                    "seed": seed,
                    "test_accuracy": value,
                }
                for cell in self.cells.values()
                for seed, value in zip(self.plan.seeds, cell.accuracies, strict=True)
            ],
        )

    def _job(self, column: Column, arm: Arm, setting: Setting, seed: int, evaluate: str) -> Job:
        start = self._pretrained(column.student) if arm.pretrained else None
        return Job(
            column.student,
            self.plan.reported if evaluate == "test" else self.plan.target,
            column.samples,
            seed,
            replace(setting.options(self.plan.training), seed=seed),
            evaluate,
            setting.terms,
            setting.task_weight,
            self.teacher,
            start,
        )

    def _pretrained(self, network: str) -> str:
        """A student trained on the teacher's data, for the row that starts from it."""
        if network not in self.pretrained:
            source = self.plan.source.load()
            trained, _, _ = trained_teacher(
                network, source, self.plan.teacher_training, cache=self.folder / "pretrained", say=self._say
            )
            self.pretrained[network] = keep_network(self.folder, "student", trained, network, source)
        return self.pretrained[network]

    def _run(self, jobs: list[Job], each: Any = lambda job, result: None) -> list[Result]:
        return run_all(jobs, self.folder, workers=self.options.workers, bar=self.bar, each=each)

    def _say(self, line: str) -> None:
        if not self.options.quiet:
            tqdm.write(line, file=sys.stderr)


def _steps(plan: Plan) -> int:
    """All steps of students' trainings: the bar's total. A combination tries at most as many rates as it has parts."""
    columns = sum(len(panel.columns) for panel in plan.panels)
    tried = sum(len(arm.settings) or len(arm.parts) for arm in plan.arms)
    runs = len(plan.panels) * tried * len(plan.search_seeds) + columns * len(plan.arms) * len(plan.seeds)
    return runs * plan.training.steps
