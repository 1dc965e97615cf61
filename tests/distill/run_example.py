"""Runs a program of examples/, also where torchvision's compiled operators do not load.

python tests/distill/run_example.py PROGRAM [its arguments]
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

from declared_operators import declare_torchvision

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run_example(program: str, *arguments: str) -> list[str]:
    """What a program of examples/ prints, in lines."""
    # One thread: two that wait for each other take many times as long where other programs use the cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(EXAMPLES / program), *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


if __name__ == "__main__":
    declare_torchvision()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
