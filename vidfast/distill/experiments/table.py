"""Running a table from its plan to its files: report.md, accuracy.png, results.csv, search.csv and runs/."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import asdict

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
    continued = (options.folder / "runs").exists()
    options.folder.mkdir(parents=True, exist_ok=True)
    write_text(options.folder / "plan.json", json.dumps(asdict(plan), indent=2, default=str) + "\n")
    started = time.monotonic()
    with tqdm(
        total=1,
        unit="step",
        disable=True if options.quiet else None,  # None: no bar where stderr is no terminal
        dynamic_ncols=True,
        smoothing=0.02,
        file=sys.stderr,
    ) as bar:
        outcome = run_study(plan, options, bar)
    seconds = time.monotonic() - started
    accuracy_over_columns(options.folder / "accuracy.png", plan, outcome)
    took = f"{seconds:.0f} s" + (" for what an earlier call had left" if continued else "")
    page = report(plan, outcome, command=_command(plan, options), took=took, workers=options.workers)
    write_text(options.folder / "report.md", page)
    print(f"{plan.title}: test accuracy (%), mean ± standard deviation over {len(plan.seeds)} seeds\n")
    print(printed(plan, outcome))
    print(f"{options.folder / 'report.md'}\n{options.folder / 'accuracy.png'}")


def _command(plan: Plan, options: Options) -> str:
    """The command that makes this page, without what is this machine's own."""
    parts = ["vidfast", "experiment", plan.name, "--data", options.data]
    parts += ["--root", "DIR"] if options.root is not None else []
    parts += ["--source-data", options.source_data] if options.source_data is not None else []
    parts += ["--source-root", "DIR"] if options.source_root is not None else []
    parts += ["--budget", options.budget]
    for name, value in (
        ("--seeds", options.seeds),
        ("--steps", options.steps),
        ("--teacher-steps", options.teacher_steps),
    ):
        parts += [name, str(value)] if value is not None else []
    parts += ["--samples", *map(str, options.samples)] if options.samples else []
    parts += ["--rows", *options.arms] if options.arms else []
    return shlex.join(parts)
