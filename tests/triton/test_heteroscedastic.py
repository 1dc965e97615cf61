"""One variance an element, interpreted: in a process of its own, as test_interpreted_suite.py says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import interpreter_fault

HERE = Path(__file__).parent


@pytest.mark.skipif(interpreter_fault() is not None, reason=f"{interpreter_fault()}")
def test_elements_when_interpreted() -> None:
    folders = [str(HERE), str(HERE.parent / "core"), os.environ.get("PYTHONPATH", "")]
    file = str(HERE / "interpreted_heteroscedastic.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        env=os.environ
        | {
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        },
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-20000:]
    assert " passed" in done.stdout.splitlines()[-1], done.stdout[-2000:]
