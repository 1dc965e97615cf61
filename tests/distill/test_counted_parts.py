"""Batches in parts whose labels do not all count: the parts make the loss of the whole, or the loss is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from vidfast.distill import KD, Distiller
from vidfast.distill.task import count_of
from vidfast.distill.trainer import NonFiniteLossError, Trainer, TrainOptions

WEIGHTS = torch.tensor([0.5, 3.0, 1.0, 0.0, 2.0])
LABELS = torch.tensor([1, 2, 0, 3, -100, -100, -100, 4])
DENSE = torch.tensor([[1, 255, 0], [255, 255, 255], [4, 2, 255], [0, 0, 3]] * 2)


class OwnCrossEntropy(nn.CrossEntropyLoss):
    """A subclass that divides by something else, so nothing is known of it."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(input, target, reduction="sum", ignore_index=self.ignore_index) / 3


KNOWN: dict[str, tuple[Any, Tensor]] = {
    "cross_entropy": (F.cross_entropy, LABELS),
    "ignore_index": (partial(F.cross_entropy, ignore_index=1), torch.tensor([1, 2, 0, 3, 1, 1, 1, 4])),
    "class weights": (partial(F.cross_entropy, weight=WEIGHTS), LABELS),
    "a module": (
        nn.CrossEntropyLoss(weight=WEIGHTS + 0.5, ignore_index=2, label_smoothing=0.1),
        torch.tensor([1, 2, 0, 3, 2, 2, 2, 4]),
    ),
    "smoothed": (partial(F.cross_entropy, label_smoothing=0.2), LABELS),
    "dense": (nn.CrossEntropyLoss(ignore_index=255), DENSE),
    "dense, weighted": (partial(F.cross_entropy, weight=WEIGHTS, ignore_index=255), DENSE),
    "uint8": (partial(F.cross_entropy, ignore_index=255), torch.tensor([1, 2, 0, 3, 4, 255, 255, 4]).byte()),
    "probabilities": (F.cross_entropy, torch.softmax(torch.randn(8, 5), 1)),
    "nll_loss": (lambda z, y: F.nll_loss(F.log_softmax(z, 1), y, WEIGHTS), LABELS),
}
COUNTS: dict[str, Callable[[Tensor], Tensor | float]] = {
    "nll_loss": lambda y: WEIGHTS[y.clamp(min=0)].where(y != -100, torch.zeros(())).sum()
}


class Net(nn.Module):
    """(B, 5), or (B, 5, 3) for dense labels."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 15 if dense else 5)
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(x)
        return found.unflatten(1, (5, 3)) if self.dense else found


def fit(task_loss: Any, labels: Tensor, **options: Any) -> tuple[dict[str, float], Tensor]:
    torch.manual_seed(0)
    count = options.pop("task_count", None)
    dense = labels.dim() == 2 and not labels.is_floating_point()
    x = torch.randn(8, 6)
    terms = [KD(weight=0.5, class_dim=1)]
    distiller = Distiller(Net(dense), Net(dense), terms, example=x[:2], task_loss=task_loss, task_count=count)
    given: dict[str, Any] = {
        "steps": 2,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "schedule": "constant",
        **options,
    }
    trainer = Trainer(
        distiller, TensorDataset(x, labels), TrainOptions(batch_size=8, lr=0.5, device="cpu", **given),
        progress=False,
    )  # fmt: skip
    return trainer.fit()[-1], distiller.student.fc.weight.detach()


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("accumulation", [2, 3, 8])
def test_parts_count_by_what_their_loss_averages_over(name: str, accumulation: int) -> None:
    task_loss, labels = KNOWN[name]
    row, weight = fit(task_loss, labels, task_count=COUNTS.get(name))
    parts, other = fit(task_loss, labels, task_count=COUNTS.get(name), accumulation=accumulation)
    assert parts["loss_task"] == pytest.approx(row["loss_task"], rel=1e-5)
    assert parts["loss"] == pytest.approx(row["loss"], rel=1e-5)
    torch.testing.assert_close(other, weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KNOWN)
def test_counts_are_what_torch_divides_by(name: str) -> None:
    """The mean is the sum over that count, on logits of which torch makes both."""
    task_loss, labels = KNOWN[name]
    count = COUNTS.get(name) or count_of(task_loss)
    assert count is not None
    logits = (
        torch.randn(8, 5, 3) if labels.dim() == 2 and not labels.is_floating_point() else torch.randn(8, 5)
    )
    halves = [slice(0, 3), slice(3, 8)]
    shares = [float(count(labels[half])) / float(count(labels)) for half in halves]
    assert sum(shares) == pytest.approx(1)
    whole = task_loss(logits, labels)
    parts = [
        task_loss(logits[half], labels[half]) * share for half, share in zip(halves, shares, strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_losses_of_which_nothing_is_known() -> None:
    lacking = [
        lambda z, y: F.cross_entropy(z, y),
        partial(F.cross_entropy, reduction="sum"),
        partial(F.cross_entropy, size_average=False),
        partial(F.cross_entropy, torch.zeros(1, 5)),
        OwnCrossEntropy(),
        nn.MSELoss(),
        F.mse_loss,
    ]
    assert [count_of(loss) for loss in lacking] == [None] * len(lacking)  # type: ignore[arg-type]


UNKNOWN: dict[str, Any] = {
    "a function that ignores": lambda z, y: F.cross_entropy(z, y),
    "a class of one's own": lambda z, y: F.cross_entropy(z, y.clamp(min=0), weight=WEIGHTS),
    "a subclass that divides by 3": OwnCrossEntropy(),
    "the largest": lambda z, y: F.cross_entropy(z, y, reduction="none").max(),
    "a sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_loss_that_its_parts_do_not_make_is_refused_before_anything_moves(name: str) -> None:
    fit(UNKNOWN[name], LABELS)
    task_loss = UNKNOWN[name]
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    student = Net(dense=False)
    start = student.fc.weight.detach().clone()
    distiller = Distiller(student, Net(dense=False), [KD()], example=x[:2], task_loss=task_loss)
    options = TrainOptions(steps=2, batch_size=8, accumulation=2, device="cpu")
    trainer = Trainer(distiller, TensorDataset(x, LABELS), options, progress=False)
    with pytest.raises(
        ValueError, match=r"a mean over images where a batch is cut.*task_count=.*task_count=len"
    ):
        trainer.fit()
    assert torch.equal(student.fc.weight, start)
    # Whoever counts by images all the same says so.
    fit(task_loss, LABELS, accumulation=2, task_count=len)


MEANS: dict[str, Any] = {
    "cross_entropy inside": lambda z, y: F.cross_entropy(z, y),
    "one-hot": lambda z, y: F.mse_loss(z, F.one_hot(y, 5).float()),
    "a module": nn.MultiMarginLoss(),
}


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_over_images_needs_nothing_said(name: str) -> None:
    labels = LABELS.clamp(min=0)
    row, weight = fit(MEANS[name], labels)
    parts, other = fit(MEANS[name], labels, accumulation=3)
    assert parts["loss"] == pytest.approx(row["loss"], rel=1e-5)
    torch.testing.assert_close(other, weight, rtol=1e-5, atol=1e-6)


def test_ignored_labels_that_come_later_are_found() -> None:
    """The first batches have none; the step that has them is looked at with the next check."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 6), torch.randint(0, 5, (64,))
    y[torch.randperm(64)[:4]] = -100
    distiller = Distiller(Net(False), task_loss=lambda z, y: F.cross_entropy(z, y))
    options = TrainOptions(steps=40, batch_size=4, accumulation=4, check_every=5, lr=1e-3, device="cpu")
    with pytest.raises(
        (ValueError, NonFiniteLossError), match=r"a mean over images|labels of that step's batch"
    ):
        Trainer(distiller, TensorDataset(x, y), options, progress=False).fit()


# ---- batches of which nothing counts, and the advice on a loss that is not finite


@pytest.mark.parametrize("name", [n for n in KNOWN if n not in ("probabilities", "uint8")])
def test_a_batch_in_which_everything_is_ignored_counts_nothing(name: str) -> None:
    task_loss, labels = KNOWN[name]
    index = {"ignore_index": 1, "a module": 2, "dense": 255, "dense, weighted": 255}.get(name, -100)
    ignored = torch.full_like(labels, index)
    for accumulation in (1, 2):
        row, weight = fit(task_loss, ignored, accumulation=accumulation, task_count=COUNTS.get(name))
        assert row["loss_task"] == 0
        assert weight.isfinite().all()
    dense = labels.dim() == 2
    distiller = Distiller(Net(dense), task_loss=task_loss, task_count=COUNTS.get(name))
    losses = distiller(torch.randn(8, 6), ignored)
    losses.loss.backward()
    assert losses.loss == 0
    assert torch.equal(distiller.student.fc.weight.grad, torch.zeros_like(distiller.student.fc.weight))


def advice(inputs: Tensor, labels: Tensor, task_loss: Any = F.cross_entropy, **options: Any) -> str:
    torch.manual_seed(0)
    teacher = Net(False)
    if options.pop("broken_teacher", False):
        teacher.fc.weight.data[0, 0] = torch.inf
    distiller = Distiller(Net(False), teacher, [KD()], example=torch.randn(2, 6), task_loss=task_loss)
    given = {"steps": 10, "batch_size": 8, "lr": 0.01, "device": "cpu", **options}
    with pytest.raises(NonFiniteLossError) as caught:
        Trainer(distiller, TensorDataset(inputs, labels), TrainOptions(**given), progress=False).fit()
    assert caught.value.step == 1
    return str(caught.value)


def test_the_advice_names_the_cause() -> None:
    inputs, labels = torch.randn(8, 6), LABELS.clamp(min=0)
    broken = inputs.clone()
    broken[3, 2] = torch.nan
    assert "the inputs of that step's batch are not finite" in advice(broken, labels)
    ignoring = partial(advice, inputs, torch.full((8,), -100), lambda z, y: F.cross_entropy(z, y))
    assert "the labels of that step's batch alone make the task_loss not finite" in ignoring()
    assert "what the teacher gives for that step's batch is not finite ('logits')" in advice(
        inputs, labels, broken_teacher=True
    )
    torch.manual_seed(0)
    divergent = advice(inputs * 1e30, labels, lambda z, y: (z * 1e30).square().mean())
    assert divergent.endswith("in step 1; lower the learning rate or that term's weight")


def test_a_scale_of_the_labels_term_in_a_loop_of_ones_own() -> None:
    torch.manual_seed(0)
    distiller = Distiller(Net(False), Net(False), [KD(weight=0.5)], example=torch.randn(2, 6))
    x, counted = torch.randn(8, 6), LABELS != -100
    distiller(x, LABELS).loss.backward()
    expected = distiller.student.fc.weight.grad.clone()
    for form in (float, torch.tensor):
        distiller.zero_grad()
        for half in (slice(0, 3), slice(3, 8)):
            share = form(counted[half].sum().item() / counted.sum().item())
            part = x[half]
            distiller(part, LABELS[half], scale=len(part) / 8, task_scale=share).loss.backward()
        torch.testing.assert_close(distiller.student.fc.weight.grad, expected)
