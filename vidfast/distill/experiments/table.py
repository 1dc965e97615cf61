"""Running a table from its plan to its files: report.md, accuracy.png, results.csv, search.csv and runs/."""

from __future__ import annotations

import json
from dataclasses import asdict

from ..files import write_text
from .base import Options
from .folder import held, timed, took
from .plots import accuracy_over_columns
from .progress import progress_bar
from .study import Plan, check, run_study
from .tables import printed, report


def run_table(plan: Plan, options: Options) -> None:
    """Do what the folder does not hold yet, write the files and print the table.

    Raises UserError for what cannot work, and where another call works in the folder, before anything is written.
    """
    check(plan)
    with held(options.folder):
        _run(plan, options)


def _run(plan: Plan, options: Options) -> None:
    write_text(options.folder / "plan.json", json.dumps(asdict(plan), indent=2, default=str) + "\n")
    # The bar's total follows once the teacher is there.
    with timed(options.folder) as calls, progress_bar(1, quiet=options.quiet) as bar:
        outcome = run_study(plan, options, bar)
    accuracy_over_columns(options.folder / "accuracy.png", plan, outcome)
    page = report(
        plan, outcome, command=options.command(plan.name), took=took(calls), workers=options.workers
    )
    write_text(options.folder / "report.md", page)
    print(f"{plan.title}: test accuracy (%), mean ± standard deviation over {len(plan.seeds)} seeds\n")
    print(printed(plan, outcome))
    print(f"{options.folder / 'report.md'}\n{options.folder / 'accuracy.png'}")
