"""What changes the mode of a network gives it back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from network_states import modes
from small_networks import SmallNet
from torch import Tensor, nn
from torch.nn import functional as F
from training_runs import QUICK, made

from vidfast.distill import KD, Distiller
from vidfast.distill.data import Images
from vidfast.distill.modes import eval_mode, kept_modes
from vidfast.distill.trainer import Trainer


def fit_in_a_file(distiller: Distiller, data: Images) -> None:
    trainer = Trainer(distiller, data, QUICK, evaluate={"t": data}, folder="/dev/null/run", progress=False)
    with pytest.raises(OSError, match="null"):
        trainer.fit()


USES: dict[str, Callable[[Distiller, Images], Any]] = {
    "accuracy": lambda d, data: Trainer(d, data, QUICK, progress=False).accuracy(data),
    "fit": lambda d, data: Trainer(d, data, QUICK, evaluate={"t": data}, progress=False).fit(),
    "accuracy, fit": lambda d, data: [
        (trainer := Trainer(d, data, QUICK, progress=False)).accuracy(data),
        trainer.fit(),
    ],
    "fit, fit": lambda d, data: [Trainer(d, data, QUICK, progress=False).fit() for _ in range(2)],
    "teacher_activations": lambda d, data: d.teacher_activations(data.images),
    "a failure in fit": fit_in_a_file,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("frozen", ["BatchNorm by its mode", "nothing", "all of the student in eval mode"])
def test_modes_are_given_back(small_data: Images, use: str, frozen: str) -> None:
    distiller = made(small_data)
    assert distiller.teacher is not None
    distiller.train()
    distiller.teacher.train()
    distiller.teacher.second.eval()
    if frozen.startswith("all"):
        distiller.student.eval()
    if frozen.startswith("BatchNorm"):
        distiller.student.first[1].eval()
        distiller.terms["vid"].regressors[0][0].eval()
    before, teacher = modes(distiller), modes(distiller.teacher)
    statistics = copy.deepcopy(distiller.teacher.state_dict())
    USES[use](distiller, small_data)
    assert modes(distiller) == before
    assert modes(distiller.teacher) == teacher
    assert all(torch.equal(value, statistics[name]) for name, value in distiller.teacher.state_dict().items())
    if frozen.startswith("BatchNorm"):
        assert int(distiller.student.first[1].num_batches_tracked) == 0
        if "fit" in use and "failure" not in use:
            assert int(distiller.student.second[1].num_batches_tracked) >= QUICK.steps


def test_what_the_terms_froze_stays_frozen_in_fit(small_data: Images) -> None:
    distiller = made(small_data)
    distiller.train()
    layer = distiller.terms["vid"].regressors[0][0]
    layer.eval()
    seen: list[bool] = []
    # A head reads the weights of its layers and does not call them, unless a hook asks for it.
    layer.register_forward_hook(lambda module, args, out: seen.append(module.training))
    Trainer(distiller, small_data, replace(QUICK, steps=2), progress=False).fit()
    assert seen == [False] * 2


class Merging(nn.Module):
    """Merges its adapter into the weights in eval mode, as LoRA layers do, and must be told of both modes."""

    shape = (3, 6)

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.adapter = nn.Parameter(torch.ones(self.shape)), nn.Parameter(torch.ones(self.shape))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += -self.adapter.data if self.merged else self.adapter.data
            self.merged = not self.merged
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.merged else self.weight + self.adapter)


class Noise(nn.Module):
    """Follows what train() says and not the flag."""

    def __init__(self) -> None:
        super().__init__()
        self.active, self.seen = True, list[bool]()

    def train(self, mode: bool = True) -> Noise:
        self.active = mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.active)
        return x


class Deaf(nn.Module):
    """Whose train() leaves what is inside as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> Deaf:
        return self

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(x)
        return out


def test_frozen_modules_with_a_train_of_their_own_stay_frozen_in_fit(small_data: Images) -> None:
    noise = Noise()
    student = nn.Sequential(nn.Flatten(), noise, nn.Linear(64, 3))
    noise.eval()
    Trainer(Distiller(student), small_data, QUICK, evaluate={"t": small_data}, progress=False).fit()
    assert set(noise.seen) == {False}
    assert (noise.active, noise.training) == (False, False)
    noise.train()
    noise.seen.clear()
    Trainer(Distiller(student), small_data, QUICK, progress=False).fit()
    assert set(noise.seen) == {True}
    assert (noise.active, noise.training) == (True, True)


def test_a_teacher_is_in_eval_mode_whatever_its_train_does(images: Tensor, labels: Tensor) -> None:
    teacher = nn.Sequential(nn.Flatten(), Deaf(), nn.Linear(64, 3))
    distiller = Distiller(SmallNet(4), teacher, [KD()], example=images)
    first, second = (distiller.teacher_activations(images).logits for _ in range(2))
    assert torch.equal(first, second)
    assert all(modes(teacher).values())


def test_all_of_a_frozen_part_stays_frozen_in_a_student_in_eval_mode(small_data: Images) -> None:
    student = SmallNet(4)
    student.first = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False), nn.Dropout(0.5)
    )
    student.first.requires_grad_(False)
    student.eval()
    seen: list[bool] = []
    student.first[2].register_forward_hook(lambda module, args, out: seen.append(module.training))
    Trainer(Distiller(student), small_data, QUICK, progress=False).fit()
    assert set(seen) == {False}
    assert int(student.first[1].num_batches_tracked) == 0
    assert int(student.second[1].num_batches_tracked) == QUICK.steps


def test_eval_mode_after_a_failure_within_a_train_of_ones_own_and_in_blocks_that_overlap() -> None:
    class Fails(nn.Linear):
        fails = True

        def train(self, mode: bool = True) -> Fails:
            if self.fails and not mode:
                self.fails = False
                raise RuntimeError("once")
            return super().train(mode)

    network = nn.Sequential(nn.Dropout(0.5), Fails(3, 3))
    with pytest.raises(RuntimeError, match="once"), eval_mode(network):
        raise AssertionError
    assert all(modes(network).values())
    with eval_mode(network):
        assert not any(modes(network).values())
        network.train()
        with eval_mode(network):
            assert not any(modes(network).values())
    assert all(modes(network).values())

    class Calibrates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def train(self, mode: bool = True) -> Calibrates:
            super().train(mode)
            with eval_mode(self.inner):
                self.inner(torch.zeros(1, 3))
            return self

    with eval_mode(Calibrates()):
        pass
    inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    outer = nn.Sequential(inner, nn.Linear(4, 4))
    first, second = eval_mode(inner), eval_mode(outer)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(modes(outer).values())
    second.__exit__(None, None, None)
    assert all(modes(outer).values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_networks_without_modes_of_their_own(small_data: Images) -> None:
    """A frozen part in TorchScript has no mode, and an exported one refuses to be given any."""
    first = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    batch = {0: torch.export.Dim("batch")}
    parts = {
        "frozen": torch.jit.freeze(torch.jit.script(first)),
        "exported": torch.export.export(first, (small_data.images[:4],), dynamic_shapes=(batch,)).module(),
    }
    for part in parts.values():
        student = nn.Sequential(part, Merging4(), nn.Dropout(0.5), nn.Linear(4, 3))
        trainer = Trainer(Distiller(student), small_data, QUICK, evaluate={"t": small_data}, progress=False)
        trainer.fit()
        assert student[2].training
        assert not student[1].merged
        with eval_mode(student):
            assert student[1].merged
            assert not student[2].training


def test_classes_with_a_train_of_their_own_are_told_of_both_modes() -> None:
    network = nn.Sequential(Merging(), nn.Dropout(0.5))
    network[1].eval()
    with eval_mode(network):
        assert network[0].merged
        assert not network.training
    assert not network[0].merged
    assert modes(network) == {"": True, "0": True, "1": False}
    with kept_modes(network):
        network.eval()
    assert not network[0].merged
    assert torch.equal(network[0].weight, torch.ones(3, 6))


class Merging4(Merging):
    shape = (4, 4)
