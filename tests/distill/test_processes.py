"""Two processes: they learn what one learns, and the command line speaks and writes once."""

from __future__ import annotations

import contextlib
import csv
import importlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_network import plain_data, plain_distiller
from process_programs import (
    CASES,
    DEVICE,
    PLAIN,
    in_one_of_two,
    join,
    own_loop,
    sharded_distillers,
    unlabelled_in_turn,
)

from vidfast import cli

# Stated in docs/distillation.md: the sums over the batch are formed in another order, nothing else differs.
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-5


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
