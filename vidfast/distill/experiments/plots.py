"""A study as a picture: accuracy over the columns, this run's panels beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..files import replacing
from .study import Outcome, Plan

# Tol's "muted" colours by row, VID's own in strong ones; markers tell the rows apart without colour.
STYLES: Mapping[str, tuple[str, str]] = {
    "Student": ("#000000", "x"),
    "KD": ("#88CCEE", "s"),
    "FitNet": ("#117733", "^"),
    "AT": ("#DDCC77", "v"),
    "NST": ("#AA4499", "D"),
    "VID-I": ("#CC3311", "o"),
    "KD + AT": ("#999933", "<"),
    "KD + VID-I": ("#EE7733", "P"),
    "fine-tuning": ("#777777", "+"),
    "LwF": ("#44AA99", "h"),
    "VID-LP": ("#EE3377", "*"),
    "LwF + FitNet": ("#332288", ">"),
    "VID-LP + VID-I": ("#882255", "X"),
}


def accuracy_over_columns(path: Path, plan: Plan, outcome: Outcome) -> None:
    """A panel of lines for each panel of the study, error bars of one standard deviation, and the paper's below."""
    published = [panel for panel in plan.panels if panel.title in plan.paper]
    height = 2 if published else 1
    figure = Figure(figsize=(3.0 + 5.2 * len(plan.panels), 0.8 + 3.7 * height), dpi=150, layout="constrained")
    axes = figure.subplots(height, len(plan.panels), squeeze=False)
    for place, panel in enumerate(plan.panels):
        ours: dict[str, list[tuple[float, float, float]]] = {}
        for cell in outcome.cells:
            if cell.panel == panel.title and cell.mean is not None:
                at = [column.label for column in panel.columns].index(cell.column)
                ours.setdefault(cell.arm, []).append((at, cell.mean, cell.spread))
        _lines(axes[0][place], ours, [column.label for column in panel.columns])
        axes[0][place].set_title(f"{panel.title}: this run", fontsize=11)
        if height == 2:
            paper = plan.paper.get(panel.title, {})
            names = list(dict.fromkeys(column for row in paper.values() for column in row))
            theirs = {
                arm.label: [(float(names.index(c)), value, 0.0) for c, value in paper[arm.label].items()]
                for arm in plan.arms
                if arm.label in paper
            }
            _lines(axes[1][place], theirs, names)
            axes[1][place].set_title(f"{panel.title}: the paper", fontsize=11)
    for row in axes:
        row[0].set_ylabel("test accuracy (%)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(
        f"{plan.title}\nmean and standard deviation of {len(plan.seeds)} seeds; teacher "
        f"{outcome.teacher_accuracy:.1f} %",
        fontsize=11,
    )
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _lines(axis: Any, rows: Mapping[str, list[tuple[float, float, float]]], names: list[str]) -> None:
    for i, (label, points) in enumerate(rows.items()):
        colour, marker = STYLES.get(label, ("#BBBBBB", "."))
        ours = "VID" in label
        # Side by side, so that error bars do not hide each other.
        beside = 0.05 * (i - (len(rows) - 1) / 2)
        points = sorted(points)
        axis.errorbar(
            [at + beside for at, _, _ in points],
            [value for _, value, _ in points],
            yerr=[spread for _, _, spread in points],
            color=colour,
            marker=marker,
            label=label,
            linewidth=2.2 if ours else 1.1,
            markersize=6,
            elinewidth=0.8,
            capsize=2,
            zorder=3 if ours else 2,
        )
    axis.set_xticks(range(len(names)), names)
    axis.set_xlim(-0.4, len(names) - 0.6)
    axis.grid(alpha=0.3, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
