"""What a Distiller or a Trainer is put beside stays as it was: networks, their modes and hooks, and files."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import PAIRS, SmallNet
from torch import Tensor, nn
from torch.nn import functional as F
from training_runs import QUICK, made

from vidfast._torch import set_compiled_call
from vidfast.distill import KD, VID, Distiller, Taps
from vidfast.distill.data import Images
from vidfast.distill.files import CheckpointError
from vidfast.distill.modes import eval_mode, kept_modes
from vidfast.distill.trainer import Trainer


def modes(network: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in network.named_modules()}


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())


# ---- modes


def test_two_networks_that_teach_each_other_both_learn(images: Tensor, labels: Tensor) -> None:
    """Each is the teacher in eval mode while the other learns, and BatchNorm counts in both."""
    a, b = SmallNet(4, dropout=0.5), SmallNet(6, dropout=0.5)
    ab, ba = (Distiller(s, t, [VID(PAIRS), KD()], example=images) for s, t in ((a, b), (b, a)))
    optimizers = [torch.optim.SGD(d.parameter_groups(lr=0.05)) for d in (ab, ba)]
    ab.train()
    ba.train()
    seen: list[bool] = []
    b.drop.register_forward_hook(lambda module, args, out: seen.append(module.training))
    for _ in range(5):
        (ab(images, labels).loss + ba(images, labels).loss).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert seen == [False, True] * 5
    for network in (a, b):
        assert all(modes(network).values())
        # As a teacher it does not count: one count a step, as a student.
        assert int(network.first[1].num_batches_tracked) == 5


def test_modules_without_parameters_may_be_shared(images: Tensor, labels: Tensor) -> None:
    shared = nn.Dropout(0.5)
    student, teacher = SmallNet(4), SmallNet(6)
    student.drop = teacher.drop = shared
    distiller = Distiller(student, teacher, [KD()], example=images)
    distiller.train()
    seen: list[bool] = []
    shared.register_forward_hook(lambda module, args, out: seen.append(module.training))
    distiller(images, labels)
    assert seen == [False, True]
    assert shared.training


class Adapted(nn.Module):
    """A backbone, an adapter and a classifier, as where several adapters share one base."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.adapter, self.fc = base, nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.adapter(self.base(x)))
        return out


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


SHARED: dict[str, Callable[[SmallNet, SmallNet], object]] = {
    "the same memory after load_state_dict(assign=True)": lambda s, t: t.load_state_dict(
        s.state_dict(), assign=True
    ),
    "the same memory in another Parameter": lambda s, t: setattr(
        t.first[0], "weight", nn.Parameter(s.first[0].weight.data, requires_grad=False)
    ),
    "the same Parameter in another layer": lambda s, t: setattr(t.fc, "bias", s.fc.bias),
    "a part of the teacher": lambda s, t: setattr(s, "second", t.second),
}


@pytest.mark.parametrize("way", SHARED)
def test_shared_parameters_that_are_trained_are_refused(images: Tensor, way: str) -> None:
    student, teacher = SmallNet(4), SmallNet(4)
    SHARED[way](student, teacher)
    for options in ({}, {"teacher_dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match=r"share the parameter '\S+', which is trained"):
            Distiller(student, teacher, [KD()], example=images, **options)


def test_a_term_with_a_layer_of_the_teacher_is_refused(images: Tensor) -> None:
    teacher = SmallNet(4)
    terms = [VID({"first": "second"}, regressor=lambda s, t: teacher.second)]
    with pytest.raises(ValueError, match=r"share the parameter 'second.0.weight', which is trained"):
        Distiller(SmallNet(4), teacher, terms, example=images)


def test_shared_statistics_and_buffers_do_not_move(images: Tensor, labels: Tensor) -> None:
    student, teacher = SmallNet(4), SmallNet(4)
    teacher.first[1].running_mean = student.first[1].running_mean
    distiller = Distiller(student, teacher, [KD()], example=images)
    with pytest.raises(
        RuntimeError, match=r"share the layer 'first.1' \(BatchNorm2d\), and it is in training mode"
    ):
        distiller(images, labels)
    student.first[1].eval()
    distiller(images, labels)
    normed = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)).requires_grad_(False)
    x, y = torch.randn(6, 6), labels
    distiller = Distiller(Adapted(normed), Adapted(normed), [KD()], example=x)
    with pytest.raises(
        RuntimeError, match=r"share the buffer 'base.parametrizations.weight.0._[uv]', and a run of"
    ):
        distiller(x, y)
    normed.eval()
    distiller(x, y)


def test_a_shared_backbone_is_allowed_while_it_is_frozen() -> None:
    base = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).requires_grad_(False)
    x, y = torch.randn(6, 6), torch.tensor([0, 1, 2, 0, 1, 2])
    distiller = Distiller(Adapted(base), Adapted(base), [VID({"base": "base"}), KD()], example=x)
    before = copy.deepcopy(base.state_dict())
    distiller.train()
    with pytest.raises(
        RuntimeError, match=r"share the layer 'base.1' \(BatchNorm1d\), and it is in training mode"
    ):
        distiller(x, y)
    base.eval()
    optimizer = torch.optim.SGD(distiller.parameter_groups(lr=0.1, weight_decay=0.1), momentum=0.9)
    for _ in range(3):
        distiller(x, y).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    base[0].weight.requires_grad_(True)
    with pytest.raises(
        RuntimeError, match=r"share the parameter 'base.0.weight', and it requires a gradient since"
    ):
        distiller(x, y)
    with pytest.raises(ValueError, match=r"share the parameter 'base.0.weight', which is trained"):
        Distiller(Adapted(base), Adapted(base), [KD()], example=x)


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


# ---- threads


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


# ---- hooks, copies and files


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


# ---- the teacher's type and place


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_teacher_in_another_type_is_a_copy(images: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
    teacher = SmallNet(6)
    earlier = Distiller(SmallNet(4).eval(), teacher, [VID(PAIRS)], example=images)
    expected = earlier(images, labels).loss
    later = Distiller(SmallNet(4), teacher, [VID(PAIRS)], example=images, teacher_dtype=dtype)
    assert later.teacher is not teacher
    assert later.teacher is not None
    assert {p.dtype for p in later.teacher.parameters()} == {dtype}
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert not set(map(id, teacher.parameters())) & set(map(id, later.teacher.parameters()))
    later(images, labels).loss.backward()
    assert torch.equal(earlier(images, labels).loss, expected)
    # One that is of the type already is used as it is.
    assert Distiller(SmallNet(4), teacher, teacher_dtype=torch.float32).teacher is teacher


def test_a_copied_teacher_follows_what_is_loaded_or_trained(images: Tensor, labels: Tensor) -> None:
    a, b = SmallNet(4), SmallNet(6)
    ab, ba = (
        Distiller(s, t, [VID(PAIRS), KD()], example=images, teacher_dtype=torch.bfloat16)
        for s, t in ((a, b), (b, a))
    )
    for _ in range(2):
        for distiller in (ab, ba):
            optimizer = torch.optim.SGD(distiller.parameter_groups(lr=0.1))
            distiller(images, labels).loss.backward()
            optimizer.step()
    ab.teacher_activations(images)
    assert ab.teacher is not None
    for name, value in b.state_dict().items():
        assert torch.equal(ab.teacher.state_dict()[name], value.to(ab.teacher.state_dict()[name].dtype)), name
    other = SmallNet(6)
    b.load_state_dict(other.state_dict())
    expected = Distiller(SmallNet(4), other, [KD()], example=images, teacher_dtype=torch.bfloat16)
    assert torch.equal(ab.teacher_activations(images).logits, expected.teacher_activations(images).logits)
    # It keeps no weights alive, and a copy of the Distiller follows nothing.
    copied = pickle.loads(pickle.dumps(copy.deepcopy(ab)))
    place = weakref.ref(b.first[0].weight)
    with torch.no_grad():
        b.fc.weight.zero_()
    assert not torch.equal(copied.teacher_activations(images).logits, ab.teacher_activations(images).logits)
    del b, ba, distiller, optimizer
    gc.collect()
    assert place() is None
    ab(images, labels)


def test_complex_buffers_and_whole_numbers_stay_what_they_are(images: Tensor) -> None:
    class Rotary(SmallNet):
        def __init__(self) -> None:
            super().__init__(6)
            self.register_buffer(
                "turns", torch.polar(torch.ones(2), torch.tensor([0.5, 1.0])), persistent=False
            )
            self.register_buffer("places", torch.arange(3))

    teacher = Rotary()
    found = Distiller(SmallNet(4), teacher, [KD()], example=images, teacher_dtype=torch.bfloat16).teacher
    assert found is not None
    assert torch.equal(found.turns, teacher.turns)
    assert found.places.dtype == torch.int64


def test_a_teacher_of_numbers_runs_outside_of_autocast() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(9, 4), nn.Linear(4, 3)
            self.seen = list[bool]()

        def forward(self, tokens: Tensor) -> Tensor:
            self.seen.append(torch.is_autocast_enabled("cpu"))
            out: Tensor = self.fc(self.embed(tokens).mean(1))
            return out

    tokens, teacher = torch.randint(0, 9, (2, 5)), Tokens()
    distiller = Distiller(Tokens(), teacher, [KD()], example=tokens, teacher_dtype=torch.float32)
    for inputs in (tokens, (tokens,), {"tokens": tokens}):
        with torch.autocast("cpu", torch.bfloat16):
            distiller(inputs)
    assert teacher.seen == [False] * 4


def test_a_fixed_type_survives_a_change_of_the_rest_without_rounding(images: Tensor) -> None:
    teacher = SmallNet(6).to(torch.bfloat16)
    with torch.no_grad():
        teacher.fc.weight.fill_(1e30)  # no fp16 number
    distiller = Distiller(SmallNet(4), teacher, [VID(PAIRS)], example=images, teacher_dtype=torch.bfloat16)
    distiller.half()
    assert {p.dtype for p in distiller.student.parameters()} == {torch.float16}
    assert bool((teacher.fc.weight == torch.tensor(1e30, dtype=torch.bfloat16)).all())


class Refuses(SmallNet):
    """Quantised networks of transformers refuse .to()."""

    def to(self, *args: Any, **options: Any) -> Any:
        raise ValueError("`.to` is not supported")


class NotCopied(SmallNet):
    def __deepcopy__(self, memo: object) -> Any:
        raise TypeError("cannot be copied")


def test_teachers_that_cannot_be_moved_or_converted(images: Tensor, labels: Tensor) -> None:
    distiller = Distiller(SmallNet(4), Refuses(6), [VID(PAIRS)], example=images)
    distiller.to("cpu")
    distiller(images, labels).loss.backward()
    quantised = SmallNet(6)
    quantised.is_loaded_in_4bit = True  # type: ignore[assignment]
    distiller = Distiller(SmallNet(4), quantised, [VID(PAIRS)], example=images)
    distiller.double()
    assert {p.dtype for p in quantised.parameters()} == {torch.float32}
    with pytest.raises(
        ValueError, match=r"teacher_dtype=torch.bfloat16 cannot convert.*weights are quantised"
    ):
        Distiller(SmallNet(4), quantised, teacher_dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"copying it failed with TypeError: cannot be copied.*convert it yourself"
    ):
        Distiller(SmallNet(4), NotCopied(6), teacher_dtype=torch.bfloat16)


@pytest.mark.parametrize("way", ["disk_offload", "cpu_offload", "dispatch_model"])
def test_a_teacher_that_accelerate_has_placed(small_data: Images, tmp_path: Path, way: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(5)
    plain = SmallNet(6)
    placed = copy.deepcopy(plain)
    folder = tempfile.mkdtemp(dir=tmp_path)
    if way == "disk_offload":
        accelerate.disk_offload(placed, folder, execution_device="cpu")
    elif way == "cpu_offload":
        accelerate.cpu_offload(placed, execution_device="cpu")
    else:
        parts = {"first": "cpu", "second": "disk", "drop": "cpu", "fc": "disk"}
        placed = accelerate.dispatch_model(placed, parts, main_device="cpu", offload_dir=folder)
    losses = []
    for teacher in (plain, placed):
        torch.manual_seed(7)
        distiller = Distiller(SmallNet(4), teacher, [VID(PAIRS), KD()], example=small_data.images[:2])
        distiller.to("cpu").to(memory_format=torch.channels_last)
        run = tmp_path / f"run {len(losses)}"
        history = Trainer(distiller, small_data, QUICK, folder=run, progress=False).fit()
        losses.append([row["loss"] for row in history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    with pytest.raises(ValueError, match=r"whose weights are offloaded by Accelerate"):
        Distiller(SmallNet(4), placed, teacher_dtype=torch.bfloat16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_another_teachers_checkpoint_is_told_wherever_the_weights_are(
    small_data: Images, tmp_path: Path
) -> None:
    """Offloaded weights are no tensors with values, and quantised ones are not read as others are."""
    accelerate = pytest.importorskip("accelerate")

    def offloaded(network: nn.Module) -> nn.Module:
        found: nn.Module = accelerate.disk_offload(
            network, tempfile.mkdtemp(dir=tmp_path), execution_device="cpu"
        )
        return found

    def quantised(network: nn.Module) -> nn.Module:
        found: nn.Module = torch.ao.quantization.quantize_dynamic(network, {nn.Linear})
        return found

    for change in (offloaded, quantised):
        folder = tmp_path / change.__name__
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            teacher = change(SmallNet(6).eval())
            distiller = Distiller(SmallNet(4), teacher, [KD()], example=small_data.images[:2])
            trainer = Trainer(distiller, small_data, QUICK, folder=folder, progress=False)
            if seed == 1:
                trainer.fit(resume=True)
            else:
                with pytest.raises(CheckpointError, match="other teacher weights"):
                    trainer.fit(resume=True)
