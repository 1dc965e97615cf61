"""`vidfast experiment`: the VID paper's tables and figure 2, on data of yours or on embedded digits.

Every experiment first chooses each method's settings on validation images, then trains with several seeds, and
writes report.md, plots and the numbers. The same command again continues where it stopped.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from ..errors import UserError
from ..processes import process_count
from .distill import COUNT, require_extras

HELP = "run one of the VID paper's experiments: table1, table2, table3, table4 or figure2"
NAMES = ("table1", "table2", "table3", "table4", "figure2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("name", choices=NAMES, metavar="EXPERIMENT", help=", ".join(NAMES))
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="digits", metavar="NAME", help="data set")
    data.add_argument("--root", type=Path, metavar="DIR", help="where the data set's files are")
    data.add_argument("--source-data", metavar="NAME", help="table3: the teacher's data set")
    data.add_argument("--source-root", type=Path, metavar="DIR", help="where the teacher's data are")

    size = parser.add_argument_group("size; what is not given follows from the budget")
    size.add_argument(
        "--budget",
        choices=("quick", "full"),
        default="quick",
        help="quick: up to 20 minutes on two cores; full: the paper's sizes",
    )
    size.add_argument("--seeds", type=COUNT, metavar="N", help="seeds 0 to N-1")
    size.add_argument("--samples", type=COUNT, nargs="+", metavar="M", help="labelled images a class")
    size.add_argument("--steps", type=COUNT, help="steps of every student")
    size.add_argument("--teacher-steps", type=COUNT, help="steps of the teacher")
    size.add_argument("--rows", nargs="+", metavar="ROW", help='rows of the table to run, such as "KD + AT"')

    how = parser.add_argument_group("how and where")
    how.add_argument(
        "--jobs", "-j", type=COUNT, metavar="N", help="trainings at once; else one for each core"
    )
    how.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    how.add_argument("--out", type=Path, metavar="DIR", help="folder; else runs/EXPERIMENT-DATA-BUDGET")
    how.add_argument(
        "--cache", type=Path, metavar="DIR", help="where teachers are kept; else the user's cache"
    )
    how.add_argument("--quiet", "-q", action="store_true", help="print the result alone")


def run(arguments: argparse.Namespace) -> int:
    require_extras()
    from ..data import DataError
    from ..experiments.base import Options
    from ..experiments.teacher import default_cache
    from ..registry import UnknownNameError

    if process_count() > 1:
        raise UserError(
            "an experiment starts processes of its own (--jobs): call it without torchrun or accelerate launch"
        )
    name: str = arguments.name
    folder: Path = arguments.out or Path("runs") / f"{name}-{arguments.data}-{arguments.budget}"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: wanted a folder, this is a file")
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("wanted device 'cuda', and torch sees no CUDA device")
    if (arguments.source_data or arguments.source_root) and name != "table3":
        raise UserError(f"--source-data and --source-root belong to table3, not to {name}")
    if arguments.rows and name == "figure2":
        raise UserError("--rows belongs to the tables, figure2 has none")
    if arguments.samples and len(arguments.samples) > 1 and name in ("table2", "table4", "figure2"):
        raise UserError(f"{name} has one number of labelled images, got --samples with several")
    options = Options(
        folder=folder,
        data=arguments.data,
        root=arguments.root,
        source_data=arguments.source_data,
        source_root=arguments.source_root,
        budget=arguments.budget,
        seeds=arguments.seeds,
        samples=tuple(dict.fromkeys(arguments.samples)) if arguments.samples else None,
        steps=arguments.steps,
        teacher_steps=arguments.teacher_steps,
        arms=tuple(arguments.rows) if arguments.rows else None,
        jobs=arguments.jobs,
        cache=arguments.cache or default_cache(),
        device=arguments.device,
        quiet=arguments.quiet,
    )
    try:
        importlib.import_module(f"vidfast.distill.experiments.{name}").run(options)
    except (DataError, UnknownNameError) as error:
        raise UserError(str(error)) from None
    return 0
