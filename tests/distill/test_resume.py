"""Checkpoints: a run killed anywhere and resumed is the uninterrupted one, and those of other runs are refused."""

from __future__ import annotations

import copy
import csv
import multiprocessing
import os
import signal
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import PAIRS, SmallNet
from torch import Tensor, nn
from training_runs import QUICK, assert_same, made, train

from vidfast.distill import VID, Distiller
from vidfast.distill.data import Images, random_shift
from vidfast.distill.files import CheckpointError, load_checkpoint, save_checkpoint
from vidfast.distill.trainer import Trainer, TrainOptions

ADAMW = replace(QUICK, optimizer="adamw", lr=0.01, schedule="steps", warmup=3)


def train_until_killed(images: Images, options: TrainOptions, folder: Path, at: int) -> None:
    """In a process of its own, which kills itself at the `at`-th of its steps and operations on files."""
    torch.set_num_threads(1)
    done = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return count

    for module, name in ((os, "fsync"), (os, "replace"), (os, "chmod"), (Trainer, "_step"), (torch, "save")):
        setattr(module, name, counted(getattr(module, name)))
    train(images, options, folder, resume=True)


@pytest.mark.parametrize(
    "options",
    [QUICK, replace(ADAMW, checkpoint_every=3), replace(QUICK, checkpoint_every="epoch", workers=1)],
    ids=["sgd", "off the rows", "epochs"],
)
def test_a_run_killed_anywhere_and_resumed_is_the_uninterrupted_one(
    small_data: Images, tmp_path: Path, options: TrainOptions
) -> None:
    whole = train(small_data, options, tmp_path / "whole")
    context, folder, killed = multiprocessing.get_context("fork"), tmp_path / "killed", 0
    # Again and again, each process a little further: before a write, half way and after it.
    for at in (2, 5, 6, 7, 8, 9, 10, 11, 13):
        process = context.Process(target=train_until_killed, args=(small_data, options, folder, at))
        process.start()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 5
    resumed = train(small_data, options, folder, resume=True)
    assert resumed[0] == whole[0]
    assert_same(resumed[1], whole[1])
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "metrics.csv"]
    assert (folder / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_what_is_finished_is_only_loaded(
    small_data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(small_data, QUICK, tmp_path)
    monkeypatch.setattr(Trainer, "_step", None)
    finished = train(small_data, QUICK, tmp_path, resume=True)
    assert finished[0] == whole[0]
    assert_same(finished[1], whole[1])


@pytest.mark.parametrize("checkpoint_every", [1, 3, 5, 7])
def test_rows_are_the_same_wherever_the_checkpoint_was(
    small_data: Images, tmp_path: Path, checkpoint_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part of a row's means that was gathered before the checkpoint is in it."""
    whole = train(small_data, QUICK)
    options = replace(QUICK, checkpoint_every=checkpoint_every)
    original, done = Trainer._step, []

    def step(self: Trainer, *args: Any) -> None:
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(1)
        original(self, *args)

    monkeypatch.setattr(Trainer, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        train(small_data, options, tmp_path)
    monkeypatch.setattr(Trainer, "_step", original)
    rows, weights = train(small_data, options, tmp_path, resume=True)
    assert rows == whole[0]
    assert_same(weights, whole[1])
    with (tmp_path / "metrics.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [row["loss"] for row in whole[0]]


def test_checkpoints_of_another_run_are_refused(small_data: Images, tmp_path: Path) -> None:
    train(small_data, QUICK, tmp_path)

    def refused(reason: str, **more: Any) -> None:
        before = (tmp_path / "checkpoint.pt").read_bytes()
        with pytest.raises(CheckpointError, match=rf"checkpoint.pt: was trained with {reason}"):
            train(more.pop("data", small_data), more.pop("options", QUICK), tmp_path, resume=True, **more)
        assert (tmp_path / "checkpoint.pt").read_bytes() == before

    refused("lr 0.05 and not 0.1", options=replace(QUICK, lr=0.1))
    refused("the term 'vid' with other options", regressor="linear")
    refused("the term 'vid' with other options", weight=3.0)
    refused(r"the terms \['vid'\] and not \['mine'\]", name="mine")
    refused("30 images and not 27", data=small_data.subset(torch.arange(27)))
    refused("other images", data=Images(small_data.images + 1, small_data.labels))
    refused("other images", data=Images(small_data.images, small_data.labels.flip(0)))


def test_checkpoints_of_another_teacher_task_or_augmentation_are_refused(
    small_data: Images, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    teacher = SmallNet(6)

    def trainer(
        augment: Any = None, alpha_lr: float = 1.0, teacher: nn.Module = teacher, **more: Any
    ) -> Trainer:
        torch.manual_seed(1)
        terms = [VID(PAIRS, alpha_lr=alpha_lr)]
        distiller = Distiller(SmallNet(4), teacher, terms, example=small_data.images[:2], **more)
        return Trainer(distiller, small_data, QUICK, folder=tmp_path, progress=False, augment=augment)

    rows = trainer().fit()
    assert trainer().fit(resume=True) == rows
    for changed, reason in (
        (trainer(task_weight=0.5), "the task 1 x cross_entropy and not 0.5 x cross_entropy"),
        (trainer(task_loss=nn.MultiMarginLoss()), "the task 1 x cross_entropy and not 1 x MultiMarginLoss"),
        (trainer(augment=random_shift(1)), "the augmentation none and not random_shift"),
        (trainer(teacher=SmallNet(6)), "other teacher weights"),
        (trainer(teacher=copy.deepcopy(teacher), teacher_dtype=torch.float64), "teacher_dtype None and not"),
        (trainer(alpha_lr=2.0), "the term 'vid' with other options"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            changed.fit(resume=True)


LOSSES: dict[str, Callable[[], Any]] = {
    "plain": nn.CrossEntropyLoss,
    "weights": lambda: nn.CrossEntropyLoss(weight=torch.tensor([9.0, 1.0, 1.0])),
    "other weights": lambda: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0, 1.0])),
    "ignored": lambda: nn.CrossEntropyLoss(ignore_index=2),
    "smoothed": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    "partial": lambda: partial(nn.functional.cross_entropy, label_smoothing=0.1),
}


def test_checkpoints_of_another_loss_count_or_frozen_part_are_refused(
    small_data: Images, tmp_path: Path
) -> None:
    def attempt(
        folder: str, task_loss: Any, count: Any = None, change: Callable[[Distiller], Any] = lambda _: None
    ) -> None:
        torch.manual_seed(3)
        options = {"task_loss": task_loss, "task_count": count}
        distiller = Distiller(
            SmallNet(4), SmallNet(6), [VID(PAIRS)], example=small_data.images[:2], **options
        )
        change(distiller)
        Trainer(distiller, small_data, QUICK, folder=tmp_path / folder, progress=False).fit(resume=True)

    for name, make in LOSSES.items():
        attempt(name, make())
        attempt(name, make())
        for other, make_other in LOSSES.items():
            if other != name:
                with pytest.raises(CheckpointError, match="was trained with the task"):
                    attempt(name, make_other())
    with pytest.raises(CheckpointError, match="was trained with the task"):
        attempt("plain", nn.CrossEntropyLoss(), len)
    with pytest.raises(CheckpointError, match="other parameters frozen"):
        attempt("plain", nn.CrossEntropyLoss(), None, lambda d: d.student.first.requires_grad_(False))


def test_checkpoints_of_another_student_are_refused(small_data: Images, tmp_path: Path) -> None:
    class Wider(SmallNet):
        pass

    train(small_data, QUICK, tmp_path)
    more_classes = SmallNet(4)
    more_classes.fc = nn.Linear(8, 4)
    for student, reason in (
        (Wider(4), r"student .*SmallNet and not .*Wider"),
        (more_classes, "of another model"),
    ):
        teacher = made(small_data).teacher
        distiller = Distiller(student, teacher, [VID(PAIRS)], example=small_data.images[:2])
        with pytest.raises(CheckpointError, match=reason):
            Trainer(
                distiller, small_data, QUICK, folder=tmp_path, progress=False, augment=random_shift(1)
            ).fit(resume=True)


def test_where_and_how_often_may_differ(small_data: Images, tmp_path: Path) -> None:
    whole = train(small_data, QUICK, tmp_path)
    other = replace(QUICK, workers=1, checkpoint_every=2, check_every=3)
    assert train(small_data, other, tmp_path, resume=True)[0] == whole[0]


def _without_momentum(state: dict[str, Any]) -> None:
    del state["optimizer"]["state"]


def _other_shapes(state: dict[str, Any]) -> None:
    state["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3)


def _fewer_groups(state: dict[str, Any]) -> None:
    state["optimizer"]["param_groups"].pop()


def _no_optimizer(state: dict[str, Any]) -> None:
    state["optimizer"] = 5


def _no_scheduler(state: dict[str, Any]) -> None:
    state["scheduler"] = None


def _no_meter(state: dict[str, Any]) -> None:
    state["meter"] = {"names": ["task"], "sums": torch.zeros(3), "count": 0}


@pytest.mark.parametrize(
    "damage",
    [_without_momentum, _other_shapes, _fewer_groups, _no_optimizer, _no_scheduler, _no_meter],
)
def test_a_damaged_state_of_the_training_is_a_checkpoint_error(
    small_data: Images, tmp_path: Path, damage: Callable[[dict[str, Any]], None]
) -> None:
    train(small_data, QUICK, tmp_path)
    path = tmp_path / "checkpoint.pt"
    state = load_checkpoint(path)
    damage(state)
    save_checkpoint(path, state)
    with pytest.raises(CheckpointError, match="state of the training does not fit") as caught:
        train(small_data, QUICK, tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_named(small_data: Images, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(CheckpointError, match=r"checkpoint.pt: damaged"):
        train(small_data, QUICK, tmp_path, resume=True)
    with pytest.raises(FileExistsError, match=r"checkpoint.pt: wanted a folder without a training"):
        train(small_data, QUICK, tmp_path)
    (tmp_path / "checkpoint.pt").unlink()
    train(small_data, QUICK, tmp_path)
    path = tmp_path / "checkpoint.pt"
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    middle = whole.find(b"FB", largest.header_offset) + largest.file_size // 2
    whole[middle : middle + 4] = bytes(255 - b for b in whole[middle : middle + 4])
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"checkpoint.pt: damaged"):
        train(small_data, QUICK, tmp_path, resume=True)
    state = dict.fromkeys(("run", "step", "optimizer", "scheduler", "scaler", "meter", "history"))
    save_checkpoint(path, {**state, "options": 5, "distiller": []})
    with pytest.raises(CheckpointError, match="options or weights are none"):
        train(small_data, QUICK, tmp_path, resume=True)
    save_checkpoint(tmp_path / "checkpoint.pt", {"step": 3})
    with pytest.raises(CheckpointError, match=r"lacks 'options', 'run'"):
        train(small_data, QUICK, tmp_path, resume=True)


def test_data_that_differs_at_every_reading_is_resumed(small_data: Images, tmp_path: Path) -> None:
    """Nothing can be told of such images but their number."""

    class Counting(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
        read = 0

        def __len__(self) -> int:
            return len(small_data)

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            self.read += 1
            image, label = small_data[index]
            return image + 0.01 * self.read, label

    for _ in range(2):
        trainer = Trainer(made(small_data), Counting(), QUICK, folder=tmp_path, progress=False)
        assert len(trainer.fit(resume=True)) == 3


def test_terms_that_show_an_address_are_recognised(small_data: Images, tmp_path: Path) -> None:
    class Shown(nn.Module):
        def extra_repr(self) -> str:
            return f"f={object()!r}"

        def forward(self, x: Tensor) -> Tensor:
            return x

    def distiller() -> Distiller:
        torch.manual_seed(3)

        def regressor(s: torch.Size, t: torch.Size) -> nn.Module:
            return nn.Sequential(nn.Conv2d(s[1], t[1], 1), Shown())

        terms = [VID(PAIRS, regressor=regressor)]
        return Distiller(SmallNet(4), SmallNet(6), terms, example=small_data.images[:2])

    for _ in range(2):
        Trainer(distiller(), small_data, QUICK, folder=tmp_path, progress=False).fit(resume=True)
