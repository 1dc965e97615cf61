"""Which back end runs, that it says so, and that one asked for by name runs or raises."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import get_args

import pytest
import torch
from places import Place, chosen_places
from problems import ISAS

import vidfast
from vidfast import backends
from vidfast.arguments import BackendName

# Those that are files of the package; a test may register others.
SHIPPED = {path.stem for path in Path(backends.__file__).parent.iterdir()} - {"__init__", "base", "plain"}


@pytest.fixture(autouse=True)
def _forget_what_was_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_picked", set())


def problem(device: torch.device | str = "cpu") -> tuple[torch.Tensor, ...]:
    return torch.randn(4, 6, device=device), torch.randn(4, 6, device=device), torch.zeros(6, device=device)


@pytest.mark.parametrize("name", backends.NAMES)
def test_every_backend_is_tested_here(name: str) -> None:
    """A skip here is a back end that the suite did not run on."""
    places, missing = chosen_places()
    if name not in [p.name for p in places]:
        pytest.skip(missing.get(name, "VIDFAST_TEST_BACKEND names others"))


@pytest.mark.parametrize("name", backends.NAMES)
def test_a_backend_asked_for_by_name_runs_or_says_why_not(name: str) -> None:
    tensors = problem()
    reason = backends.load(name).supports(*tensors)
    if reason is None:
        assert vidfast.gaussian_nll(*tensors, backend=name).isfinite()
    else:
        with pytest.raises(RuntimeError) as caught:
            vidfast.gaussian_nll(*tensors, backend=name)
        assert f"backend={name!r}" in str(caught.value)
        assert reason in str(caught.value)


def test_a_backend_that_cannot_run_raises_with_the_reason(
    backend: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = problem(backend.device)
    monkeypatch.setattr(type(backends.load(backend.name)), "supports", lambda *_: "it has gone fishing")
    before = [x.clone() for x in tensors]
    with pytest.raises(RuntimeError, match="gone fishing"):
        backend.nll(*tensors)
    for x, old in zip(tensors, before, strict=True):
        assert torch.equal(x, old)


def test_auto_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in backends.NAMES:
        monkeypatch.setattr(type(backends.load(name)), "supports", lambda *_, n=name: f"{n} has gone fishing")
    tensors = problem()
    with caplog.at_level(logging.DEBUG, "vidfast"):
        loss = vidfast.gaussian_nll(*tensors)
        vidfast.gaussian_nll(*tensors)
    torch.testing.assert_close(loss, vidfast.gaussian_nll(*tensors, backend="reference"), rtol=0, atol=0)
    records = [r.getMessage() for r in caplog.records if r.name == "vidfast"]
    assert len(records) == 1, "once, not at every call"
    assert "reference" in records[0]
    assert all(f"{name} has gone fishing" in records[0] for name in backends.NAMES)


def test_what_auto_picks_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "vidfast"):
        for _ in range(3):
            vidfast.gaussian_nll(*problem())
    records = [r for r in caplog.records if r.name == "vidfast"]
    assert len(records) == 1
    assert records[0].levelno == logging.DEBUG
    assert "cpu" in records[0].getMessage()


def test_a_missing_cpu_extension_is_a_warning_not_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = backends.load("cpu")
    monkeypatch.setattr(type(cpu), "supports", lambda *_: "it was never built")
    monkeypatch.setattr(type(cpu), "unavailable", lambda _: "it was never built")
    with pytest.warns(RuntimeWarning, match="never built"):
        vidfast.gaussian_nll(*problem())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vidfast.gaussian_nll(*problem())  # once
    assert vidfast.info()["backends"]["cpu"] == {"available": False, "reason": "it was never built"}  # type: ignore[index]


def test_without_the_extension_everything_runs_on_the_reference() -> None:
    code = """
import sys
sys.modules["vidfast._C"] = None
import torch, vidfast
cpu = vidfast.info()["backends"]["cpu"]
assert cpu["available"] is False and "_C" in cpu["reason"], cpu
m, t, a = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6), torch.zeros(6)
vidfast.gaussian_nll(m, t, a).backward()
assert m.grad is not None
try:
    vidfast.gaussian_nll(m, t, a, backend="cpu")
except RuntimeError as error:
    assert "not built" in str(error), error
else:
    raise SystemExit("backend='cpu' ran without the extension")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_info() -> None:
    info = vidfast.info()
    assert info["vidfast"] == vidfast.__version__
    assert info["torch"] == torch.__version__
    found = info["backends"]
    assert isinstance(found, dict)
    assert set(found) == set(backends.NAMES)
    for name, entry in found.items():
        assert entry["available"] == (backends.load(name).unavailable() is None)
        assert entry["available"] or entry["reason"]
    torch.set_num_threads(1)
    assert vidfast.info()["backends"]["cpu"]["threads"] == 1  # type: ignore[index]
    assert vidfast.info()["backends"]["cpu"]["isa"] in ISAS  # type: ignore[index]


def test_the_names_of_the_type_are_those_that_there_are() -> None:
    assert {*get_args(BackendName)} == {
        "auto",
        "reference",
        *(name for name in backends.NAMES if name in SHIPPED),
    }


def test_on_the_cpu_the_cpus_comes_first_whatever_is_added() -> None:
    """An interpreted or emulated kernel that takes tensors there is never what `auto` means."""
    assert backends._CPU_FIRST[0] == "cpu"
    assert set(backends._CPU_FIRST) <= set(backends.NAMES)


def test_backends_follow_the_protocol() -> None:
    for name in backends.NAMES:
        value = backends.load(name)
        assert value.name == name
        for method in ("unavailable", "supports", "info", "forward", "forward_grad", "backward", "scale"):
            assert callable(getattr(value, method)), method
