"""Adding a back end is adding a file: the toy's goes through the shared suite's small shapes, and no test names it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Of the plain one, whose sums are torch's and whose tensors need not be copied: what both say of gradients.
OF_GRADIENTS = (
    "test_inplace.py",
    "test_backward.py",
    "test_derivatives.py",
    "test_saved_tensors.py",
    "test_random_problems.py",
)


@pytest.mark.parametrize(("name", "files", "least"), [("toy", ("",), 1000), ("plain", OF_GRADIENTS, 100)])
def test_a_back_end_of_one_file_passes_the_shared_suite(
    name: str, files: tuple[str, ...], least: int
) -> None:
    site = Path(__file__).parent / "site"
    found = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT), *([found] if found else [])]),
        "VIDFAST_TEST_BACKEND": name,
        "VIDFAST_TEST_SMALL": "1",
    }
    paths = [str(ROOT / "tests" / "core" / file) for file in files]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *paths, "-m", "backend", "-q", "-p", "no:cacheprovider"],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=1800,
    )  # fmt: skip
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None
    assert int(passed[1]) > least, summary
