"""Pictures of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

from .experiments.compare import Run
from .files import replacing

# Okabe and Ito's colours, which colour-blind readers tell apart; the teacher is black.
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")


def accuracy_curves(
    path: Path,
    runs: Sequence[Run],
    labels: Mapping[str, str],
    *,
    title: str,
    teacher_accuracy: float | None = None,
    column: str = "test_accuracy",
) -> None:
    """Draw accuracy over steps: a panel for each M, a line for each arm, a band of one standard deviation.

    labels: what each arm is called, in the order of the legend. accuracies are in percent.
    """
    sizes = sorted({run.samples_per_class for run in runs})
    figure = Figure(figsize=(1.2 + 4.4 * len(sizes), 4.7), dpi=160, layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    ends: list[float] = []
    for panel, samples in zip(panels, sizes, strict=True):
        finals: list[tuple[float, str]] = []
        for (arm, label), colour, marker in zip(
            labels.items(), _cycle(COLOURS), _cycle(MARKERS), strict=False
        ):
            histories = [run.history for run in runs if run.arm == arm and run.samples_per_class == samples]
            if not histories:
                continue
            steps = [row["step"] for row in histories[0]]
            by_step = [[row[column] for row in rows] for rows in zip(*histories, strict=True)]
            middle = [mean(values) for values in by_step]
            spread = [stdev(values) if len(values) > 1 else 0.0 for values in by_step]
            panel.plot(steps, middle, color=colour, label=label, linewidth=2, marker=marker, markersize=4)
            low = [m - s for m, s in zip(middle, spread, strict=True)]
            high = [m + s for m, s in zip(middle, spread, strict=True)]
            panel.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            finals.append((middle[-1], colour))
            ends.append(min(by_step[-1]))
        if teacher_accuracy is not None:
            panel.axhline(teacher_accuracy, color="black", linestyle="--", linewidth=1, label="teacher")
        _write_finals(panel, finals)
        seeds = len({run.seed for run in runs})
        panel.set_title(f"M = {samples} labelled images a class", fontsize=11)
        panel.set_xlabel("training step")
        panel.grid(alpha=0.3, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy (%)")
    panels[0].set_ylim(max(0.0, 10 * math.floor((min(ends) - 20) / 10)), 101)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    plural = "mean of 1 seed" if seeds == 1 else f"mean ± standard deviation of {seeds} seeds"
    figure.suptitle(f"{title}\n{plural}", fontsize=11)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _write_finals(panel: object, finals: Sequence[tuple[float, str]]) -> None:
    """Each arm's last value beside its line's end, in its colour, moved apart where two would overlap."""
    least, placed = 3.0, -math.inf
    for value, colour in sorted(finals):
        placed = max(value, placed + least)
        panel.annotate(  # type: ignore[attr-defined]
            f"{value:.1f}",
            xy=(1.0, placed),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=10,
            fontweight="bold",
            annotation_clip=False,
        )


def _cycle(values: Sequence[str]) -> list[str]:
    return list(values) * 8
