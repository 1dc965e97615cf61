"""From measured samples to pytest-benchmark's rows.

pytest-benchmark runs each benchmark to its end, which would give every provider its own stretch of the machine's mood.
So a case is measured once, interleaved, when its first row is asked for, and every row's test then replays its own
samples into `benchmark.pedantic`: the row's timer is a clock that only moves when the replayed target moves it. What
pytest-benchmark stores, compares and prints are therefore the measured samples, one row a provider.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch

from bench import masks, memory, traffic
from bench.accuracy import Errors, Oracle
from bench.buffers import EPS, Pool
from bench.cases import DTYPE_NAMES, Case
from bench.clock import clock_for
from bench.graphs import GraphContender
from bench.interleave import Budget, Contender, Timings, interleave, warm_up
from bench.machine import LoadWindow
from bench.providers import COMPILE, COPY, EAGER, Provider
from vidfast.report.noise import Samples, spread, times_faster
from vidfast.report.results import GRAPH

_replayed_now = 0.0


def recorded_seconds() -> float:
    """The timer of every row: seconds that have been replayed."""
    return _replayed_now


def replay_sample(seconds: Iterator[float]) -> None:
    """Let one recorded sample pass."""
    global _replayed_now
    _replayed_now += next(seconds)


class Measurable(Contender, Protocol):
    """A contender that can also say what it moved."""

    provider: Provider
    incoming: float

    def traffic(self) -> traffic.Traffic | None: ...


@runtime_checkable
class WholeModule(Protocol):
    """A contender that knows its own exact answer, and which part of its time the loss took."""

    def errors(self) -> Errors | None: ...

    def errors_of(self, result: Any) -> Errors | None: ...

    def part_seconds(self, samples: int) -> float | None: ...


@dataclass
class Row:
    """What one contender's row stores beside its samples, and why there is none if it failed."""

    timings: Timings | None = None
    info: dict[str, Any] | None = None
    failure: Exception | None = None


class Opener(Protocol):
    """A suite: it names the contenders of a case without building them, and builds those that were selected."""

    def names(self, case: Case) -> list[str]: ...

    def contenders(
        self, case: Case, pool: Pool, names: list[str]
    ) -> Iterator[tuple[str, Measurable | Exception]]: ...


@contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(case: Case, suite: Opener, names: list[str], budget: Budget) -> dict[str, Row]:
    """Measure the named contenders of a case, interleaved. A contender that raises has its exception in its row."""
    # One graph a case: past eight recompilations of the same code dynamo would quietly fall back to eager.
    if any("compile" in name for name in names):
        torch.compiler.reset()
    budget = replace(
        budget,
        fewest=max(budget.fewest, case.fewest),
        fewest_slow=max(budget.fewest_slow, case.fewest),
    )
    with thread_count(case.threads):
        pool = Pool(case)
        clock = clock_for(case.device)
        rows = {name: Row() for name in names}
        exact = Oracle(case, pool.pristine, pool.slots[0].target, pool.alpha, EPS)
        masked = exact
        if case.mask is not None:
            mask = masks.of_case(case)
            masked = Oracle(case, pool.pristine, pool.slots[0].target, pool.alpha, EPS, mask)
        ready: list[Measurable] = []
        estimates: list[float] = []
        for name, contender in suite.contenders(case, pool, names):
            if isinstance(contender, Exception):
                rows[name].failure = contender
                continue
            try:
                # Eager code has nothing to compile: its second call is like its first.
                eager = contender.replayed or contender.provider.family in {"eager", "torch", "reference"}
                estimate = warm_up(contender, clock, 1 if eager else budget.warm_ups)
                oracle = exact if contender.provider.ignores_mask else masked
                rows[name].info = beside_the_time(case, contender, oracle)
            except Exception as failure:
                rows[name].failure = failure
                continue
            ready.append(contender)
            estimates.append(estimate)
        with LoadWindow() as window:
            timings = interleave(ready, clock, budget, estimates, len(pool.slots))
        for contender in ready:
            row = rows[contender.name]
            row.failure = timings[contender.name].failure
            if row.failure is not None:
                continue
            assert row.info is not None
            row.info |= {"load": window.load.as_dict(), "slots": len(pool.slots), "cold": pool.cold}
            row.info["meant_cold"] = case.cold
            row.info["timer"] = clock.name
            try:
                row.info |= after_the_rounds(case, contender, len(timings[contender.name].samples))
            except Exception as failure:
                row.failure = failure
                continue
            row.timings = timings[contender.name]
        add_rates(case, rows)
    return rows


def beside_the_time(case: Case, contender: Measurable, oracle: Oracle) -> dict[str, Any]:
    """Everything of a row that is not its time: traffic, memory, error."""
    moved = contender.traffic()
    contender.finish()
    call, results = contender.prepare(), list[Any]()
    # A replay allocates nothing: its results have had their memory since the capture.
    peak: int | None = None
    if contender.replayed:
        results.append(call())
    else:
        peak = memory.peak_extra_bytes(lambda: results.append(call()), case.device)
    error: Errors | None = None
    if contender.provider.compared:
        loss, grads = results.pop()
        error = oracle.errors(loss, grads, contender.incoming)
        del loss, grads
        if isinstance(contender, GraphContender) and (differing := contender.differing()):
            raise RuntimeError(f"{differing} of {contender.calls} calls on equal inputs gave other results")
    contender.finish()
    if isinstance(contender, WholeModule):
        error = contender.errors()
    elif isinstance(contender, GraphContender) and isinstance(contender.inner, WholeModule):
        error = contender.inner.errors_of(results.pop())
    info: dict[str, Any] = {
        "suite": case.suite,
        "case": case.title,
        "provider": contender.provider.name,
        "family": contender.provider.family,
        "device": case.device,
        "dtype": DTYPE_NAMES[case.dtype],
        "autocast": None if case.autocast is None else DTYPE_NAMES[case.autocast],
        "layout": case.layout,
        "shape": list(case.shape),
        "channels": case.channels,
        "elements": case.elements,
        "pass_bytes": case.nbytes,
        "incoming_gradient": contender.incoming,
        "graph": contender.replayed,
        "threads": torch.get_num_threads(),
        "bytes": None if moved is None else moved.nbytes,
        "bytes_source": "none" if moved is None else moved.source,
        "peak_extra_bytes": peak,
        **case.extra,
    }
    if error is not None:
        info["error"] = error.as_dict()
    return info


def after_the_rounds(case: Case, contender: Measurable, samples: int) -> dict[str, Any]:
    """What must not come before them: the profiler, once it was started, stays in every launch's way."""
    info: dict[str, Any] = {}
    if isinstance(contender, WholeModule):
        info["pair_seconds"] = contender.part_seconds(samples)
    if case.on_gpu and case.count_launches and not contender.replayed:
        info["launches"] = memory.kernel_launches(contender.prepare())
        contender.finish()
    return info


def add_rates(case: Case, rows: dict[str, Row]) -> None:
    """What needs the other rows: the rate, its share of the copy's, the ratios to eager and to torch.compile."""
    done = {name: row for name, row in rows.items() if row.timings is not None and row.info is not None}
    samples = {name: samples_of(row) for name, row in done.items()}
    copy_rate = None
    if COPY in done:
        copy_rate = rate(done[COPY])
    for name, row in done.items():
        info = row.info
        assert info is not None
        assert row.timings is not None
        gb_per_s = rate(row)
        info["gb_per_s"] = gb_per_s
        info["case_rounds"] = row.timings.case_rounds
        info["calls_per_sample"] = row.timings.calls_per_sample
        if copy_rate is not None and gb_per_s:
            info["copy_gb_per_s"] = copy_rate
            info["share_of_copy"] = gb_per_s / copy_rate
        if not case.on_gpu:
            # The host computes: all of the time is its own, and nothing is launched.
            info["launches"] = 0
        info["host_seconds"] = statistics.median(sample.host_seconds for sample in row.timings.samples)
        for key, baseline in (("times_eager", EAGER), ("times_compile", COMPILE)):
            # The same incoming gradient: a step with g = 1 is held against an eager step with g = 1.
            against = find_baseline(done, baseline, info)
            if against is not None and against != name and info["family"] != "copy":
                ratio = times_faster(samples[name], samples[against])
                info[key] = {
                    "value": ratio.value,
                    "low": ratio.interval.low,
                    "high": ratio.interval.high,
                    "tie": ratio.tie,
                    "paired": ratio.paired,
                }


def find_baseline(done: dict[str, Row], baseline: str, info: dict[str, Any]) -> str | None:
    """The baseline's row at the same incoming gradient; of a graph its graph, where it was captured too."""
    for wanted in (baseline + GRAPH, baseline) if info["graph"] else (baseline,):
        for name, row in done.items():
            assert row.info is not None
            same = row.info["incoming_gradient"] == info["incoming_gradient"]
            if same and row.info["provider"] == wanted:
                return name
    return None


def samples_of(row: Row) -> Samples:
    assert row.timings is not None
    return Samples(row.timings.rounds, [sample.seconds for sample in row.timings.samples])


def rate(row: Row) -> float | None:
    """Decimal gigabytes a second at the median; None where no bytes are known."""
    assert row.info is not None
    nbytes: int | None = row.info["bytes"]
    if nbytes is None:
        return None
    return nbytes / spread(samples_of(row).seconds).middle / 1e9


def file_row(row: Row, benchmark: Any, case: Case) -> None:
    """Hand a row to pytest-benchmark: its samples through a replay, the rest as extra_info."""
    if row.failure is not None:
        raise row.failure
    assert row.timings is not None
    assert row.info is not None
    seconds = [sample.seconds for sample in row.timings.samples]
    benchmark.group = case.key
    benchmark.extra_info.update(row.info)
    benchmark.pedantic(replay_sample, args=(iter(seconds),), rounds=len(seconds))
