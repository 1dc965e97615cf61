"""`vidfast experiment`: a table from the command line, and every wrong use as one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from vidfast.cli import main
from vidfast.distill.experiments import presets, table1
from vidfast.distill.experiments.base import Options
from vidfast.distill.trainer import Trainer

TINY = [
    "--steps",
    "2",
    "--teacher-steps",
    "2",
    "--seeds",
    "2",
    "--samples",
    "2",
    "--jobs",
    "1",
    "--device",
    "cpu",
]


def test_a_table_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "table1"
    call = [
        "experiment",
        "table1",
        *TINY,
        "--rows",
        "KD + VID-I",
        "--out",
        str(out),
        "--cache",
        str(tmp_path),
    ]
    assert main(call) == 0
    printed = capsys.readouterr().out
    assert "KD + VID-I" in printed
    assert "paper, M = 100" in printed
    with (out / "results.csv").open(newline="") as file:
        results = list(csv.DictReader(file))
    assert [(row["row"], row["seed"]) for row in results] == [
        (row, seed) for row in ("KD", "VID-I", "KD + VID-I") for seed in "01"
    ]
    with (out / "search.csv").open(newline="") as file:
        searched = list(csv.DictReader(file))
    # The search never looks at the test images, and every candidate is recorded.
    expected = len(presets.RATES) + 3 * len(presets.RATES)
    assert len([row for row in searched if row["row"] != "KD + VID-I"]) == expected
    jobs = [json.loads(path.read_text()) for path in out.glob("runs/*/job.json")]
    assert {job["evaluate"] for job in jobs if job["seed"] >= 1000} == {"validation"}
    assert {job["evaluate"] for job in jobs if job["seed"] < 1000} == {"test"}
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")

    assert len(json.loads((out / "calls.json").read_text())) == 1

    # Again: nothing is trained, and the table is the same.
    monkeypatch.setattr("vidfast.distill.experiments.pool.execute", None)
    assert main(call) == 0
    assert capsys.readouterr().out == printed
    assert len(json.loads((out / "calls.json").read_text())) == 2
    assert " s in 2 calls with 1 process" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table1", "--rows", "VID"], "no row 'VID'"),
        (["table1", "--source-data", "digits"], "belong to table3"),
        (["table2", "--samples", "2", "3"], "one number"),
        (["figure2", "--rows", "Student"], "has none"),
        (["table1", "--data", "digitz"], "did you mean 'digits'"),
        (["table3", "--source-root", "somewhere"], "needs --source-data"),
        (["table1", "--samples", "1000"], "1000 images a class"),
    ],
)
def test_wrong_use_is_one_line_before_anything_is_trained(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment", *arguments, "--out", str(tmp_path / "out"), "--cache", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_a_cache_the_folder_keeps_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Options(
        tmp_path, samples=(2,), seeds=1, steps=2, teacher_steps=2, arms=("Student",), jobs=1, device="cpu"
    )
    table1.run(options)
    printed = capsys.readouterr().out
    monkeypatch.setattr(Trainer, "fit", None)
    table1.run(options)
    assert capsys.readouterr().out == printed


def test_several_processes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["experiment", "table1", "--out", str(tmp_path / "out")]) == 2
    assert "without torchrun" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
