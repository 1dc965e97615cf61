"""The loss with a mask: what it gains on indexing and on the compiled formula, and what it costs over no mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vidfast.report import figures, tables
from vidfast.report.document import Section, Table
from vidfast.report.results import COMPILE, GRAPH, INDEXING, MASKS, WITHOUT_MASK, Row, Run

# What a step with a mask may take of the time of the same step without one, by how its positions are walked.
MOST_OF_UNMASKED = {"planes": 1.15, "rows": 1.05}
STRATEGIES = {"one_pass": "one_pass", "one_pass in place": "in place"}
TEXT = (
    "Forward and backward at g = 1 with a mask. `indexing` is the eager formula on `mean[mask]` and `target[mask]`; "
    "`torch.compile` is given the formula with `where` and a weighted mean. Ours is one pass, allocating and in place, "
    "without the mask and with it; the gains are of both, and the last column is what ours with the mask takes of its "
    "own time without one."
)


@dataclass(frozen=True)
class Pair:
    """Ours without the mask and with it, in one strategy; None where a row is missing."""

    without: Row | None
    masked: Row | None


def backends(run: Run) -> list[str]:
    """The back ends that have rows with a mask, in the order measured."""
    names = (row.provider.split()[1] for row in run.of(MASKS) if row.family == "vidfast")
    return list(dict.fromkeys(names))


def pair(run: Run, case: str, backend: str, strategy: str, suffix: str = "") -> Pair:
    name = f"vidfast {backend} {strategy}"
    return Pair(
        run.find(MASKS, case, name + WITHOUT_MASK + suffix, 1.0), run.find(MASKS, case, name + suffix, 1.0)
    )


def blocks(run: Run) -> list[str]:
    """What the README and the notes say of the masks that the run measured: nothing where it measured none."""
    found = [each.markdown() for each in (table(run), device_table(run)) if each.rows]
    return [*found, sentence(run)] if found else []


def sections(run: Run) -> list[Section]:
    """What a page says of them."""
    found = [each for each in (table(run), device_table(run)) if each.rows]
    return [Section("Masks", 3, [TEXT, *found, sentence(run)])] if found else []


def table(run: Run) -> Table:
    """A line a case and back end: the time of a whole step, and its ratios."""
    return lines(run, "with a mask, forward + backward, g = 1", (INDEXING, COMPILE))


def device_table(run: Run) -> Table:
    """The same steps as CUDA graphs. Indexing waits for a number of rows, which no graph can hold."""
    return lines(run, "the same as a CUDA graph: device time", (COMPILE,), GRAPH)


def lines(run: Run, what: str, baselines: Sequence[str], suffix: str = "") -> Table:
    several = len(backends(run)) > 1
    header = [what, *(["back end"] if several else []), *baselines]
    header += [name + end for name in STRATEGIES.values() for end in (WITHOUT_MASK, "")]
    header += [f"vs {name.removeprefix('torch.')}" for name in baselines]
    rows = []
    for case in run.cases(MASKS):
        others = [run.find(MASKS, case, name + suffix, 1.0) for name in baselines]
        for backend in backends(run):
            pairs = [pair(run, case, backend, strategy, suffix) for strategy in STRATEGIES]
            ours = [row for each in pairs for row in (each.without, each.masked)]
            if all(row is None for row in ours):
                continue
            shown = [row for row in (*others, *ours) if row is not None]
            cells = [tables.mark(case, shown), *([backend] if several else [])]
            cells += ["" if row is None else figures.time(row.seconds.middle) for row in (*others, *ours)]
            cells += [gains(run, pairs, name + suffix) for name in baselines]
            rows.append([*cells, " / ".join(filter(None, (share_of_unmasked(run, each) for each in pairs)))])
    return Table([*header, "of the time without"], rows, left=2 if several else 1)


def gains(run: Run, pairs: Sequence[Pair], baseline: str) -> str:
    """How many times faster than the baseline each of ours with the mask is."""
    found = [figures.times(run.ratio(each.masked, baseline)) for each in pairs if each.masked is not None]
    return " / ".join(filter(None, found))


def share_of_unmasked(run: Run, both: Pair) -> str:
    """The time with the mask over that without, and whether that is a tie: where the spread holds 1."""
    if both.masked is None or both.without is None:
        return ""
    ratio = run.ratio(both.masked, both.without.provider)
    assert ratio is not None, "two rows of one case"
    return figures.digits(1 / ratio.value) + (" (tie)" if ratio.tie else "")


def masked_rows(run: Run) -> Iterator[tuple[Row, Row | None]]:
    """Every row of ours with a mask, steps and graphs, and the same without."""
    for suffix in ("", GRAPH):
        for case in run.cases(MASKS):
            for backend in backends(run):
                for strategy in STRATEGIES:
                    found = pair(run, case, backend, strategy, suffix)
                    if found.masked is not None:
                        yield found.masked, found.without


def dearer(run: Run, row: Row, without: Row | None) -> float | None:
    """The time over that without the mask, where it is more than it may be, beyond the noise."""
    ratio = None if without is None else run.ratio(row, without.provider)
    most = MOST_OF_UNMASKED[str(row.facts["walk"])]
    return None if ratio is None or ratio.interval.high >= 1 / most else 1 / ratio.value


def sentence(run: Run) -> str:
    """In how many rows a mask costs no more than it may, and where ours is not the fastest."""
    kept = []
    for walk, most in MOST_OF_UNMASKED.items():
        found = [(row, other) for row, other in masked_rows(run) if other and row.facts["walk"] == walk]
        within = sum(dearer(run, row, other) is None for row, other in found)
        if found:
            kept.append(f"{walk} at most {figures.digits(most)} in {within} of {len(found)}")
    every = [row for row, _ in masked_rows(run)]
    slower = [text for name in (INDEXING, COMPILE) if (text := slower_than(run, name, every))]
    lost = f"Slower beyond the noise: {'; '.join(slower) or 'nowhere'}."
    return f"Of the time without a mask, within the noise: {', '.join(kept)}. {lost}" if kept else lost


def slower_than(run: Run, baseline: str, rows: Sequence[Row]) -> str:
    times = [t for row in rows if (t := tables.times_slower(run, row, baseline)) is not None]
    if not times:
        return ""
    span = " to ".join(dict.fromkeys(map(figures.digits, (min(times), max(times)))))
    return f"than {baseline} in {len(times)} rows ({span} times the time)"


def shortfalls(run: Run) -> list[str]:
    """Where a mask costs more than it may, and where ours is slower than what people do today."""
    found = []
    for row, without in masked_rows(run):
        at = f"{row.suite}, {row.case}, {row.provider}: "
        times = dearer(run, row, without)
        if times is not None:
            most = figures.digits(MOST_OF_UNMASKED[str(row.facts["walk"])])
            found.append(f"{at}{figures.digits(times)} times the time without the mask (aim: {most})")
        for baseline in (INDEXING, COMPILE):
            slower = tables.times_slower(run, row, baseline)
            if slower is not None:
                found.append(f"{at}{figures.digits(slower)} times the time of {baseline}")
    return found
