"""Suites measured into lines, case after case, until the time is over."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import machine, measured, traffic
from bench.buffers import Pool
from bench.cases import Case
from bench.clock import Call
from bench.interleave import Budget
from bench.lines import Lines, one_line, without_paths
from bench.measured import measure_all, write_machine
from bench.nvidia_smi import first_gpu
from bench.providers import Provider, eager_formula
from vidfast.report.results import load

CASE = Case("test", (2, 3, 4, 4), cold=False)
ONCE = Budget(0.0, fewest=2, most=2)


class Sleeps:
    """A contender that takes a while."""

    calls, replayed, incoming = 1, False, 1.0
    provider = Provider("sleeps", "floor", eager_formula, compared=False)
    name = "sleeps"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def prepare(self) -> Call:
        return lambda: time.sleep(self.seconds)

    def finish(self) -> None:
        """Nothing was written."""

    def traffic(self) -> traffic.Traffic | None:
        return None


class Suite:
    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def names(self, case: Case) -> list[str]:
        return ["sleeps"]

    def contenders(self, case: Case, pool: Pool, names: list[str]) -> Iterator[tuple[str, Any]]:
        yield "sleeps", self.make()


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_case_is_written_before_the_next_begins(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "x.jsonl")
    cases = [replace(CASE, note=str(n)) for n in range(3)]
    seen = []
    for case, rows in measure_all(Suite(lambda: Sleeps(0.0)), cases, lines, ONCE, time.monotonic() + 60):
        seen.append(case.note)
        assert set(rows) == {"sleeps"}
        assert [line["kind"] for line in lines_of(lines.path)] == ["row"] * len(seen)
    assert seen == ["0", "1", "2"]
    row = lines_of(lines.path)[0]
    assert row["extra_info"]["suite"] == "test"
    assert len(row["stats"]["data"]) == 2


def test_no_case_is_begun_that_would_not_fit(tmp_path: Path) -> None:
    """The longest so far says how long the next may take."""
    lines = Lines(tmp_path / "x.jsonl")
    cases = [replace(CASE, note=str(n)) for n in range(3)]
    begin = time.monotonic()
    done = [case for case, _ in measure_all(Suite(lambda: Sleeps(0.2)), cases, lines, ONCE, begin + 1.2)]
    assert len(done) == 1
    assert [(line["kind"], line.get("case")) for line in lines_of(lines.path)[1:]] == [
        ("left_out", cases[1].title),
        ("left_out", cases[2].title),
    ]


def refuses() -> Any:
    raise RuntimeError("no kernel\nfor this")


@pytest.mark.parametrize(
    "make", [lambda: RuntimeError("no kernel\nfor this"), lambda: Broken(0.0)], ids=["not built", "raises"]
)
def test_a_row_that_fails_is_a_line_of_its_own(make: Callable[[], Any], tmp_path: Path) -> None:
    lines = Lines(tmp_path / "x.jsonl")
    for _ in measure_all(Suite(make), [CASE], lines, ONCE, time.monotonic() + 60):
        pass
    assert lines_of(lines.path) == [
        {
            "kind": "failure",
            "suite": "test",
            "case": CASE.title,
            "row": "sleeps",
            "error": "RuntimeError: no kernel for this",
        }
    ]


class Broken(Sleeps):
    def prepare(self) -> Call:
        return refuses


def test_the_head_makes_a_file_that_the_report_reads(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "x.jsonl")
    write_machine(lines, "cpu", "some")
    for _ in measure_all(Suite(lambda: Sleeps(0.0)), [CASE], lines, ONCE, time.monotonic() + 60):
        pass
    run = load(lines.path)
    assert run.gpu is None
    assert len(run.rows) == 1
    assert run.commit["id"]


def test_the_commit_is_this_checkouts_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy without .git, inside another project's checkout, has no commit of its own."""
    inner = tmp_path / "around" / "copy"
    inner.mkdir(parents=True)
    monkeypatch.setattr(measured, "ROOT", inner)
    assert measured.commit() == {"id": "unknown", "dirty": False}
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C"]
    subprocess.run(["git", "init", "-q", str(inner.parent)], check=True)
    subprocess.run([*git, str(inner.parent), "commit", "-qm", "x", "--allow-empty"], check=True)
    assert measured.commit() == {"id": "unknown", "dirty": False}
    monkeypatch.setattr(measured, "ROOT", inner.parent)
    found = measured.commit()
    assert len(str(found["id"])) == 40
    assert found["dirty"] is False
    (inner.parent / "file").write_text("1")
    subprocess.run([*git, str(inner.parent), "add", "file"], check=True)
    assert measured.commit()["dirty"] is True


def test_without_py_cpuinfo_the_processor_still_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cpuinfo", None)
    facts = machine.processor()
    assert facts["brand_raw"]
    assert facts["simd"] == []
    flags = {"brand_raw": "X", "flags": ["avx2", "sse"], "hz_actual": 1}
    assert machine.processor(flags) == {"brand_raw": "X", "simd": ["avx2"]}


@pytest.mark.parametrize(
    ("printed", "facts"),
    [
        ("580.1, 700.00 W, 1980 MHz", ["580.1", "700.00 W", "1980 MHz"]),
        ("580.1, 700.00 W, 1980 MHz\n580.1, 300.00 W, 1 MHz", ["580.1", "700.00 W", "1980 MHz"]),
        ("something else", []),
        ("", []),
    ],
)
def test_facts_of_the_driver(
    printed: str, facts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '%s\\n' '{printed}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    names = ("driver_version", "power.limit", "clocks.max.sm")
    assert list(first_gpu(*names).values()) == facts
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert first_gpu(*names) == {}


def test_the_digest_is_of_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("csrc/a.cu", "vidfast/b.py", "vidfast/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(measured, "ROOT", tmp_path)
    found = [measured.digest_of_sources()]
    for name in ("vidfast/c.txt", "vidfast/b.py", "csrc/a.cu"):
        (tmp_path / name).write_text("2")
        found.append(measured.digest_of_sources())
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_lines_name_no_folder_of_the_machine(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "x.jsonl")
    error = one_line(ValueError(f"in {Path.home()}/a and {measured.ROOT}/bench/x.py:\n  no"))
    lines.write("failure", error=error)
    assert lines_of(lines.path)[0]["error"] == "ValueError: in a and bench/x.py: no"
    assert without_paths("nothing of that kind") == "nothing of that kind"
