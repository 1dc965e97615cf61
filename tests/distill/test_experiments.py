"""The experiments' machinery: rows and settings, one training as data, many at once, the table and its files."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import psutil
import pytest
import torch
from tqdm.auto import tqdm

from vidfast.cli import main
from vidfast.distill.data import load
from vidfast.distill.errors import UserError
from vidfast.distill.experiments import paper, presets, table1, table2, table3, table4
from vidfast.distill.experiments.arms import Arm, Setting, chosen, combination, transfer
from vidfast.distill.experiments.base import Options
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
from vidfast.distill.experiments.study import Cell, Column, Outcome, Panel, Plan, check
from vidfast.distill.experiments.tables import findings, percent, rows
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


def test_a_combination_takes_its_parts_terms_and_rates() -> None:
    kd = Setting("sgd", 0.1, (Term("kd", 0.9),), task_weight=0.1)
    vid = Setting("adamw", 0.02, (VID,))
    assert combination("KD", "VID-I").candidates({"KD": kd, "VID-I": vid}, {}) == (
        Setting("sgd", 0.1, (Term("kd", 0.9), VID), 0.1),
        Setting("adamw", 0.02, (Term("kd", 0.9), VID), 0.1),
    )
    # A rate with which a part alone diverged is left out, unless none is left.
    unstable = {"VID-I": [replace(vid, optimizer="sgd", lr=0.1)]}
    assert combination("KD", "VID-I").candidates({"KD": kd, "VID-I": vid}, unstable) == (
        Setting("adamw", 0.02, (Term("kd", 0.9), VID), 0.1),
    )
    heavier = {"VID-I": [Setting("sgd", 0.1, (replace(VID, weight=30.0),))]}
    assert len(combination("KD", "VID-I").candidates({"KD": kd, "VID-I": vid}, heavier)) == 2
    # One rate for both is tried once.
    assert (
        len(
            combination("KD", "VID-I").candidates(
                {"KD": kd, "VID-I": replace(vid, optimizer="sgd", lr=0.1)}, {}
            )
        )
        == 1
    )


def test_transfer_tries_every_rate_with_every_weight() -> None:
    arm = transfer("AT", "at", [("sgd", 0.1), ("adamw", 0.01)], [1.0, 10.0], taps=(0,))
    assert [(s.optimizer, s.terms[0].weight) for s in arm.settings] == [
        ("sgd", 1.0),
        ("sgd", 10.0),
        ("adamw", 1.0),
        ("adamw", 10.0),
    ]
    assert arm.settings[0].terms[0].taps == (0,)


def test_chosen_rows_bring_their_parts() -> None:
    arms = [Arm("Student"), Arm("KD"), Arm("AT"), combination("KD", "AT")]
    assert [arm.label for arm in chosen(arms, ["KD + AT"])] == ["KD", "AT", "KD + AT"]
    assert chosen(arms, None) == tuple(arms)
    with pytest.raises(ValueError, match=r"no row 'VID'.*Student, KD"):
        chosen(arms, ["VID"])


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


@pytest.mark.parametrize("table", [table1, table2, table3, table4], ids=lambda table: table.__name__[-6:])
def test_every_row_of_every_table_fits_its_networks(table: object, tmp_path: Path) -> None:
    plan: Plan = table.plan(Options(folder=tmp_path))  # type: ignore[attr-defined]
    check(plan)
    for panel in plan.panels:
        assert panel.tune in panel.columns
        # Every row of ours is a row of the paper's, so that they stand side by side.
        assert set(plan.paper[panel.title]) == {arm.label for arm in plan.arms}
    assert not set(plan.seeds) & set(plan.search_seeds)


def test_full_budgets_have_the_papers_networks(tmp_path: Path) -> None:
    options = Options(folder=tmp_path, budget="full")
    assert {
        (p.teacher, p.panels[0].columns[0].student) for p in (table1.plan(options), table2.plan(options))
    } == {("wrn-40-2", "wrn-16-1")}
    assert [c.samples for c in table1.plan(options).panels[0].columns] == [100, 500, 1000, 5000]
    assert table3.plan(options).teacher == "resnet-34-imagenet"
    assert [c.student for c in table4.plan(options).panels[0].columns] == ["mlp-1024", "mlp-2048", "mlp-4096"]


def test_table3_splits_the_classes(tmp_path: Path) -> None:
    plan = table3.plan(Options(folder=tmp_path))
    assert plan.source.classes == (0, 1, 2, 3, 4)
    assert plan.target.classes == (5, 6, 7, 8, 9)
    assert plan.target.load().num_classes == 5
    with pytest.raises(UserError, match="one size"):
        table3.plan(Options(folder=tmp_path, source_data="digits"))


def test_published_tables_are_complete() -> None:
    for table in (paper.TABLE1, paper.TABLE2, paper.TABLE3, paper.TABLE3_CUB, paper.TABLE4):
        for panel in table.values():
            assert len({tuple(row) for row in panel.values()}) == 1
    assert paper.TABLE1["WRN"]["VID-I"]["M = 100"] == 81.59
    assert paper.TABLE3["VGG-9"]["VID-LP + VID-I"]["M ≈ 80"] == 71.72


def an_outcome(**accuracies: tuple[float | None, ...]) -> tuple[Plan, Outcome]:
    labels = {"Student": "Student", "AT": "AT", "NST": "NST", "VID": "VID-I"}
    column = Column("M = 5", "wrn-10-1", 5)
    plan = Plan(
        "t",
        "T",
        "M",
        DIGITS,
        DIGITS,
        "wrn-10-1",
        (Panel("P", (column,), column),),
        tuple(Arm(labels[name]) for name in accuracies),
        OPTIONS,
        OPTIONS,
        (0, 1),
        (1000,),
        paper={"P": {"VID-I": {"M = 9": 50.0}}},
    )
    cells = tuple(Cell("P", labels[name], "M = 5", values) for name, values in accuracies.items())
    return plan, Outcome(cells, {}, (), 99.0, 10)


def test_the_table_marks_the_best_and_shows_the_papers() -> None:
    plan, outcome = an_outcome(Student=(80.0, 82.0), VID=(90.0, 90.0))
    assert rows(plan, outcome, plan.panels[0], bold=True) == [
        ["", "M = 5", "paper, M = 9"],
        ["Student", "81.0 ± 1.4", ""],
        ["VID-I", "**90.0 ± 0.0**", "50.00"],
    ]


def test_a_row_of_which_runs_diverged_is_never_marked_best() -> None:
    plan, outcome = an_outcome(Student=(80.0, 82.0), VID=(99.0, None))
    table = rows(plan, outcome, plan.panels[0], bold=True)
    assert [row[1] for row in table[1:]] == ["**81.0 ± 1.4**", "99.0 (1 of 2 diverged)"]


def test_findings_say_who_leads_and_do_not_make_noise_a_lead() -> None:
    panel = an_outcome(VID=(1.0,))[0].panels[0]
    plan, outcome = an_outcome(Student=(80.0, 82.0), AT=(85.0, 87.0), NST=(70.0, 71.0), VID=(90.0, 92.0))
    (line,) = findings(plan, outcome, panel)
    assert "+10.0 against the student alone" in line
    assert "leads AT, the best feature-matching row (+5.0, standard error 1.4)" in line
    plan, outcome = an_outcome(AT=(89.0, 91.0), VID=(89.5, 91.5))
    assert "is level with AT" in findings(plan, outcome, panel)[0]
    plan, outcome = an_outcome(AT=(99.0, None), VID=(89.5, 91.5))
    assert (
        "-8.5 against AT, the best feature-matching row (too few runs to judge)"
        in findings(plan, outcome, panel)[0]
    )
    plan, outcome = an_outcome(AT=(99.0, 99.0), VID=(89.5, 91.5))
    assert "is behind AT" in findings(plan, outcome, panel)[0]


def test_a_diverged_cell_says_so() -> None:
    assert percent(Cell("", "", "", (90.0, None, 92.0))) == "91.0 ± 1.4 (1 of 3 diverged)"
    assert percent(Cell("", "", "", (None,))) == "diverged"
    assert percent(Cell("", "", "", (90.0,))) == "90.0"


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


def test_several_processes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["experiment", "table1", "--out", str(tmp_path / "out")]) == 2
    assert "without torchrun" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_full_budgets_report_runs_that_train_on_the_validation_images(tmp_path: Path) -> None:
    plan = table4.plan(Options(folder=tmp_path, budget="full"))
    digits = plan.target.load()
    assert len(plan.reported.load().train) == len(digits.train) + len(digits.validation)
    assert len(plan.reported.load().test) == len(digits.test)
    quick = table4.plan(Options(folder=tmp_path))
    assert quick.reported == quick.target


def test_a_term_gets_the_networks_layers() -> None:
    data = load("digits")
    student, teacher = fresh("wrn-10-1", data), fresh("wrn-16-2", data)
    term = Term("fitnet", 1.0, taps=(1, 3)).build(student, teacher)
    assert term.student_layers == ("group1", "group3")
    assert Term("lwf", 1.0).build(student, teacher).student_layers == (student.penultimate,)
