"""A run as a page: what stands on it, and how it is written as Markdown and as HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from vidfast.report import device, figures, masks, tables, variances
from vidfast.report.document import Figure, Page, Section, Table
from vidfast.report.results import FORWARD, KERNEL, MASKS, OVERHEAD, SCALING, STEP, Run, contended_share

LEGEND = (
    "Times are medians; the spread is the distance of the quartiles over the median, or that of the median's 95% "
    "limits where few samples make those wider. Ratios pair samples of the same round and say how many times faster "
    "a row is than the baseline at the same g; `tie` where the spread of the ratio holds 1. `bytes` are what the "
    "strategy moves by its design; + counted operator by operator; * assumed: a forward and a backward fused as far "
    "as possible. `of copy` is the row's rate over that of `copy_` on the same buffers in the same rounds. Extra "
    "memory is the peak beyond the inputs. Errors are against fp64 on the same inputs: loss and d alpha over the "
    "sum of the magnitudes of their terms, d mean over the largest gradient."
)

MODULES_TEXT = (
    "Everything but the pairs' code is the same: forward and backward to every parameter. What the pairs of a training "
    "step take of it, their regressors and losses, forward and backward, is clocked inside of the step: the difference "
    "of two whole steps is often smaller than their spread. A compiled step has no place for that clock. Autocast is "
    "that of the forward; backward runs outside of it. A graph is compared with its baseline's graph. Errors are "
    "against fp64: of d student the norm of the error over the gradient's norm, else over the largest exact value."
)


def facts(run: Run) -> Table:
    """The head: machine, software, commit, date, load."""
    own, cpu = run.machine.get("vidfast", {}), run.machine.get("cpu", {})
    busy, cases = contended_share(run.rows)
    commit = str(run.commit.get("id", "unknown"))[:12] + (
        " with local changes" if run.commit.get("dirty") else ""
    )
    rows = [
        ("processor", f"{cpu.get('brand_raw', 'unknown')}, {own.get('logical_cores', '?')} logical cores"),
        ("vector instructions", ", ".join(cpu.get("simd", [])) or "unknown"),
        ("last-level cache", figures.nbytes(float(own.get("last_level_cache_bytes", 0)))),
        ("memory", figures.nbytes(float(own.get("memory_bytes", 0)))),
        ("threads", str(own.get("torch_threads", "?"))),
        (
            "environment",
            ", ".join(f"{k}={v}" for k, v in own.get("environment", {}).items()) or "no OMP variables set",
        ),
        *gpu_facts(own.get("gpu")),
        ("torch, Python", f"{own.get('torch', '?')}, {run.machine.get('python_version', '?')}"),
        ("vidfast", describe_backends(own)),
        ("commit", commit + (f", sources {own['sources']}" if "sources" in own else "")),
        ("date", run.date[:19].replace("T", " ") + " UTC"),
        ("selection", f"{own.get('selection', '?')}, {len(run.rows)} rows in {cases} cases"),
        (
            "load",
            f"{busy} of {cases} cases beside others (marked)"
            if busy
            else "alone on the machine's processor in every case",
        ),
    ]
    return Table(["", run.name], rows, left=2)


def gpu_facts(gpu: dict[str, Any] | None) -> list[tuple[str, str]]:
    if not gpu:
        return [("GPU", "none: GPU figures are pending")]
    facts = [gpu["name"], figures.nbytes(gpu["memory_bytes"]), f"compute capability {gpu['capability']}"]
    facts += [f"L2 {figures.nbytes(gpu['l2_bytes'])}"] if "l2_bytes" in gpu else []
    facts += [f"{gpu['multiprocessors']} multiprocessors"] if "multiprocessors" in gpu else []
    software = [
        f"{name} {gpu[key]}" for name, key in (("CUDA", "cuda"), ("driver", "driver_version")) if gpu.get(key)
    ]
    limits = [
        f"{name} {gpu[key]}"
        for name, key in (("power limit", "power.limit"), ("highest clock", "clocks.max.sm"))
        if key in gpu
    ]
    return [
        ("GPU", ", ".join(map(str, facts))),
        *([("driver", ", ".join([*software, *limits]))] if software or limits else []),
    ]


def describe_backends(own: dict[str, Any]) -> str:
    info = own.get("vidfast", {})
    parts = []
    for name, state in info.get("backends", {}).items():
        details = ", ".join(
            f"{key} {value}" for key, value in state.items() if key in ("isa", "openmp", "reason")
        )
        parts.append(f"{name} ({details})" if details else name)
    return f"{info.get('vidfast', '?')}: {'; '.join(parts) or 'no back end'}"


def of_run(run: Run, drawn: Iterable[Figure]) -> list[Section]:
    """The sections of one run."""
    head = Section(f"{run.name}: {run.device}", 2, [facts(run)])
    drawn = list(drawn)
    sections = [head]
    if run.gpu:
        sections += device.sections(run)
    if run.of(STEP):
        text = "Time of forward and backward at g = 1 (nothing multiplies the loss outside), and what vidfast gains."
        blocks: list[str | Table | Figure] = [text, tables.summary(run), *drawn]
        sections.append(Section("Loss step", 3, blocks))
        others = sorted({row.incoming for row in run.of(STEP)} - {1.0})
        for incoming in others:
            sections.append(
                Section(f"Loss step at g = {incoming:g}", 3, [tables.summary(run, STEP, incoming)])
            )
    elif drawn:
        sections.append(Section("Figures", 3, [*drawn]))
    if run.of(KERNEL) and not run.gpu:
        text = "The native calls over existing buffers, without allocation or autograd; shares are of the copy's rate."
        sections.append(Section("Kernels alone", 3, [text, tables.kernels(run)]))
    if run.of(FORWARD):
        sections.append(Section("Forward only", 3, [tables.summary(run, FORWARD)]))
    if run.of(OVERHEAD):
        text = (
            "A step on almost no elements, in the cache: what is left is the host. The floor is an autograd.Function "
            "that saves mean and alpha and returns them as gradients."
        )
        parts = [tables.overhead(run, case) for case in run.cases(OVERHEAD)]
        sections.append(Section("Host overhead", 3, [text, *parts]))
    sections += [*masks.sections(run), *variances.sections(run)]
    for suite in others_of(run):
        sections.append(Section(suite[:1].upper() + suite[1:], 3, [MODULES_TEXT, tables.modules(run, suite)]))
    sections.append(
        Section(
            "Where vidfast does not lead",
            3,
            [listing([*tables.shortfalls(run), *masks.shortfalls(run), *variances.shortfalls(run)])],
        )
    )
    listed = (STEP, FORWARD, KERNEL, OVERHEAD, SCALING, MASKS, device.TUNING)
    details = [suite for suite in listed if run.of(suite)]
    sections.append(Section("Every row", 3, [LEGEND]))
    sections += [
        Section(f"{suite}: {case}", 4, [tables.detail(run, suite, case)], folded=True)
        for suite in details
        for case in run.cases(suite)
    ]
    return sections


def others_of(run: Run) -> list[str]:
    """The suites without a section of their own: whole modules and training steps."""
    known = {STEP, FORWARD, KERNEL, SCALING, OVERHEAD, MASKS, device.TUNING}
    return [suite for suite in dict.fromkeys(row.suite for row in run.rows) if suite not in known]


def listing(items: list[str]) -> str:
    return "\n".join(f"- {item}" for item in items) or "Nowhere, beyond the noise."


def of_changes(before: Run, after: Run) -> Section:
    table = tables.changes(before, after)
    text = (
        f"{tables.compared(before, after)} rows are in both {before.name} ({before.date[:10]}) and {after.name} "
        f"({after.date[:10]}); {len(table.rows)} changed beyond the noise: their spreads do not overlap, and "
        "they moved further than the copy in the same case did."
    )
    return Section(f"Changes from {before.name} to {after.name}", 2, [text, table] if table.rows else [text])


def markdown(page: Page) -> str:
    """The page as Markdown; figures are files beside it."""
    parts = [f"# {page.title}"]
    for section in page.sections:
        parts.append(f"{'#' * section.level} {section.title}")
        for block in section.blocks:
            if isinstance(block, Table):
                parts.append(block.markdown())
            elif isinstance(block, Figure):
                parts.append(f"![{block.caption}]({block.name}.svg)")
            else:
                parts.append(block)
    return "\n\n".join(parts) + "\n"


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { border-bottom: 1px solid #d5dbe1; padding-bottom: .2rem; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eceff2; }
th { border-bottom: 2px solid #d5dbe1; } .left { text-align: left; white-space: normal; }
tbody tr:hover { background: #f5f7fa; } .wide { overflow-x: auto; } figure { margin: 1.5rem 0; }
figure svg { max-width: 100%; height: auto; } figcaption { color: #616e7c; font-size: 13px; }
summary { cursor: pointer; padding: .2rem 0; } p { max-width: 60rem; white-space: pre-line; }
"""


def html_table(table: Table) -> str:
    def cells(values: Iterable[str], tag: str) -> str:
        kinds = ("left" if column < table.left else "" for column in range(len(table.header)))
        marked = (
            f"<{tag} class={kind}>{html.escape(text)}</{tag}>"
            if kind
            else f"<{tag}>{html.escape(text)}</{tag}>"
            for kind, text in zip(kinds, values, strict=True)
        )
        return f"<tr>{''.join(marked)}</tr>"

    body = "\n".join(cells(row, "td") for row in table.rows)
    return f"<div class=wide><table><thead>{cells(table.header, 'th')}</thead><tbody>\n{body}\n</tbody></table></div>"


def html_section(section: Section) -> str:
    title = html.escape(section.title)
    parts = [] if section.folded else [f"<h{section.level}>{title}</h{section.level}>"]
    for block in section.blocks:
        if isinstance(block, Table):
            parts.append(html_table(block))
        elif isinstance(block, Figure):
            parts.append(f"<figure>{block.svg}<figcaption>{html.escape(block.caption)}</figcaption></figure>")
        else:
            parts.append(f"<p>{html.escape(block)}</p>")
    text = "\n".join(parts)
    return f"<details><summary>{title}</summary>\n{text}\n</details>" if section.folded else text


def web_page(page: Page) -> str:
    """The page as one HTML file that needs nothing else."""
    title = html.escape(page.title)
    body = "\n".join(html_section(section) for section in page.sections)
    head = f"<meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n<h1>{title}</h1>\n{body}\n</body></html>\n"
