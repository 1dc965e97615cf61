"""A study as text: the table beside the paper's, what it shows, and how every row was trained."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import torch

import vidfast

from ..report import as_markdown, as_text, mean_and_spread
from .study import Cell, Outcome, Panel, Plan

FEATURE_MATCHING = ("FitNet", "AT", "NST")


def percent(cell: Cell) -> str:
    """Mean ± sample standard deviation, for one run its value, and how many runs diverged."""
    if not cell.reached:
        return "diverged"
    failed = len(cell.accuracies) - len(cell.reached)
    lost = f" ({failed} of {len(cell.accuracies)} diverged)" if failed else ""
    return mean_and_spread(cell.reached) + lost


def rows(plan: Plan, outcome: Outcome, panel: Panel, *, bold: bool = False) -> list[list[str]]:
    """Header and rows: this run's columns, then the paper's.

    bold: mark the best mean of each column, of rows none of whose runs diverged.
    """
    cells = {(cell.arm, cell.column): cell for cell in outcome.cells if cell.panel == panel.title}
    paper = plan.paper.get(panel.title, {})
    published = list(dict.fromkeys(column for row in paper.values() for column in row))
    table = [["", *(c.label for c in panel.columns), *(f"paper, {column}" for column in published)]]
    best = {
        column.label: max(
            (c.mean or 0.0 for c in cells.values() if c.column == column.label and c.complete), default=0.0
        )
        for column in panel.columns
    }
    for arm in plan.arms:
        line = [arm.label]
        for column in panel.columns:
            cell = cells[arm.label, column.label]
            text = percent(cell)
            line.append(f"**{text}**" if bold and cell.complete and cell.mean == best[column.label] else text)
        line += [f"{paper[arm.label][c]:.2f}" if c in paper.get(arm.label, {}) else "" for c in published]
        table.append(line)
    return table


def findings(plan: Plan, outcome: Outcome, panel: Panel) -> list[str]:
    """VID-I against the student alone and against the best feature-matching row, column by column."""
    cells = {(cell.arm, cell.column): cell for cell in outcome.cells if cell.panel == panel.title}
    lines = []
    for column in panel.columns:
        vid, student = cells.get(("VID-I", column.label)), cells.get(("Student", column.label))
        others = [
            cell
            for arm in FEATURE_MATCHING
            if (cell := cells.get((arm, column.label))) and cell.mean is not None
        ]
        if vid is None or vid.mean is None:
            continue
        against = []
        if student is not None and student.mean is not None:
            against.append(f"{vid.mean - student.mean:+.1f} against the student alone")
        rival = max(others, key=lambda cell: cell.mean or 0.0, default=None)
        if rival is not None and rival.mean is not None:
            gap = vid.mean - rival.mean
            if min(len(vid.reached), len(rival.reached)) < 2:
                against.append(
                    f"{gap:+.1f} against {rival.arm}, the best feature-matching row (too few runs to judge)"
                )
            else:
                # Standard errors of the two means; below them a difference says nothing.
                noise = (vid.spread**2 / len(vid.reached) + rival.spread**2 / len(rival.reached)) ** 0.5
                verdict = "leads" if gap > noise else "is behind" if gap < -noise else "is level with"
                against.append(
                    f"{verdict} {rival.arm}, the best feature-matching row "
                    f"({gap:+.1f}, standard error {noise:.1f})"
                )
        if against:
            lines.append(f"- {panel.title}, {column.label}: VID-I {', '.join(against)}.")
    return lines


def printed(plan: Plan, outcome: Outcome) -> str:
    """All panels for a terminal."""
    parts = []
    for panel in plan.panels:
        parts += [f"{panel.title}", as_text(rows(plan, outcome, panel)), ""]
        parts += [*findings(plan, outcome, panel), ""]
    return "\n".join(parts)


def report(plan: Plan, outcome: Outcome, *, command: str, took: str, workers: int) -> str:
    """The page of this run, Markdown."""
    seeds = f"{len(plan.seeds)} seed{'s' if len(plan.seeds) != 1 else ''}"
    parts = [
        f"# {plan.title}",
        "",
        f"    {command}",
        "",
        f"Top-1 test accuracy in percent after the last step, mean ± sample standard deviation over {seeds}; the "
        f"best mean of a column is bold. The teacher, {plan.teacher}, reaches {outcome.teacher_accuracy:.1f} on "
        f"{plan.source.load().name} ({outcome.teacher_classes} classes). The paper's numbers stand to the right: other "
        "data and other sizes, so compare the order of the rows and the differences, not the values.",
    ]
    for panel in plan.panels:
        parts += ["", f"## {panel.title}", "", as_markdown(rows(plan, outcome, panel, bold=True))]
    parts += ["", f"![Accuracy over {plan.axis}](accuracy.png)", "", "## What it shows", ""]
    shown = [line for panel in plan.panels for line in findings(plan, outcome, panel)]
    parts += shown or ["Too few rows were run for a comparison."]
    parts += ["", "## How it differs from the paper", "", plan.notes.strip()]
    parts += ["", "## How it was made", "", *_made(plan, outcome, took, workers), ""]
    return "\n".join(parts)


def _made(plan: Plan, outcome: Outcome, took: str, workers: int) -> Sequence[str]:
    training, teacher = plan.training, plan.teacher_training
    lines = [
        f"- Students: {training.steps} steps, {training.schedule} schedule, batch size {training.batch_size}, weight "
        f"decay {training.weight_decay:g}. Every row of a column has the same labelled images, initial student (but "
        "for fine-tuning), order and augmentation, all set by the seed.",
        f"- Teacher: {teacher.steps} steps of {teacher.optimizer}, learning rate {teacher.lr:g}, on all training "
        f"images of {plan.source.load().name}.",
        f"- Settings: the candidate with the best mean accuracy on the validation images, over seeds "
        f"{', '.join(map(str, plan.search_seeds))}, in one column of each panel; no reported run has these seeds, and "
        "no validation image is a training or test image. The paper validates on 20 % of the training set; with few "
        "labelled images that would be too few to choose by, so a pool apart is used"
        f"{', which the reported runs train on as well' if plan.validation_trains else ''}. `search.csv` has "
        f"all {len(outcome.search)} candidates.",
        f"- vidfast {vidfast.__version__}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"{took} with {workers} process{'es' if workers != 1 else ''} on {platform.machine()}.",
        "",
    ]
    for panel in plan.panels:
        chosen = [["row", "optimizer", "learning rate", "terms", "weight of the labels' loss"]]
        for arm in plan.arms:
            setting = outcome.best[panel.title, arm.label].describe()
            chosen.append(
                [
                    arm.label,
                    setting["optimizer"],
                    setting["lr"],
                    setting["terms"] or "none",
                    setting["task_weight"],
                ]
            )
        column = panel.tune
        lines += [f"Chosen for {panel.title} (in the column {column.label}):", "", as_markdown(chosen), ""]
    return lines[:-1]
