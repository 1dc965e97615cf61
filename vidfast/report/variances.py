"""Losses with one variance an element: what one pass gains on torch's own, and on the compiled formula."""

from __future__ import annotations

from vidfast.report import figures, tables
from vidfast.report.document import Section, Table
from vidfast.report.results import COMPILE, DEFAULT, GRAPH, IN_PLACE, TORCH_LOSS, VARIANCES, Row, Run

BASELINES = (TORCH_LOSS, COMPILE)
OURS = {DEFAULT: "vidfast", IN_PLACE: "in place"}
TEXT = (
    "Forward and backward at g = 1 where a variance is predicted for each element. The first column is "
    "`torch.nn.GaussianNLLLoss`, or the eager formula where the row says another loss; `torch.compile` is given the "
    "formula without torch's check of the variances, which nothing compiles. The share is of the copy's rate in the "
    "same run, counted on five passes: mean, target and raw read, two gradients written."
)


def blocks(run: Run) -> list[str]:
    """What the README and the notes say of them: nothing where the run measured none."""
    found = [each.markdown() for each in (table(run), table(run, GRAPH)) if each.rows]
    return [*found, sentence(run)] if found else []


def sections(run: Run) -> list[Section]:
    """What a page says of them."""
    found = [each for each in (table(run), table(run, GRAPH)) if each.rows]
    return [Section("One variance an element", 3, [TEXT, *found, sentence(run)])] if found else []


def table(run: Run, suffix: str = "") -> Table:
    """A line a case: the time of a step, its ratios, and the share of the copy's rate."""
    what = (
        "the same as a CUDA graph: device time"
        if suffix
        else "one variance an element, forward + backward, g = 1"
    )
    names = [TORCH_LOSS, COMPILE] if not suffix else [COMPILE]
    header = [what, *names, *OURS.values(), *(f"vs {name.removeprefix('torch.')}" for name in names)]
    rows = []
    for case in run.cases(VARIANCES):
        others = [run.find(VARIANCES, case, name + suffix, 1.0) for name in names]
        ours = [run.find(VARIANCES, case, name + suffix, 1.0) for name in OURS]
        if all(row is None for row in ours):
            continue
        shown = [row for row in (*others, *ours) if row is not None]
        times = ["" if row is None else figures.time(row.seconds.middle) for row in (*others, *ours)]
        shares = [figures.share(row.share_of_copy) for row in ours if row is not None and row.share_of_copy]
        gains = [_gains(run, ours, name) for name in names]
        rows.append([tables.mark(case, shown), *times, *gains, " / ".join(shares)])
    return Table([*header, "of the copy's rate"], rows)


def _gains(run: Run, ours: list[Row | None], baseline: str) -> str:
    """How many times faster than the baseline each of ours is."""
    found = [figures.times(tables.ratio(run, row, baseline)) for row in ours if row is not None]
    return " / ".join(filter(None, found))


def sentence(run: Run) -> str:
    """Where ours is not the fastest."""
    lost = shortfalls(run, tuple(OURS))
    return f"Slower beyond the noise: {'; '.join(lost) or 'nowhere'}."


def shortfalls(run: Run, names: tuple[str, ...] = (IN_PLACE,)) -> list[str]:
    """Every row of these that takes longer than a baseline, beyond the noise; `tables.shortfalls` has the default's."""
    found = []
    for row in run.of(VARIANCES):
        if row.provider.removesuffix(GRAPH) not in names:
            continue
        for baseline in BASELINES:
            slower = tables.times_slower(run, row, baseline)
            if slower is not None:
                at = f"{row.suite}, {row.case}, {row.provider}"
                found.append(f"{at}: {figures.digits(slower)} times the time of {baseline}")
    return found
