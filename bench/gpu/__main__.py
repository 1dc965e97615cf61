"""What this library needs to know from a GPU, in order of value, within a limit; see docs/benchmarks.md."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.runner import LIMIT_SECONDS, Runner, free_folder
from bench.gpu.stages import ALWAYS, STAGES, prepare
from bench.nvidia_smi import first_gpu

# What every run imports. The stages that want more (pytest-xdist, ncu) do without, or say so.
PACKAGES = ("torch", "triton", "numpy", "psutil", "pytest", "pybind11")


def gpu_name() -> str | None:
    """As nvidia-smi gives it, fit for a folder's name."""
    name = first_gpu("name").get("name", "")
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or None


def missing_packages() -> list[str]:
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def parser() -> argparse.ArgumentParser:
    names = [stage.name for stage in STAGES]
    arguments = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    arguments.add_argument(
        "--limit",
        type=float,
        default=LIMIT_SECONDS,
        metavar="SECONDS",
        help=f"of the whole run (default: {LIMIT_SECONDS:g}); with more, every stage may take longer in proportion",
    )
    arguments.add_argument(
        "--only",
        action="append",
        choices=names,
        metavar="STAGE",
        help=f"this one, after {' and '.join(ALWAYS)}; may be repeated: {', '.join(names)}",
    )
    arguments.add_argument(
        "--small", action="store_true", help="every stage's shortest way: to try the run itself"
    )
    arguments.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for the results (default: $OUT, else runs/gpu-NAME)"
    )
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if not arguments.limit > 0:
        parser().error(f"--limit must be a positive number of seconds, got {arguments.limit:g}")
    wanted = [stage for stage in STAGES if arguments.only is None or stage.name in (*ALWAYS, *arguments.only)]
    name = gpu_name()
    if name is None:
        return wrong(
            "nvidia-smi finds no NVIDIA GPU on this machine; docs/benchmarks.md says how to rehearse without one"
        )
    if lacking := missing_packages():
        return wrong(
            f"{sys.executable} lacks {', '.join(lacking)}: name another interpreter (PYTHON=...), or pip install them"
        )
    given = arguments.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    try:
        out = given or free_folder(Path("runs") / f"gpu-{name}")
        runner = Runner(wanted, out.resolve(), arguments.limit, arguments.small, prepare)
    except FileExistsError as error:
        return wrong(str(error))
    except OSError as error:
        return wrong(f"--out must be a folder that can be written, got {error.filename}: {error.strerror}")
    return runner.run()


def wrong(message: str) -> int:
    print(f"bench/gpu.sh: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
