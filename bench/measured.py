"""Suites measured into lines of JSON (bench/lines.py), case after case, until the time is over."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import vidfast
from bench import machine
from bench.cases import Case
from bench.interleave import Budget
from bench.lines import Lines, one_line
from bench.record import Opener, Row, measure

ROOT = Path(__file__).parents[1]


def write_machine(lines: Lines, device: str, selection: str) -> None:
    """The head: what pytest-benchmark stores of the machine, the commit and the date, and what was asked for."""
    own = machine.describe(device)
    own["selection"] = selection
    own["vidfast"] = vidfast.info()
    own["sources"] = digest_of_sources()
    lines.write(
        "machine",
        machine_info={
            "cpu": machine.processor(),
            "python_version": platform.python_version(),
            "vidfast": own,
        },
        commit_info=commit(),
        datetime=time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
    )


def write_rows(lines: Lines, case: Case, rows: dict[str, Row]) -> None:
    """All rows of a case, with their samples in seconds; a row that raised is a `failure`."""
    for name, row in rows.items():
        if row.timings is None or row.info is None:
            error = row.failure or RuntimeError("it was not built")
            lines.write("failure", suite=case.suite, case=case.title, row=name, error=one_line(error))
            continue
        seconds = [round(sample.seconds, 10) for sample in row.timings.samples]
        lines.write("row", name=name, extra_info=row.info, stats={"data": seconds})


def measure_all(
    suite: Opener,
    cases: Sequence[Case],
    lines: Lines,
    budget: Budget,
    deadline: float,
    longest: list[float] | None = None,
) -> Iterator[tuple[Case, dict[str, Row]]]:
    """Measures and writes case after case until time.monotonic() passes `deadline`, and yields each.

    Args:
        suite: Whose contenders are measured.
        cases: In the order of their value.
        lines: Where rows, failures and cases that were left out are written.
        budget: Of a case.
        deadline: A case is begun only if the longest one so far would still end before it.
        longest: [seconds of the longest case so far], kept from call to call by the caller; [0.0] at first.

    Yields:
        Each case that was measured, with its rows, after they were written.
    """
    longest = [0.0] if longest is None else longest
    for case in cases:
        begin = time.monotonic()
        if begin + longest[0] > deadline:
            lines.write("left_out", suite=case.suite, case=case.title)
            continue
        rows = measure(case, suite, suite.names(case), budget)
        write_rows(lines, case, rows)
        longest[0] = max(longest[0], time.monotonic() - begin)
        yield case, rows


def commit() -> dict[str, object]:
    """The commit of this checkout; "unknown" where there is no git, as on a machine that was given the files alone."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=20
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT.resolve():
            return {"id": "unknown", "dirty": False}  # another project's checkout around this one
        return {"id": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {"id": "unknown", "dirty": False}


def digest_of_sources() -> str:
    """12 digits of SHA-256 over the library's sources: says which code a run measured where no commit does."""
    whole = hashlib.sha256()
    for folder in ("csrc", "vidfast"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".h", ".cpp", ".cu"}:
                whole.update(f"{path.relative_to(ROOT)}\n".encode())
                whole.update(path.read_bytes())
    return whole.hexdigest()[:12]
