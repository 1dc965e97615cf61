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
    # To count by images all the same must be said.
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
    step = options.pop("step", 1)
    given = {"steps": 10, "batch_size": 8, "lr": 0.01, "device": "cpu", **options}
    with pytest.raises(NonFiniteLossError) as caught:
        Trainer(distiller, TensorDataset(inputs, labels), TrainOptions(**given), progress=False).fit()
    assert step is None or caught.value.step == step
    return str(caught.value)


def test_the_advice_names_the_cause() -> None:
    inputs, labels = torch.randn(8, 6), LABELS.clamp(min=0)
    broken = inputs.clone()
    broken[3, 2] = torch.nan
    assert "the inputs of that step's batch are not finite" in advice(broken, labels)
    ignoring = partial(advice, inputs, torch.full((8,), -100), lambda z, y: F.cross_entropy(z, y))
    assert "the labels of that step's batch alone make the task_loss not finite" in ignoring()
    assert "the teacher's 'logits' are not finite for that step's batch" in advice(
        inputs, labels, broken_teacher=True
    )
    torch.manual_seed(0)
    divergent = advice(inputs * 1e30, labels, lambda z, y: (z * 1e30).square().mean())
    assert divergent.endswith("in step 1; lower the learning rate or that term's weight")
    # Parts of which nothing counts are no cause where it is known what counts.
    one = torch.full((8,), -100)
    one[0] = 1
    divergent = advice(inputs, one, step=None, lr=1e30, accumulation=8)
    assert divergent.endswith("lower the learning rate or that term's weight")
    # Nor is a loss that is not finite for logits of 0 alone.
    normed = lambda z, y: F.cross_entropy(z / z.norm() * (1 if z.grad_fn is None else torch.inf), y)  # noqa: E731
    assert advice(inputs, labels, normed).endswith("lower the learning rate or that term's weight")


def test_the_advice_is_of_the_augmented_batch() -> None:
    distiller = Distiller(Net(False))
    before = torch.get_rng_state()

    def breaks(images: Tensor, generator: torch.Generator) -> Tensor:
        torch.rand(1)
        return images / 0

    options = TrainOptions(steps=2, batch_size=8, check_every=1, device="cpu")
    data = TensorDataset(torch.ones(8, 6), LABELS.clamp(min=0))
    with pytest.raises(NonFiniteLossError, match=r"the inputs of that step's batch.*or their augmentation"):
        Trainer(distiller, data, options, augment=breaks, progress=False).fit()
    assert torch.equal(torch.get_rng_state(), before)


def test_bytes_are_no_ignored_labels() -> None:
    """torch compares 156 with -100 as bytes, and finds them equal."""
    x, labels = torch.randn(4, 6), torch.tensor([156, 156, 3, 3], dtype=torch.uint8)
    student = nn.Linear(6, 200)
    with torch.no_grad():
        student.weight.zero_()
        student.bias.zero_()[3] = 1
    losses = Distiller(student)(x, labels)
    torch.testing.assert_close(losses.loss, F.cross_entropy(student(x), labels))
    losses.loss.backward()
    assert student.weight.grad is not None
    assert student.weight.grad.norm() > 0
    options = TrainOptions(steps=1, batch_size=4, device="cpu")
    trainer = Trainer(Distiller(student), TensorDataset(x, labels), options, progress=False)
    assert trainer.accuracy(TensorDataset(x, labels)) == 50.0
    big = nn.Linear(6, 1000)
    trainer = Trainer(Distiller(big), TensorDataset(x, labels), options, progress=False)
    with torch.no_grad():
        big.weight.zero_()
        big.bias.zero_()[240] = 1
    assert trainer.accuracy(TensorDataset(x, torch.full((4,), 240, dtype=torch.uint8))) == 100.0


def test_losses_that_cannot_be_called_twice_alike() -> None:
    """One on probabilities, one that keeps what it has seen, and one that draws, which must be told."""
    x, y = torch.randn(8, 6), torch.rand(8, 5)

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            return F.mse_loss(z, y)

    keeps = Keeps()
    drawn = lambda z, y: F.mse_loss(F.dropout(z, 0.9), y)  # noqa: E731
    options = TrainOptions(steps=3, batch_size=8, accumulation=2, device="cpu")
    for loss in (F.binary_cross_entropy, keeps):
        student = nn.Sequential(Net(False), nn.Sigmoid())
        Trainer(Distiller(student, task_loss=loss), TensorDataset(x, y), options, progress=False).fit()
    assert float(keeps.calls) == 6
    with pytest.raises(ValueError, match="task_count=len"):
        Trainer(Distiller(Net(False), task_loss=drawn), TensorDataset(x, y), options, progress=False).fit()
    told = Distiller(Net(False), task_loss=drawn, task_count=len)
    Trainer(told, TensorDataset(x, y), options, progress=False).fit()


def test_wrong_counts_and_shares_are_refused() -> None:
    x = torch.randn(8, 6)
    with pytest.raises(TypeError, match="task_count as a function of the labels, got int"):
        Distiller(Net(False), task_count=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one number for all labels, got \(8,\)"):
        Distiller(Net(False), task_count=lambda y: y != 255)(x, LABELS)
    with pytest.raises(ValueError, match=r"task_scale as a number or a scalar Tensor, got \(2,\)"):
        Distiller(Net(False))(x, LABELS, task_scale=torch.ones(2))


def test_the_documented_share_of_a_batch_of_which_nothing_counts() -> None:
    distiller, labels = Distiller(Net(False)), torch.full((8,), -100)
    assert distiller.task_count is not None
    share = distiller.task_count(labels[:4]) / distiller.task_count(labels)
    losses = distiller(torch.randn(4, 6), labels[:4], scale=0.5, task_scale=share)
    losses.loss.backward()
    assert losses.loss == 0
    assert torch.equal(distiller.student.fc.weight.grad, torch.zeros_like(distiller.student.fc.weight))


def test_weighted_losses_in_transforms_and_graphs() -> None:
    distiller = Distiller(Net(False), task_loss=partial(F.cross_entropy, weight=WEIGHTS))
    x = torch.randn(8, 6)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(distiller, parameters, (x, LABELS)).loss

    parameters = {name: p.detach() for name, p in distiller.named_parameters()}
    found = torch.func.grad(loss)(parameters)
    distiller(x, LABELS).loss.backward()
    for name, p in distiller.named_parameters():
        torch.testing.assert_close(found[name], p.grad)
    expected = [p.grad.clone() for p in distiller.parameters() if p.grad is not None]
    distiller.zero_grad()
    torch._dynamo.reset()
    torch.compile(distiller, backend="eager", fullgraph=True)(x, LABELS).loss.backward()
    torch.testing.assert_close([p.grad for p in distiller.parameters()], expected)
    torch._dynamo.reset()


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
