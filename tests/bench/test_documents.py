"""What documents say of GPUs is what stored runs say; every default says what decided it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.cases import DEVICE_POINTS
from bench.gpu.runner import LIMIT_SECONDS
from bench.gpu.stages import STAGES
from vidfast import backends
from vidfast.backends.triton import plan as triton_plan
from vidfast.report import device, main
from vidfast.report.results import Run, load

ROOT = Path(__file__).parents[2]
NOTES = ROOT / "docs" / "kernel-notes.md"
STORED = sorted((ROOT / "bench" / "results").glob("*.json*"))
HEADING = "## Defaults, and what decided them"
# Rules of the kernels themselves, which no search changes.
FIXED = (
    ("kWarps", "csrc/cuda/device.h", r"^constexpr int kWarps = (\d+);"),
    ("kReduceUnroll", "csrc/cuda/finish.cu", r"^constexpr int kReduceUnroll = (\d+);"),
    ("bytes of loads that a thread has in flight", "csrc/cuda/element.h", r"int batch = any \? 2 : (\d+) /"),
    (
        "most vectors of a warp's piece in `scale`",
        "csrc/cuda/gaussian_nll.cu",
        r"outer \* row / width, (\d+)\);",
    ),
)
# Said as long as no run on a GPU is stored, and not a day longer.
UNMEASURED = {
    "README.md": ("GPU figures are pending", "**not yet run or measured on a GPU**"),
    "docs/triton.md": ("## Not measured",),
    "docs/kernel-notes.md": ("No run on a GPU is stored",),
    "CHANGELOG.md": ("Neither has run on a GPU yet",),
}


def runs_on_gpus() -> list[Run]:
    return [run for run in map(load, STORED) if run.gpu]


def table() -> dict[str, tuple[str, str, str]]:
    """rule -> (value, file, what decided it)."""
    text = NOTES.read_text()
    part = text[text.index(HEADING) + len(HEADING) :].split("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("| ") and not line.startswith("| rule")]
    found = {}
    for row in rows:
        rule, value, where, decided = (cell.strip() for cell in row.strip("|").split("|"))
        found[rule if "` " in rule or " `" in rule else rule.strip("`")] = (value, where.strip("`"), decided)
    return found


def in_the_code() -> dict[str, tuple[str, str]]:
    """rule -> (value, file)."""
    header = "csrc/cuda/chunks.h"
    found = {
        name: (value, header)
        for name, value in re.findall(
            r"^VIDFAST_FREE (k\w+) = (\d+);", (ROOT / header).read_text(), re.MULTILINE
        )
    }
    for rule, file, pattern in FIXED:
        values = re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)
        assert len(values) == 1, f"{file}: {pattern}"
        found[rule] = (values[0], file)
    plan = "vidfast/backends/triton/plan.py"
    for name, value in triton_plan.RULE._asdict().items():
        if name != "lanes":  # the device's own
            found[name] = (str(value), plan)
    for name in ("SHORT_PLANE_BYTES", "FEW_ROWS", "NARROW_ROW"):
        found[name] = (str(getattr(triton_plan, name)), plan)
    order = ", ".join(f"`{name}`" for name in backends.NAMES if name != "cpu")
    found["order of `auto` on a GPU"] = (order, "vidfast/backends/__init__.py")
    return found


def test_every_default_is_in_the_table_with_its_value() -> None:
    stated = {rule: (value, where) for rule, (value, where, _) in table().items()}
    assert stated == in_the_code()


def test_every_default_cites_a_stored_run_or_says_predicted() -> None:
    for rule, (_, _, decided) in table().items():
        if decided != "predicted":
            cited = re.findall(r"`(bench/results/gpu-[^`]+\.jsonl?)`", decided)
            assert cited, f"{rule}: {decided!r} names no stored run"
            assert all((ROOT / path).exists() for path in cited), rule


def test_the_order_of_auto_is_that_of_the_newest_run_that_has_both() -> None:
    runs = [run for run in runs_on_gpus() if len(device.backends(run)) > 1]
    if not runs:
        assert table()["order of `auto` on a GPU"][2] == "predicted"
        return
    newest = max(runs, key=lambda run: run.date)
    assert [name for name in backends.NAMES if name != "cpu"] == device.order(newest)
    assert table()["order of `auto` on a GPU"][2] != "predicted"


@pytest.mark.parametrize("name", list(UNMEASURED))
def test_what_is_said_to_be_unmeasured_is(name: str) -> None:
    text = " ".join((ROOT / name).read_text().split())
    for phrase in UNMEASURED[name]:
        assert (phrase in text) == (not runs_on_gpus()), f"{name}: {phrase!r}"


@pytest.mark.parametrize("document", ["README.md", "docs/kernel-notes.md"])
def test_documents_hold_what_the_stored_runs_make(document: str) -> None:
    assert main([*map(str, STORED), "--readme", str(ROOT / document), "--check"]) == 0


def test_the_stages_are_described_with_their_limits() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    described: dict[str, float] = {}
    for names, seconds in re.findall(r"^\| (`[^|]+`) \| ([\d, ]+) \|", text, re.MULTILINE):
        limits = [float(value) for value in seconds.split(",")]
        described |= dict(zip(re.findall(r"`([^`]+)`", names), limits, strict=True))
    assert described == {stage.name: stage.most_seconds for stage in STAGES}
    assert f"({LIMIT_SECONDS:g} s, unless given)" in text
    points = f"{len(DEVICE_POINTS)} points, the most telling first"
    assert points in text


def test_a_stored_run_on_a_gpu_is_named_by_device_and_date() -> None:
    for path in STORED:
        run = load(path)
        assert bool(run.gpu) == path.name.startswith("gpu-"), path.name
        assert run.device != "Stand-in", "a rehearsal is no result"
        assert "rehearsal" not in str(run.machine["vidfast"].get("selection", "")), path.name
        assert run.date, path.name
