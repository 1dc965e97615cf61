"""The tables' plans: their rows and the settings to choose from, their networks, data and seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vidfast.distill.errors import UserError
from vidfast.distill.experiments import paper, table1, table2, table3, table4
from vidfast.distill.experiments.arms import Arm, Setting, chosen, combination, transfer
from vidfast.distill.experiments.base import Options
from vidfast.distill.experiments.runs import (
    Term,
)
from vidfast.distill.experiments.study import Plan, check

VID = Term("vid", 3.0, {"regressor": "linear", "init_var": 1.0})


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


def test_settings_are_searched_with_the_seeds_of_the_budget(tmp_path: Path) -> None:
    """However few the steps."""
    for budget, expected in (("quick", [2, 1, 1, 1]), ("full", [2, 2, 2, 2])):
        for steps in (None, 2):
            options = Options(folder=tmp_path, budget=budget, steps=steps)
            plans = [table.plan(options) for table in (table1, table2, table3, table4)]
            assert [len(plan.search_seeds) for plan in plans] == expected


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


def test_full_budgets_report_runs_that_train_on_the_validation_images(tmp_path: Path) -> None:
    plan = table4.plan(Options(folder=tmp_path, budget="full"))
    digits = plan.target.load()
    assert len(plan.reported.load().train) == len(digits.train) + len(digits.validation)
    assert len(plan.reported.load().test) == len(digits.test)
    quick = table4.plan(Options(folder=tmp_path))
    assert quick.reported == quick.target
