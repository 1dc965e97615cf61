"""`python -m pytest bench` as a user runs it: rows are stored, selected, refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import machine
from vidfast.report import main

ROOT = Path(__file__).parents[2]


# A plugin that gives the run another machine: its cache, memory enough, and the most slots of a case.
OTHER_MACHINE = """
import bench.buffers, bench.clock, bench.machine
for module in (bench.buffers, bench.clock, bench.machine):
    module.last_level_cache = lambda device: {cache}
bench.buffers.free_memory = lambda: 1 << 40
bench.buffers.MOST_SLOTS = 128
"""


def run_bench(*arguments: str, plugins: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", *arguments]
    found = [str(plugins)] if plugins else []
    found += [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    environment = os.environ | ({"PYTHONPATH": os.pathsep.join(found)} if found else {})
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The overhead suite without torch.compile, and some rows of the logits: seconds, and every kind of row."""
    path = tmp_path_factory.mktemp("bench") / "run.json"
    selected = "(overhead and not compile) or (loss_step and 128x1000 and (copy or default or eager))"
    done = run_bench("-k", selected, "--bench-seconds=0.2", "--benchmark-quiet", f"--benchmark-json={path}")
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["benchmarks"]
    return rows


def test_a_row_carries_what_a_sceptic_asks_for(stored: Path) -> None:
    row = next(row for row in rows_of(stored) if "128x1000" in row["name"] and "default g=1" in row["name"])
    facts = row["extra_info"]
    assert facts["bytes"] == 3 * 128 * 1000 * 4
    assert facts["gb_per_s"] == pytest.approx(facts["bytes"] / row["stats"]["median"] / 1e9, rel=1e-3)
    assert facts["share_of_copy"] == pytest.approx(facts["gb_per_s"] / facts["copy_gb_per_s"])
    assert facts["times_eager"]["low"] <= facts["times_eager"]["value"] <= facts["times_eager"]["high"]
    assert facts["error"]["loss"] < 1e-6
    check_cold(row, machine.last_level_cache("cpu"))
    assert 128 * 1000 * 4 <= facts["peak_extra_bytes"] < 2 * 128 * 1000 * 4
    assert set(facts["load"]) >= {"neighbour_cores", "stolen_cores", "load_average", "contended"}
    weighted = next(
        row for row in rows_of(stored) if "128x1000" in row["name"] and "default g=0.37" in row["name"]
    )
    assert weighted["extra_info"]["bytes"] == 5 * 128 * 1000 * 4


def check_cold(row: dict[str, Any], cache: int) -> None:
    """A row is cold exactly where its buffers are at least twice that cache, whatever the machine has."""
    facts = row["extra_info"]
    assert facts["meant_cold"]
    assert facts["cold"] == (facts["slots"] * 2 * facts["pass_bytes"] >= 2 * cache)


@pytest.mark.parametrize(
    ("mebibytes", "cold"),
    [(1, True), (32, True), (480, False), (1024, False)],
    ids=["1 MiB", "32 MiB", "480 MiB", "1 GiB"],
)
def test_a_row_on_a_machine_of_another_cache_is_marked(mebibytes: int, cold: bool, tmp_path: Path) -> None:
    """128 slots of 128x1000 are 125 MiB: more than twice 32, and not twice 480."""
    (tmp_path / "other_machine.py").write_text(OTHER_MACHINE.format(cache=mebibytes << 20))
    path = tmp_path / "run.json"
    selected = ["-k", "loss_step and 128x1000 and default", "--bench-device=cpu", "--bench-seconds=0.1"]
    stored = ["-p", "other_machine", "--benchmark-quiet", f"--benchmark-json={path}"]
    done = run_bench(*selected, *stored, plugins=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(path)
    assert len(rows) == 2
    for row in rows:
        check_cold(row, mebibytes << 20)
        assert row["extra_info"]["cold"] is cold


def test_stored_statistics_are_those_of_the_samples(stored: Path) -> None:
    for row in rows_of(stored):
        data = row["stats"]["data"]
        assert row["stats"]["rounds"] == len(data) >= 5
        assert min(data) > 0
        assert row["stats"]["max"] == pytest.approx(max(data), abs=2e-9)


def test_the_stored_run_makes_a_page(stored: Path, tmp_path: Path) -> None:
    assert main([str(stored), "--output", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "### Host overhead" in text
    assert "autograd.Function that saves and returns" in text


def test_nothing_stored_names_the_host_or_a_path(stored: Path) -> None:
    text = stored.read_text()
    assert "node" not in json.loads(text)["machine_info"]
    assert str(ROOT) not in text
    assert str(Path.home()) not in text


def test_a_busy_machine_is_refused_where_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The neighbour is a process of our own that spins while the run starts."""
    code = "import time, sys; end = time.time() + 60\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as neighbour:
        done = run_bench("-k", "overhead and default", "--bench-contended=refuse", "--benchmark-quiet")
        neighbour.kill()
    assert done.returncode == 3, done.stdout
    assert "refusing to measure beside others" in done.stdout + done.stderr
