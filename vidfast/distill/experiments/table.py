"""Running a table from its plan to its files: report.md, accuracy.png, results.csv, search.csv and runs/."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from ..files import write_text
from .base import Options
from .plots import accuracy_over_columns
from .study import Plan, check, run_study
from .tables import printed, report


def run_table(plan: Plan, options: Options) -> None:
    """Do what the folder does not hold yet, write the files and print the table.

    Raises UserError for what cannot work, before anything is trained.
    """
    check(plan)
    options.folder.mkdir(parents=True, exist_ok=True)
    write_text(options.folder / "plan.json", json.dumps(asdict(plan), indent=2, default=str) + "\n")
    with (
        _timed(options.folder / "calls.json") as calls,
        tqdm(
            total=1,
            unit="step",
            disable=True if options.quiet else None,  # None: no bar where stderr is no terminal
            dynamic_ncols=True,
            smoothing=0.02,
            file=sys.stderr,
        ) as bar,
    ):
        outcome = run_study(plan, options, bar)
    accuracy_over_columns(options.folder / "accuracy.png", plan, outcome)
    took = f"{sum(calls):.0f} s" + (f" in {len(calls)} calls" if len(calls) > 1 else "")
    page = report(plan, outcome, command=options.command(plan.name), took=took, workers=options.workers)
    write_text(options.folder / "report.md", page)
    print(f"{plan.title}: test accuracy (%), mean ± standard deviation over {len(plan.seeds)} seeds\n")
    print(printed(plan, outcome))
    print(f"{options.folder / 'report.md'}\n{options.folder / 'accuracy.png'}")


@contextmanager
def _timed(path: Path) -> Iterator[list[float]]:
    """The seconds of every call for this folder, interrupted ones included; at the block's end with this one's."""
    try:
        calls = [float(seconds) for seconds in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        calls = []
    started = time.monotonic()
    try:
        yield calls
    finally:
        calls.append(time.monotonic() - started)
        write_text(path, json.dumps(calls) + "\n")
