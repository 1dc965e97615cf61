"""The pictures of figure 2: heat maps over images, and the log-likelihood through training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from ..files import replacing
from ..plots import COLOURS, MARKERS

# From blue, the least, to red, the most, as the paper's.
HEAT = "turbo"


def normalised(heat: Tensor) -> Tensor:
    """Each map of (n, H, W) from 0, its least position, to 1, its greatest; a flat map is 0."""
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    span = high - low
    return torch.where(span > 0, (heat - low) / span.clamp(min=1e-30), torch.zeros_like(heat))


def fitted(heat: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (n, H, W) at an image's size, bilinearly."""
    return F.interpolate(heat[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


@dataclass(frozen=True)
class Column:
    """One column: a title and a map for every image, (n, H, W); unit: what the numbers below the maps are in."""

    title: str
    maps: Tensor
    unit: str = ""


def heat_maps(
    path: Path,
    images: Tensor,
    names: Sequence[str],
    columns: Sequence[Column],
    *,
    title: str,
    shared: bool = False,
) -> None:
    """Draw a row for each image: the image, then each column's map over it; below each map its mean.

    images: (n, C, height, width) in [0, 1], C of 1 or 3. names: of the rows. shared: one colour scale for the
    columns that have a unit, in that unit and cut at the 1st and 99th percentile of all but the first of them; else
    every map has its own.
    """
    size = (images.shape[2], images.shape[3])
    drawn = [c for c in columns if c.unit] if shared else list(columns)
    scale = Normalize(0, 1)
    if shared:
        # The first column's start would take most of the scale for itself.
        later = torch.cat([c.maps.flatten() for c in drawn[1:] or drawn])
        low, high = torch.quantile(later, torch.tensor([0.01, 0.99])).tolist()
        scale = Normalize(low, high)
    figure = Figure(
        figsize=(1.55 * (1 + len(drawn)) + 1.0, 1.72 * len(images) + 1.0), dpi=160, layout="constrained"
    )
    panels = figure.subplots(len(images), 1 + len(drawn), squeeze=False)
    for row, (image, name) in enumerate(zip(images, names, strict=True)):
        panel = panels[row][0]
        panel.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        panel.set_ylabel(name, fontsize=10)
    for index, column in enumerate(drawn, start=1):
        values = fitted(column.maps if shared else normalised(column.maps), size)
        for row in range(len(images)):
            panel = panels[row][index]
            panel.imshow(values[row].numpy(), cmap=HEAT, norm=scale, interpolation="nearest")
            mean = float(column.maps[row].mean())
            panel.set_xlabel(
                f"{mean:.1f} {column.unit}" if column.unit else f"mean {mean:.2f}", fontsize=8, labelpad=2
            )
    for panel, heading in zip(panels[0], ["(a) input", *(c.title for c in drawn)], strict=True):
        panel.set_title(heading, fontsize=9.5)
    for panel in panels.flat:
        panel.set_xticks([])
        panel.set_yticks([])
        panel.spines[:].set_visible(False)
    bar = figure.colorbar(
        ScalarMappable(scale, HEAT),
        ax=panels,
        fraction=0.03,
        aspect=35,
        pad=0.015,
        extend="both" if shared else "neither",
    )
    if shared:
        bar.set_label(f"log q(t$_{{hw}}$|s), {drawn[0].unit} per position")
    else:
        bar.set_ticks([0, 1], labels=["the map's\nleast", "the map's\ngreatest"])
    figure.suptitle(title, fontsize=11)
    with replacing(path) as file:
        figure.savefig(file, format="png")


@dataclass(frozen=True)
class Curve:
    """A line: values by step for every seed, (seeds, steps)."""

    steps: Sequence[int]
    values: Tensor


def likelihood_curves(
    path: Path,
    panels: Mapping[str, Mapping[str, Curve]],
    levels: Mapping[str, float],
    *,
    title: str,
    level_label: str,
) -> None:
    """Draw nats per position over steps: a panel for each pair of layers, a line for each student.

    panels: curves by pair and label. levels: a dashed line for each pair. Steps are shown as sqrt(step), so that
    the first ones, which change most, can be seen; the lowest values may be cut off.
    """
    figure = Figure(figsize=(3.5 * len(panels) + 0.4, 3.9), dpi=160, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (pair, curves) in zip(axes, panels.items(), strict=True):
        seen, ends = [levels[pair]], [levels[pair]]
        named: list[tuple[float, str, int]] = []
        for (label, curve), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
            middle = curve.values.mean(0)
            spread = curve.values.std(0) if len(curve.values) > 1 else torch.zeros_like(middle)
            steps = list(curve.steps)
            axis.plot(
                steps, middle.tolist(), color=colour, marker=marker, markersize=4, linewidth=2, label=label
            )
            axis.fill_between(
                steps,
                (middle - spread).tolist(),
                (middle + spread).tolist(),
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
            seen += middle.tolist()
            ends.append(float(middle[-1]))
            named.append((float(middle[-1]), colour, steps[-1]))
        axis.axhline(levels[pair], color="black", linestyle="--", linewidth=1, label=level_label)
        top = max(seen)
        # A start far below every end would press the rest into a line.
        floor = max(min(seen), min(ends) - (top - min(ends)) - 1.0)
        axis.set_ylim(floor - 0.04 * (top - floor), top + 0.06 * (top - floor))
        placed = -math.inf
        for value, colour, step in sorted(named):
            # The lines' last values, moved apart where two would overlap.
            placed = max(value, placed + 0.07 * (top - floor))
            axis.annotate(
                f"{value:.1f}",
                (step, placed),
                xytext=(4, 0),
                textcoords="offset points",
                color=colour,
                va="center",
                fontsize=9,
                fontweight="bold",
                annotation_clip=False,
            )
        axis.set_xscale("function", functions=(_root, _square))
        axis.set_xlim(left=0)
        last = max(curve.steps[-1] for curve in curves.values())
        axis.set_xticks(sorted({0, last // 20, last // 5, last // 2, last}))
        axis.set_title(pair, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("log q(t$_{hw}$|s), nats per position")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title, fontsize=11)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _root(x: Tensor) -> Tensor:
    return x.clip(min=0) ** 0.5


def _square(x: Tensor) -> Tensor:
    return x**2
