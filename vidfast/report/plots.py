"""The figures of a report, as SVG. matplotlib is needed: `pip install 'vidfast[bench]'`."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterable
from typing import Any

from vidfast.report import device
from vidfast.report.document import Figure
from vidfast.report.results import COMPILE, COPY, EAGER, KERNEL, SCALING, STEP, TORCH_LOSS, Row, Run
from vidfast.report.tables import short, strategies

INK, FAINT = "#1f2933", "#d5dbe1"
COLOURS = {
    EAGER: "#9aa5b1",
    TORCH_LOSS: "#c2a878",
    COMPILE: "#e07b39",
    "two_pass": "#8ecae6",
    "one_pass": "#2a7ab8",
    "in place": "#123a63",
    "kernel": "#2b9348",
    COPY: INK,
}
MARKERS = ("o", "s", "D", "^", "v")
STYLE: Any = {
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff2",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "path",
    # Ids in the SVG follow from this and not from chance: the same results give the same file.
    "svg.hashsalt": "vidfast",
}


def colour(provider: str) -> str:
    for name in ("in place", "one_pass", "two_pass"):
        if provider.startswith("vidfast") and provider.endswith(name):
            return COLOURS[name]
    return COLOURS.get(provider, COLOURS["kernel"] if provider.startswith("kernel") else FAINT)


def marker(run: Run, provider: str) -> str:
    """One marker a back end, so that two of them can share a strategy's colour."""
    backends = list(dict.fromkeys(name.split()[1] for name in strategies(run)))
    words = provider.split()
    return (
        MARKERS[backends.index(words[1]) % len(MARKERS)]
        if words[0] == "vidfast" and words[1] in backends
        else "o"
    )


def draw(figure: Any, name: str, caption: str) -> Figure:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    text = buffer.getvalue()
    return Figure(name, caption, text[text.index("<svg") :])


def unit_rows(run: Run, suite: str, provider: str) -> list[Row]:
    return [row for row in run.of(suite) if row.provider == provider and row.incoming == 1.0]


def roofline(run: Run, plt: Any) -> Figure | None:
    """The rate of the unavoidable bytes against the size of a tensor, under the copy's own rate."""
    figure, axes = plt.subplots(figsize=(7.2, 4.0))
    rows = [row for suite in (STEP, SCALING) for row in run.of(suite) if row.facts["dtype"] == "float32"]
    rows = [
        row
        for row in rows
        if row.cold and row.facts["layout"] == "contiguous" and row.facts.get("axis") != "threads"
    ]
    copies = [row for row in rows if row.provider == COPY]
    if not copies:
        plt.close(figure)
        return None
    line(
        axes,
        copies,
        [row.gb_per_s for row in copies],
        label="copy (the roofline)",
        color=INK,
        linestyle="--",
        marker="",
    )
    for provider in (EAGER, COMPILE, *strategies(run)):
        mine = [row for row in rows if row.provider == provider and row.incoming == 1.0]
        if mine:
            rates = [row.useful_gb_per_s for row in mine]
            line(
                axes, mine, rates, label=short(provider), color=colour(provider), marker=marker(run, provider)
            )
    in_place = (row.provider for row in run.of(KERNEL) if "in place" in row.provider and run.gpu is None)
    for provider in dict.fromkeys(in_place):
        mine = [row for row in run.of(KERNEL) if row.provider == provider and row.facts["dtype"] == "float32"]
        line(
            axes,
            mine,
            [row.useful_gb_per_s for row in mine],
            label=provider,
            color=colour(provider),
            marker="x",
            linestyle="",
        )
    axes.set(xscale="log", xlabel="bytes of one tensor", ylabel="GB/s of the three unavoidable passes")
    axes.set_ylim(bottom=0)
    axes.set_title(f"Forward + backward, fp32, g = 1, cold cache ({run.device})")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    drawn = draw(
        figure,
        "roofline",
        "Rate against size. Above the copy's line is possible in place: a store finds its line in the cache, where "
        "the copy first reads what it overwrites.",
    )
    plt.close(figure)
    return drawn


def device_kernels(run: Run, plt: Any) -> Figure | None:
    """A GPU's kernels alone: the share of the copy's rate that one pass reaches, case by case."""
    names = device.backends(run) if run.gpu else []
    cases = run.cases(KERNEL)
    if not names or not cases:
        return None
    figure, axes = plt.subplots(figsize=(7.2, 0.9 + 0.3 * len(cases)))
    for number, backend in enumerate(names):
        for primitive in device.ONE_PASS:
            points = [
                (100 * row.share_of_copy, index)
                for index, case in enumerate(cases)
                if (row := device.kernel(run, case, backend, primitive)) is not None
                and row.share_of_copy is not None
            ]
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                linestyle="",
                marker=MARKERS[number % len(MARKERS)],
                color=COLOURS["in place" if "place" in primitive else "one_pass"],
                label=f"{backend} {primitive}",
            )
    for index, case in enumerate(cases):
        size = next(row.pass_bytes for row in run.of(KERNEL) if row.case == case)
        aim = next((share for least, share in device.SHARES if size >= least), None)
        if aim is not None:
            axes.plot([100 * aim] * 2, [index - 0.4, index + 0.4], color=COLOURS[COMPILE], linewidth=1.5)
    axes.axvline(100, color=INK, linestyle="--", linewidth=1)
    axes.set(xlabel="share of the copy's rate, % (bar: the aim for this size)", xlim=(0, None))
    axes.set_yticks(range(len(cases)), cases)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_title(f"One pass, device time, cold ({run.device})")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    drawn = draw(figure, "kernels", "Share of the copy's rate that one pass reaches, from CUDA graphs.")
    plt.close(figure)
    return drawn


def line(axes: Any, rows: list[Row], rates: Iterable[float | None], **style: Any) -> None:
    """Rates by size; cases of the same size (another shape, another suite) are one point, their median."""
    by_size: dict[int, list[float]] = {}
    for row, rate in zip(rows, rates, strict=True):
        if rate is not None:
            by_size.setdefault(row.pass_bytes, []).append(rate)
    points = [(size, statistics.median(rates)) for size, rates in sorted(by_size.items())]
    axes.plot([x for x, _ in points], [y for _, y in points], linewidth=1.2, markersize=5, **style)


def against_eager(run: Run, plt: Any) -> Figure | None:
    return ratios(run, plt, EAGER, "eager", (TORCH_LOSS, COMPILE, *strategies(run)))


def against_compile(run: Run, plt: Any) -> Figure | None:
    return ratios(run, plt, COMPILE, "compile", strategies(run))


def ratios(run: Run, plt: Any, baseline: str, name: str, others: Iterable[str]) -> Figure | None:
    """How many times faster than the baseline each of the others is, case by case, with its spread."""
    cases = [case for case in run.cases(STEP) if run.find(STEP, case, baseline)]
    providers = [name for name in others if any(run.find(STEP, c, name) for c in cases)]
    if not cases or not providers:
        return None
    figure, axes = plt.subplots(figsize=(7.2, 0.9 + 0.42 * len(cases)))
    for provider in providers:
        for index, case in enumerate(cases):
            row = run.find(STEP, case, provider, 1.0) or run.find(STEP, case, provider)
            ratio = None if row is None else run.ratio(row, baseline)
            if ratio is None:
                continue
            label = short(provider) if index == 0 else None
            spot = {
                "color": colour(provider),
                "marker": marker(run, provider),
                "markersize": 6,
                "label": label,
            }
            axes.plot(
                [ratio.interval.low, ratio.interval.high],
                [index, index],
                color=colour(provider),
                linewidth=1.2,
            )
            axes.plot([ratio.value], [index], linestyle="", **spot)
    axes.axvline(1.0, color=COLOURS[baseline], linewidth=1.5)
    axes.set(xscale="log", xlabel=f"times faster than {baseline} (1 = {baseline}; bars are the spread)")
    axes.xaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(plt.NullFormatter())
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_title(f"Forward + backward against {baseline} (g = 1; fp16: the scaler's factor)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    drawn = draw(figure, f"against-{name}", f"Times faster than {baseline}, paired by round.")
    plt.close(figure)
    return drawn


def memory(run: Run, plt: Any) -> Figure | None:
    """Peak extra memory of a step, in tensors of the case's size: the same for every large shape, so one of them."""
    large = max(
        (row for row in run.of(STEP) if row.incoming == 1.0), key=lambda row: row.pass_bytes, default=None
    )
    if large is None:
        return None
    rows = [
        row
        for row in run.of(STEP)
        if row.case == large.case
        and row.family != "copy"
        and row.provider != "vidfast default"
        and not row.graph
    ]
    providers = list(dict.fromkeys(row.provider for row in rows))
    figure, axes = plt.subplots(figsize=(7.2, 0.9 + 0.36 * len(providers)))
    for index, provider in enumerate(providers):
        for row, peak in ((row, row.peak_passes) for row in rows if row.provider == provider):
            assert peak is not None, "only a graph's is not known"
            unit = row.incoming == 1.0
            offset = -0.18 if unit else 0.18
            axes.barh(
                index + offset,
                peak,
                height=0.34,
                color=colour(provider),
                alpha=1.0 if unit else 0.45,
            )
            axes.text(peak + 0.05, index + offset, f"{peak:.1f}", va="center", fontsize=7)
    axes.set_yticks(range(len(providers)), [short(provider) for provider in providers])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="peak extra memory, in tensors of the mean's size (pale: g other than 1)", xlim=(0, None))
    axes.set_title(f"Memory of a step on {large.case}")
    drawn = draw(figure, "memory", "Peak memory that a step allocates beyond its inputs.")
    plt.close(figure)
    return drawn


def scaling(run: Run, plt: Any) -> Figure | None:
    """Seconds against one extent at a time."""
    axes_names = [
        name
        for name in ("B", "C", "HW", "threads")
        if any(row.facts.get("axis") == name for row in run.of(SCALING))
    ]
    if not axes_names:
        return None
    figure, grid = plt.subplots(1, len(axes_names), figsize=(3.0 * len(axes_names), 3.0), squeeze=False)
    providers = [EAGER, COMPILE, *strategies(run)]
    for axes, name in zip(grid[0], axes_names, strict=True):
        rows = [row for row in run.of(SCALING) if row.facts.get("axis") == name and row.incoming == 1.0]
        for provider in providers:
            points = sorted((extent(row, name), row.seconds) for row in rows if row.provider == provider)
            if not points:
                continue
            xs = [x for x, _ in points]
            style = {
                "color": colour(provider),
                "marker": marker(run, provider),
                "markersize": 3.5,
                "linewidth": 1.2,
            }
            axes.plot(xs, [1e3 * s.middle for _, s in points], label=short(provider), **style)
            low, high = [1e3 * s.low for _, s in points], [1e3 * s.high for _, s in points]
            axes.fill_between(xs, low, high, color=colour(provider), alpha=0.15, linewidth=0)
        axes.set(xscale="log", yscale="log", xlabel=name, title=name)
        ticks = sorted({extent(row, name) for row in rows})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    grid[0][0].set_ylabel("ms a step, g = 1")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(len(labels), 6))
    figure.tight_layout()
    drawn = draw(figure, "scaling", "Time of a step as one extent grows; bands are the spread.")
    plt.close(figure)
    return drawn


def extent(row: Row, axis: str) -> float:
    shape: list[int] = row.facts["shape"]
    if axis == "threads":
        return float(row.facts["threads"])
    return float({"B": shape[0], "C": shape[1], "HW": row.elements // (shape[0] * shape[1])}[axis])


def all_figures(run: Run) -> Iterable[Figure]:
    """Every figure that the run has rows for. ImportError where matplotlib is not installed."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    drawing = (device_kernels, roofline, against_eager, against_compile, memory, scaling)
    with plt.rc_context(STYLE):
        drawn = [plot(run, plt) for plot in drawing]
    return [figure for figure in drawn if figure is not None]
