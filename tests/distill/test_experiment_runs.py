"""One training as data, and many at once: what names it, how it is stored, stopped and continued."""

from __future__ import annotations

import io
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import psutil
import pytest
import torch
from tqdm.auto import tqdm

from vidfast.distill.data import load
from vidfast.distill.errors import UserError
from vidfast.distill.experiments import pool
from vidfast.distill.experiments.pool import run_all
from vidfast.distill.experiments.runs import (
    DataSpec,
    Job,
    Term,
    begin_with,
    execute,
    fresh,
    keep_network,
    restored,
    stored,
)
from vidfast.distill.files import CheckpointError
from vidfast.distill.trainer import TrainOptions

DIGITS = DataSpec("digits")
VID = Term("vid", 3.0, {"regressor": "linear", "init_var": 1.0})
OPTIONS = TrainOptions(steps=4, batch_size=10, optimizer="adamw", lr=0.01, checkpoint_every=1, device="cpu")


def a_bar() -> tqdm[Any]:
    return tqdm(file=io.StringIO())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment's folder that holds a teacher."""
    path = tmp_path_factory.mktemp("experiment")
    torch.manual_seed(0)
    data = DIGITS.load()
    keep_network(path, "teacher", fresh("wrn-10-1", data), "wrn-10-1", data)
    return path


def a_job(folder: Path, **changes: object) -> Job:
    teacher = next((folder / "networks").glob("teacher-*")).name
    job = Job("wrn-10-1", DIGITS, 2, 0, OPTIONS, "validation", (VID,), teacher=teacher)
    return replace(job, **changes)  # type: ignore[arg-type]


def test_a_jobs_name_follows_from_what_its_result_follows_from(folder: Path) -> None:
    job = a_job(folder)
    assert replace(job, options=replace(OPTIONS, device="auto")).digest == job.digest
    others = [
        a_job(folder, seed=1),
        a_job(folder, samples=3),
        a_job(folder, evaluate="test"),
        a_job(folder, terms=(replace(VID, weight=4.0),)),
        a_job(folder, terms=(replace(VID, taps=(0, 1)),)),
        a_job(folder, options=replace(OPTIONS, lr=0.02)),
        a_job(folder, data=replace(DIGITS, classes=(0, 1))),
    ]
    assert len({job.digest, *(other.digest for other in others)}) == len(others) + 1


def test_data_of_one_name_in_two_places_are_told_apart(folder: Path, tmp_path: Path) -> None:
    for place, colour in (("a", 10), ("b", 200)):
        for part in ("train", "validation", "test"):
            for label in ("x", "y"):
                (tmp_path / place / part / label).mkdir(parents=True)
                for i in range(2):
                    shade = (colour + 20 * i, 0, 0 if label == "x" else 99)
                    PIL.Image.new("RGB", (32, 32), shade).save(tmp_path / place / part / label / f"{i}.png")
    a, b = (a_job(folder, data=DataSpec("folder-32", str(tmp_path / place))).digest for place in ("a", "b"))
    assert a != b


def test_a_stopped_training_continues_to_the_same_result(folder: Path, tmp_path: Path) -> None:
    job = a_job(folder, seed=7)
    (tmp_path / "networks").symlink_to(folder / "networks")

    class Stop:
        def __init__(self) -> None:
            self.steps = 0

        def update(self, n: int, /) -> None:
            self.steps += n
            if self.steps == 3:
                raise KeyboardInterrupt

    whole = execute(job, folder)
    with pytest.raises(KeyboardInterrupt):
        execute(job, tmp_path, Stop())
    assert stored(job, tmp_path) is None
    taken: list[int] = []
    assert execute(job, tmp_path, type("Steps", (), {"update": lambda self, n: taken.append(n)})()) == whole
    assert stored(job, tmp_path) == whole

    def weights(of: Path) -> dict[str, torch.Tensor]:
        return restored(of / "runs" / job.digest / "student.safetensors").state_dict()

    continued = weights(tmp_path)
    for name, value in weights(folder).items():
        assert torch.equal(value, continued[name]), name


def test_a_diverged_training_is_a_result(folder: Path) -> None:
    job = a_job(folder, options=replace(OPTIONS, optimizer="sgd", lr=1e30, check_every=1))
    result = execute(job, folder)
    assert result.accuracy is None
    assert "not finite" in result.failure
    assert stored(job, folder) == result


def test_a_damaged_result_is_computed_again(folder: Path) -> None:
    job = a_job(folder, seed=11)
    result = execute(job, folder)
    path = folder / "runs" / job.digest / "result.json"
    for damage in ('{"accur', '{"accuracy": "90", "failure": ""}', '{"accuracy": NaN, "failure": ""}'):
        path.write_text(damage)
        assert stored(job, folder) is None
    (path.parent / "checkpoint.pt").write_bytes(b"PK nonsense")
    assert execute(job, folder) == result


def test_processes_give_what_one_gives(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "networks").symlink_to(folder / "networks")
    jobs = [a_job(folder, seed=seed) for seed in (20, 21, 20)]
    alone, together = a_bar(), a_bar()
    seen: list[int] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers of a machine with as many cores
    try:
        expected = run_all(jobs, folder, workers=1, bar=alone)
    finally:
        torch.set_num_threads(threads)
    found = run_all(
        jobs,
        tmp_path,
        workers=2,
        bar=together,
        each=lambda job, result: seen.append(job.seed),
    )
    assert [r.accuracy for r in found] == pytest.approx([r.accuracy for r in expected], abs=2.0)
    assert found[0] == found[2]
    assert sorted(seen) == [20, 21]
    assert alone.n == 2 * OPTIONS.steps


def test_a_worker_that_dies_is_said_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying(pool.ProcessPoolExecutor):
        def submit(self, call: Any, /, *args: Any, **more: Any) -> Any:
            return super().submit(os._exit, 9)

    monkeypatch.setattr(pool, "ProcessPoolExecutor", Dying)
    jobs = [a_job(folder, seed=seed) for seed in (50, 51)]
    with pytest.raises(UserError, match="fewer --jobs"):
        run_all(jobs, folder, workers=2, bar=a_bar())


def test_workers_end_with_a_parent_that_is_killed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "networks").symlink_to(folder / "networks")
    long = replace(OPTIONS, steps=100_000, checkpoint_every=0)
    jobs = [a_job(folder, seed=seed, options=long) for seed in (40, 41)]
    parent = multiprocessing.get_context("spawn").Process(target=_run_both, args=(jobs, tmp_path))
    parent.start()
    assert parent.pid is not None
    us = psutil.Process(parent.pid)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("runs/*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = us.children(recursive=True)
    assert len(workers) >= 2
    parent.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    for process in alive:
        process.kill()
    assert not alive


def _run_both(jobs: list[Job], folder: Path) -> None:
    run_all(jobs, folder, workers=2, bar=a_bar())


def test_stored_results_are_not_done_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = a_job(folder, seed=30)
    first = run_all([job], folder, workers=1, bar=a_bar())
    monkeypatch.setattr("vidfast.distill.experiments.pool.execute", None)
    bar = a_bar()
    assert run_all([job], folder, workers=1, bar=bar) == first
    assert bar.n == bar.initial == OPTIONS.steps


def test_fine_tuning_keeps_a_fresh_classifier(folder: Path) -> None:
    data = load("digits")
    torch.manual_seed(1)
    source, student = fresh("wrn-10-1", data), fresh("wrn-10-1", data)
    own = {name: value.clone() for name, value in student.state_dict().items()}
    begin_with(student, folder / "networks" / keep_network(folder, "student", source, "wrn-10-1", data))
    for name, value in student.state_dict().items():
        expected = own if name.startswith("fc.") else source.state_dict()
        assert torch.equal(value, expected[name]), name
    assert not torch.equal(own["stem.weight"], student.state_dict()["stem.weight"])


def test_a_damaged_network_is_named(folder: Path, tmp_path: Path) -> None:
    whole = next((folder / "networks").glob("teacher-*"))
    path = tmp_path / whole.name
    for damage in (b"", whole.read_bytes()[:200], whole.read_bytes().replace(b'"vidfast"', b'"vidslow"')):
        path.write_bytes(damage)
        with pytest.raises(CheckpointError, match=rf"{path.name}: damaged"):
            restored(path)
        with pytest.raises(CheckpointError, match=rf"{path.name}: damaged"):
            begin_with(fresh("wrn-10-1", load("digits")), path)


def test_a_networks_file_is_named_by_its_weights(folder: Path) -> None:
    """Jobs' names follow from such a name, so results are found again only while it stays as it is."""
    data = load("digits")
    network = fresh("wrn-10-1", data)
    with torch.no_grad():
        for value in network.state_dict().values():
            value.copy_(torch.arange(value.numel()).reshape(value.shape) % 7)
    assert (
        keep_network(folder, "student", network, "wrn-10-1", data)
        == "student-wrn-10-1-5d67d08c1155.safetensors"
    )
    network.to(memory_format=torch.channels_last)
    assert (
        keep_network(folder, "student", network, "wrn-10-1", data)
        == "student-wrn-10-1-5d67d08c1155.safetensors"
    )


def test_a_term_gets_the_networks_layers() -> None:
    data = load("digits")
    student, teacher = fresh("wrn-10-1", data), fresh("wrn-16-2", data)
    term = Term("fitnet", 1.0, taps=(1, 3)).build(student, teacher)
    assert term.student_layers == ("group1", "group3")
    assert Term("lwf", 1.0).build(student, teacher).student_layers == (student.penultimate,)
