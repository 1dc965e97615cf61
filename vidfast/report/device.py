"""What a run on a GPU says: the kernels alone against the copy, the back ends against each other, aims and tuning."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from vidfast.report import figures, heads, masks, tables, variances
from vidfast.report.document import Section, Table
from vidfast.report.noise import times_faster
from vidfast.report.results import COMPILE, COPY, DEFAULT, EAGER, KERNEL, OVERHEAD, STEP, Row, Run

TUNING, TUNING_TRITON, AS_BUILT = "tuning", "tuning triton", "as built"
# What was tuned in which suite.
TUNED = {TUNING: "CUDA", TUNING_TRITON: "Triton"}
ONE_PASS = ("forward_grad", "forward_grad in place")
# What one pass of a kernel should reach of the copy's rate, by the bytes of a tensor: (from, share).
SHARES = ((100e6, 0.90), (20e6, 0.80))
# What a step of the default should gain on maps of this many bytes: over eager and over torch.compile.
LARGE_MAP, OVER_EAGER, OVER_COMPILE = 100e6, 6.0, 1.6

# A change of speed of less than this is none.
LEAST_CHANGE = 0.01

KERNELS_TEXT = (
    "Device time alone, from CUDA graphs: one call for each of a set of buffers of four times the L2, so that inputs "
    "are cold and nothing of the host is on the clock. In brackets the share of the rate of `copy_`, measured likewise "
    "on the same buffers; more than 100% is possible, since a pass here reads twice for each write and a copy once. "
    "`forward` is the loss alone (two reads), `forward_grad` the loss and the gradient of mean in one pass (two reads, "
    "one write; `in place` over mean), `backward` the second pass of two_pass (two reads, one write), `scale` the "
    "gradient times the incoming one, in place (nothing where that is 1, else a read and a write)."
)
TUNING_TEXT = (
    "One pass in place with one free number changed, or some, as VALUE: change of speed, + is faster than as built; a "
    "tie is within the spread. Below, each value over all cases: one to take is faster in the mean and slower nowhere."
)


@dataclass(frozen=True)
class Aim:
    """One figure and what it was to be. `by`: the back end, or "steps"."""

    by: str
    what: str
    wanted: str
    found: str
    met: bool


def backends(run: Run) -> list[str]:
    """The back ends whose kernels were measured alone, in the order of preference that the run had."""
    return list(dict.fromkeys(row.provider.split()[0] for row in run.of(KERNEL) if row.provider != COPY))


def only_tuned(run: Run) -> bool:
    """Whether the run tried free numbers and nothing else."""
    return any(run.of(suite) for suite in TUNED) and not backends(run)


def kernel(run: Run, case: str, backend: str, primitive: str) -> Row | None:
    return run.find(KERNEL, case, f"{backend} {primitive}")


def kernels(run: Run, backend: str) -> Table:
    """A line a case: the copy, and each of the back end's primitives."""
    primitives = list(
        dict.fromkeys(
            row.provider.removeprefix(f"{backend} ")
            for row in run.of(KERNEL)
            if row.provider.startswith(f"{backend} ")
        )
    )
    lines = (
        kernel_line(run, case, [kernel(run, case, backend, primitive) for primitive in primitives])
        for case in run.cases(KERNEL)
    )
    rows = [line for line in lines if line is not None]
    return Table([f"{backend}: case", "tensor", "copy", *primitives], rows)


def kernel_line(run: Run, case: str, kernels: Sequence[Row | None]) -> list[str] | None:
    """The case, the bytes of a tensor, the copy's rate and each kernel's time; None where nothing was measured."""
    copy = run.find(KERNEL, case, COPY)
    measured = [row for row in (copy, *kernels) if row is not None]
    if not measured:
        return None
    rate = "" if copy is None else f"{figures.rate(copy.gb_per_s)} GB/s"
    size = figures.nbytes(measured[0].pass_bytes)
    return [tables.mark(case, measured), size, rate, *map(time_and_share, kernels)]


def time_and_share(row: Row | None) -> str:
    if row is None:
        return ""
    share = figures.share(row.share_of_copy)
    return figures.time(row.seconds.middle) + (f" ({share})" if share else "")


def faster(run: Run, one: str, other: str) -> float | None:
    """How many times faster `one`'s single passes are than the other's: the geometric mean over all cases."""
    ratios = []
    for case in run.cases(KERNEL):
        for primitive in ONE_PASS:
            ours, theirs = (kernel(run, case, name, primitive) for name in (one, other))
            if ours is not None and theirs is not None:
                ratios.append(times_faster(ours.samples, theirs.samples).value)
    return statistics.geometric_mean(ratios) if ratios else None


def faster_steps(run: Run, one: str, other: str) -> float | None:
    """How many times faster `one`'s whole steps in one pass are, the host included: the geometric mean over all."""
    ratios = []
    for suite in (STEP, OVERHEAD):
        for case in run.cases(suite):
            ours, theirs = (run.find(suite, case, f"vidfast {name} one_pass", 1.0) for name in (one, other))
            if ours is not None and theirs is not None:
                ratios.append(times_faster(ours.samples, theirs.samples).value)
    return statistics.geometric_mean(ratios) if ratios else None


def order(run: Run) -> list[str]:
    """The back ends, the fastest first: what `auto` should take, by this run.

    Whole steps decide, since they are what a program waits for; kernels alone where no step was measured.
    """
    names = backends(run)

    def gain(name: str) -> float:
        steps = faster_steps(run, name, names[0])
        return (faster(run, name, names[0]) if steps is None else steps) or 1.0

    return sorted(names, key=lambda name: -gain(name))


def aims(run: Run) -> list[Aim]:
    """Every aim that the run has a figure for, back end by back end."""
    found = []
    for row in run.of(KERNEL):
        if row.provider == COPY or row.share_of_copy is None or not row.cold:
            continue
        backend, primitive = row.provider.split(" ", 1)
        wanted = next((share for size, share in SHARES if row.pass_bytes >= size), None)
        if primitive in ONE_PASS and wanted is not None:
            what = f"{row.case}: {primitive}"
            aim, share = f"{figures.share(wanted)} of the copy", figures.share(row.share_of_copy)
            found.append(Aim(backend, what, aim, share, row.share_of_copy >= wanted))
    for row in run.of(STEP):
        if row.provider != DEFAULT or row.incoming != 1.0 or row.pass_bytes < LARGE_MAP:
            continue
        for baseline, least in ((EAGER, OVER_EAGER), (COMPILE, OVER_COMPILE)):
            ratio = run.ratio(row, baseline)
            if ratio is not None:
                what, times = f"{row.case}: against {baseline}", f"{figures.digits(ratio.value)}x"
                found.append(Aim("steps", what, f"{figures.digits(least)}x", times, ratio.value >= least))
    return sorted(found, key=lambda aim: [*backends(run), "steps"].index(aim.by))


def aims_met(run: Run) -> str:
    """One sentence: how many of its aims each back end met, and the steps."""
    listed = aims(run)
    counts = [
        f"{by} {sum(aim.met for aim in listed if aim.by == by)} of {sum(aim.by == by for aim in listed)}"
        for by in dict.fromkeys(aim.by for aim in listed)
    ]
    return f"Aims met: {', '.join(counts)}." if counts else ""


def tuning(run: Run, suite: str = TUNING) -> Table:
    """A line a case: what every value of every free number changes, beyond the spread."""
    names = list(dict.fromkeys(row.provider.split("=")[0] for row in run.of(suite) if "=" in row.provider))
    rows = []
    for case in run.cases(suite):
        built = run.find(suite, case, AS_BUILT)
        if built is None:
            continue
        cells = [case, figures.time(built.seconds.middle)]
        for name in names:
            gains = []
            for row in run.of(suite):
                if row.case != case or row.provider.split("=")[0] != name:
                    continue
                ratio = times_faster(row.samples, built.samples)
                if not ratio.tie and abs(ratio.value - 1) >= LEAST_CHANGE:
                    gains.append(f"{row.provider.split('=', 1)[1]}: {100 * (ratio.value - 1):+.0f}%")
            cells.append(", ".join(gains) or "tie")
        rows.append(cells)
    return Table(["case", AS_BUILT, *names], rows)


def tuning_over_all(run: Run, suite: str = TUNING) -> Table:
    """A line a value: the geometric mean of its change over all cases, the worst case, and whether to take it."""
    rows = []
    for provider in dict.fromkeys(row.provider for row in run.of(suite) if "=" in row.provider):
        ratios = []
        for case in run.cases(suite):
            built, row = (run.find(suite, case, name) for name in (AS_BUILT, provider))
            if built is not None and row is not None:
                ratios.append(times_faster(row.samples, built.samples))
        if not ratios:
            continue
        mean = statistics.geometric_mean([ratio.value for ratio in ratios])
        worst = min(ratios, key=lambda ratio: ratio.value)
        slower = [r for r in ratios if not r.tie and r.value <= 1 - LEAST_CHANGE]
        take = mean >= 1 + LEAST_CHANGE and not slower
        cells = [provider, f"{100 * (mean - 1):+.1f}%", f"{100 * (worst.value - 1):+.1f}%", str(len(slower))]
        rows.append([*cells, "take" if take else "keep as built"])
    return Table(["value", "geometric mean", "worst case", "slower in", ""], rows)


def stages(run: Run) -> Table:
    return Table(
        ["stage", "", "seconds", "last line"],
        [
            [str(s["stage"]), str(s["verdict"]), f"{s['seconds']:.0f}", str(s["last_line"])[:100]]
            for s in run.stages
        ],
        left=4,
    )


def checked(run: Run) -> str:
    """One sentence on the checks against fp64 on the device."""
    parts = [
        f"{c['backend']}: {c['calls']} of {c.get('wanted', c['calls'])} calls, {c['wrong']} wrong"
        for c in run.checks
    ]
    return f"Checked against fp64 on the device: {'; '.join(parts)}." if parts else "Measured only."


def compared(run: Run) -> str:
    """Which back end is the faster, on the device alone and in whole steps: geometric means over all cases."""
    names = backends(run)
    pairs = [(one, other) for index, one in enumerate(names) for other in names[index + 1 :]]
    found = []
    for what, measure in (
        ("One pass on the device alone", faster),
        ("whole steps, the host included", faster_steps),
    ):
        ratios = [
            f"{one} {figures.digits(ratio)} times as fast as {other}"
            for one, other in pairs
            if (ratio := measure(run, one, other)) is not None
        ]
        if ratios:
            found.append(f"{what}: {', '.join(ratios)}")
    text = "; ".join(found)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def sections(run: Run) -> list[Section]:
    """What a page says of a run on a GPU beyond the tables that every run has."""
    found = []
    if run.stages:
        found.append(Section("What ran", 3, [stages(run), checked(run)]))
    wrong = [f"- {error['problem']}: {error['error']}" for check in run.checks for error in check["errors"]]
    if wrong:
        found.append(Section("Wrong results", 3, ["\n".join(wrong)]))
    if run.failures:
        lines = [f"- {f['suite']}, {f['case']}, {f['row']}: {f['error']}" for f in run.failures]
        found.append(Section("Rows that failed", 3, ["\n".join(lines)]))
    if run.left_out:
        lines = [f"- {item['suite']}, {item['case']}" for item in run.left_out]
        found.append(Section("Left out for want of time", 3, ["\n".join(lines)]))
    listed = aims(run)
    if listed:
        rows = [[a.by, a.what, a.wanted, a.found, "met" if a.met else "missed"] for a in listed]
        table = Table(["", "figure", "aim", "found", ""], rows, left=2)
        found.append(Section("Aims", 3, [aims_met(run), table]))
    if backends(run):
        found.append(
            Section(
                "Kernels alone", 3, [KERNELS_TEXT, compared(run), *(kernels(run, b) for b in backends(run))]
            )
        )
    for suite, name in TUNED.items():
        if run.of(suite):
            title = f"Free numbers of the {name} back end"
            found.append(Section(title, 3, [TUNING_TEXT, tuning(run, suite), tuning_over_all(run, suite)]))
    return found


def summary(run: Run) -> str:
    """The README's part: heads, device time of one pass, whole steps, and masks."""
    names = backends(run)
    header = ["one pass, device time (share of the copy's rate)", "tensor", "copy"]
    header += [f"{name}{' in place' if 'place' in p else ''}" for name in names for p in ONE_PASS]
    lines = (
        kernel_line(
            run, case, [kernel(run, case, name, primitive) for name in names for primitive in ONE_PASS]
        )
        for case in run.cases(KERNEL)
    )
    rows = [line for line in lines if line is not None]
    head = f"**{run.device}**, {software(run)}, {run.date[:10]}. {checked(run)} {compared(run)}".strip()
    parts = [head, *heads.blocks(run)]
    if rows:
        parts.append(Table(header, rows).markdown())
    whole = whole_steps(run)
    if whole.rows:
        parts.append(whole.markdown())
    return "\n\n".join([*parts, *masks.blocks(run), *variances.blocks(run)])


def whole_steps(run: Run) -> Table:
    """Forward and backward through autograd, the host included; and ours as a CUDA graph, the device's time alone."""
    columns = (EAGER, COMPILE, DEFAULT, f"{DEFAULT} graph")
    rows = []
    for case in run.cases(STEP):
        found = [run.find(STEP, case, name, 1.0) for name in columns]
        ours = found[2]
        if ours is None:
            continue
        cells = ["" if row is None else figures.time(row.seconds.middle) for row in found]
        gains = [figures.times(run.ratio(ours, base)) for base in (EAGER, COMPILE)]
        rows.append([tables.mark(case, [row for row in found if row is not None]), *cells, *gains])
    header = ["step, g = 1", EAGER, COMPILE, "vidfast", "the same as a CUDA graph", "vs eager", "vs compile"]
    return Table(header, rows)


def software(run: Run) -> str:
    own = run.machine.get("vidfast", {})
    triton = own.get("vidfast", {}).get("backends", {}).get("triton", {}).get("triton")
    cuda = (run.gpu or {}).get("cuda")
    parts = [f"torch {own.get('torch', '?')}"]
    parts += [f"Triton {triton}"] if triton else []
    parts += [f"CUDA {cuda}"] if cuda else []
    return ", ".join(parts)


def notes(runs: Sequence[Run]) -> str:
    """What stands in docs/kernel-notes.md between its markers: what was measured, or that nothing was."""
    on_gpus = [run for run in runs if run.gpu]
    if not on_gpus:
        return (
            "No run on a GPU is stored: every figure of a GPU's time on this page is a prediction, and so is what "
            "decided each default above."
        )
    parts = []
    for run in on_gpus:
        if not only_tuned(run):
            missed = [
                f"- missed, {a.by}: {a.what}: {a.found}, aim {a.wanted}" for a in aims(run) if not a.met
            ]
            parts.append(f"`bench/results/{run.name}.jsonl`: {summary(run)}")
            parts.append("\n".join([aims_met(run), *missed]))
        else:
            parts.append(
                f"`bench/results/{run.name}.jsonl`, free numbers alone: **{run.device}**, {run.date[:10]}."
            )
        for suite, name in TUNED.items():
            if run.of(suite):
                text = (
                    TUNING_TEXT if suite == TUNING else f"{name}: {TUNING_TEXT[0].lower()}{TUNING_TEXT[1:]}"
                )
                parts += [text, tuning(run, suite).markdown(), tuning_over_all(run, suite).markdown()]
    return "\n\n".join(part for part in parts if part)
