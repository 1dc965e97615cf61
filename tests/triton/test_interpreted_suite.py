"""The core suite, run by the interpreter of Triton on CPU tensors: the same tests, in processes of their own.

Whether kernels are interpreted is fixed when they are defined, so not in this process. An interpreted kernel is
some thousand times slower than a compiled one: small problems only, and a few parametrisations of each test.
All of them: VIDFAST_TEST_PER_FUNCTION=0 pytest tests/triton/test_interpreted_suite.py (half an hour).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import interpreter_fault
from thinning import kept

HERE = Path(__file__).parent
PROCESSES = 2
# Not about kernels, but slow: many examples of random problems, and processes that these tests start. A difference
# quotient for each of 864 elements is too.
LEFT_OUT = (
    "not random and not fake_tensors and not another_default_device and not training_finds "
    "and not (heteroscedastic and gradcheck)"
)

pytestmark = pytest.mark.skipif(interpreter_fault() is not None, reason=f"{interpreter_fault()}")


def interpreted(share: str, per_function: str, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "VIDFAST_TEST_BACKEND": "triton",
        "VIDFAST_TEST_DEVICE": "cpu",
        "VIDFAST_TEST_SMALL": "1",
        "VIDFAST_TEST_PER_FUNCTION": per_function,
        "VIDFAST_TEST_SHARE": share,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")])),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "thinning", "-p", "no:cacheprovider", *arguments]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=HERE.parents[1],
    )


def test_the_core_suite_holds_when_interpreted() -> None:
    per_function = os.environ.get("VIDFAST_TEST_PER_FUNCTION", "2")
    running = [
        interpreted(f"{i}/{PROCESSES}", per_function, "tests/core", "-m", "backend", "-k", LEFT_OUT)
        for i in range(PROCESSES)
    ]
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output[-20000:]
        assert " passed" in output.splitlines()[-1], output[-2000:]


@pytest.mark.parametrize(
    ("counts", "most", "expected"),
    [
        ([1], 2, [[0]]),
        ([5], 2, [[0, 4]]),
        ([5, 2], 3, [[0, 2, 4], [0, 1]]),
        ([3], 0, [[0, 1, 2]]),
        ([4], 1, [[0]]),
    ],
)
def test_thinning_keeps_the_ends_and_something_between(
    counts: list[int], most: int, expected: list[list[int]]
) -> None:
    assert kept(counts, most) == expected
