"""The trainer: it learns, repeats itself, says what it does, and stops early on nonsense."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_network import plain_distiller
from small_networks import SmallNet
from torch import Tensor, nn
from training_runs import QUICK, assert_same, made, train

from vidfast.distill import VID, Distiller
from vidfast.distill.conversion import synchronise_batchnorm
from vidfast.distill.data import Images
from vidfast.distill.trainer import NonFiniteLossError, Trainer


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
            # Without gradients the labels' loss is called again, to see what is the matter with it.
            calls.extend([1] * torch.is_grad_enabled())
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
    synchronise_batchnorm(tapped)
    assert isinstance(tapped.student.first[1], nn.SyncBatchNorm)
    tapped.eval()(small_data.images, small_data.labels).loss.backward()
    hooked = Distiller(SmallNet(4))
    hooked.student.first[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"got a forward hook on 'first.1'"):
        synchronise_batchnorm(hooked)


def test_what_cannot_work_is_refused_before_training(small_data: Images) -> None:
    distiller = Distiller(SmallNet(4), task_loss=partial(nn.functional.cross_entropy, reduction="sum"))
    with pytest.raises(ValueError, match="'task' has reduction='sum'"):
        Trainer(distiller, small_data, replace(QUICK, accumulation=2))
    nothing = small_data.subset(torch.arange(0))
    with pytest.raises(ValueError, match="'test' has none"):
        Trainer(Distiller(SmallNet(4)), small_data, QUICK, evaluate={"test": nothing})
    with pytest.raises(ValueError, match=r"fp16.*needs a GPU"):
        Trainer(Distiller(SmallNet(4)), small_data, replace(QUICK, mixed_precision="fp16", device="cpu"))
