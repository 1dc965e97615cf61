"""A comparison as text: the table that is printed, and the run folder's report."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import torch

import vidfast

from .experiments.compare import Summary


def table(summaries: Sequence[Summary], labels: Mapping[str, str], baseline: str) -> list[list[str]]:
    """Rows of text: a header, then M, each arm's mean ± spread, and each arm's gain over the baseline."""
    arms = [arm for arm in labels if any(s.arm == arm for s in summaries)]
    others = [arm for arm in arms if arm != baseline]
    gains = ["gain"] if len(others) == 1 else [f"gain of {labels[arm]}" for arm in others]
    rows = [["M", *(labels[arm] for arm in arms), *gains]]
    for samples in sorted({s.samples_per_class for s in summaries}):
        cells = {s.arm: s for s in summaries if s.samples_per_class == samples}
        row = [str(samples)]
        row += [mean_and_spread(cells[arm].accuracies) if arm in cells else "" for arm in arms]
        for arm in others:
            both = arm in cells and baseline in cells
            row.append(f"{cells[arm].mean - cells[baseline].mean:+.1f}" if both else "")
        rows.append(row)
    return rows


def mean_and_spread(values: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """Mean ± sample standard deviation; a single value alone, which has no spread to tell.

    digits: after the point. sign: "+" for a mean that is a difference.
    """
    text = f"{mean(values):{sign}.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """The table in columns, for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """The table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " ---: |" * len(rows[0]), *lines[1:]])


def markdown(
    config: Mapping[str, Any],
    labels: Mapping[str, str],
    rows: Sequence[Sequence[str]],
    *,
    teacher_accuracy: float,
    seconds: float,
) -> str:
    """The run folder's report.md."""
    vid = config["vid"]
    seeds = config["seeds"]
    common = next(iter(config["training"].values()))
    rates = "; ".join(
        f"{labels[arm]}: {options['optimizer']}, learning rate {options['lr']:g}"
        for arm, options in config["training"].items()
    )
    teacher = config["teacher_training"]
    return f"""# {config["student"]} taught by {config["teacher"]} on {config["data"]}

Top-1 test accuracy in percent after the last step, mean ± sample standard deviation over {len(seeds)} \
seed{"s" if len(seeds) != 1 else ""}; M is the number of labelled images a class. The seed sets which images \
those are, the initial weights and the order. The teacher reaches {teacher_accuracy:.1f}.

{as_markdown(rows)}

![Test accuracy over training steps](curves.png)

## How it was made

| | |
| --- | --- |
| VID-I | weight {vid["weight"]:g}, regressor {vid["regressor"]}, initial variance {vid["init_var"]:g}, \
alpha's learning rate x {vid["alpha_lr"]:g}, reduction {vid["reduction"]} |
| students | {common["steps"]} steps, {common["schedule"]} schedule, batch size {common["batch_size"]}, \
weight decay {common["weight_decay"]:g}; {rates} |
| teacher | {teacher["steps"]} steps of {teacher["optimizer"]}, learning rate {teacher["lr"]:g}, on the whole \
training part |
| seeds | {", ".join(map(str, seeds))} |
| software | vidfast {vidfast.__version__}, torch {torch.__version__}, Python {platform.python_version()} |
| time | {seconds:.0f} s on {platform.machine()}, {torch.get_num_threads()} threads |

Both arms have the same labelled images, initial student, augmentation and number of steps. The default
hyperparameters of each arm were chosen on validation images, which are neither test images nor among the M.
`config.json` holds every option, `metrics.csv` every row of the metrics, and `checkpoints/` for each run the
student's weights (`student.safetensors`) and the state from which `--resume` continues (`checkpoint.pt`).
"""
