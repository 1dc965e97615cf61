"""The host's time where there is no GPU: rows of every back end, and the back ends as they were afterwards."""

from __future__ import annotations

import re

import pytest

from bench import host
from bench.suites import SAVE_AND_RETURN
from vidfast import backends
from vidfast.backends import cpu

pytestmark = pytest.mark.skipif(cpu.BACKEND.unavailable() is not None, reason="the extension is not built")


def test_every_back_end_and_strategy_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    before = dict(backends._loaded)
    assert host.main(["--seconds", "0.05"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {
        found[1].strip(): float(found[2])
        for line in lines
        if (found := re.match(r"(.+?) +([\d.]+) us", line))
    }
    names = ["cuda", "cpu"] + ([] if "triton is not installed: left out" in lines else ["triton"])
    strategies = ("two_pass", "one_pass", "one_pass in place")
    assert list(rows) == [SAVE_AND_RETURN, *(f"{n} {s}" for n in names for s in strategies)]
    assert all(0 < us < 1e6 for us in rows.values())
    assert {name: backends._loaded[name] for name in before} == before


def test_the_kernels_are_left_out_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step comes to the native calls that it would make, with as many arguments as the extension wants."""
    called: list[str] = []
    for name in ("cuda_forward_grad", "cuda_scale", "cuda_forward", "cuda_backward"):

        def note(*_: object, name: str = name) -> None:
            called.append(name)

        monkeypatch.setattr(host._Nothing, name, staticmethod(note))
    (case,) = host.overhead_cases("host", False, "cpu")
    pool = host.Pool(case)
    for row in host.contenders(case, pool):
        if row.name.startswith("cuda"):
            row.prepare()()
    assert called == ["cuda_forward", "cuda_backward", *["cuda_forward_grad", "cuda_scale"] * 2]


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_how_long_must_be_a_time(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        host.main([f"--seconds={seconds}"])
    assert "must be positive and finite" in capsys.readouterr().err
