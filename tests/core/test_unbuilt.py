"""A source folder without the extension is never taken instead of an installed package in silence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vidfast

PACKAGE = Path(vidfast.__file__).parent
ROOT = Path(__file__).parents[2]

# No vidfast but those that a test puts in place: no editable installation, none in site-packages.
ALONE = """
import importlib.machinery as machinery, os, sys, warnings
sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__module__", "").startswith("_frozen_importlib")]
places = os.environ["PLACES"].split(os.pathsep)
sys.path[:] = [p for p in sys.path if p in places or not os.path.isdir(os.path.join(p or ".", "vidfast"))]
warnings.simplefilter("always")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The root of a source folder that was never built."""
    root = tmp_path / "checkout"
    shutil.copytree(PACKAGE, root / "vidfast", ignore=shutil.ignore_patterns("_C.*so", "__pycache__"))
    for name in ("setup.py", "CMakeLists.txt"):
        (root / name).touch()
    return root


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder as site-packages is, with a vidfast that has its extension."""
    from vidfast import _C

    site = tmp_path / "site"
    shutil.copytree(PACKAGE, site / "vidfast", ignore=shutil.ignore_patterns("_C.*so", "__pycache__"))
    shutil.copy(_C.__file__, site / "vidfast")
    return site


def run(code: str, *places: Path, begin: str = ALONE) -> subprocess.CompletedProcess[str]:
    """`code` with those folders first on sys.path; its script is user.py in the first."""
    script = places[0] / "user.py"
    script.write_text(begin + code)
    found = os.pathsep.join(map(str, places))
    environment = os.environ | {"PYTHONPATH": found, "PLACES": found, "PYTHONSAFEPATH": ""}
    command = [sys.executable, "-W", "always", str(script)]
    done = subprocess.run(
        command, cwd=places[0], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_folder_that_hides_an_installed_package_says_so(checkout: Path, installed: Path) -> None:
    done = run("import vidfast  # here\nprint(vidfast.__file__)", checkout, installed)
    assert done.stdout.strip() == str(checkout / "vidfast" / "__init__.py")
    (said,) = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert f"imported from {checkout / 'vidfast'}," in said
    assert f"hides the vidfast that is installed in {installed / 'vidfast'}:" in said
    assert f"Start Python in another folder, or build this one: pip install -e {checkout}" in said
    assert said.startswith(f"{checkout / 'user.py'}:"), "it names the caller's line"
    assert "import vidfast  # here" in done.stderr


def test_an_editable_installation_can_be_hidden_too(checkout: Path, installed: Path) -> None:
    """It may be found by a finder of its own and not by sys.path."""
    finder = f"""
import importlib.util, sys
class Editable:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "vidfast":
            found = {str(installed / "vidfast" / "__init__.py")!r}
            return importlib.util.spec_from_file_location(name, found)
sys.meta_path.append(Editable)
"""
    done = run(finder + "import vidfast", checkout)
    assert f"hides the vidfast that is installed in {installed / 'vidfast'}:" in done.stderr


def test_an_extension_of_another_folder_is_named(checkout: Path, installed: Path) -> None:
    """As setuptools' finder of an editable installation gives it to whatever vidfast was imported."""
    finder = f"""
import importlib.machinery, sys
class Editable:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "vidfast._C":
            return importlib.machinery.PathFinder.find_spec(name, [{str(installed / "vidfast")!r}])
sys.meta_path.append(Editable)
"""
    done = run(finder + "import vidfast  # here", checkout)
    (said,) = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    (extension,) = (installed / "vidfast").glob("_C.*so")
    assert f"imported from {checkout / 'vidfast'}, where its extension is not built, and took" in said
    assert f"took the extension {extension}, which may be of other sources" in said
    assert f"pip install -e {checkout}" in said
    assert "import vidfast  # here" in done.stderr


def test_with_no_other_package_the_reasons_name_the_source_folder(checkout: Path) -> None:
    code = """
import torch, vidfast
print(vidfast.info()["backends"]["cpu"]["reason"])
print(vidfast.info()["backends"]["cuda"]["reason"])
vidfast.gaussian_nll(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(3))  # here
"""
    done = run(code, checkout)
    assert "  # here" in done.stderr, "the warning is at the caller's line"
    for said in done.stdout.splitlines():
        assert "the extension vidfast._C is not built (" in said
        assert (
            f"{checkout / 'vidfast'}, an unbuilt source folder; pip install -e {checkout} builds it there"
            in said
        )
    (warned,) = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert "vidfast runs its slow reference" in warned
    assert f"pip install -e {checkout}" in warned


def test_an_extension_of_another_python_is_named(checkout: Path) -> None:
    (checkout / "vidfast" / "_C.cpython-30-x86_64-linux-gnu.so").touch()
    done = run("import vidfast; print(vidfast.info()['backends']['cpu']['reason'])", checkout)
    assert "only _C.cpython-30-x86_64-linux-gnu.so for another Python" in done.stdout


def test_an_extension_that_does_not_load_is_not_called_unbuilt(installed: Path) -> None:
    (extension,) = (installed / "vidfast").glob("_C.*so")
    extension.write_bytes(b"not a library")
    done = run("import vidfast; print(vidfast.info()['backends']['cpu']['reason'])", installed)
    assert f"the extension {extension} does not load (" in done.stdout
    assert "RuntimeWarning" not in done.stderr


def test_with_the_extension_nothing_is_looked_for(installed: Path, checkout: Path) -> None:
    code = "import vidfast; vidfast.info(); import sys; assert 'vidfast.unbuilt' not in sys.modules"
    done = run(code, installed, checkout)
    assert "RuntimeWarning" not in done.stderr


def bench(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    shutil.copytree(
        ROOT / "bench", checkout / "bench", ignore=shutil.ignore_patterns("results", "__pycache__")
    )
    code = f"""
import pytest
raise SystemExit(pytest.main(["bench", "-q", "-p", "no:cacheprovider", "--benchmark-disable",
    "-k", "overhead and default", "--bench-device=cpu", *{list(arguments)!r}]))
"""
    script = checkout / "user.py"
    script.write_text(ALONE + code)
    environment = os.environ | {"PYTHONPATH": str(checkout), "PLACES": str(checkout)}
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_benchmarks_refuse_to_measure_the_reference_unasked(checkout: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    done = bench(checkout)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    (said,) = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("ERROR")]
    assert "refusing to measure the reference: no kernel runs on cpu (cpu: the extension vidfast._C" in said
    assert f"pip install -e {checkout}" in said
    assert said.endswith("--bench-reference measures it")


def test_the_benchmarks_measure_the_reference_where_that_is_asked_for(checkout: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    done = bench(checkout, "--bench-reference")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
