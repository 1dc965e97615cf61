"""Options, rows and the stored file of `python -m pytest bench`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import vidfast
from bench import machine
from bench.cases import Case
from bench.interleave import Budget
from bench.record import Opener, Row, file_row, measure, recorded_seconds
from vidfast import backends

MEASUREMENTS = pytest.StashKey["Measurements"]()


class Measurements:
    """The rows of every case, measured when the first of them is asked for and let go of after the last."""

    def __init__(self, budget: Budget, refuse: bool) -> None:
        self.budget, self.refuse = budget, refuse
        self.suites: dict[str, Opener] = {}
        self.cases: dict[str, Case] = {}
        self.selected: dict[str, list[str]] = {}
        self.rows: dict[str, dict[str, Row]] = {}

    def register(self, suite: Opener, case: Case) -> None:
        self.suites[case.key], self.cases[case.key] = suite, case

    def row(self, key: str, name: str) -> Row:
        if key not in self.rows:
            self.rows.clear()
            if self.refuse:
                load = machine.idle_load(0.3)
                if load.contended:
                    pytest.exit(
                        f"refusing to measure beside others: {load} (--bench-contended=mark goes on)", 3
                    )
            self.rows[key] = measure(self.cases[key], self.suites[key], self.selected[key], self.budget)
        return self.rows[key][name]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vidfast benchmarks")
    group.addoption(
        "--bench-selection", choices=("short", "full"), default="short", help="how much to measure"
    )
    group.addoption(
        "--bench-device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"
    )
    group.addoption(
        "--bench-contended",
        choices=("mark", "refuse"),
        default="mark",
        help="what to do when others are using the machine: mark the rows, or stop",
    )
    group.addoption(
        "--bench-reference",
        action="store_true",
        help="measure even where no kernel runs on the device: vidfast's rows are then its reference's",
    )
    group.addoption("--bench-seconds", type=float, default=None, help="seconds of samples for each case")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    full = config.getoption("--bench-selection") == "full"
    seconds = config.getoption("--bench-seconds")
    budget = Budget(seconds if seconds is not None else 1.0, fewest=5, most=60 if full else 30)
    if config.getoption("--benchmark-disable"):
        budget = Budget(0.0, fewest=1, most=1, warm_ups=1)
    config.stash[MEASUREMENTS] = Measurements(budget, config.getoption("--bench-contended") == "refuse")
    # pytest-benchmark's own table has a row for every sample statistic; the report is ours, so keep it short.
    if not config.getoption("--benchmark-columns"):
        config.option.benchmark_columns = ["median", "iqr", "rounds"]
    if not config.getoption("--benchmark-json") and not config.getoption("--benchmark-save"):
        config.option.benchmark_autosave = config.getoption("--benchmark-autosave") or "benchmarks"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Rows of the slow reference under the kernels' names would be a figure about nothing."""
    device = device_of(session.config)
    if session.config.getoption("--bench-reference"):
        return
    names = ("cpu",) if torch.device(device).type == "cpu" else ("cuda", "triton")
    reasons = {name: backends.load(name).unavailable() for name in names}
    if all(reasons.values()):
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise pytest.UsageError(
            f"refusing to measure the reference: no kernel runs on {device} ({why}); "
            "--bench-reference measures it"
        )


def device_of(config: pytest.Config) -> str:
    device = str(config.getoption("--bench-device"))
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for every contender of every case of the module's suite; all rows of a case stand together."""
    if "contender" not in metafunc.fixturenames:
        return
    config = metafunc.config
    suite = metafunc.module.suite(config.getoption("--bench-selection") == "full", device_of(config))
    rows, ids = [], []
    for case in suite.list_cases():
        config.stash[MEASUREMENTS].register(suite, case)
        for name in suite.names(case):
            rows.append((case.key, name))
            ids.append(f"{case.title} | {name}")
    metafunc.parametrize(("case", "contender"), rows, ids=ids)


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.benchmark(timer=recorded_seconds))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Only what was selected takes part in the rounds."""
    selected = session.config.stash[MEASUREMENTS].selected
    for item in session.items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "contender" in parameters:
            selected.setdefault(parameters["case"], []).append(parameters["contender"])


@pytest.fixture
def record(request: pytest.FixtureRequest, case: str, contender: str, benchmark: Any) -> Any:
    """`record()` measures the case if that has not happened yet and files this contender's row."""
    measurements = request.config.stash[MEASUREMENTS]
    return lambda: file_row(measurements.row(case, contender), benchmark, measurements.cases[case])


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)
    machine_info["cpu"] = machine.processor(machine_info.get("cpu", {}))
    machine_info["vidfast"] = machine.describe(device_of(config))
    machine_info["vidfast"]["vidfast"] = vidfast.info()
    machine_info["vidfast"]["selection"] = config.getoption("--bench-selection")
    machine_info["vidfast"]["budget"] = dataclasses.asdict(config.stash[MEASUREMENTS].budget)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Samples to the nanosecond: their seventeen digits are half of the file."""
    for row in output_json["benchmarks"]:
        statistics = row["stats"]
        statistics["data"] = [round(seconds, 9) for seconds in statistics["data"]]
