"""Stored benchmark runs: pytest-benchmark's JSON, read into rows."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vidfast.report.noise import Interval, Ratio, Samples, spread, times_faster

EAGER, COMPILE, COPY, TORCH_LOSS = "eager", "torch.compile", "copy", "torch.nn.GaussianNLLLoss"
STEP, FORWARD, KERNEL, OVERHEAD, SCALING = "loss step", "forward", "kernel alone", "overhead", "scaling"
HEAD, TRAINING, MASKS, VARIANCES = "VIDLoss", "training step", "masks", "variances"
DEFAULT, COMPILED_DEFAULT, IN_PLACE = "vidfast default", "vidfast compiled", "vidfast in place"
# Among masks: the selected rows copied out, and what ends the name of a row of ours that has no mask.
INDEXING, WITHOUT_MASK = "indexing", " without a mask"
# Ends the name of a row that was captured in a CUDA graph.
GRAPH = " graph"
# A forward and its gradient cannot move less than two reads and one write.
FLOOR_PASSES = 3
LINE = "an object with a 'kind' (bench/lines.py)"
# The head of a run that was cut off before its stage `machine`.
UNDESCRIBED = {
    "machine_info": {
        "vidfast": {"gpu": {"name": "a GPU that was not described", "memory_bytes": 0, "capability": "?"}}
    }
}
REQUIRED = (
    "suite",
    "case",
    "provider",
    "family",
    "shape",
    "elements",
    "pass_bytes",
    "bytes",
    "gb_per_s",
    "load",
)


@dataclass(frozen=True)
class Row:
    """One provider in one case. `facts` is the stored extra_info, `samples` the seconds by round."""

    key: str
    facts: dict[str, Any]
    samples: Samples

    @cached_property
    def seconds(self) -> Interval:
        return spread(self.samples.seconds)

    @property
    def suite(self) -> str:
        return str(self.facts["suite"])

    @property
    def case(self) -> str:
        return str(self.facts["case"])

    @property
    def provider(self) -> str:
        return str(self.facts["provider"])

    @property
    def family(self) -> str:
        return str(self.facts["family"])

    @property
    def incoming(self) -> float:
        return float(self.facts["incoming_gradient"])

    @property
    def elements(self) -> int:
        return int(self.facts["elements"])

    @property
    def pass_bytes(self) -> int:
        return int(self.facts["pass_bytes"])

    @property
    def gb_per_s(self) -> float | None:
        """Decimal gigabytes a second; None for a whole module, whose bytes nobody counts."""
        rate = self.facts["gb_per_s"]
        return None if rate is None else float(rate)

    @property
    def share_of_copy(self) -> float | None:
        share = self.facts.get("share_of_copy")
        return None if share is None else float(share)

    @property
    def peak_passes(self) -> float | None:
        """Peak extra memory as a multiple of one tensor of the case; None for a graph, which allocates nothing."""
        peak = self.facts["peak_extra_bytes"]
        return None if peak is None else float(peak) / self.pass_bytes

    @property
    def autocast(self) -> str | None:
        """The dtype of the autocast that the row ran under, if any; runs of before autocast was measured have none."""
        name = self.facts.get("autocast")
        return None if name is None else str(name)

    @property
    def graph(self) -> bool:
        """Whether a CUDA graph was replayed: the device's time alone."""
        return bool(self.facts.get("graph", False))

    @property
    def useful_gb_per_s(self) -> float:
        """The rate at which the bytes that nobody can avoid went by: wasted traffic does not count as speed."""
        return FLOOR_PASSES * self.pass_bytes / self.seconds.middle / 1e9

    @property
    def contended(self) -> bool:
        return bool(self.facts["load"]["contended"])

    @property
    def cold(self) -> bool:
        return bool(self.facts.get("cold", False))

    @property
    def warm(self) -> bool:
        """Whether inputs that were meant to be in memory may have been in the cache, which is too large."""
        return bool(self.facts.get("meant_cold", False)) and not self.cold


@dataclass(frozen=True)
class Run:
    """One stored file."""

    name: str
    date: str
    commit: dict[str, Any]
    machine: dict[str, Any]
    rows: list[Row] = field(repr=False)
    # Of a run on a GPU (`bench/gpu.sh`): its stages in order, its checks, rows that failed and cases left out.
    stages: list[dict[str, Any]] = field(default_factory=list, repr=False)
    checks: list[dict[str, Any]] = field(default_factory=list, repr=False)
    failures: list[dict[str, Any]] = field(default_factory=list, repr=False)
    left_out: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def gpu(self) -> dict[str, Any] | None:
        """Name, memory and software of the GPU that was measured, if it was one."""
        found: dict[str, Any] | None = self.machine.get("vidfast", {}).get("gpu")
        return found

    @property
    def device(self) -> str:
        """What the figures were measured on, by name."""
        if self.gpu:
            return str(self.gpu["name"])
        cpu = self.machine.get("cpu", {})
        threads = self.machine.get("vidfast", {}).get("torch_threads")
        return f"{cpu.get('brand_raw', 'CPU')}, {threads} threads"

    def of(self, suite: str) -> list[Row]:
        return [row for row in self.rows if row.suite == suite]

    def cases(self, suite: str) -> list[str]:
        """The suite's cases in the order in which they were measured."""
        return list(dict.fromkeys(row.case for row in self.of(suite)))

    def find(self, suite: str, case: str, provider: str, incoming: float | None = None) -> Row | None:
        for row in self.rows:
            if (row.suite, row.case, row.provider) == (suite, case, provider) and incoming in (
                None,
                row.incoming,
            ):
                return row
        return None

    def ratio(self, row: Row, baseline: str) -> Ratio | None:
        """How many times faster `row` is than the baseline of its case, at the same incoming gradient."""
        other = self.find(row.suite, row.case, baseline, row.incoming)
        return None if other is None or other is row else times_faster(row.samples, other.samples)

    def share_of_memory(self, row: Row, baseline: str = EAGER) -> float | None:
        """The row's peak extra memory over the baseline's of its case; None where either is unknown."""
        other = self.find(row.suite, row.case, baseline, row.incoming)
        ours = row.facts["peak_extra_bytes"]
        theirs = None if other is None or other is row else other.facts["peak_extra_bytes"]
        return float(ours) / float(theirs) if ours is not None and theirs else None


def load(path: Path) -> Run:
    """Read a file that `python -m pytest bench` (.json) or `bench/gpu.sh` (.jsonl) stored.

    Raises FileNotFoundError, or ValueError if the file is no such result.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(
            f"{path}: wanted a stored run (.json, .jsonl), got something that is no text"
        ) from None
    if path.suffix == ".jsonl":
        return load_lines(path, text)
    try:
        stored = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: wanted a pytest-benchmark JSON file, got something that is no JSON: {error}"
        ) from None
    if not isinstance(stored, dict) or "benchmarks" not in stored or "machine_info" not in stored:
        raise ValueError(f"{path}: wanted a pytest-benchmark JSON file (keys 'benchmarks', 'machine_info')")
    rows = [read_row(path, row) for row in stored["benchmarks"]]
    if not rows:
        raise ValueError(f"{path}: holds no benchmark")
    return run_of(path, stored, rows)


def load_lines(path: Path, text: str) -> Run:
    """Read lines of JSON (bench/lines.py). Lines that were cut off while they were written are left away."""
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            fields = json.loads(line)
            lines[fields.pop("kind")].append(fields)
        except json.JSONDecodeError:
            if line.startswith('{"kind": '):
                continue
            raise ValueError(f"{path}: line {number} must be {LINE}, got {line.strip()[:60]!r}") from None
        except (KeyError, AttributeError, TypeError):
            raise ValueError(f"{path}: line {number} must be {LINE}, got {line.strip()[:60]!r}") from None
    if not lines:
        raise ValueError(f"{path}: must have lines of JSON (bench/lines.py), got none")
    if len(lines["machine"]) > 1:
        raise ValueError(f"{path}: must be one run, got {len(lines['machine'])} lines of kind 'machine'")
    head = (lines["machine"] or [UNDESCRIBED])[0]
    rows = [read_row(path, row) for row in lines["row"]]
    run = run_of(path, head, rows)
    return replace(
        run,
        stages=lines["stage"],
        checks=lines["check"],
        failures=lines["failure"],
        left_out=lines["left_out"],
    )


def run_of(path: Path, head: dict[str, Any], rows: list[Row]) -> Run:
    return Run(
        path.stem,
        str(head.get("datetime", "")),
        head.get("commit_info", {}),
        head["machine_info"],
        rows,
    )


def read_row(path: Path, stored: dict[str, Any]) -> Row:
    facts = stored.get("extra_info", {})
    missing = [name for name in REQUIRED if name not in facts]
    if missing:
        raise ValueError(
            f"{path}: {name_of(stored)} was not stored by vidfast's bench: no {', '.join(missing)}"
        )
    data = stored.get("stats", {}).get("data")
    if not data:
        raise ValueError(f"{path}: {name_of(stored)} has no samples; store with --benchmark-json")
    key = f"{facts['suite']}: {facts['case']} | {facts['provider']} g={facts['incoming_gradient']:g}"
    return Row(key, facts, Samples.spread(data, int(facts.get("case_rounds", len(data)))))


def name_of(stored: dict[str, Any]) -> str:
    return str(stored.get("fullname") or stored.get("name") or "a row")


def contended_share(rows: Iterable[Row]) -> tuple[int, int]:
    """How many cases were measured beside others, and how many there are."""
    cases = {(row.suite, row.case): row.contended for row in rows}
    return sum(cases.values()), len(cases)
