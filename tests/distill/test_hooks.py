"""Hooks while a Distiller runs and at no other time, in threads, copies and files; and what else stays as it was."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from network_states import hooks, modes
from small_networks import PAIRS, SmallNet
from torch import Tensor, nn
from training_runs import QUICK, made

from vidfast._torch import set_compiled_call
from vidfast.distill import KD, VID, Distiller, Taps
from vidfast.distill.data import Images
from vidfast.distill.modes import eval_mode
from vidfast.distill.trainer import Trainer


def test_threads_with_one_teacher_or_one_distiller(images: Tensor, labels: Tensor) -> None:
    """The teacher is in training mode between its runs, so a run of one thread must not end another one's eval mode."""
    teacher = SmallNet(6, dropout=0.5)
    made = [Distiller(SmallNet(4).eval(), teacher, [VID(PAIRS)], example=images) for _ in range(2)]
    expected = [float(d(images, labels).loss.detach()) for d in made]
    statistics = copy.deepcopy(teacher.state_dict())
    wrong: list[object] = []
    other = torch.randn(9, 1, 8, 8)

    def work(which: int) -> None:
        try:
            for _ in range(25):
                if which == 3:
                    with eval_mode(teacher), torch.no_grad():
                        teacher(other)
                else:
                    found = float(made[which % 2](images, labels).loss.detach())
                    if found != pytest.approx(expected[which % 2], rel=1e-5):
                        wrong.append(found)
        except Exception as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(which,)) for which in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert all(modes(teacher).values())
    assert all(torch.equal(value, statistics[name]) for name, value in teacher.state_dict().items())
    assert hooks(teacher) == 0


def test_a_recording_takes_its_own_threads_calls_alone(student: nn.Module, images: Tensor) -> None:
    """Also from the first moment of a recording on."""
    student.eval()
    taps, expected, wrong = Taps(student, ["first"]), student.first(images), list[object]()
    other, done = torch.randn(9, 1, 8, 8), threading.Event()

    def elsewhere() -> None:
        try:
            while not done.is_set():
                student.first(other)
        except Exception as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=elsewhere)
    try:
        thread.start()
        for _ in range(300):
            with taps.recording() as activations:
                student.first(images)
                if not torch.equal(activations()["first"], expected):
                    wrong.append("another thread's")
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert wrong == []


def test_a_layer_that_only_another_thread_calls_is_an_error_that_says_so(
    student: nn.Module, images: Tensor
) -> None:
    taps = Taps(student, ["first"])
    with taps.recording() as activations:
        thread = threading.Thread(target=student, args=(images,))
        thread.start()
        thread.join()
        with pytest.raises(
            RuntimeError, match=r"'first' was not called.*another thread called it, as torch.nn.Data"
        ):
            activations()


def test_no_hooks_are_left_on_networks(images: Tensor, labels: Tensor) -> None:
    teacher = SmallNet(6)
    for _ in range(10):
        distiller = Distiller(SmallNet(4), teacher, [VID(PAIRS)], example=images)
        distiller(images, labels).loss.backward()
        assert hooks(teacher) == hooks(distiller.student) == 0
    with pytest.raises(ValueError, match="scalar"):
        Distiller(SmallNet(4), teacher, [VID(PAIRS)], example=images, task_loss=lambda z, y: z)(
            images, labels
        )
    assert hooks(teacher) == 0


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
def test_hooks_on_compiled_networks_live_as_long_as_their_distiller(images: Tensor, labels: Tensor) -> None:
    teacher = SmallNet(6)
    teacher.compile(backend="eager")
    distiller = Distiller(SmallNet(4), teacher, [VID(PAIRS)], example=images)
    distiller(images, labels).loss.backward()
    assert hooks(teacher) == len(PAIRS)
    # Neither in copies nor in files: what stands there does nothing, and is not of vidfast.
    for other in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        for module in other.modules():
            assert all(type(hook).__module__ == "builtins" for hook in module._forward_hooks.values())
        torch.testing.assert_close(other.eval()(images), teacher.eval()(images))
        teacher.train()
    torch._dynamo.reset()  # its caches hold what they have seen
    del distiller
    gc.collect()
    assert hooks(teacher) == 0


@pytest.mark.usefixtures("_fresh_dynamo")
def test_a_training_that_compiles_leaves_networks_that_script_and_hold_no_hooks(small_data: Images) -> None:
    distiller = made(small_data)
    networks = (distiller.student, distiller.teacher)
    options = replace(QUICK, steps=2, compile="eager")
    Trainer(distiller, small_data, options, evaluate={"t": small_data}, progress=False).fit()
    assert [hooks(network) for network in networks if network is not None] == [0, 0]
    distiller(small_data.images, small_data.labels)
    torch.jit.script(distiller.student)
    # Compiled by the caller, and not any more.
    distiller.student.compile(backend="eager")
    distiller(small_data.images, small_data.labels)
    assert hooks(distiller.student) == len(PAIRS)
    set_compiled_call(distiller.student, None)
    distiller(small_data.images, small_data.labels)
    assert hooks(distiller.student) == 0


def test_a_student_is_scripted_and_loads_where_vidfast_is_not(images: Tensor, labels: Tensor) -> None:
    student = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    distiller = Distiller(student, copy.deepcopy(student), [VID({"1": "1"})], example=images)
    distiller(images, labels).loss.backward()
    scripted = torch.jit.script(student)
    torch.testing.assert_close(scripted(images), student(images))
    stored = io.BytesIO()
    torch.save(student, stored)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, io, torch; sys.modules['vidfast'] = None; "
            "network = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False); "
            "print(tuple(network(torch.ones(2, 1, 8, 8)).shape))",
        ],
        input=stored.getvalue(),
        capture_output=True,
    )
    assert done.stdout.decode().strip() == "(2, 3)", done.stderr.decode()


@pytest.mark.parametrize("left", ["checkpoint.pt", "metrics.csv"])
def test_a_folder_with_another_training_is_refused_before_anything_happens(
    small_data: Images, tmp_path: Path, left: str
) -> None:
    Trainer(made(small_data), small_data, QUICK, folder=tmp_path, progress=False).fit()
    for path in tmp_path.iterdir():
        if path.name != left:
            path.unlink()
    before = (tmp_path / left).read_bytes()
    distiller = made(small_data)
    weights = copy.deepcopy(distiller.state_dict())
    trainer = Trainer(distiller, small_data, replace(QUICK, seed=1), folder=tmp_path, progress=False)
    with pytest.raises(FileExistsError, match=rf"{left}: wanted a folder without a training.*resume=True"):
        trainer.fit()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {left: before}
    assert all(torch.equal(value, weights[name]) for name, value in distiller.state_dict().items())


def test_neither_accuracy_nor_the_probe_touch_a_random_state(small_data: Images) -> None:
    class Draws(SmallNet):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images + random.random() + float(np.random.rand()) + torch.rand(1))

    def states() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    student, teacher = Draws(4), Draws(6)
    torch.set_rng_state(torch.tensor(before[2], dtype=torch.uint8))
    distiller = Distiller(student, teacher, [KD()], example=small_data.images[:2])
    assert states() == before
    trainer = Trainer(distiller, small_data, QUICK, progress=False)
    trainer.accuracy(small_data)
    assert states() == before
    trainer.fit()
    assert states() == before


def test_a_failed_fit_leaves_no_gradients(small_data: Images) -> None:
    distiller = made(small_data)

    def fails(gradient: Tensor) -> None:
        raise ZeroDivisionError

    handle = distiller.student.first[0].weight.register_hook(fails)
    with pytest.raises(ZeroDivisionError):
        Trainer(distiller, small_data, QUICK, progress=False).fit()
    handle.remove()
    assert all(p.grad is None for p in distiller.parameters())


def test_gradients_that_were_left_do_not_count_in_fit(small_data: Images) -> None:
    results = []
    for left in (False, True):
        distiller = made(small_data)
        if left:
            (100 * distiller(small_data.images, small_data.labels).loss).backward()
            distiller.load_state_dict(made(small_data).state_dict())
        history = Trainer(distiller, small_data, QUICK, progress=False).fit()
        results.append((history, distiller.state_dict()))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())
