"""What each of two processes does for the tests: trainings, loops of one's own, and what is refused."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain_network import PlainNet, plain_data, plain_distiller
from torch import Tensor, nn
from torch.utils.data import Dataset
from training_runs import made

from vidfast.distill import KD, VID, Distiller
from vidfast.distill.data import Images, random_shift
from vidfast.distill.files import CheckpointError
from vidfast.distill.trainer import NonFiniteLossError, Trainer, TrainOptions

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
