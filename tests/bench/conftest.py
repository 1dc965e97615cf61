"""Stored runs to test the report with: real files of pytest-benchmark's form, made from chosen samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stored_runs import Row


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., Path]:
    """store(name, rows) writes a run and returns its path."""

    def write(name: str, rows: list[Row], gpu: dict[str, Any] | None = None) -> Path:
        own: dict[str, Any] = {"torch": "2.6.0", "torch_threads": 2, "logical_cores": 2, "selection": "short"}
        if gpu:
            own["gpu"] = gpu
        machine = {"cpu": {"brand_raw": "Processor X"}, "python_version": "3.11", "vidfast": own}
        commit = {"id": "0123456789abcdef", "dirty": False}
        path = tmp_path / f"{name}.json"
        date = "2024-05-06T07:08:09"
        path.write_text(
            json.dumps({"machine_info": machine, "commit_info": commit, "datetime": date, "benchmarks": rows})
        )
        return path

    return write
