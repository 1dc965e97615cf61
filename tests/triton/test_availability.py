"""Where the back end cannot run: the reason, and no cost to those who do not use it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from interpreter import interpreter_fault

import vidfast
from vidfast.backends.triton import TritonBackend
from vidfast.backends.triton import launch as module
from vidfast.backends.triton.interpreter import interpreter_fault as fault


def run(code: str, **environment: str) -> str:
    import os

    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=clean | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_call_on_the_cpu_by_name_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run here: .*on a GPU, not on cpu"):
        vidfast.gaussian_nll(x, x, x[0], backend="triton")


def test_without_triton_the_reason_is_its_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    backend = TritonBackend()
    assert "not installed" in str(backend.unavailable())
    assert "pip install 'vidfast[triton]'" in str(backend.unavailable())
    assert backend.info() == {}
    x = torch.ones(2, 3, device="meta")
    assert "not installed" in str(backend.supports(x, x, x[0]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_its_absence() -> None:
    pytest.importorskip("triton")
    assert "GPU" in run("import vidfast; print(vidfast.info()['backends']['triton'])")


def test_nothing_is_imported_before_it_is_used() -> None:
    """Neither by the import nor by a call that another back end serves. torch may have parts named so itself."""
    code = """
import sys, torch
had = "triton" in sys.modules
import vidfast
x = torch.ones(2, 3)
vidfast.gaussian_nll(x, x, x[0], backend="cpu")
vidfast.gaussian_nll(x, x, x[0])
assert "vidfast.backends.triton.kernels" not in sys.modules
assert had or "triton" not in sys.modules
"""
    run(code)


@pytest.mark.skipif(interpreter_fault() is not None, reason=f"{interpreter_fault()}")
def test_interpreted_it_takes_cpu_tensors_and_says_so() -> None:
    code = """
import torch, vidfast
x = torch.randn(4, 6, 5)
a = torch.randn(6)
torch.testing.assert_close(
    vidfast.gaussian_nll(x, x * 2, a, backend="triton"), vidfast.gaussian_nll(x, x * 2, a, backend="cpu")
)
print(vidfast.info()["backends"]["triton"]["interpreted"])
"""
    assert run(code, TRITON_INTERPRET="1").strip() == "True"


@pytest.mark.parametrize(("value", "wanted"), [("0", False), ("1", True), ("", False)])
def test_the_search_is_off_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, value: str, wanted: bool
) -> None:
    monkeypatch.setenv("VIDFAST_AUTOTUNE", value)
    assert module.autotunes() is wanted


def test_an_interpreter_that_cannot_run_is_a_reason() -> None:
    """Triton 3.6 cannot count with numpy 2.4: it raises where a loop's bound becomes a Python number."""
    pytest.importorskip("triton")
    code = """
import logging, torch, vidfast
from vidfast.backends.triton import math as triton_math

class Broken:
    def __getitem__(self, grid):
        def launch(*arguments):
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")
        return launch

triton_math.counts = Broken()
x = torch.randn(4, 6)
assert torch.isfinite(vidfast.gaussian_nll(x, x * 2, x[0]))  # auto goes on
try:
    vidfast.gaussian_nll(x, x * 2, x[0], backend="triton")
except RuntimeError as error:
    print(error)
print(vidfast.info()["backends"]["triton"]["reason"])
"""
    by_name, in_info = run(code, TRITON_INTERPRET="1").splitlines()
    for said in (by_name, in_info):
        assert "the interpreter of triton" in said
        assert "with numpy" in said
        assert "install another version" in said
    assert by_name.startswith("backend='triton' cannot run here: ")


def test_an_interpreter_that_counts_wrong_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")

    class Idle:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments: None

    monkeypatch.setattr("vidfast.backends.triton.math.counts", Idle())
    assert "counts wrong: [-1, -1]" in str(fault())


@pytest.mark.skipif(interpreter_fault() is not None, reason=f"{interpreter_fault()}")
@pytest.mark.parametrize(
    "first",
    [
        "torch.func.grad(lambda m: vidfast.gaussian_nll(m, m * 2, a, backend='triton').sum())(x)",
        "with FakeTensorMode(): vidfast.info()",
        "with torch.device('meta'): vidfast.info()",
        "with torch.inference_mode(): vidfast.info()",
        "threads = [threading.Thread(target=vidfast.info) for _ in range(6)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]",
    ],
)
def test_what_asks_first_does_not_decide_whether_it_runs(first: str) -> None:
    """The answer is kept for the process: it must be the machine's, not that of a mode that was on."""
    lines = "\n    ".join(first.splitlines())
    code = f"""
import threading, torch, vidfast
from torch._subclasses.fake_tensor import FakeTensorMode
x, a = torch.randn(4, 6), torch.randn(6)
try:
    {lines}
except RuntimeError as error:
    assert "torch.func" in str(error)
assert torch.isfinite(vidfast.gaussian_nll(x, x * 2, a, backend="triton"))
print("runs")
"""
    assert run(code, TRITON_INTERPRET="1").strip() == "runs"
