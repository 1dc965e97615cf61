"""The programs of examples/ run as they stand, and what they print are finite numbers."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path

import pytest
from run_example import EXAMPLES, run_example

SHORT = ["--steps", "2", "--teacher-steps", "2"]

# By program: its arguments, the packages that it needs, and the names of the student's losses.
PROGRAMS = {
    "vit_to_vit.py": (SHORT, ["timm", "sklearn"], ["task", "vid", "vid_lp", "kd"]),
    "bert_to_bert.py": (SHORT, ["transformers"], ["task", "vid", "kd"]),
    "segmentation.py": (SHORT, ["sklearn"], ["task", "vid", "kd"]),
    "features_and_tuples.py": (["--steps", "2"], ["sklearn"], ["task", "vid", "kd"]),
}
ELSEWHERE = {"torchdistill/train.py": "test_torchdistill.py"}


def test_every_example_is_run() -> None:
    found = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py")}
    assert found == set(PROGRAMS) | set(ELSEWHERE)
    for program, file in ELSEWHERE.items():
        assert f'run_example("{program}"' in Path(__file__).with_name(file).read_text()


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_example_runs(program: str) -> None:
    arguments, packages, losses = PROGRAMS[program]
    # Not importorskip: importing timm fails where torchvision's operators do not load, which run_example.py sees to.
    missing = [package for package in ["tqdm", *packages] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    lines = run_example(program, *arguments)
    result, last = lines[-1].split(", last losses: ")
    assert re.fullmatch(r"[^:]+: (test accuracy|mean IoU) .*", result)
    printed = dict(loss.split(" ") for loss in last.split(", "))
    assert list(printed) == losses
    assert all(math.isfinite(float(value)) for value in printed.values())
    shares = [float(value) for line in lines for value in re.findall(r"([^ ]+) %", line)]
    assert len(shares) >= len(lines) >= 3
    assert all(0 <= share <= 100 for share in shares)


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_examples_docstring_says_how_to_run_it(program: str) -> None:
    text = (EXAMPLES / program).read_text().split('"""')[1]
    assert f"python examples/{program} {' '.join(PROGRAMS[program][0])}" in text
