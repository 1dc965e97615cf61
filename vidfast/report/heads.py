"""The head of a pair of layers, a regressor and its loss (`VIDLoss`): what a training step contains of this library."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vidfast.report import figures, tables
from vidfast.report.document import Table
from vidfast.report.results import COMPILE, COMPILED_DEFAULT, DEFAULT, EAGER, GRAPH, HEAD, Row, Run

COLUMNS = (EAGER, COMPILE, DEFAULT, COMPILED_DEFAULT)
NAMES = {EAGER: "eager formula", DEFAULT: "vidfast", COMPILED_DEFAULT: "vidfast compiled"}
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}


def blocks(run: Run) -> list[str]:
    """What the README and the notes say of the heads that the run measured: nothing where it measured none."""
    found = []
    steps, graphs = table(run), device_table(run)
    if steps.rows:
        found += [steps.markdown()]
    if graphs.rows:
        found += [graphs.markdown()]
    return [*found, sentences(run)] if found else []


def table(run: Run) -> Table:
    """A line a pair: time and peak extra memory of every row, what vidfast gains on torch.compile, and its memory."""

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        peak = figures.nbytes(row.facts["peak_extra_bytes"])
        return figures.time(row.seconds.middle) + (f", {peak}" if peak else "")

    head = "regressor and loss of a pair, forward + backward: time, peak extra memory"
    ours = [NAMES[DEFAULT], NAMES[COMPILED_DEFAULT]]
    header = [head, *(NAMES.get(name, name) for name in COLUMNS), *(f"{name} vs compile" for name in ours)]
    rows = []
    for case, cells, found in lines(run, "", cell):
        shares = [None if row is None else run.share_of_memory(row) for row in found[2:]]
        memory = " / ".join(figures.share(share) for share in shares if share is not None)
        rows.append([case, *cells, *gains(run, found), memory])
    return Table([*header, "memory of eager's"], rows)


def device_table(run: Run) -> Table:
    """The same steps as CUDA graphs: what the device takes of them."""
    rows = [
        [case, *cells, *gains(run, found)]
        for case, cells, found in lines(
            run, GRAPH, lambda row: "" if row is None else figures.time(row.seconds.middle)
        )
    ]
    ours = [NAMES[DEFAULT], NAMES[COMPILED_DEFAULT]]
    header = ["the same as a CUDA graph: device time", *(NAMES.get(name, name) for name in COLUMNS)]
    return Table([*header, *(f"{name} vs compile" for name in ours)], rows)


def lines(
    run: Run, suffix: str, cell: Callable[[Row | None], str]
) -> list[tuple[str, list[str], list[Row | None]]]:
    """(the case's name, a cell for each of COLUMNS, their rows) of every case that vidfast has a row in."""
    found = []
    for case in run.cases(HEAD):
        rows = [first_gradient(run, case, name + suffix) for name in COLUMNS]
        if rows[2] is None and rows[3] is None:
            continue
        name = tables.mark(case, [row for row in rows if row is not None])
        found.append((name, [cell(row) for row in rows], rows))
    return found


def first_gradient(run: Run, case: str, provider: str) -> Row | None:
    """The row at g = 1; at the loss scaler's factor where the case was measured at no other."""
    return run.find(HEAD, case, provider, 1.0) or run.find(HEAD, case, provider)


def gains(run: Run, found: Sequence[Row | None]) -> list[str]:
    """How many times faster than torch.compile each of vidfast's two rows is."""
    return ["" if row is None else figures.times(tables.ratio(run, row, COMPILE)) for row in found[2:]]


def sentences(run: Run) -> str:
    """Where the head does not lead, in time and in memory; and what makes bf16 slow where something does."""
    slower, smaller = [], []
    for name in (*COLUMNS[2:], *(name + GRAPH for name in COLUMNS[2:])):
        found = [first_gradient(run, case, name) for case in run.cases(HEAD)]
        rows = [row for row in found if row is not None]
        title = NAMES[name.removesuffix(GRAPH)] + (", on the device alone," if name.endswith(GRAPH) else "")
        times = [t for row in rows if (t := tables.times_slower(run, row, COMPILE)) is not None]
        if times:
            span = " to ".join(dict.fromkeys(map(figures.digits, (min(times), max(times)))))
            slower.append(f"{title} in {len(times)} of {len(rows)} cases ({span} times the time)")
        shares = [share for row in rows if (share := run.share_of_memory(row)) is not None]
        if shares:
            below = sum(share < tables.MEMORY_SHARE for share in shares)
            smaller.append(f"{title} in {below} of {len(shares)} cases")
    least = figures.share(tables.MEMORY_SHARE)
    parts = [f"Slower than torch.compile beyond the noise: {'; '.join(slower) or 'nowhere'}."]
    parts += [f"Peak extra memory under {least} of eager's: {'; '.join(smaller)}."] if smaller else []
    simd = set(run.machine.get("cpu", {}).get("simd", []))
    half = any(row.autocast == "bfloat16" for row in run.of(HEAD))
    if half and not run.gpu and not simd & BF16_INSTRUCTIONS:
        parts.append(
            "This processor has no instructions for products in bf16: they take torch 20 to 50 times as long as fp32's."
        )
    return " ".join(parts)
