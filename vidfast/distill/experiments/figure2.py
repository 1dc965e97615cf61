"""Figure 2: how likely the student makes the teacher's activation, position by position (Ahn et al., CVPR 2019).

(a) the input; (b, c, d) log q(t_hw|s) of a pair of layers through VID training; (e) the same for a student that was
trained without transfer, after q alone (regressors and variances) was optimised on it, frozen, for as many steps;
(f) mean_c |t_chw|. Beside the pictures, the log-likelihoods themselves over all test images: for one teacher's layer
their difference between two students is the difference between the lower bounds of equation 3 on I(t; s).

By default on digits at 32x32; `--data cifar10 --root DIR --budget full` has the paper's networks. The trainings are
done one after the other, whatever --jobs says: each uses all cores.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import DataError, ImageData, LabelledImages, samples_per_class
from ..distiller import Distiller
from ..errors import UserError
from ..files import CheckpointError, load_checkpoint, save_checkpoint, write_csv, write_text
from ..fingerprint import add_weights
from ..methods.vid import VID
from ..models.base import TappedNetwork
from ..registry import UnknownNameError
from ..trainer import CHECKPOINT, NonFiniteLossError, Trainer, TrainOptions
from . import presets
from .arms import Rate
from .base import Options
from .compare import save_network
from .figure2_outcome import Outcome
from .figure2_plan import Plan
from .figure2_report import page, pictures, printed
from .folder import held, timed, took
from .likelihood import MarginalMaps, Reading, VIDMaps, read
from .progress import progress_bar, skip
from .runs import Job, Term, execute, fresh, keep_network, restored, sound, stored
from .teacher import trained_teacher

# Raise it when a change makes the same plan give another result.
FORMAT = 1

# Where the log-likelihoods are taken, as parts of the steps.
CURVE = (0.0, 0.01, 0.03, 0.07, 0.13, 0.2, 0.35, 0.5, 0.75, 1.0)

# In these, strokes are bright on black, so that brightness tells foreground from background.
BRIGHT_STROKES = ("digits", "digits32")


def plan(options: Options) -> Plan:
    quick = options.quick
    data = presets.data_spec(options, "digits32" if options.data == "digits" else options.data)
    training = presets.students(options, 300 if quick else 64_000)
    # Quick: what was found best on the digits' validation images (docs/vid-search.csv). Full: the public recipe.
    alone: Rate = ("sgd", 0.1 if quick else 0.05)
    vid: Rate = ("adamw", 0.02) if quick else ("sgd", 0.05)
    return Plan(
        data=data,
        teacher="wrn-16-1" if quick else "wrn-40-2",
        student="wrn-10-1" if quick else "wrn-16-1",
        samples=(options.samples or ((10,) if quick else (500,)))[0],
        seeds=presets.seeds(options, 3),
        term=Term("vid", 30.0 if quick else 1.0, presets.regressor(options, "linear", "conv3")),
        teacher_training=presets.teachers(options, 200 if quick else 64_000),
        alone=replace(training, optimizer=alone[0], lr=alone[1]),
        vid=replace(training, optimizer=vid[0], lr=vid[1]),
        budget=options.budget,
    )


def run(options: Options) -> None:
    """Do what the folder does not hold yet, write the files and print the result.

    It writes report.md, figure2.png, figure2-nats.png, figure2-log-likelihood.png and log_likelihood.csv.

    Raises UserError for what cannot work, and where another call works in the folder, before anything is written.
    """
    try:
        chosen = plan(options)
        data = chosen.data.load()
    except (ValueError, DataError, UnknownNameError) as error:
        raise UserError(str(error)) from error
    _check(chosen, options, data)
    with held(options.folder):
        _run(chosen, options, data)


def _run(plan: Plan, options: Options, data: ImageData) -> None:
    folder = options.folder
    write_text(folder / "plan.json", json.dumps(asdict(plan), indent=2, default=str) + "\n")
    steps = plan.teacher_training.steps + len(plan.seeds) * 3 * plan.vid.steps
    with timed(folder) as calls, progress_bar(steps, quiet=options.quiet) as bar:
        outcome = _Study(plan, data, options, bar).outcome()
    write_csv(folder / "log_likelihood.csv", outcome.rows())
    names = pictures(folder, plan, data, outcome)
    command = options.command("figure2")
    write_text(folder / "report.md", page(plan, data, outcome, command=command, took=took(calls)))
    print(printed(plan, outcome))
    print("\n".join(str(folder / name) for name in ("report.md", *names, "log_likelihood.csv")))


def _check(plan: Plan, options: Options, data: ImageData) -> None:
    """Find what cannot work, by building the networks and the term and looking at one image."""
    if options.arms:
        raise UserError("figure2 has no rows to choose from")
    if options.samples and len(options.samples) > 1:
        raise UserError(
            f"figure2 has one number of labelled images, got {', '.join(map(str, options.samples))}"
        )
    if not plan.seeds:
        raise UserError("figure2 needs one seed or more")
    if options.folder.exists() and not options.folder.is_dir():
        raise UserError(f"{options.folder}: wanted a folder, this is a file")
    if data.in_channels not in (1, 3):
        raise UserError(f"figure2 draws grey and RGB images, got {data.in_channels} channels")
    try:
        samples_per_class(data.train, plan.samples, seed=0)
        with torch.random.fork_rng(devices=[]):
            student, teacher = fresh(plan.student, data), fresh(plan.teacher, data)
            term = _vid(plan, student, teacher)
            Distiller(student, teacher, [term], example=data.train.example(2)).remove_taps()
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error).splitlines()[0]) from error
    layers = [layer for _, layer in term.pairs]
    if plan.layer not in layers:
        raise UserError(
            f"wanted a layer of the teacher that is paired ({', '.join(layers)}), got {plan.layer!r}"
        )


def _vid(plan: Plan, student: TappedNetwork, teacher: TappedNetwork) -> VID:
    term = plan.term.build(student, teacher)
    assert isinstance(term, VID)
    return term


def shown_images(data: ImageData, count: int) -> list[int]:
    """The test set's first image of each of `count` classes, evenly spread."""
    labels = data.test.labels
    classes = torch.linspace(0, data.num_classes - 1, min(count, data.num_classes)).round().long().tolist()
    return [int((labels == label).nonzero()[0, 0]) for label in classes]


class _Study:
    def __init__(self, plan: Plan, data: ImageData, options: Options, bar: tqdm[Any]) -> None:
        self.plan, self.data, self.folder, self.bar, self.options = plan, data, options.folder, bar, options
        self.shown = shown_images(data, plan.shown)
        self.bright = data.normalisation if data.name in BRIGHT_STROKES else None

    def outcome(self) -> Outcome:
        plan = self.plan
        self.bar.set_description("teacher")
        watch = _Watch(self.bar)
        network, metrics, cached = trained_teacher(
            plan.teacher,
            self.data,
            plan.teacher_training,
            cache=self.options.teachers,
            progress=watch,
            say=self._say,
        )
        if cached:
            watch.update(plan.teacher_training.steps)
        self._say(f"teacher {plan.teacher}: test accuracy {metrics['test_accuracy']:.1f} %")
        self.teacher = keep_network(self.folder, "teacher", network, plan.teacher, self.data)
        outcome = Outcome(float(metrics["test_accuracy"]), self.shown)
        for seed in plan.seeds:
            self._seed(seed, outcome)
        return outcome

    def _seed(self, seed: int, outcome: Outcome) -> None:
        """The three trainings of a seed, which have the same labelled images and initial student."""
        plan = self.plan
        labelled = samples_per_class(self.data.train, plan.samples, seed)

        self.bar.set_description(f"seed {seed}: VID")
        folder, accuracy = self._train("vid", seed, labelled)
        outcome.add("vid", seed, _stages(folder, plan.at(CURVE)), accuracy)
        outcome.marginal[seed] = _stage(folder / "marginal.pt")
        self._say(f"seed {seed}: student with VID-I {accuracy:.1f} %")

        self.bar.set_description(f"seed {seed}: no transfer")
        job = Job(plan.student, plan.data, plan.samples, seed, replace(plan.alone, seed=seed), "test")
        result, watch = stored(job, self.folder), _Watch(self.bar)
        if result is None:
            result = execute(job, self.folder, watch)
        else:
            watch.update(plan.alone.steps)
        if result.accuracy is None:
            raise UserError(f"the student without transfer could not be trained: {result.failure}")
        self._say(f"seed {seed}: student without transfer {result.accuracy:.1f} %")

        self.bar.set_description(f"seed {seed}: q without transfer")
        weights = self.folder / "runs" / job.digest / "student.safetensors"
        folder, _ = self._train("no transfer", seed, labelled, frozen=restored(weights).state_dict())
        outcome.add("no transfer", seed, _stages(folder, plan.at(CURVE)), result.accuracy)

    def _train(
        self, arm: str, seed: int, labelled: LabelledImages, frozen: dict[str, Tensor] | None = None
    ) -> tuple[Path, float]:
        """Train a student and q, or with a frozen student's weights q alone, and store the readings on the way.

        Returns the run's folder and the student's test accuracy after the last step.
        """
        plan, data = self.plan, self.data
        training = replace(plan.vid, seed=seed)
        folder = self.folder / "runs" / self._name(arm, seed, training, frozen)
        files = [folder / _file(step) for step in plan.at(CURVE)]
        if frozen is None:
            files.append(folder / "marginal.pt")
        watch = _Watch(self.bar)
        try:
            accuracy = float(json.loads((folder / "result.json").read_text())["accuracy"])
            for path in files:
                _stage(path)
            watch.update(training.steps)
            return folder, accuracy
        except (OSError, ValueError, KeyError, TypeError, CheckpointError):
            folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / CHECKPOINT)
        if any(path.exists() and not sound(path) for path in files):
            # From the beginning, since a reading of an earlier step cannot be taken later.
            for path in files:
                path.unlink(missing_ok=True)

        teacher = restored(self.folder / "networks" / self.teacher)
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            # Also for a frozen student: then the regressors begin with the same weights in both arms.
            torch.manual_seed(seed)
            student = fresh(plan.student, data)
            if frozen is not None:
                student.load_state_dict(frozen)
                student.eval().requires_grad_(False)
            vid = _vid(plan, student, teacher)
            distiller = Distiller(
                student,
                teacher,
                [vid],
                example=labelled.example(2),
                # A frozen student learns nothing from the labels.
                task_weight=1.0 if frozen is None else 0.0,
            )
        maps = VIDMaps(distiller, vid)

        def look(step: int) -> None:
            if not (folder / _file(step)).exists():
                _save(folder / _file(step), self._read(maps, vid))

        # The trainer tells of a step before it saves a checkpoint, so no checkpoint is ahead of the readings.
        watch = _Watch(self.bar, look, plan.at(CURVE))
        trainer = Trainer(
            distiller,
            labelled,
            training,
            evaluate={"test": data.test},
            augment=data.augment,
            folder=folder,
            progress=watch,
        )
        try:
            accuracy = float(trainer.fit(resume=True)[-1]["test_accuracy"])
        except NonFiniteLossError as error:
            raise UserError(f"{arm}, seed {seed}: {error}") from error
        if frozen is None:
            marginal = MarginalMaps(maps, labelled, floor=vid.eps)
            _save(folder / "marginal.pt", self._read(marginal, vid))
        maps.remove()
        distiller.remove_taps()
        save_network(folder / "student.safetensors", student.cpu(), plan.student, data)
        write_text(folder / "result.json", json.dumps({"accuracy": accuracy}) + "\n")
        (folder / CHECKPOINT).unlink(missing_ok=True)
        return folder, accuracy

    def _read(self, maps: VIDMaps | MarginalMaps, vid: VID) -> list[Reading]:
        return read(maps, vid.pair_names(), self.data.test, self.shown, bright=self.bright)

    def _name(self, arm: str, seed: int, training: TrainOptions, frozen: dict[str, Tensor] | None) -> str:
        """A folder's name that follows from all that its readings follow from."""
        plan = self.plan
        made_by = {
            "format": FORMAT,
            "data": self.data.name,
            "teacher": self.teacher,
            "student": plan.student,
            "samples": plan.samples,
            "shown": self.shown,
            "term": asdict(plan.term),
            "training": training.what_counts(),
        }
        digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode())
        add_weights(digest, frozen or {})
        return f"{arm.replace(' ', '-')}-seed{seed}-{digest.hexdigest()[:12]}"

    def _say(self, line: str) -> None:
        if not self.options.quiet:
            tqdm.write(line, file=sys.stderr)


class _Watch:
    """Stands where a Trainer's bar does: advances the experiment's bar, and looks at the networks at some steps."""

    def __init__(
        self,
        bar: tqdm[Any],
        look: Callable[[int], None] = lambda step: None,
        at: Collection[int] = (),
    ) -> None:
        self.bar, self.look, self.at = bar, look, frozenset(at)
        self.step: int | None = None

    def update(self, n: int, /) -> None:
        if self.step is None:
            # What an earlier call has done.
            skip(self.bar, n)
        else:
            self.bar.update(n)
        self.step = n + (self.step or 0)
        if self.step in self.at:
            self.look(self.step)


def _file(step: int) -> str:
    return f"step-{step:06d}.pt"


def _save(path: Path, readings: list[Reading]) -> None:
    save_checkpoint(path, {"readings": [reading.as_state() for reading in readings]})


def _stage(path: Path) -> list[Reading]:
    return [Reading(**state) for state in load_checkpoint(path, ("readings",))["readings"]]


def _stages(folder: Path, steps: Collection[int]) -> dict[int, list[Reading]]:
    return {step: _stage(folder / _file(step)) for step in steps}
