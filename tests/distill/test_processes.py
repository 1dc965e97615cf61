"""Two processes: they learn what one learns, and the command line speaks and writes once."""

from __future__ import annotations

import contextlib
import csv
import importlib
import os
import random
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_network import PlainNet, plain_data, plain_distiller
from torch import Tensor, nn
from torch.utils.data import Dataset
from training_runs import made

from vidfast import cli
from vidfast.distill import KD, VID, Distiller
from vidfast.distill.data import Images, random_shift
from vidfast.distill.files import CheckpointError
from vidfast.distill.trainer import NonFiniteLossError, Trainer, TrainOptions

# Stated in docs/distillation.md: the sums over the batch are formed in another order, nothing else differs.
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-5

# As by default where there is no GPU.
DEVICE = "cpu" if torch.cuda.is_available() else "auto"
PLAIN = TrainOptions(steps=12, batch_size=8, lr=0.05, eval_every=5, device=DEVICE)
# A last part that is uneven: 7 images are 4 and 3, and these are cut into 3 parts.
UNEVEN = replace(PLAIN, batch_size=7, accumulation=3, clip=0.5, optimizer="adamw", lr=0.01)


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """A data set that draws random numbers from every generator when it is read."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.images[index]
        return image + torch.rand(1) + float(np.random.rand()) + random.random(), label


def train(options: TrainOptions, data: Dataset[Any], folder: Path | None = None) -> tuple[Any, Any]:
    distiller = plain_distiller(plain_data(), weight=2.0)
    trainer = Trainer(
        distiller,
        data,
        options,
        evaluate={"test": plain_data(25)},
        augment=random_shift(1),
        folder=folder,
        progress=False,
    )
    return trainer.fit(resume=folder is not None), distiller.state_dict()


def train_ignoring(task_loss: Any, options: TrainOptions = PLAIN) -> tuple[Any, Any]:
    """Labels of which every third does not count, so that the processes' parts count differently."""
    data = plain_data()
    labels = data.labels.where(torch.arange(len(data)) % 4 > 0, torch.tensor(-100))
    distiller = plain_distiller(data, weight=2.0)
    distiller.task_loss = task_loss
    trainer = Trainer(
        distiller,
        data.subset(torch.arange(len(data)), labels),
        options,
        evaluate={"test": data.subset(torch.arange(25), labels[:25])},
        progress=False,
    )
    return trainer.fit(), distiller.state_dict()


WEIGHTED = partial(nn.functional.cross_entropy, weight=torch.tensor([0.2, 1.0, 3.0]))

CASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "plain": lambda: train(PLAIN, plain_data()),
    "uneven": lambda: train(UNEVEN, plain_data()),
    "noisy": lambda: train(replace(PLAIN, workers=1), Noisy(plain_data())),
    "ignored labels": lambda: train_ignoring(nn.functional.cross_entropy),
    "weighted classes in parts": lambda: train_ignoring(WEIGHTED, replace(UNEVEN, batch_size=8, clip=None)),
}


def join(rank: int, port: int) -> None:
    """Make this forked process one of two, as torchrun does."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)


def in_one_of_two(rank: int, port: int, folder: str) -> None:
    join(rank, port)
    results: dict[str, Any] = {name: case() for name, case in CASES.items()}
    assert torch.distributed.get_world_size() == 2

    results["own loop"] = own_loop(rank, 2)

    # Resumed in the middle of a row of the metrics, from a run of 7 of its steps.
    run = Path(folder) / "resumed"
    options = replace(PLAIN, checkpoint_every=7)
    original, done = Trainer._step, []

    def step(self: Trainer, *args: Any) -> None:
        if len(done) == 9:
            raise KeyboardInterrupt
        done.append(1)
        original(self, *args)

    Trainer._step = step  # type: ignore[method-assign]
    with contextlib.suppress(KeyboardInterrupt):
        train(options, plain_data(), run)
    Trainer._step = original  # type: ignore[method-assign]
    torch.distributed.barrier()
    results["resumed"] = train(options, plain_data(), run)

    # One process's loss is not finite: both stop.
    def broken(z: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(z, y) / (0 if rank == 0 else 1)

    try:
        train_with(plain_distiller(plain_data(), weight=2.0), broken)
    except NonFiniteLossError as error:
        results["error"] = str(error)
    unlike: dict[str, Callable[[], Any]] = {
        "options": lambda: train(replace(PLAIN, lr=0.1 + rank), plain_data()),
        "teacher": lambda: train_with(another_teacher(rank), nn.functional.cross_entropy),
        "data": lambda: train(PLAIN, plain_data(30 - rank)),
    }
    for what, call in unlike.items():
        try:
            call()
        except ValueError as error:
            results[f"unlike {what}"] = str(error)
    results["one checkpoint"] = one_checkpoint(rank, Path(folder) / "one")
    try:
        train(replace(PLAIN, sync_batchnorm=True), plain_data())
    except ValueError as error:
        results["sync_batchnorm"] = str(error)
    try:
        Trainer(plain_distiller(plain_data(), reduction="sum"), plain_data(), PLAIN, progress=False)
    except ValueError as error:
        results["sum"] = str(error)
    try:
        train_ignoring(lambda z, y: nn.functional.cross_entropy(z, y))
    except ValueError as error:
        results["unknown loss"] = str(error)
    results["unlabelled"] = unlabelled_in_turn(rank, 2)
    results["wrapped"] = wrapped_students()
    results["norms"] = with_norms()
    results["sharded"] = sharded_distillers(rank, 2)
    results["torch's own"] = torch.distributed.get_backend()
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def own_loop(rank: int, world: int) -> dict[str, Tensor]:
    """A step of a loop of one's own in DistributedDataParallel, in two parts and with the teacher's view kept."""
    distiller, data = plain_distiller(plain_data()), plain_data(28)
    model: Any = nn.parallel.DistributedDataParallel(distiller) if world > 1 else distiller
    images, labels = data.images[rank::world], data.labels[rank::world]
    kept = distiller.teacher_activations(images[:7])
    with model.no_sync() if world > 1 else contextlib.nullcontext():
        model(images[:7], labels[:7], scale=7 / len(images), teacher=kept).loss.backward()
    model(images[7:], labels[7:], scale=1 - 7 / len(images)).loss.backward()
    return {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}


def train_with(distiller: Distiller, task_loss: Any) -> Any:
    distiller.task_loss = task_loss
    return Trainer(distiller, plain_data(), PLAIN, progress=False).fit()


def another_teacher(seed: int) -> Distiller:
    torch.manual_seed(seed)
    teacher, data = PlainNet(6), plain_data()
    torch.manual_seed(3)
    return Distiller(PlainNet(4), teacher, [VID({"first": "first"})], example=data.images[:2])


def one_checkpoint(rank: int, folder: Path) -> str:
    """What is said where only the first process sees a checkpoint, as with a folder for each machine."""
    train(PLAIN, plain_data(), folder / "shared")
    place = folder / ("shared" if rank == 0 else "other")
    try:
        train(PLAIN, plain_data(), place)
    except CheckpointError as error:
        return str(error)
    return "nothing"


def unlabelled_in_turn(rank: int, world: int) -> dict[str, Any]:
    """Labelled and unlabelled batches in turn, with VID alone: an unlabelled one does not reach the classifier."""
    found: dict[str, Any] = {}
    for unused in (True, False):
        distiller, data = plain_distiller(plain_data()), plain_data(16)
        options = {"find_unused_parameters": unused}
        model: Any = nn.parallel.DistributedDataParallel(distiller, **options) if world > 1 else distiller
        optimizer = torch.optim.SGD(distiller.parameter_groups(lr=0.05, weight_decay=0.01), momentum=0.9)
        images, labels = data.images[rank::world], data.labels[rank::world]
        try:
            for i in range(4):
                model(images, None if i % 2 else labels).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            found[str(unused)] = {name: p.detach() for name, p in distiller.named_parameters()}
        except RuntimeError as error:
            found[str(unused)] = str(error)
        if world == 1:
            break
    return found


def wrapped_students() -> dict[str, Any]:
    """What is said of a student in DistributedDataParallel, with terms that have parameters and without."""
    found: dict[str, Any] = {}
    data = plain_data(16)
    for name, term in (("VID", VID({"module.first": "first"})), ("KD", KD())):
        student, teacher = PlainNet(4), PlainNet(6)
        for place in ("the student", "a part of it"):
            wrapped: nn.Module = nn.parallel.DistributedDataParallel(student)
            if place == "a part of it":
                student.fc = nn.parallel.DistributedDataParallel(student.fc)  # type: ignore[assignment]
                wrapped = student
                term = VID({"first": "first"}) if name == "VID" else KD()
            try:
                Distiller(wrapped, teacher, [term], example=data.images[:2])(data.images, data.labels)
                found[f"{name}, {place}"] = "fine"
            except ValueError as error:
                found[f"{name}, {place}"] = str(error)
    return found


def with_norms() -> tuple[Any, dict[str, Tensor]]:
    """A student whose BatchNorm has seen this process's images alone in the last step."""
    data = plain_data()
    distiller = made(data)
    trainer = Trainer(distiller, data, PLAIN, evaluate={"test": plain_data(25)}, progress=False)
    return trainer.fit(), distiller.state_dict()


def sharded_distillers(rank: int, world: int) -> dict[str, Any]:
    """A step of a sharded Distiller, and what is said of a sharded student."""
    from torch.distributed import fsdp

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,)) if world > 1 else None
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {
        "fully_shard": lambda module: fsdp.fully_shard(module, mesh=mesh),
        "FullyShardedDataParallel": lambda module: fsdp.FullyShardedDataParallel(
            module, device_id=torch.device("cpu"), use_orig_params=True
        ),
    }
    found: dict[str, Any] = {}
    data = plain_data(16)
    for name, way in ways.items():
        distiller = plain_distiller(plain_data())
        model = way(distiller) if world > 1 else distiller
        optimizer = torch.optim.SGD(distiller.parameter_groups(lr=0.1))
        for _ in range(2):
            model(data.images[rank::world], data.labels[rank::world]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            found[name] = model(data.images, data.labels).loss
        if world > 1:
            student = way(PlainNet(4))
            layer = "first" if name == "fully_shard" else "_fsdp_wrapped_module.first"
            try:
                Distiller(student, PlainNet(6), [VID({layer: "first"})], example=data.images[:2])
            except ValueError as error:
                found[f"{name}, student"] = str(error)
    return found


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("two")
    # Forked, which spares each of them the imports; conftest.py keeps this process to one thread.
    torch.multiprocessing.start_processes(
        in_one_of_two, (free_port(), str(folder)), nprocs=2, start_method="fork"
    )
    assert sorted(path.name for path in (folder / "resumed").iterdir()) == ["checkpoint.pt", "metrics.csv"]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_learns(two: list[dict[str, Any]], case: str) -> None:
    history, state = CASES[case]()
    for of_process in two:
        rows, weights = of_process[case]
        assert [row["step"] for row in rows] == [5, 10, 12]
        for row, expected in zip(rows, history, strict=True):
            assert row == pytest.approx(expected, rel=LOSS_TOLERANCE)
        assert list(weights) == list(state)
        for key, value in state.items():
            torch.testing.assert_close(
                weights[key], value, rtol=WEIGHT_TOLERANCE, atol=WEIGHT_TOLERANCE, msg=key
            )
    # Both processes hold the same student, bit for bit.
    for key, value in two[0][case][1].items():
        assert torch.equal(value, two[1][case][1][key])


def test_a_loop_of_ones_own_in_two_processes(two: list[dict[str, Any]]) -> None:
    expected = own_loop(0, 1)
    assert len(expected) == len(list(plain_distiller(plain_data()).parameters()))
    for of_process in two:
        assert list(of_process["own loop"]) == list(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(
                of_process["own loop"][name], gradient, rtol=1e-4, atol=WEIGHT_TOLERANCE, msg=name
            )


def test_processes_end_with_one_student_also_with_batchnorm(two: list[dict[str, Any]]) -> None:
    (rows, state), (other_rows, other) = (of_process["norms"] for of_process in two)
    assert rows == other_rows
    for name, value in state.items():
        assert torch.equal(value, other[name]), name
    assert int(state["student.first.1.num_batches_tracked"]) == PLAIN.steps


def test_two_processes_resume_exactly(two: list[dict[str, Any]]) -> None:
    for of_process in two:
        assert of_process["resumed"][0] == of_process["plain"][0]
        for key, value in of_process["plain"][1].items():
            assert torch.equal(value, of_process["resumed"][1][key]), key


def test_every_process_stops_when_one_sees_a_loss_that_is_not_finite(two: list[dict[str, Any]]) -> None:
    for of_process in two:
        assert "not finite: the term 'task' became inf or nan in step 1" in of_process["error"]


def test_processes_that_were_given_something_else_are_refused(two: list[dict[str, Any]]) -> None:
    for of_process in two:
        for what, said in {
            "options": "process 1 lr",
            "teacher": "other teacher weights",
            "data": "29 images",
        }.items():
            assert (
                "wanted the same options, networks and data in all processes" in of_process[f"unlike {what}"]
            )
            assert said in of_process[f"unlike {what}"]
        assert "after the steps [12, 0]" in of_process["one checkpoint"]


def test_unlabelled_batches_in_turn_need_what_the_docs_say(two: list[dict[str, Any]]) -> None:
    expected = unlabelled_in_turn(0, 1)["True"]
    for of_process in two:
        for name, value in expected.items():
            torch.testing.assert_close(
                of_process["unlabelled"]["True"][name], value, rtol=1e-5, atol=WEIGHT_TOLERANCE, msg=name
            )
        assert "find_unused_parameters=True" in of_process["unlabelled"]["False"]


def test_a_wrapped_student_is_refused_where_terms_have_parameters(two: list[dict[str, Any]]) -> None:
    for of_process in two:
        found = of_process["wrapped"]
        for place in ("the student", "a part of it"):
            assert "'vid.regressors.0.0.weight'" in found[f"VID, {place}"]
            assert "DistributedDataParallel(Distiller(network, ...))" in found[f"VID, {place}"]
            assert found[f"KD, {place}"] == "fine"


def test_a_sharded_distiller_learns_what_one_process_learns(two: list[dict[str, Any]]) -> None:
    expected = sharded_distillers(0, 1)
    for of_process in two:
        for name, value in expected.items():
            torch.testing.assert_close(of_process["sharded"][name], value, rtol=1e-5, atol=1e-6)
            assert f"{name}(Distiller(network, ...))" in of_process["sharded"][f"{name}, student"]


def test_what_does_not_go_with_processes_is_refused(two: list[dict[str, Any]]) -> None:
    for of_process in two:
        assert "SyncBatchNorm does not run on the CPU" in of_process["sync_batchnorm"]
        assert "'vid' has reduction='sum'" in of_process["sum"]
        assert "a number of processes of 2" in of_process["sum"]
        assert "wanted a task_loss that is a mean over images" in of_process["unknown loss"]
        assert of_process["torch's own"] == "gloo"


DISTILL = [
    "distill",
    "--teacher=wrn-10-1",
    "--steps=4",
    "--teacher-steps=4",
    "--samples-per-class=2",
    "--seeds=1",
    f"--device={DEVICE}",
]


def command_in_one_of_two(rank: int, port: int, folder: str, arguments: list[str]) -> None:
    """What torchrun sets, and then the command, with what it says and returns in files."""
    join(rank, port)
    os.environ["VIDFAST_CACHE"] = f"{folder}/cache"
    with (
        open(f"{folder}/out{rank}", "w") as out,
        open(f"{folder}/err{rank}", "w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = cli.main(arguments)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    Path(f"{folder}/code{rank}").write_text(str(code))


def command_in_two(folder: Path, *arguments: str) -> list[tuple[int, str, str]]:
    torch.multiprocessing.start_processes(
        command_in_one_of_two, (free_port(), str(folder), list(arguments)), nprocs=2, start_method="fork"
    )
    found = [[(folder / f"{what}{rank}").read_text() for what in ("code", "out", "err")] for rank in range(2)]
    return [(int(code), out, err) for code, out, err in found]


def test_the_command_speaks_and_writes_once(tmp_path: Path) -> None:
    # Imported once, and not in each of the forked processes.
    for module in ("sklearn.datasets", "matplotlib.figure", "vidfast.distill.experiments.compare"):
        importlib.import_module(module)
    out = tmp_path / "run"
    (code, text, said), other = command_in_two(tmp_path, *DISTILL, f"--out={out}")
    assert code == 0
    assert text.count("Test accuracy (%)") == 1
    assert said.count("seed 0  student + VID-I") == 1
    assert other == (0, "", "")
    assert len(list((tmp_path / "cache").glob("teacher-*.pt"))) == 1
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.csv", "curves.png", "report.md", "checkpoints",
    }  # fmt: skip
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["step"]) for row in rows] == [
        (arm, str(step)) for arm in ("alone", "vid") for step in range(1, 5)
    ]
    # What cannot be done is said once, by the process that tried.
    (code, text, said), other = command_in_two(tmp_path, *DISTILL, f"--out={out}")
    assert (code, text, said.count("is not empty")) == (2, "", 1)
    assert other == (2, "", "")
