"""Where the back end cannot run: the reason, and no cost to those who do not use it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

import vidfast
from vidfast.backends import triton as module
from vidfast.backends.triton import TritonBackend


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
assert "vidfast.backends.triton_kernels" not in sys.modules
assert had or "triton" not in sys.modules
"""
    run(code)


def test_interpreted_it_takes_cpu_tensors_and_says_so() -> None:
    pytest.importorskip("triton")
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
