"""Parts of documents that stored runs make, between two markers: generated, and checked to be what is stored.

The README's tables, of heads, of the bare loss and of masks, and what docs/kernel-notes.md says of GPUs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from vidfast.report import device, figures, heads, masks, tables, variances
from vidfast.report.document import Table
from vidfast.report.results import (
    COMPILE,
    DEFAULT,
    EAGER,
    HEAD,
    MASKS,
    STEP,
    VARIANCES,
    Run,
    contended_share,
)

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
NOTES_BEGIN, NOTES_END = "<!-- measured on GPUs: begin -->", "<!-- measured on GPUs: end -->"


def best(run: Run, ending: str) -> list[str]:
    """The rows of a strategy, one a back end."""
    return [name for name in tables.strategies(run) if name.endswith(ending)]


def table(run: Run) -> Table:
    """A line a case at g = 1: eager, torch.compile, each back end allocating and in place, and what in place gains."""
    ours = [*best(run, " one_pass"), *best(run, " in place")]
    header = [
        "forward + backward, g = 1",
        "eager",
        "torch.compile",
        *(name.removeprefix("vidfast ") for name in ours),
    ]
    header += ["in place vs eager", "vs compile", "of copy's rate"]
    rows = []
    for case in run.cases(STEP):
        found = [run.find(STEP, case, name, 1.0) for name in (EAGER, COMPILE, *ours)]
        last = found[-1]
        if last is None:
            continue
        cells = [tables.mark(case, [row for row in found if row is not None])]
        cells += ["" if row is None else figures.time(row.seconds.middle) for row in found]
        cells += [figures.times(run.ratio(last, EAGER)), figures.times(run.ratio(last, COMPILE))]
        rows.append([*cells, figures.share(last.share_of_copy)])
    return Table(header, rows)


def sleeping(run: Run) -> bool:
    """Whether the run was made with OpenMP threads that sleep while they wait."""
    environment = run.machine.get("vidfast", {}).get("environment", {})
    return str(environment.get("OMP_WAIT_POLICY", "")).lower() == "passive"


def cost_of_sleeping(run: Run, others: Sequence[Run]) -> str | None:
    """One sentence: the time of the default's steps with sleeping threads over that with spinning ones."""
    for other in others:
        if other.device != run.device:
            continue
        ratios = [
            (run.find(STEP, case, DEFAULT, 1.0), other.find(STEP, case, DEFAULT, 1.0))
            for case in run.cases(STEP)
        ]
        found = [a.seconds.middle / b.seconds.middle for a, b in ratios if a is not None and b is not None]
        if found:
            return (
                f"With `OMP_WAIT_POLICY=passive` on the same machine, alone on it, vidfast's steps take "
                f"{figures.digits(min(found))} to {figures.digits(max(found))} times as long "
                f"(median {figures.digits(statistics.median(found))}, {len(found)} shapes)."
            )
    return None


def block(runs: Sequence[Run]) -> str:
    """What stands between the markers: tables of every run, and a sentence on runs with sleeping threads."""
    parts: list[str] = []
    spinning = [run for run in runs if not sleeping(run)]
    for run in sorted(runs, key=sleeping):  # what sleeping costs, behind the table that it speaks of
        if run.gpu and (device.only_tuned(run) or superseded(run, runs)):
            continue  # for the kernel notes
        if run.gpu:
            parts.append(device.summary(run))
            continue
        sentence = cost_of_sleeping(run, spinning) if sleeping(run) else None
        if sentence is not None:
            parts.append(sentence)
            continue
        torch = run.machine.get("vidfast", {}).get("torch", "?")
        busy, cases = contended_share(run.rows)
        load = f"; {busy} of {cases} cases beside other work" if busy else ""
        parts.append(f"**{run.device}**, torch {torch}, {run.date[:10]}{load}:")
        whole = [] if measured_again(run, spinning, HEAD) else heads.blocks(run)
        masked = [] if measured_again(run, spinning, MASKS) else masks.blocks(run)
        each = [] if measured_again(run, spinning, VARIANCES) else variances.blocks(run)
        bare = table(run)
        parts += whole
        if bare.rows or not (whole or masked or each):
            parts += ["The loss alone, without a regressor:"] if whole else []
            parts.append(bare.markdown())
        parts += [*masked, *each]
    if not any(run.gpu for run in runs):
        parts.append("GPU figures are pending: no stored run was made on a GPU.")
    return "\n\n".join(parts)


def measured_again(run: Run, runs: Sequence[Run], suite: str) -> bool:
    """Whether a later run on the same processor measured the suite."""
    return any(other.device == run.device and other.date > run.date and other.of(suite) for other in runs)


def superseded(run: Run, runs: Sequence[Run]) -> bool:
    """Whether a later run on the same GPU measured steps too; or heads or masks, where this one has no more than that.

    The only run with masks stands until another has some.
    """
    later = [other for other in runs if other.gpu and other.device == run.device and other.date > run.date]
    if run.of(MASKS) and not any(other.of(MASKS) for other in later):
        return False
    if {row.suite for row in run.rows} == {MASKS}:
        return True
    return any(other.of(STEP) or (other.of(HEAD) and not run.of(STEP)) for other in later)


def insert(text: str, runs: Sequence[Run]) -> str:
    """`text` with its blocks anew, whichever it has the markers of.

    ValueError if it has neither pair of markers, or not each once and in order.
    """
    blocks = ((BEGIN, END, block), (NOTES_BEGIN, NOTES_END, device.notes))
    written = [(begin, end, make) for begin, end, make in blocks if begin in text or end in text]
    for begin, end, make in written or blocks[:1]:
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"wanted the markers {begin} and {end} once each, in this order")
        head, tail = text[: text.index(begin) + len(begin)], text[text.index(end) :]
        text = f"{head}\n{make(runs)}\n{tail}"
    return text


def update(path: Path, runs: Sequence[Run]) -> bool:
    """Write the block into the file; whether that changed it."""
    before = path.read_text(encoding="utf-8")
    after = inserted(path, before, runs)
    if after != before:
        path.write_text(after, encoding="utf-8")
    return after != before


def is_current(path: Path, runs: Sequence[Run]) -> bool:
    """Whether the file holds what these runs would generate."""
    text = path.read_text(encoding="utf-8")
    return inserted(path, text, runs) == text


def inserted(path: Path, text: str, runs: Sequence[Run]) -> str:
    """`insert`, with the file's name in its error."""
    try:
        return insert(text, runs)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
