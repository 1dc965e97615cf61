"""What type checkers say of programs that use vidfast: nothing of right ones, every mistake of wrong ones.

A checker that is not installed skips its tests; `make test` installs both (the extra "dev"). basedpyright is
pyright with a node of its own, so that it needs no network.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROGRAMS = ("user_program.py", "training_program.py")
MISTAKES = "mistakes.py"
FILES = [str(HERE / name) for name in (*PROGRAMS, MISTAKES)]
MARKED = {
    number: line.split("  # mistake")[0]
    for number, line in enumerate((HERE / MISTAKES).read_text().splitlines(), 1)
    if line.endswith("  # mistake")
}

# Errors by file and line: {"mistakes.py": {12: "..."}}
Found = dict[str, dict[int, str]]


def run(command: list[str]) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1, done.stdout + done.stderr  # errors were found, and nothing else went wrong
    return done.stdout


@lru_cache(maxsize=1)
def mypy() -> Found:
    """`mypy --strict`, as where vidfast is installed: silent about vidfast itself."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    options = [
        "--strict",
        "--follow-imports=silent",
        "--config-file=",
        "--cache-dir=.mypy_cache/of-programs",
        "--untyped-calls-exclude=torch",  # Tensor.backward has no types
        f"--python-executable={sys.executable}",
    ]
    found: Found = {}
    for line in run([sys.executable, "-m", "mypy", *options, "--no-pretty", *FILES]).splitlines():
        if match := re.match(r"(.+?):(\d+)(?::\d+)?: error: (.*)", line):
            found.setdefault(Path(match[1]).name, {})[int(match[2])] = match[3]
    return found


@lru_cache(maxsize=1)
def pyright() -> Found:
    beside = Path(sys.executable).parent / "basedpyright"
    program = str(beside) if beside.exists() else shutil.which("basedpyright")
    if program is None:
        pytest.skip("basedpyright is not installed")
    options = ["--level=error", "--outputjson", f"--pythonpath={sys.executable}", f"--project={HERE}"]
    found: Found = {}
    for error in json.loads(run([program, *options]))["generalDiagnostics"]:
        lines = found.setdefault(Path(error["file"]).name, {})
        lines[error["range"]["start"]["line"] + 1] = error["message"]
    return found


CHECKERS = pytest.mark.parametrize("checker", [mypy, pyright], ids=["mypy", "pyright"])


@CHECKERS
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_right_program_has_no_errors(checker: Callable[[], Found], program: str) -> None:
    assert checker().get(program, {}) == {}


@CHECKERS
@pytest.mark.parametrize("line", MARKED, ids=MARKED.values())
def test_a_mistake_is_found(checker: Callable[[], Found], line: int) -> None:
    assert line in checker()[MISTAKES]


@CHECKERS
def test_nothing_but_the_mistakes_is_found(checker: Callable[[], Found]) -> None:
    assert {line: said for line, said in checker()[MISTAKES].items() if line not in MARKED} == {}


def loaded_names(path: Path) -> set[str]:
    """Names and attributes that a program uses; an import alone is no use."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("module", ["vidfast", "vidfast.distill"])
def test_the_program_uses_every_public_name(module: str) -> None:
    public = set(importlib.import_module(module).__all__)
    assert public - loaded_names(HERE / "user_program.py") == set()


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_program_runs(program: str, tmp_path: Path) -> None:
    if program == "training_program.py":
        pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", str(HERE / program)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
