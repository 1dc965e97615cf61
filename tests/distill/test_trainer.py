"""The trainer: it learns, repeats itself, continues exactly, and stops early on nonsense."""

from __future__ import annotations

import csv
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_network import plain_distiller
from small_networks import PAIRS, SmallNet
from torch import Tensor, nn
from torch.utils.data import Dataset

from vidfast.distill import VID, Distiller
from vidfast.distill.data import Images, random_shift
from vidfast.distill.modes import synchronise_batchnorm
from vidfast.distill.stream import StreamBatches, seed_for
from vidfast.distill.trainer import NonFiniteLossError, Trainer, TrainOptions

QUICK = TrainOptions(steps=12, batch_size=8, lr=0.05, eval_every=4, checkpoint_every=4, device="cpu")


def made(images: Images, dropout: float = 0.3, **vid: Any) -> Distiller:
    torch.manual_seed(3)
    student, teacher = SmallNet(4, dropout), SmallNet(6)
    return Distiller(student, teacher, [VID(PAIRS, **vid)], example=images.images[:2])


def train(
    images: Images,
    options: TrainOptions = QUICK,
    folder: Path | None = None,
    resume: bool = False,
    **more: Any,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    distiller = made(images, **more)
    trainer = Trainer(
        distiller,
        images,
        options,
        evaluate={"test": images},
        augment=random_shift(1),
        folder=folder,
        progress=False,
    )
    history = trainer.fit(resume=resume)
    return history, distiller.state_dict()


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_it_learns_and_reports(small_data: Images, tmp_path: Path) -> None:
    options = replace(QUICK, steps=60, eval_every=20)
    history, state = train(small_data, options, tmp_path, dropout=0.0)
    assert [row["step"] for row in history] == [20, 40, 60]
    assert history[-1]["epoch"] == pytest.approx(60 * 8 / 30)
    assert history[-1]["test_accuracy"] > 90
    assert history[-1]["loss"] < history[0]["loss"]
    for row in history:
        assert row["loss"] == pytest.approx(row["loss_task"] + row["loss_vid"])
    with (tmp_path / "metrics.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(row["loss_vid"]) for row in written] == [row["loss_vid"] for row in history]
    # alpha is trained, not only stored.
    alphas = [value for key, value in state.items() if key.endswith("alpha")]
    assert len(alphas) == 2
    assert all(
        bool((alpha != made(small_data).terms["vid"].likelihoods[0].alpha[0]).all()) for alpha in alphas
    )


def test_the_seed_decides_everything(small_data: Images) -> None:
    one, again, other = (train(small_data, replace(QUICK, seed=seed)) for seed in (0, 0, 1))
    assert one[0] == again[0]
    assert_same(one[1], again[1])
    assert one[0] != other[0]


def test_training_does_not_touch_the_random_state(small_data: Images) -> None:
    distiller = made(small_data)
    state = torch.get_rng_state()
    Trainer(distiller, small_data, QUICK, progress=False).fit()
    assert torch.equal(torch.get_rng_state(), state)


def test_accumulation_does_not_change_what_is_learned(small_data: Images) -> None:
    """Up to rounding, where nothing depends on the batch; parts of 3, 3 and 2 images are weighted by size."""
    states = []
    for accumulation in (1, 3):
        distiller = plain_distiller(small_data)
        options = replace(QUICK, accumulation=accumulation)
        history = Trainer(distiller, small_data, options, progress=False).fit()
        states.append((history[-1]["loss"], distiller.state_dict()))
    assert states[0][0] == pytest.approx(states[1][0], rel=1e-5)
    for key, value in states[0][1].items():
        torch.testing.assert_close(states[1][1][key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_accumulated_parts_reach_the_kernel_with_a_gradient_of_one(small_data: Images) -> None:
    distiller = made(small_data, weight=3.0)
    seen: list[float] = []
    for nll in distiller.terms["vid"].likelihoods:
        nll.register_forward_hook(
            lambda module, args, loss: loss.register_hook(lambda g: seen.append(float(g))) and None
        )
    Trainer(distiller, small_data, replace(QUICK, steps=2, accumulation=2), progress=False).fit()
    assert seen == [1.0] * 8


def test_trainers_of_different_precision_in_one_process(small_data: Images) -> None:
    seen: list[torch.dtype] = []
    for precision in ("no", "bf16", "no"):
        distiller = made(small_data)
        distiller.student.first.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
        options = replace(QUICK, mixed_precision=precision, steps=1)
        Trainer(distiller, small_data, options, progress=False).fit()
    assert seen == [torch.float32, torch.bfloat16, torch.float32]


def test_bf16_runs_and_leaves_the_module_as_it_was(small_data: Images) -> None:
    distiller = made(small_data, dropout=0.0)
    seen: list[torch.dtype] = []
    hook = distiller.student.first.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    history = Trainer(
        distiller, small_data, replace(QUICK, mixed_precision="bf16", steps=60), evaluate={"test": small_data},
        progress=False,
    ).fit()  # fmt: skip
    assert torch.bfloat16 in seen
    assert history[-1]["test_accuracy"] > 80
    seen.clear()
    distiller(small_data.images, small_data.labels)
    assert seen == [torch.float32]
    hook.remove()


def test_channels_last_changes_the_layout_and_not_the_result(small_data: Images) -> None:
    """The convolutions' outputs reach the loss in that layout, as one column for each channel."""
    results = []
    for channels_last in (False, True):
        distiller = plain_distiller(small_data)
        seen: list[bool] = []
        distiller.terms["vid"].regressors[0].register_forward_hook(
            lambda m, a, out, seen=seen: seen.append(out.is_contiguous(memory_format=torch.channels_last))
        )
        options = replace(QUICK, channels_last=channels_last)
        history = Trainer(distiller, small_data, options, evaluate={"v": small_data}, progress=False).fit()
        assert set(seen) == {channels_last}
        results.append([row["loss"] for row in history])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


@pytest.mark.parametrize("term", ["vid", "task"])
def test_a_loss_that_is_not_finite_stops_early_and_is_named(
    small_data: Images, tmp_path: Path, term: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    distiller = made(small_data)
    calls: list[int] = []

    def broken(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(1)
            loss = original(*args, **kwargs)
            return loss * float("nan") if len(calls) >= 3 else loss

        return call

    if term == "vid":
        monkeypatch.setattr(distiller.terms["vid"], "forward", broken(distiller.terms["vid"].forward))
    else:
        distiller.task_loss = broken(distiller.task_loss)
    options = replace(QUICK, steps=100, eval_every=0, checkpoint_every=0, check_every=5)
    trainer = Trainer(distiller, small_data, options, folder=tmp_path, progress=False)
    with pytest.raises(NonFiniteLossError, match=rf"the term '{term}' became inf or nan in step 3;"):
        trainer.fit()
    assert len(calls) == 5
    assert not (tmp_path / "checkpoint.pt").exists()


def test_every_image_comes_equally_often_and_no_batch_is_short() -> None:
    batches = list(StreamBatches(10, 4, 15, seed=0))
    assert len(batches) == 15
    assert {len(batch) for batch in batches} == {4}
    counts = torch.tensor(batches).flatten().bincount()
    assert counts.tolist() == [6] * 10
    assert [len(b) for b in StreamBatches(3, 64, 2, seed=0)] == [3, 3]


def test_seeds_differ_where_torch_looks() -> None:
    """Its CPU generator takes the lower 32 bits of a seed."""
    seeds = {
        seed_for(seed, purpose, step, rank) & 0xFFFFFFFF
        for seed in range(10)
        for purpose in ("order", "augment")
        for step in range(20)
        for rank in range(3)
    }
    assert len(seeds) == 10 * 2 * 20 * 3


def test_batches_from_a_start_and_for_processes_are_parts_of_the_same_stream() -> None:
    whole = list(StreamBatches(10, 4, 15, seed=5))
    assert list(StreamBatches(10, 4, 15, seed=5, start=6)) == whole[6:]
    parts = [list(StreamBatches(10, 4, 15, seed=5, rank=rank, world=3)) for rank in range(3)]
    for i, batch in enumerate(whole):
        assert sorted(index for part in parts for index in part[i]) == sorted(batch)
    with pytest.raises(ValueError, match="one image a process"):
        StreamBatches(10, 2, 15, seed=5, rank=0, world=3)
    with pytest.raises(ValueError, match="at least one training image"):
        StreamBatches(0, 2, 15, seed=5)


def test_workers_do_not_change_what_is_learned(small_data: Images) -> None:
    assert_same(train(small_data)[1], train(small_data, replace(QUICK, workers=1))[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps of 1 or more"),
        ({"batch_size": 0}, "batch_size of 1"),
        ({"lr": float("nan")}, "lr of 0 or more"),
        ({"weight_decay": -1.0}, "weight_decay of 0"),
        ({"seed": -1}, "seed of 0"),
        ({"schedule": "linear"}, "one of cosine, steps, constant"),
        ({"optimizer": "lion"}, "one of sgd, adamw"),
        ({"mixed_precision": "int8"}, "one of no, bf16, fp16"),
        ({"device": "tpu"}, "one of auto, cpu, cuda"),
        ({"epochs": 0}, "epochs of 1 or more"),
        ({"checkpoint_every": "hour"}, "checkpoint_every as a number of steps or 'epoch'"),
        ({"clip": 0.0}, "clip above 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainOptions(**options)


def test_schedules_and_clipping(small_data: Images) -> None:
    lr = [row["lr"] for row in train(small_data, replace(QUICK, schedule="steps", eval_every=1, lr=1e-3))[0]]
    # The rate for the step after the row: ten times less at 60, 80 and 90 % of 12 steps.
    assert lr == pytest.approx([1e-3] * 7 + [1e-4] * 2 + [1e-5] + [1e-6] * 2)
    clipped = train(small_data, replace(QUICK, clip=1e-9, weight_decay=0.0))[1]
    for key, value in made(small_data).state_dict().items():
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(clipped[key], value, rtol=0, atol=1e-6)


def test_a_folder_that_cannot_be_made_is_an_os_error(small_data: Images, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        train(small_data, QUICK, tmp_path / "file" / "run")


@pytest.mark.parametrize("whole_in_eval", [False, True])
def test_what_was_frozen_stays_frozen(small_data: Images, whole_in_eval: bool) -> None:
    """BatchNorm in eval mode keeps its statistics, also in a second fit; the rest is trained."""
    distiller = made(small_data)
    frozen = distiller.student.first[1]
    frozen.eval().requires_grad_(False)
    if whole_in_eval:
        distiller.eval()
    trainer = Trainer(distiller, small_data, QUICK, progress=False)
    for _ in range(2):
        before = frozen.running_mean.clone()
        other = distiller.student.second[1].running_mean.clone()
        trainer.fit()
        assert torch.equal(frozen.running_mean, before)
        assert not torch.equal(distiller.student.second[1].running_mean, other)


def test_frozen_by_its_mode_alone(small_data: Images) -> None:
    distiller = made(small_data)
    distiller.student.train()
    distiller.student.first[1].eval()
    trainer = Trainer(distiller, small_data, QUICK, progress=False)
    for _ in range(2):
        before = distiller.student.first[1].running_mean.clone()
        trainer.fit()
        assert torch.equal(distiller.student.first[1].running_mean, before)


def test_a_second_fit_begins_a_history_of_its_own(small_data: Images) -> None:
    trainer = Trainer(made(small_data), small_data, QUICK, progress=False)
    assert [row["step"] for row in trainer.fit()] == [4, 8, 12]
    assert [row["step"] for row in trainer.fit()] == [4, 8, 12]


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """A data set that draws random numbers from every generator when it is read."""

    def __init__(self, images: Images, source: str) -> None:
        self.images, self.source = images, source

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = {"random": random.random, "numpy": np.random.rand, "torch": lambda: float(torch.rand(()))}
        image, label = self.images[index]
        return image + drawn[self.source](), label


@pytest.mark.parametrize("source", ["random", "numpy", "torch"])
def test_what_a_data_set_draws_follows_from_the_seed(small_data: Images, source: str) -> None:
    def trained(**options: Any) -> list[dict[str, Any]]:
        data = Noisy(small_data, source)
        options = {"eval_every": 1, **options}
        trainer = Trainer(made(small_data), data, replace(QUICK, **options), progress=False)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        history = trainer.fit()
        assert states == (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        )
        return history

    first = trained()
    for generator in (random.random, np.random.rand, lambda: torch.rand(())):
        generator()
    assert trained() == first
    assert trained(workers=2) == first
    assert trained(seed=1) != first
    # Every image of every batch has its own draw.
    still = Trainer(made(small_data), small_data, replace(QUICK, eval_every=1), progress=False).fit()
    assert still[0]["loss"] != first[0]["loss"]


def test_epochs_and_checkpoints_at_their_ends(small_data: Images, tmp_path: Path) -> None:
    options = replace(QUICK, epochs=3, eval_every="epoch", checkpoint_every="epoch")
    trainer = Trainer(made(small_data), small_data, options, folder=tmp_path, progress=False)
    # 30 images in batches of 8: the ends are in steps 4, 8 and 12 (3.75, 7.5 and 11.25).
    assert [row["step"] for row in trainer.fit()] == [4, 8, 12]
    due = [step for step in range(1, 13) if trainer.options.checkpoint_due(step, 30)]
    assert due == [4, 8, 12]
    # One step is a whole epoch: not a checkpoint a step.
    tiny = TrainOptions(epochs=1000, batch_size=64, checkpoint_every="epoch").of_data(30)
    assert tiny.steps == 1000
    assert sum(tiny.checkpoint_due(step, 30) for step in range(1, 1001)) == 100
    large = TrainOptions(epochs=2, batch_size=8, checkpoint_every="epoch").of_data(1000)
    assert [step for step in range(1, 251) if large.checkpoint_due(step, 1000)] == [125, 250]


def test_progress_may_be_anything_with_update(small_data: Images) -> None:
    class Queue:
        def __init__(self) -> None:
            self.done: list[int] = []

        def update(self, n: int) -> None:
            self.done.append(n)

    progress = Queue()
    Trainer(made(small_data), small_data, QUICK, progress=progress).fit()
    assert sum(progress.done) == QUICK.steps
    with pytest.raises(TypeError, match=r"update\(n\), got object"):
        Trainer(made(small_data), small_data, QUICK, progress=object())  # type: ignore[arg-type]


def test_tensorboard_gets_every_row(small_data: Images, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = Trainer(
        made(small_data),
        small_data,
        QUICK,
        evaluate={"test": small_data},
        folder=tmp_path,
        progress=False,
        tensorboard=True,
    )
    history = trainer.fit()
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = [name for name in history[0] if name != "step"]
    assert sorted(found.Tags()["scalars"]) == sorted(names)
    for name in names:
        written = [(event.step, event.value) for event in found.Scalars(name)]
        assert written == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in history]


def test_tensorboard_without_the_package_or_a_folder(
    small_data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="needs folder="):
        Trainer(made(small_data), small_data, QUICK, progress=False, tensorboard=True)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        Trainer(made(small_data), small_data, QUICK, folder=tmp_path, progress=False, tensorboard=True)
    assert list(tmp_path.iterdir()) == []


def test_sums_are_refused_where_the_batch_is_cut(small_data: Images) -> None:
    cut = replace(QUICK, accumulation=2)
    Trainer(made(small_data, reduction="sum"), small_data, QUICK, progress=False)
    Trainer(made(small_data, reduction="batchmean"), small_data, cut, progress=False)
    with pytest.raises(ValueError, match=r"'vid' has reduction='sum'.*accumulation of 2"):
        Trainer(made(small_data, reduction="sum"), small_data, cut, progress=False)
    task = Distiller(SmallNet(4), task_loss=nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(ValueError, match=r"'task' has reduction='sum'"):
        Trainer(task, small_data, cut, progress=False)


def test_synchronised_batchnorm_keeps_parameters_and_taps(small_data: Images) -> None:
    distiller = made(small_data)
    before = distiller.state_dict(keep_vars=True)
    distiller.student.second[1].eval()
    synchronise_batchnorm(distiller)
    assert isinstance(distiller.student.first[1], nn.SyncBatchNorm)
    assert not distiller.student.second[1].training
    after = distiller.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    distiller.eval()(small_data.images, small_data.labels).loss.backward()
    tapped = Distiller(SmallNet(4), SmallNet(6), [VID({"first.1": "first"})], example=small_data.images[:2])
    with pytest.raises(ValueError, match=r"'first.1' is tapped"):
        synchronise_batchnorm(tapped)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"steps": 2.5}, "steps as a whole number, got 2.5"),
        ({"eval_every": 1.5}, "eval_every as a whole number"),
        ({"lr": "0.1"}, "lr as a number, got '0.1'"),
        ({"steps": True}, "steps as a whole number, got True"),
    ],
)
def test_options_of_other_types_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TrainOptions(**options)


def test_what_cannot_work_is_refused_before_training(small_data: Images) -> None:
    distiller = Distiller(SmallNet(4), task_loss=partial(nn.functional.cross_entropy, reduction="sum"))
    with pytest.raises(ValueError, match="'task' has reduction='sum'"):
        Trainer(distiller, small_data, replace(QUICK, accumulation=2))
    nothing = small_data.subset(torch.arange(0))
    with pytest.raises(ValueError, match="'test' has none"):
        Trainer(Distiller(SmallNet(4)), small_data, QUICK, evaluate={"test": nothing})
    with pytest.raises(ValueError, match=r"fp16.*needs a GPU"):
        Trainer(Distiller(SmallNet(4)), small_data, replace(QUICK, mixed_precision="fp16", device="cpu"))
