"""The tables of a report."""

from __future__ import annotations

from vidfast.report import figures
from vidfast.report.document import Table
from vidfast.report.noise import Ratio, changed
from vidfast.report.results import (
    COMPILE,
    COMPILED_DEFAULT,
    COPY,
    DEFAULT,
    EAGER,
    GRAPH,
    HEAD,
    KERNEL,
    OVERHEAD,
    STEP,
    TORCH_LOSS,
    Row,
    Run,
)

# A kernel below this share of the copy's rate, out of cache, is a shortfall to explain.
KERNEL_SHARE = 0.90
# The least that a custom loss in Python costs, and how many times that a step on nothing may take.
FLOOR = "autograd.Function that saves and returns"
HOST_MULTIPLE = 2.0
# The peak extra memory of a regressor and its loss should be below this share of the eager formula's.
MEMORY_SHARE = 0.20
ERRORS = ("loss", "grad_mean", "grad_alpha")


def strategies(run: Run) -> list[str]:
    """The back ends' rows, by name, in the order measured."""
    return list(
        dict.fromkeys(
            row.provider
            for row in run.of(STEP)
            if row.family == "vidfast" and row.provider != DEFAULT and not row.graph
        )
    )


def short(provider: str) -> str:
    return {TORCH_LOSS: "GaussianNLLLoss"}.get(provider, provider)


def summary(run: Run, suite: str = STEP, incoming: float | None = 1.0) -> Table:
    """A line a case: the time of each provider, and what the default and in place gain."""
    columns = [EAGER, TORCH_LOSS, COMPILE, *strategies(run)]
    gains = [name for name in columns if name.endswith("one_pass") or name.endswith("in place")]
    header = ["case", *(short(name) for name in columns)]
    header += [
        f"{name.removeprefix('vidfast ')} vs {base}" for name in gains for base in ("eager", "compile")
    ]
    rows = []
    for case in run.cases(suite):
        found = {name: run.find(suite, case, name, incoming) for name in columns}
        if all(row is None for row in found.values()):
            continue
        cells = [mark(case, [row for row in found.values() if row is not None])]
        cells += ["" if row is None else figures.time(row.seconds.middle) for row in found.values()]
        for name in gains:
            row = found[name]
            cells += ["" if row is None else figures.times(run.ratio(row, base)) for base in (EAGER, COMPILE)]
        rows.append(cells)
    return Table(header, rows)


def mark(case: str, rows: list[Row]) -> str:
    """The case's name, and a warning where others were running or the cache may have held its inputs."""
    warnings = ["busy machine"] if any(row.contended for row in rows) else []
    warnings += ["warm cache"] if any(row.warm for row in rows) else []
    return f"{case} ({', '.join(warnings)})" if warnings else case


def detail(run: Run, suite: str, case: str) -> Table:
    """Every row of a case with everything that it carries."""
    on_device = any(row.facts.get("launches") for row in run.rows)
    header = [
        "provider",
        "g",
        "median",
        "spread",
        "samples",
        "bytes",
        "GB/s",
        "of copy",
        "vs eager",
        "vs compile",
    ]
    header += [
        "extra memory",
        "error: loss",
        "d mean",
        "d alpha",
        *(["launches", "host"] if on_device else []),
    ]
    rows = []
    for row in run.of(suite):
        if row.case != case:
            continue
        assumed = {"assumed": "*", "operators": "+"}.get(str(row.facts["bytes_source"]), "")
        error = row.facts.get("error") or {}
        cells = [
            short(row.provider),
            "" if row.family == "copy" else f"{row.incoming:g}",
            figures.time(row.seconds.middle),
            figures.spread(row.seconds),
            str(len(row.samples.seconds)),
            figures.nbytes(row.facts["bytes"]) + assumed,
            figures.rate(row.gb_per_s),
            figures.share(row.share_of_copy),
            figures.times(run.ratio(row, EAGER)) if row.family != "copy" else "",
            figures.times(run.ratio(row, COMPILE)) if row.family != "copy" else "",
            figures.nbytes(row.facts["peak_extra_bytes"]),
            *(figures.error(error.get(name)) for name in ERRORS),
        ]
        if on_device:
            host = row.facts.get("host_seconds")
            cells += [str(row.facts.get("launches", "")), "" if host is None else figures.time(host)]
        rows.append(cells)
    return Table(header, rows)


def kernels(run: Run) -> Table:
    """The kernels alone: rates, and shares of the copy's on the same buffers."""
    providers = list(dict.fromkeys(row.provider for row in run.of(KERNEL) if row.provider != COPY))
    header = ["case", "tensor", "copy", *(f"{name.removeprefix('kernel ')}" for name in providers)]
    rows = []
    for case in run.cases(KERNEL):
        of_case = [row for row in run.of(KERNEL) if row.case == case]
        copy = next((row for row in of_case if row.provider == COPY), None)
        cells = [mark(case, of_case), figures.nbytes(of_case[0].pass_bytes)]
        cells.append("" if copy is None else f"{figures.rate(copy.gb_per_s)} GB/s")
        for name in providers:
            row = next((row for row in of_case if row.provider == name), None)
            share = "" if row is None else figures.share(row.share_of_copy)
            cells.append(
                ""
                if row is None
                else f"{figures.time(row.seconds.middle)}, {figures.rate(row.gb_per_s)} GB/s, {share}"
            )
        rows.append(cells)
    return Table(header, rows)


def overhead(run: Run, case: str) -> Table:
    """The host's time of a step on almost nothing, in multiples of the least that an autograd.Function costs."""
    rows = []
    for row in run.of(OVERHEAD):
        if row.case != case or row.graph:  # a graph has no host
            continue
        floor = run.ratio(row, FLOOR)
        multiple = "" if floor is None else f"{figures.digits(1 / floor.value)}x"
        cells = [
            short(row.provider),
            f"{row.incoming:g}",
            figures.time(row.seconds.middle),
            figures.spread(row.seconds),
        ]
        rows.append(
            [*cells, multiple, figures.times(run.ratio(row, EAGER)), figures.times(run.ratio(row, COMPILE))]
        )
    return Table(["provider", "g", "median", "spread", "times the floor", "vs eager", "vs compile"], rows)


def modules(run: Run, suite: str) -> Table:
    """Whole modules and steps: time, what of it the pairs of layers take, and how it compares with the public code."""
    parts = any(row.facts.get("pair_seconds") is not None for row in run.of(suite))
    rows = []
    for row in run.of(suite):
        cells = [
            mark(row.case, [row]),
            row.provider,
            f"{row.incoming:g}",
            figures.time(row.seconds.middle),
            figures.spread(row.seconds),
        ]
        if parts:
            part = row.facts.get("pair_seconds")
            cells += (
                ["", ""] if part is None else [figures.time(part), f"{100 * part / row.seconds.middle:.1f}%"]
            )
        gains = [figures.times(ratio(run, row, base)) for base in (EAGER, COMPILE)]
        error = row.facts.get("error") or {}
        cells += [
            *gains,
            figures.nbytes(row.facts["peak_extra_bytes"]),
            figures.share(run.share_of_memory(row)),
        ]
        rows.append(cells if parts else [*cells, *(figures.error(error.get(name)) for name in ERRORS)])
    header = ["case", "loss", "g", "median", "spread", *(["of it the pairs", "share"] if parts else [])]
    header += ["vs eager", "vs compile", "extra memory", "of eager's"]
    return Table([*header, *([] if parts else ["error: loss", "d student", "d alpha"])], rows, left=2)


def ratio(run: Run, row: Row, baseline: str) -> Ratio | None:
    """How many times faster the row is than the baseline; a graph is held against the baseline's graph alone."""
    return run.ratio(row, baseline + GRAPH if row.graph else baseline)


def times_slower(run: Run, row: Row, baseline: str) -> float | None:
    """How many times the baseline's time the row takes; None where that is not more, beyond the noise."""
    found = ratio(run, row, baseline)
    return None if found is None or found.tie or found.value >= 1 else 1 / found.value


def shortfalls(run: Run) -> list[str]:
    """Every place where vidfast does not lead: slower than a baseline, a head's memory, a kernel far below the copy."""
    found = []
    for row in run.rows:
        name = row.provider.removesuffix(GRAPH)
        if name in (DEFAULT, COMPILED_DEFAULT):
            at = f"{row.suite}, {row.case}, " + (f"{row.provider}, " if row.provider != DEFAULT else "")
            for baseline in (EAGER, TORCH_LOSS, COMPILE):
                times = times_slower(run, row, baseline)
                if times is not None:
                    slower = figures.digits(times)
                    found.append(f"{at}g = {row.incoming:g}: {slower} times the time of {short(baseline)}")
            share = run.share_of_memory(row) if row.suite == HEAD else None
            if share is not None and share >= MEMORY_SHARE:
                aim = f"aim: under {figures.share(MEMORY_SHARE)}"
                memory = f"{figures.share(share)} of eager's peak extra memory ({aim})"
                found.append(f"{at}g = {row.incoming:g}: {memory}")
        floor = (
            run.ratio(row, FLOOR)
            if row.suite == OVERHEAD and row.family == "vidfast" and not row.graph
            else None
        )
        if floor is not None and floor.interval.high < 1 / HOST_MULTIPLE:
            multiple = figures.digits(1 / floor.value)
            found.append(
                f"{row.suite}, {row.provider}, g = {row.incoming:g}: {multiple} times the floor of an autograd.Function"
            )
        if (
            row.suite == KERNEL
            and run.gpu is None  # a GPU's have aims by size: device.aims
            and row.provider != COPY
            and row.cold
            and (row.share_of_copy or 1.0) < KERNEL_SHARE
        ):
            found.append(
                f"{row.suite}, {row.case}: {row.provider} at {figures.share(row.share_of_copy)} of the copy's rate"
            )
    return found


def changes(before: Run, after: Run) -> Table:
    """Row by row what became faster or slower beyond the noise; rows within it are counted by the caller."""
    old = {row.key: row for row in before.rows}
    rows = []
    for row in after.rows:
        earlier = old.get(row.key)
        if earlier is None or row.provider == COPY:
            continue
        change = changed(earlier.seconds, row.seconds, drift(before, after, row))
        if change is not None:
            word = "slower" if change > 0 else "faster"
            cells = [row.suite, row.case, f"{short(row.provider)} g={row.incoming:g}"]
            cells += [
                figures.time(earlier.seconds.middle),
                figures.time(row.seconds.middle),
                f"{100 * abs(change):.0f}% {word}",
            ]
            rows.append(cells)
    return Table(["suite", "case", "provider", "before", "after", "change"], rows, left=3)


def compared(before: Run, after: Run) -> int:
    """How many rows both runs have."""
    return len({row.key for row in before.rows} & {row.key for row in after.rows})


def drift(before: Run, after: Run, row: Row) -> float:
    """By how much the copy of this row's case changed between the runs: the machine, and nobody's code."""
    earlier, later = (run.find(row.suite, row.case, COPY) for run in (before, after))
    if earlier is None or later is None:
        return 0.0
    return later.seconds.middle / earlier.seconds.middle - 1.0
