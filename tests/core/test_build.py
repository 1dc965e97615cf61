"""A build that cannot succeed ends in one line that says what to install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77", reason="an older setuptools cannot read pyproject.toml")
pytest.importorskip("pybind11")

ROOT = Path(__file__).parents[2]


def executable(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder to be the whole PATH: a cmake and a ninja that no test should reach, and no compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cmake", "ninja"):
        executable(folder / name, f"echo {name} ran; exit 7")
    return folder


def build(programs: Path, code: str | None = None, **environment: str) -> list[str]:
    """The lines that a failing `setup.py build_ext` prints with that PATH, or `code` in its place."""
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "CXXFLAGS", "CUDA_HOME", "CUDA_PATH")}
    into = ["build_ext", "--build-lib", str(programs / "lib"), "--build-temp", str(programs / "temp")]
    script = [str(ROOT / "setup.py")] if code is None else ["-c", code]
    done = subprocess.run(
        [sys.executable, *script, *into],
        cwd=ROOT,
        env=clean | {"PATH": str(programs), "VIDFAST_CUDA": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()


def test_without_a_compiler_one_line_says_what_to_install(programs: Path) -> None:
    *_, last = build(programs)
    assert last.startswith(
        "error: vidfast needs a C++17 compiler to build its CPU kernels, and there is none on PATH"
    )
    assert "apt install g++" in last
    assert "set CXX" in last


def test_a_compiler_named_by_cxx_that_is_not_there_is_named(programs: Path) -> None:
    *_, last = build(programs, CXX="no-such-compiler -m64")
    assert last.startswith("error: CXX must be a C++17 compiler, got 'no-such-compiler -m64'")


def test_a_compiler_that_is_too_old_is_quoted(programs: Path) -> None:
    executable(programs / "g++", "echo 'g++: error: unrecognized command line option -std=c++17' >&2; exit 1")
    *_, last = build(programs)
    assert "g++ does not compile C++17 (g++: error: unrecognized command line option -std=c++17)" in last
    assert "apt install g++" in last


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_a_compiler_of_an_older_language_is_not_enough(programs: Path) -> None:
    """A real compiler, held to C++14 by a wrapper that drops the option."""
    real = shutil.which("c++")
    executable(
        programs / "c++",
        f'PATH={os.environ["PATH"]}; for a; do shift; [ "$a" = -std=c++17 ] || set -- "$@" "$a"; done\n'
        f'exec {real} -std=c++14 "$@"',
    )
    *_, last = build(programs)
    assert "c++ does not compile C++17 (" in last
    assert "this is not C++17" in last


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_a_failure_of_cmake_ends_in_one_line_too(programs: Path) -> None:
    """The compiler passes, and CMake, which is a stub here if none is installed beside Python, fails."""
    executable(programs / "c++", f'PATH={os.environ["PATH"]}; exec {shutil.which("c++")} "$@"')
    *_, last = build(
        programs,
        code=f"""
import runpy, sys, subprocess
run = subprocess.run
def fail_in_cmake(command, **options):
    return run([sys.executable, "-c", "raise SystemExit(7)"] if "-G" in command else command, **options)
subprocess.run = fail_in_cmake
runpy.run_path({str(ROOT / "setup.py")!r}, run_name="__main__")
""",
    )
    assert last == "error: CMake's configuration of vidfast._C failed (exit code 7): its reason is above"


@pytest.mark.parametrize("missing", ["cmake", "ninja"])
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_a_missing_tool_is_named(programs: Path, missing: str) -> None:
    if (Path(sys.executable).parent / missing).exists():
        pytest.skip(f"{missing} is installed beside this Python, where setup.py looks first")
    executable(programs / "c++", f'PATH={os.environ["PATH"]}; exec {shutil.which("c++")} "$@"')
    (programs / missing).unlink()
    *_, last = build(programs)
    assert last == f"error: vidfast needs {missing} to build: pip install {missing}"


def test_a_missing_pybind11_is_named(programs: Path) -> None:
    *_, last = build(
        programs,
        code=f"""
import runpy, sys
sys.modules["pybind11"] = None  # as if it were not installed
runpy.run_path({str(ROOT / "setup.py")!r}, run_name="__main__")
""",
    )
    assert last == "error: vidfast needs pybind11 to build: pip install pybind11"
