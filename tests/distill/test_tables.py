"""A study as a table: its cells, which row is marked best, and what is said of it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from vidfast.distill.experiments.arms import Arm, Setting
from vidfast.distill.experiments.runs import DataSpec
from vidfast.distill.experiments.study import Cell, Column, Outcome, Panel, Plan
from vidfast.distill.experiments.tables import findings, percent, rows
from vidfast.distill.report import mean_and_spread
from vidfast.distill.trainer import TrainOptions

PUBLISHED = Path(__file__).parents[2] / "docs" / "experiments"

OPTIONS = TrainOptions(steps=4, batch_size=10, optimizer="adamw", lr=0.01, checkpoint_every=1, device="cpu")


def an_outcome(**accuracies: tuple[float | None, ...]) -> tuple[Plan, Outcome]:
    labels = {"Student": "Student", "AT": "AT", "NST": "NST", "VID": "VID-I"}
    column = Column("M = 5", "wrn-10-1", 5)
    plan = Plan(
        "t",
        "T",
        "M",
        DataSpec("digits"),
        DataSpec("digits"),
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


def test_a_mean_has_a_spread_where_there_are_several_values() -> None:
    assert mean_and_spread([90.0, 92.0]) == "91.0 ± 1.4"
    assert mean_and_spread([90.04]) == "90.0"
    assert mean_and_spread([0.25, 0.75], 2, "+") == "+0.50 ± 0.35"
    assert mean_and_spread([-1.0], sign="+") == "-1.0"


@pytest.mark.parametrize("table", ["table1", "table2", "table3", "table4"])
def test_published_files_are_those_that_are_written(table: str) -> None:
    """Their columns are today's, and the published page has the cells that follow from the published runs."""
    with (PUBLISHED / table / "search.csv").open(newline="") as file:
        searched = csv.DictReader(file)
        setting = Setting("sgd", 0.1).describe()
        assert searched.fieldnames == ["panel", "row", *setting, "validation_accuracy", "diverged"]
    runs: dict[tuple[str, str, str], list[float | None]] = {}
    with (PUBLISHED / table / "results.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            accuracy = float(row["test_accuracy"]) if row["test_accuracy"] else None
            runs.setdefault((row["panel"], row["row"], row["column"]), []).append(accuracy)
    page = (PUBLISHED / table / "report.md").read_text()
    for (panel, label, column), accuracies in runs.items():
        section = page.split(f"## {panel}\n")[1]
        (line, *_) = [line for line in section.splitlines() if line.startswith(f"| {label} |")]
        cell = Cell(panel, label, column, tuple(accuracies))
        assert percent(cell) in [text.strip(" *") for text in line.split("|")]
