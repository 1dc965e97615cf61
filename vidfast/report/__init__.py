"""`vidfast report`: stored benchmark runs as one page, and the README's table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vidfast.report import page, readme
from vidfast.report.document import Figure, Page
from vidfast.report.results import Run, load

__all__ = ["main"]


HELP = "pages of tables and plots from stored benchmark runs"


def add_arguments(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="RESULTS",
        help="stored by `python -m pytest bench` (.json) or bench/gpu.sh (.jsonl)",
    )
    arguments.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="mark what changed since this run beyond noise"
    )
    arguments.add_argument(
        "--output", type=Path, default=Path("report"), help="folder for report.md, report.html and figures"
    )
    arguments.add_argument("--title", default="vidfast benchmarks", help="the page's title")
    arguments.add_argument(
        "--readme",
        type=Path,
        help="write what the runs say between this file's markers (README.md, docs/kernel-notes.md) instead of a page",
    )
    arguments.add_argument(
        "--check", action="store_true", help="with --readme: write nothing, fail if it is not current"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command by itself; see :func:`run`."""
    parser = argparse.ArgumentParser(prog="vidfast report", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """0 if all went well, 1 if --check finds an old table, 2 for input that cannot be read."""
    if arguments.check and arguments.readme is None:
        print("vidfast report: --check goes with --readme FILE", file=sys.stderr)
        return 2
    try:
        runs = [load(path) for path in arguments.results]
        if arguments.readme is not None:
            return write_readme(arguments.readme, runs, arguments.check)
        before = None if arguments.compare is None else load(arguments.compare)
        write_page(arguments.output, arguments.title, runs, before)
    except OSError as error:
        print(f"vidfast report: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"vidfast report: {error}", file=sys.stderr)
        return 2
    return 0


def write_readme(path: Path, runs: Sequence[Run], check: bool) -> int:
    if check:
        if readme.is_current(path, runs):
            return 0
        print(
            f"vidfast report: {path} does not hold the table of the stored runs; write it with --readme",
            file=sys.stderr,
        )
        return 1
    print(f"{path}: {'written' if readme.update(path, runs) else 'already current'}")
    return 0


def write_page(folder: Path, title: str, runs: Sequence[Run], before: Run | None) -> None:
    """report.md, report.html and the figures of the Markdown page, in `folder`."""
    whole = Page(title)
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        drawn = figures_of(run)
        for figure in drawn:
            (folder / f"{figure.name}.svg").write_text(figure.svg, encoding="utf-8")
        whole.sections += page.of_run(run, drawn)
        if before is not None:
            whole.sections.append(page.of_changes(before, run))
    (folder / "report.md").write_text(page.markdown(whole), encoding="utf-8")
    (folder / "report.html").write_text(page.web_page(whole), encoding="utf-8")
    print(f"{folder / 'report.html'}, {folder / 'report.md'}")


def figures_of(run: Run) -> list[Figure]:
    """The run's figures under names of their own; none, and a word about it, where matplotlib is missing."""
    try:
        from vidfast.report.plots import all_figures

        return [replace(figure, name=f"{run.name}-{figure.name}") for figure in all_figures(run)]
    except ImportError as error:
        print(f"vidfast report: no figures ({error}); pip install 'vidfast[bench]'", file=sys.stderr)
        return []
