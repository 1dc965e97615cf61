"""Figure 2 as files and text: the pictures, the page, and what is printed."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import torch

import vidfast

from ..data import ImageData
from ..data.base import as_pixels
from ..report import as_markdown, as_text, mean_and_spread
from .figure2_outcome import ALONE, LABELS, MARGINAL, VID, Outcome
from .figure2_plan import Plan
from .heatmaps import Column, Curve, heat_maps, likelihood_curves
from .likelihood import BACKGROUND, FOREGROUND, Reading

# A difference in nats per position below which the text does not call one part of an image easier.
CLEARLY = 0.1


def drawn_pair(plan: Plan, outcome: Outcome) -> int:
    """The number of the pair whose maps are drawn."""
    first = outcome.marginal[outcome.seeds[0]]
    return [reading.pair.split(" -> ")[1] for reading in first].index(plan.layer)


def pictures(folder: Path, plan: Plan, data: ImageData, outcome: Outcome) -> list[str]:
    """Draw the figures; returns their names."""
    pair, seed = drawn_pair(plan, outcome), outcome.seeds[0]
    indices = outcome.shown
    inputs = data.test.inputs(indices)
    images = as_pixels(inputs) if data.normalisation is None else data.normalisation.pixels(inputs)
    labels = [int(data.test.labels[i]) for i in indices]
    names = [data.class_names[label] if data.class_names else f"class {label}" for label in labels]
    stages = plan.stages
    letters = iter("bcdefgh")
    columns = [
        Column(f"({next(letters)}) VID, step {step}", outcome.readings[VID][seed][step][pair].maps, "nats")
        for step in stages
    ]
    last = outcome.readings[ALONE][seed][stages[-1]][pair]
    columns.append(Column(f"({next(letters)}) no transfer", last.maps, "nats"))
    columns.append(Column(f"({next(letters)}) mean$_c$ |t$_{{chw}}$|", last.magnitudes))
    layer = f"{plan.student} taught by {plan.teacher}, {last.pair} ({last.height}x{last.width})"
    heat_maps(
        folder / "figure2.png",
        images,
        names,
        columns,
        title=f"log q(t$_{{hw}}$|s) of each image's map, normalised: {layer}",
    )
    heat_maps(
        folder / "figure2-nats.png",
        images,
        names,
        columns,
        title=f"The same maps on one scale: {layer}",
        shared=True,
    )
    panels = {
        reading.pair: {
            LABELS[arm]: Curve(
                outcome.steps,
                torch.tensor(
                    [
                        [outcome.readings[arm][s][step][i].nats for step in outcome.steps]
                        for s in outcome.seeds
                    ]
                ),
            )
            for arm in (VID, ALONE)
        }
        for i, reading in enumerate(outcome.marginal[seed])
    }
    levels = {
        reading.pair: mean(r.nats for r in outcome.of_marginal(i))
        for i, reading in enumerate(outcome.marginal[seed])
    }
    several = f", mean ± standard deviation of {len(outcome.seeds)} seeds" if len(outcome.seeds) > 1 else ""
    likelihood_curves(
        folder / "figure2-log-likelihood.png",
        panels,
        levels,
        title=f"Log-likelihood over all test images through training{several}",
        level_label=f"{MARGINAL} (each channel's mean and variance)",
    )
    return ["figure2.png", "figure2-nats.png", "figure2-log-likelihood.png"]


def table(outcome: Outcome) -> list[list[str]]:
    """For each pair of layers: the log-likelihood of both students at the end, and the gap."""
    last = outcome.steps[-1]
    rows = [["pair", "t", MARGINAL, "no transfer", "VID", "gap", "gap per element", "gap per image"]]
    for pair, shape in enumerate(outcome.marginal[outcome.seeds[0]]):
        gaps = outcome.gaps(pair)
        rows.append(
            [
                shape.pair,
                f"{shape.channels}x{shape.height}x{shape.width}",
                mean_and_spread([r.nats for r in outcome.of_marginal(pair)]),
                mean_and_spread([r.nats for r in outcome.of(ALONE, pair, last)]),
                mean_and_spread([r.nats for r in outcome.of(VID, pair, last)]),
                mean_and_spread(gaps, sign="+"),
                mean_and_spread([gap / shape.channels for gap in gaps], 2, "+"),
                f"{mean(gaps) * shape.positions:+.0f}",
            ]
        )
    return rows


def stages_table(plan: Plan, outcome: Outcome) -> list[list[str]]:
    """The drawn pair through training."""
    pair = drawn_pair(plan, outcome)
    rows = [["step", *(LABELS[arm] for arm in (VID, ALONE))]]
    for step in outcome.steps:
        rows.append(
            [
                str(step),
                *(mean_and_spread([r.nats for r in outcome.of(arm, pair, step)]) for arm in (VID, ALONE)),
            ]
        )
    return rows


def brightness_table(outcome: Outcome) -> list[list[str]]:
    """For each pair, after the last step and without a student: background, foreground, and |t|."""
    last = outcome.steps[-1]
    rows = [["pair", "student", "background", "foreground", "difference", "correlation with magnitude"]]
    for pair, shape in enumerate(outcome.marginal[outcome.seeds[0]]):
        for label, found in (
            ("VID", outcome.of(VID, pair, last)),
            ("no transfer", outcome.of(ALONE, pair, last)),
            ("none", outcome.of_marginal(pair)),
        ):
            dark = [r.background for r in found if r.background is not None]
            bright = [r.foreground for r in found if r.foreground is not None]
            difference = [d - b for d, b in zip(dark, bright, strict=False)]
            rows.append(
                [
                    shape.pair,
                    label,
                    mean_and_spread(dark) if dark else "",
                    mean_and_spread(bright) if bright else "",
                    mean_and_spread(difference, sign="+") if difference else "",
                    mean_and_spread([r.magnitude for r in found], 2, "+"),
                ]
            )
    return rows


def _which(outcome: Outcome, holds: Callable[[int], bool]) -> str:
    """ "all 4 pairs", "no pair" or the pairs' names."""
    pairs = [r.pair for r in outcome.marginal[outcome.seeds[0]]]
    found = [name for i, name in enumerate(pairs) if holds(i)]
    if len(found) == len(pairs):
        return f"all {len(pairs)} pairs"
    return ", ".join(found) if found else "no pair"


def findings(plan: Plan, outcome: Outcome) -> list[str]:
    """What the figure says about the paper's three remarks, and about how far q gets at all."""
    last, drawn = outcome.steps[-1], drawn_pair(plan, outcome)
    first = outcome.steps[0]
    vid = [mean(r.nats for r in outcome.of(VID, drawn, step)) for step in (first, last)]
    best = max(outcome.steps, key=lambda step: mean(r.nats for r in outcome.of(VID, drawn, step)))
    name = outcome.marginal[outcome.seeds[0]][drawn].pair
    gaps = outcome.gaps(drawn)
    lines = [
        f"- **Through training** (b, c, d): the log-likelihood of {name} goes from {vid[0]:.1f} to {vid[1]:.1f} nats "
        f"per position over the test images" + ("." if best == last else f"; it was highest at step {best}."),
        f"- **Without transfer** (e): q reaches {mean(r.nats for r in outcome.of(ALONE, drawn, last)):.1f} nats per "
        f"position there. The difference of the two bounds on I(t; s), VID's less the other's, is "
        f"{mean_and_spread(gaps, sign='+')} nats per position. "
        f"VID ends higher in every seed for {_which(outcome, lambda i: min(outcome.gaps(i)) > 0)}, lower in every "
        f"seed for {_which(outcome, lambda i: max(outcome.gaps(i)) < 0)}.",
        f"- **Against q without a student**, which gives each channel its mean and variance whatever the image: "
        f"VID is above it for {_which(outcome, lambda i: _above(outcome, VID, i))}, no transfer for "
        f"{_which(outcome, lambda i: _above(outcome, ALONE, i))}.",
    ]
    if outcome.of(VID, drawn, last)[0].background is not None:
        lines.append(
            "- **Background and foreground**: after VID training the background has the higher log-likelihood, as the "
            f"paper remarks, by more than {CLEARLY:g} nats per position in every seed, for "
            f"{_which(outcome, lambda i: _easier(outcome.of(VID, i, last)))}; without transfer for "
            f"{_which(outcome, lambda i: _easier(outcome.of(ALONE, i, last)))}; for q without a student for "
            f"{_which(outcome, lambda i: _easier(outcome.of_marginal(i)))}."
        )
    falls = _which(outcome, lambda i: mean(r.magnitude for r in outcome.of(VID, i, last)) < -0.1)
    rises = _which(outcome, lambda i: mean(r.magnitude for r in outcome.of(VID, i, last)) > 0.1)
    lines.append(
        "- **Magnitude**: the paper explains the background by its activations of about zero. Within an image of VID "
        f"training the log-likelihood falls with mean |t| (correlation below -0.1) for {falls}, and rises (above "
        f"0.1) for {rises}. These layers are sums of residual blocks before any ReLU, so a background's activations "
        "need not be zero."
    )
    return lines


def _above(outcome: Outcome, arm: str, pair: int) -> bool:
    last = outcome.steps[-1]
    return mean(r.nats for r in outcome.of(arm, pair, last)) > mean(r.nats for r in outcome.of_marginal(pair))


def _easier(readings: Sequence[Reading]) -> bool:
    """Whether the background is clearly easier than the foreground in every seed."""
    return all(
        r.background is not None and r.foreground is not None and r.background - r.foreground > CLEARLY
        for r in readings
    )


def printed(plan: Plan, outcome: Outcome) -> str:
    """For a terminal."""
    seeds = f"{len(outcome.seeds)} seed{'s' if len(outcome.seeds) != 1 else ''}"
    accuracies = ", ".join(
        f"{LABELS[a].split(',')[0]} {mean_and_spread(list(v.values()))}"
        for a, v in outcome.accuracies.items()
    )
    return "\n".join(
        [
            f"Figure 2: log q(t_hw|s) on the test images, nats per position, mean ± standard deviation over {seeds}",
            f"test accuracy (%): teacher {outcome.teacher_accuracy:.1f}, {accuracies}",
            "",
            as_text(table(outcome)),
            "",
            *findings(plan, outcome),
            "",
        ]
    )


def page(plan: Plan, data: ImageData, outcome: Outcome, *, command: str, took: str) -> str:
    """report.md."""
    stages = plan.stages
    drawn = outcome.marginal[outcome.seeds[0]][drawn_pair(plan, outcome)]
    seeds = f"{len(outcome.seeds)} seed{'s' if len(outcome.seeds) != 1 else ''}"
    vid, alone, teacher = plan.vid, plan.alone, plan.teacher_training
    options = ", ".join(f"{name} {value}" for name, value in plan.term.options.items())
    bright = outcome.of(VID, 0, stages[-1])[0].background is not None
    accuracies = outcome.accuracies
    return f"""# Figure 2: log q(t|s) through training ({data.name})

    {command}

![Heat maps of the log-likelihood](figure2.png)

{plan.student} taught by {plan.teacher}, seed {outcome.seeds[0]}. (a) images of the test set; (b, c, d) \
log q(t_hw|s) = sum_c log q(t_chw|s) for t the teacher's `{plan.layer}` \
({drawn.channels}x{drawn.height}x{drawn.width}) after {", ".join(map(str, stages))} steps of VID training; (e) the \
same for a student trained without transfer, after q alone was optimised on it for {stages[-1]} steps; (f) the \
teacher's mean_c |t_chw|. Every map is normalised by itself, its least position blue and its greatest red, and \
interpolated bilinearly to the image's size, so colours compare positions of one map and not maps; below each is its \
mean in nats per position. On one scale the maps of (b) to (e) are:

![The same heat maps on one scale](figure2-nats.png)

## The log-likelihood itself

Over all {len(data.test)} test images, in nats per position (summed over the channels), with the Gaussian's \
-1/2 log(2 pi), mean ± sample standard deviation over {seeds}, after {stages[-1]} steps. Equation 3 bounds the \
mutual information by I(t; s) >= H(t) + E[log q(t|s)], and H(t) is the teacher's alone: the gap between the two \
students is the difference between their bounds.

{as_markdown(table(outcome))}

![Log-likelihood through training](figure2-log-likelihood.png)

For {drawn.pair}, the pair that is drawn:

{as_markdown(stages_table(plan, outcome))}

The students' test accuracy is {mean_and_spread(list(accuracies[VID].values()))} % with VID-I and \
{mean_and_spread(list(accuracies[ALONE].values()))} % without transfer; the teacher reaches \
{outcome.teacher_accuracy:.1f} %.

## Background and foreground

{_brightness_text(bright)}

{as_markdown(brightness_table(outcome))}

## What it shows

{chr(10).join(findings(plan, outcome))}

## How it differs from the paper

- The paper names neither the networks, the layer, the stages nor the number of labelled images of its \
figure.{_size(plan)}
- It says that the maps are normalised, not how: by each map's own extremes here, and beside that not at all.
- The log-likelihoods over the test set, the gap and q without a student are ours.

## How it was made

- VID-I on all pairs: weight {plan.term.weight:g}, {options}; {vid.steps} steps of {vid.optimizer}, learning rate \
{vid.lr:g}. Without transfer: {alone.steps} steps of {alone.optimizer}, learning rate {alone.lr:g}, then q (regressors \
and variances) with the student frozen in eval mode, optimised as in VID training, from the same initial q.
- {plan.samples} labelled images a class; batch size {vid.batch_size}, {vid.schedule} schedule, weight decay \
{vid.weight_decay:g}. The seed sets the labelled images, the initial student, the order and the augmentation, the same \
for both students. q sees the labelled images alone; no number here is of an image that anything was trained on.
- Teacher: {teacher.steps} steps of {teacher.optimizer}, learning rate {teacher.lr:g}, on all training images.
- q without a student has each channel's mean and variance over the labelled images.
- The images are the test set's first of {len(outcome.shown)} classes. `log_likelihood.csv` has every reading of every \
seed and pair.
- vidfast {vidfast.__version__}, torch {torch.__version__}, Python {platform.python_version()}; {took} on \
{platform.machine()} with {torch.get_num_threads()} thread{"s" if torch.get_num_threads() != 1 else ""}.
"""


def _brightness_text(bright: bool) -> str:
    magnitude = (
        "The last column is the mean over images of the correlation, within an image, of log q(t_hw|s) with "
        "mean_c |t_chw|."
    )
    if not bright:
        return f"Brightness does not tell foreground from background in these images. {magnitude}"
    return (
        "Digits are bright strokes on black, so brightness tells the two apart: a position is foreground where its "
        f"pixels are on average at least {FOREGROUND:g} bright (of 1) and background where they are at most "
        f"{BACKGROUND:g}; edges between are left out. In nats per position. {magnitude}"
    )


def _size(plan: Plan) -> str:
    if plan.budget != "quick":
        return " The networks here are those of its table 1."
    return f" The quick budget has smaller networks than its table 1 and {plan.vid.steps} steps."
