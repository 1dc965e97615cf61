"""The command line: `vidfast info | distill | report`."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from vidfast import __version__, info, report
from vidfast.distill import commands
from vidfast.distill.errors import UserError
from vidfast.distill.files import CheckpointError

FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with that line."""
        self.exit(WRONG_USE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 failed, 2 wrong use, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt as interrupt:
        # CPython notes an interrupt that ends an exec() of text, as dataclasses do on import, even where it is caught
        # later, and would end the process by the signal instead of our exit code; the next exec() forgets it.
        exec("")
        return _fail(str(interrupt) or "interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has closed it; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, CheckpointError) as error:
        return _fail(str(error), WRONG_USE)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", WRONG_USE)
    except FloatingPointError as error:
        return _fail(str(error), FAILED)


def _fail(message: str, code: int) -> int:
    print(f"vidfast: {message}", file=sys.stderr)
    return code


def _parser() -> Parser:
    parser = Parser(prog="vidfast", description="Variational Information Distillation with fused kernels.")
    parser.add_argument("--version", action="version", version=f"vidfast {__version__}")
    subparsers = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", parser_class=Parser
    )
    about = subparsers.add_parser(
        "info", help="what vidfast can use on this machine", description=info.__doc__
    )
    about.set_defaults(run=_info)
    pages = subparsers.add_parser("report", help=report.HELP, description=report.__doc__)
    report.add_arguments(pages)
    pages.set_defaults(run=report.run)
    # Every file of the package is a command, so adding one changes nothing here.
    for module in pkgutil.iter_modules(commands.__path__):
        command = importlib.import_module(f"{commands.__name__}.{module.name}")
        sub = subparsers.add_parser(module.name, help=command.HELP, description=command.__doc__)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def _info(arguments: argparse.Namespace) -> int:
    print("\n".join(_lines(info())))
    return 0


def _lines(values: Mapping[str, object], indent: str = "") -> list[str]:
    """A nested mapping as lines of `name: value`, aligned."""
    lines: list[str] = []
    width = max((len(name) for name, value in values.items() if not isinstance(value, Mapping)), default=0)
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            shown = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
            lines.append(f"{indent}{name:<{width}}  {shown}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
