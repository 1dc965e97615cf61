"""Accuracy: judged right where it means something, refused before the training elsewhere, and never at its cost."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from training_runs import QUICK, assert_same, made, train

from vidfast.distill import KD, Distiller, LwF
from vidfast.distill.data import Images
from vidfast.distill.evaluation import Counts, check
from vidfast.distill.files import load_checkpoint
from vidfast.distill.trainer import Trainer, TrainOptions

OPTIONS = TrainOptions(steps=3, batch_size=8, lr=0.01, device="cpu")


class Net(nn.Module):
    """(B, 6) -> (B, *shape)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.fc, self.shape = nn.Linear(6, torch.Size(shape).numel()), shape

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x)
        return out.unflatten(1, self.shape)


def trained(
    shape: tuple[int, ...], labels: Tensor, task_loss: Any, **options: Any
) -> tuple[Distiller, list[Any]]:
    torch.manual_seed(1)
    x = torch.randn(len(labels), 6)
    distiller = Distiller(Net(*shape), task_loss=task_loss, **options)
    data = TensorDataset(x, labels)
    trainer = Trainer(distiller, data, OPTIONS, evaluate={"test": data}, progress=False)
    return distiller, [trainer.fit()[-1]["test_accuracy"], trainer.accuracy(data, batch_size=7), x]


def expected(logits: Tensor, labels: Tensor, ignored: int) -> float:
    """Item by item, position by position."""
    right = counted = 0
    for z, y in zip(
        logits.flatten(2).movedim(1, 2) if logits.dim() > 2 else logits[:, None], labels, strict=True
    ):
        for position, label in zip(z, y.flatten(), strict=True):
            if int(label) != ignored:
                counted += 1
                right += int(max(range(len(position)), key=lambda c: float(position[c])) == int(label))
    return 100 * right / counted


DENSE = torch.randint(0, 5, (20, 4, 4), generator=torch.Generator().manual_seed(0))
DENSE[:, :2] = 255
CLASSES = torch.arange(20) % 5
JUDGED: dict[str, tuple[tuple[int, ...], Tensor, Any, int]] = {
    "class numbers": ((5,), CLASSES, F.cross_entropy, -100),
    "with ignored ones": ((5,), CLASSES.where(CLASSES != 3, torch.tensor(-100)), F.cross_entropy, -100),
    "a background that does not count": ((5,), CLASSES, partial(F.cross_entropy, ignore_index=0), 0),
    "segmentation": ((5, 4, 4), DENSE, partial(F.cross_entropy, ignore_index=255), 255),
    "segmentation by a module": ((5, 4, 4), DENSE, nn.CrossEntropyLoss(ignore_index=255), 255),
    "positions": ((5, 3), DENSE[:, 2, :3], F.cross_entropy, -100),
    "as many positions as classes": ((3, 3), DENSE[:, 2, :3] % 3, F.cross_entropy, -100),
    "two classes as bools": ((2,), CLASSES % 2 == 0, lambda z, y: F.cross_entropy(z, y.long()), -100),
    "small integers": ((5,), CLASSES.to(torch.int16), lambda z, y: F.cross_entropy(z, y.long()), -100),
    "one item": ((5,), CLASSES[:1], F.cross_entropy, -100),
}


@pytest.mark.parametrize("name", JUDGED)
def test_accuracy_is_that_of_what_counts(name: str) -> None:
    shape, labels, task_loss, ignored = JUDGED[name]
    distiller, (in_fit, again, x) = trained(shape, labels, task_loss)
    with torch.no_grad():
        assert in_fit == again == pytest.approx(expected(distiller.student(x), labels, ignored))


def squared(z: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(z.flatten(1), y.float().flatten(1)[:, : z.flatten(1).shape[1]])


REFUSED: dict[str, tuple[tuple[int, ...], Tensor, Any, str]] = {
    "soft labels": ((5,), torch.softmax(torch.randn(20, 5), 1), F.cross_entropy, "as class numbers"),
    "as many as images": ((20,), torch.softmax(torch.randn(20, 20), 1), F.cross_entropy, "as class numbers"),
    "multi-label": ((5,), torch.randint(0, 2, (20, 5)).float(), F.binary_cross_entropy_with_logits, "as class"),
    "multi-label in integers": ((5,), torch.randint(0, 2, (20, 5)), squared, r"labels \(20, 5\), torch.int64"),
    "a column": ((5,), CLASSES[:, None], lambda z, y: F.cross_entropy(z, y[:, 0]), "logits' shape without"),
    "one logit": ((1,), (CLASSES[:, None] % 2).float(), F.binary_cross_entropy_with_logits, "as class numbers"),
    "one logit, whole numbers": ((1,), CLASSES % 2, lambda z, y: squared(z, y[:, None]), "of two or more classes"),
    "regression": ((1,), torch.randn(20, 1), F.mse_loss, "as class numbers"),
    "a language model": (
        (3, 7), DENSE[:, 2, :3], lambda z, y: F.cross_entropy(z.transpose(1, 2), y), r"logits \(20, 3, 7\)",
    ),
    "as many positions as classes": (
        (3, 3), DENSE[:, 2, :3] % 3, lambda z, y: F.cross_entropy(z.transpose(1, 2), y), "does not tell which",
    ),
    "a label that is no class": (
        (5, 4, 4), DENSE, lambda z, y: F.cross_entropy(z, y, ignore_index=255), r"got 160 others.*ignore_index=255",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_judged_is_refused_before_training(name: str, tmp_path: Path) -> None:
    shape, labels, task_loss, message = REFUSED[name]
    x = torch.randn(len(labels), 6)
    distiller = Distiller(Net(*shape), task_loss=task_loss)
    before = distiller.student.fc.weight.detach().clone()
    data = TensorDataset(x, labels)
    Trainer(distiller, data, OPTIONS, progress=False).fit()
    distiller.student.fc.weight.data.copy_(before)
    trainer = Trainer(
        distiller, data, OPTIONS, evaluate={"val": data}, folder=tmp_path / "run", progress=False
    )
    with pytest.raises(ValueError, match=rf"(?s)the evaluation set 'val': .*{message}"):
        trainer.fit()
    assert torch.equal(distiller.student.fc.weight, before)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=message):
        trainer.accuracy(data)


def test_nothing_that_counts_is_refused() -> None:
    counts = Counts(F.cross_entropy, torch.device("cpu"))
    counts.add(torch.randn(2, 5), torch.tensor([-100, -100]))
    trainer = Trainer(
        Distiller(Net(5)), TensorDataset(torch.randn(8, 6), CLASSES[:8]), OPTIONS, progress=False
    )
    with pytest.raises(ValueError, match="at least one label that is not ignored"):
        counts.accuracy(trainer.processes)
    with pytest.raises(ValueError, match=r"logits \(2,\)"):
        check(torch.randn(2), torch.tensor([1, 0]), F.cross_entropy)


# ---- nothing is lost to an evaluation that fails


class Damaged(Dataset[tuple[Tensor, Tensor]]):
    """Reads that fail from a certain number on."""

    def __init__(self, data: Images, after: int) -> None:
        self.data, self.after, self.read = data, after, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read += 1
        if self.read > self.after:
            raise OSError(f"image {index} is truncated")
        return self.data[index]


def test_every_evaluation_set_is_tried_before_training(small_data: Images, tmp_path: Path) -> None:
    wide = Images(torch.randn(4, 2, 8, 8), torch.zeros(4, dtype=torch.int64))
    cases: list[tuple[Any, type[Exception], str]] = [
        (wide, RuntimeError, "channels"),
        (Damaged(small_data, 13), OSError, "image 13 is truncated"),
    ]
    for data, kind, message in cases:
        distiller = made(small_data)
        before = {name: value.clone() for name, value in distiller.state_dict().items()}
        sets = {"good": small_data, "bad": data}
        trainer = Trainer(
            distiller, small_data, QUICK, evaluate=sets, folder=tmp_path / "run", progress=False
        )
        with pytest.raises(kind, match=message) as caught:
            trainer.fit()
        if sys.version_info >= (3, 11):
            assert any("'bad'" in note for note in caught.value.__notes__)
        assert_same(distiller.state_dict(), before)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("checkpoint_every", [0, 4, "epoch"])
@pytest.mark.parametrize("at", [1, 3])
def test_a_failed_evaluation_loses_nothing(
    small_data: Images, tmp_path: Path, checkpoint_every: Any, at: int
) -> None:
    """At the first row and at the last; resumed with the file mended, it is the run that did not fail."""
    options = replace(QUICK, checkpoint_every=checkpoint_every)
    whole = train(small_data, options, tmp_path / "whole")
    size = len(small_data)
    folder = tmp_path / "run"

    def run(test: Any) -> tuple[Any, Any]:
        from vidfast.distill.data import random_shift

        distiller = made(small_data)
        trainer = Trainer(
            distiller, small_data, options, evaluate={"test": test}, augment=random_shift(1), folder=folder,
            progress=False,
        )  # fmt: skip
        return trainer.fit(resume=True), distiller.state_dict()

    with pytest.raises(OSError, match="is truncated"):
        run(Damaged(small_data, size + (at - 1) * size + 5))
    state = load_checkpoint(folder / "checkpoint.pt")
    assert state["step"] == at * QUICK.eval_every
    assert len(state["history"]) == at - 1
    rows, weights = run(small_data)
    assert rows == whole[0]
    assert_same(weights, whole[1])
    assert (folder / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()
    assert load_checkpoint(folder / "checkpoint.pt")["history"] == rows
    # What is complete is loaded, and nothing is evaluated again.
    assert run(Damaged(small_data, size))[0] == rows


def test_tensorboard_has_each_row_once_after_a_failed_evaluation(small_data: Images, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    size = len(small_data)
    for data in (Damaged(small_data, 2 * size + 5), small_data):
        trainer = Trainer(
            made(small_data), small_data, QUICK, evaluate={"test": data}, folder=tmp_path, progress=False,
            tensorboard=True,
        )  # fmt: skip
        try:
            trainer.fit(resume=True)
        except OSError:
            continue
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("test_accuracy")] == [4, 8, 12]


def test_the_checkpoint_is_there_before_the_evaluation(small_data: Images, tmp_path: Path) -> None:
    """A process that is killed in an evaluation has lost no step."""
    seen: list[int] = []

    class Watches(Damaged):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            path = tmp_path / "checkpoint.pt"
            if index == 0 and path.exists():
                seen.append(load_checkpoint(path)["step"])
            return self.data[index]

    sets = {"test": Watches(small_data, 0)}
    Trainer(made(small_data), small_data, QUICK, evaluate=sets, folder=tmp_path, progress=False).fit()
    assert seen == [4, 8, 12]


def test_evaluation_sets_that_draw_are_the_same_when_resumed(small_data: Images, tmp_path: Path) -> None:
    class Draws(Damaged):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            image, label = super().__getitem__(index)
            return image + 3 * torch.randn(image.shape), label

    size, rows = len(small_data), []
    for after, folder in ((10**6, "whole"), (2 * size + 5, "failed"), (10**6, "failed")):
        sets = {"test": Draws(small_data, after)}
        trainer = Trainer(
            made(small_data), small_data, QUICK, evaluate=sets, folder=tmp_path / folder, progress=False
        )
        try:
            rows.append(trainer.fit(resume=True))
        except OSError:
            continue
    assert len(rows) == 2
    assert rows[0] == rows[1]


def test_a_loss_of_ones_own_names_its_ignored_label() -> None:
    class Own(nn.Module):
        ignore_index = 255

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(z, y, ignore_index=255)

    distiller, (found, _, x) = trained((5, 4, 4), DENSE, Own())
    with torch.no_grad():
        assert found == pytest.approx(expected(distiller.student(x), DENSE, 255))


def test_nothing_to_train_is_refused(small_data: Images) -> None:
    distiller = made(small_data).requires_grad_(False)
    with pytest.raises(ValueError, match="wanted a parameter that requires a gradient"):
        Trainer(distiller, small_data, QUICK, progress=False).fit()


def test_the_trial_changes_nothing_of_what_is_learned(small_data: Images) -> None:
    results = []
    for sets in ({}, {"test": small_data}):
        distiller = made(small_data)
        history = Trainer(distiller, small_data, QUICK, evaluate=sets, progress=False).fit()
        results.append(([row["loss"] for row in history], distiller.state_dict()))
    assert results[0][0] == results[1][0]
    assert_same(results[0][1], results[1][1])


# ---- KD's classes


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = F.softmax(teacher / temperature, -1)
    found = p * (F.log_softmax(teacher / temperature, -1) - F.log_softmax(student / temperature, -1))
    return found.sum(-1).mean() * temperature**2


@pytest.mark.parametrize(
    ("shape", "class_dim", "last"),
    [
        ((7,), None, lambda z: z),
        ((7,), -1, lambda z: z),
        ((4, 7), -1, lambda z: z),
        ((4, 7), 2, lambda z: z),
        ((7, 4), 1, lambda z: z.transpose(1, 2)),
        ((7, 7), -1, lambda z: z),
        ((5, 3, 2), None, lambda z: z.movedim(1, -1)),
        ((3, 2, 5), -1, lambda z: z),
    ],
)
def test_kd_over_the_dimension_of_the_classes(
    shape: tuple[int, ...], class_dim: int | None, last: Callable[[Tensor], Tensor]
) -> None:
    student, teacher, x = Net(*shape), Net(*shape), torch.randn(6, 6)
    teacher.fc.weight.data *= 5
    distiller = Distiller(student, teacher, [KD(2.0, weight=1.0, class_dim=class_dim)], example=x)
    with torch.no_grad():
        expected = divergence(last(student(x)), last(teacher(x)), 2.0)
    assert float(distiller(x).loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_kd_refuses_classes_that_are_not_there() -> None:
    x = torch.randn(6, 6)
    for class_dim, message in ((0, "not the batch's, got 0"), (2, "got 2"), (-2, "got -2"), (-3, "got -3")):
        with pytest.raises(ValueError, match=message):
            Distiller(Net(5), Net(5), [KD(class_dim=class_dim)], example=x)
    with pytest.raises(ValueError, match=r"wanted logits of two or more classes, got \(6, 1\)"):
        Distiller(Net(1), Net(1), [KD()], example=x)
    with pytest.raises(ValueError, match=r"two or more classes for form 'softened', got logits \(6, 1\)"):
        Distiller(Net(5), Net(1), [LwF("fc", "softened")], example=x)
    with pytest.raises(TypeError, match="class_dim as a whole number"):
        KD(class_dim=True)
    with pytest.raises(ValueError, match=r"of three dimensions, got \(6, 5, 3\)"):
        Distiller(Net(5, 3), Net(5, 3), [KD()], example=x)
    with pytest.raises(ValueError, match="the student has 3 and the teacher 5"):
        Distiller(Net(4, 3), Net(4, 5), [KD(class_dim=-1)], example=x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "class_dim=-1" in repr(KD(class_dim=-1))
