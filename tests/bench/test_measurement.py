"""The measuring itself: bytes, errors, rounds, memory and load, on calls whose answers are known."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import buffers, machine, traffic
from bench.accuracy import Oracle
from bench.buffers import EPS, Pool
from bench.cases import Case, kernel_cases, loss_cases
from bench.clock import ProcessorClock
from bench.interleave import Budget, interleave
from bench.kernels import INTO_BUFFER, PASSES_OF, KernelContender, extents
from bench.memory import peak_extra_bytes
from bench.providers import (
    CopyContender,
    StepContender,
    baselines,
    vidfast_providers,
)
from vidfast import gaussian_nll

SMALL = Case("test", (6, 5, 4, 3), cold=False)
LAYOUTS = [
    SMALL,
    Case("test", (6, 5, 4, 3), layout="channels_last", cold=False),
    Case("test", (6, 4, 5), channel_dim=-1),
]


class Recorder:
    """A contender that takes no time and writes down when it ran."""

    calls, replayed = 1, False

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def prepare(self) -> Callable[[], object]:
        return lambda: self.log.append(self.name)

    def finish(self) -> None:
        """Nothing was written."""


def test_rounds_are_interleaved_and_each_starts_with_another_contender() -> None:
    log: list[str] = []
    contenders = [Recorder(name, log) for name in "abc"]
    timings = interleave(contenders, ProcessorClock(), Budget(1.0, fewest=3, most=3), [1.0, 1.0, 1.0], 1)
    assert "".join(log) == "abc" + "bca" + "cab"
    assert all(timing.rounds == [0, 1, 2] for timing in timings.values())


def test_a_slow_contender_sits_out_rounds_evenly() -> None:
    log: list[str] = []
    contenders = [Recorder("slow", log), Recorder("fast", log)]
    budget = Budget(2.0, fewest=5, most=20)
    timings = interleave(contenders, ProcessorClock(), budget, [10.0, 0.01], 1)
    assert len(timings["fast"].samples) == 20
    assert timings["slow"].rounds == [6, 13, 19], "three of a call of seconds, five of a quicker one"
    quicker = interleave(contenders, ProcessorClock(), Budget(0.02, fewest=5, most=20), [0.09, 1e-3], 1)
    assert quicker["slow"].rounds == [1, 3, 5, 7, 9]


class Fails(Recorder):
    def prepare(self) -> Callable[[], object]:
        if len(self.log) >= 2:
            raise RuntimeError("no more")
        return super().prepare()


def test_a_contender_that_raises_costs_only_itself() -> None:
    log, others = list[str](), list[str]()
    contenders = [Fails("a", log), Recorder("b", others)]
    timings = interleave(contenders, ProcessorClock(), Budget(0.0, fewest=4, most=4), [0.01, 0.01], 1)
    assert str(timings["a"].failure) == "no more"
    assert len(timings["a"].samples) == len(timings["a"].rounds) == 2
    assert timings["b"].failure is None
    assert len(timings["b"].samples) == 4


def test_a_sample_never_has_more_calls_than_buffers() -> None:
    timings = interleave([Recorder("a", [])], ProcessorClock(), Budget(0.1, most=1, fewest=1), [1e-6], 3)
    assert timings["a"].calls_per_sample == 3


def test_counted_bytes_are_operands_and_results_without_views() -> None:
    x, y = torch.ones(10, 4), torch.ones(10, 1)
    assert traffic.of_operators(lambda: x.view(40)).nbytes == 0
    assert traffic.of_operators(lambda: torch.empty(100)).nbytes == 0
    assert traffic.of_operators(lambda: x + x).nbytes == 3 * x.nbytes
    assert traffic.of_operators(lambda: x + y.expand(10, 4)).nbytes == 2 * x.nbytes + y.nbytes


@pytest.mark.parametrize(
    ("strategy", "unit", "passes"),
    [
        ("two_pass", True, 5),
        ("two_pass", False, 5),
        ("one_pass", True, 3),
        ("one_pass", False, 5),
        ("copy", True, 2),
    ],
)
def test_bytes_of_a_strategy(strategy: str, unit: bool, passes: int) -> None:
    assert traffic.of_strategy(strategy, unit, 1000) == traffic.Traffic(passes * 1000, "algorithm")


def test_peak_memory_is_the_most_held_at_once_and_not_the_sum() -> None:
    kilobyte = torch.ones(256)

    def call() -> torch.Tensor:
        first = kilobyte + 1
        del first
        second = kilobyte + 1
        return second + 1

    # a few bytes more: the constant 1 becomes a tensor
    assert 2 * 1024 <= peak_extra_bytes(call, "cpu") < 2 * 1024 + 64
    assert peak_extra_bytes(lambda: kilobyte.add_(1), "cpu") < 64


def test_memory_that_vidfast_keeps_is_counted() -> None:
    mean, target, alpha = (
        torch.randn(64, 64, 64, 65).requires_grad_(),
        torch.randn(64, 64, 64, 65),
        torch.zeros(64),
    )

    def step() -> object:
        return torch.autograd.grad(gaussian_nll(mean, target, alpha), mean)

    assert step() is not None
    assert mean.nbytes <= peak_extra_bytes(step, "cpu") < 1.1 * mean.nbytes


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.title)
def test_the_oracle_is_the_reference_in_fp64(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.accuracy.CHUNK_ELEMENTS", 50)
    pool = Pool(case)
    slot = pool.slots[0]
    mean = slot.mean.double().requires_grad_()
    alpha = pool.alpha.detach().double().requires_grad_()
    loss = gaussian_nll(
        mean, slot.target.double(), alpha, channel_dim=case.channel_dim, eps=EPS, backend="reference"
    )
    grads = torch.autograd.grad(loss, (mean, alpha), torch.full_like(loss, 0.37))
    oracle = Oracle(case, slot.mean, slot.target, pool.alpha, EPS)
    errors = oracle.errors(loss, grads, 0.37)
    assert max(errors.loss, errors.grad_mean or 0, errors.grad_alpha or 0) < 1e-14
    wrong = oracle.errors(loss * 1.01, (grads[0] * 1.01, grads[1] * 1.01), 0.37)
    assert min(wrong.loss, wrong.grad_mean or 0, wrong.grad_alpha or 0) > 1e-4
    spoiled = grads[0].clone()
    spoiled.view(-1)[3] = torch.nan
    nan = oracle.errors(loss, (spoiled, grads[1]), 0.37).grad_mean
    assert nan is not None
    assert math.isnan(nan), "NaN is an error, whatever it is compared with"


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.title)
@pytest.mark.parametrize("incoming", [1.0, 0.37])
def test_every_provider_computes_the_loss_and_leaves_the_buffers_as_they_were(
    case: Case, incoming: float
) -> None:
    """torch.compile, whose formula is eager's, is left to the benchmark: compiling takes seconds a case."""
    pool = Pool(case)
    oracle = Oracle(case, pool.pristine, pool.slots[0].target, pool.alpha, EPS)
    providers = [
        p for p in [*baselines("cpu", full=True), *vidfast_providers("cpu", True)] if p.family != "compile"
    ]
    assert {"eager", "torch", "vidfast", "reference"} <= {provider.family for provider in providers}
    for provider in providers:
        contender = StepContender(provider, case, pool, provider.build(case), incoming)
        result = contender.prepare()()
        assert isinstance(result, tuple)
        errors = oracle.errors(result[0], result[1], incoming)
        assert max(errors.loss, errors.grad_mean or 0, errors.grad_alpha or 0) < 1e-6, provider.name
        contender.finish()
        assert all(torch.equal(slot.mean, pool.pristine) for slot in pool.slots), provider.name
        assert contender.traffic().nbytes >= 3 * case.nbytes
        contender.finish()


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.title)
@pytest.mark.parametrize("name", list(PASSES_OF))
def test_the_kernels_alone_compute_the_loss(case: Case, name: str) -> None:
    pool = Pool(case)
    oracle = Oracle(case, pool.pristine, pool.slots[0].target, pool.alpha, EPS)
    contender = KernelContender(name, case, pool)
    result = contender.prepare()()
    assert isinstance(result, tuple)
    errors = oracle.errors(result[0], result[1])
    assert max(errors.loss, errors.grad_mean or 0, errors.grad_alpha or 0) < 1e-6
    contender.finish()
    assert all(torch.equal(slot.mean, pool.pristine) for slot in pool.slots)
    if name == INTO_BUFFER:
        assert result[1][0].data_ptr() not in {slot.mean.data_ptr() for slot in pool.slots}


def test_the_copy_is_undone() -> None:
    pool = Pool(SMALL)
    contender = CopyContender(SMALL, pool)
    contender.prepare()()
    assert not torch.equal(pool.slots[0].mean, pool.pristine)
    contender.finish()
    assert torch.equal(pool.slots[0].mean, pool.pristine)


def test_extents_of_every_layout() -> None:
    assert [extents(case) for case in LAYOUTS] == [(6, 5, 12), (72, 5, 1), (24, 5, 1)]


LARGE = Case("test", (16, 64, 16, 16))  # a slot is 2 MiB


def test_a_cold_pool_exceeds_the_cache_and_a_hot_one_says_that_it_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(buffers, "last_level_cache", lambda device: 8 << 20)
    pool = Pool(LARGE)
    assert pool.cold
    assert len(pool.slots) == 16
    assert not Pool(SMALL).cold


@pytest.mark.parametrize("cache", [480 << 20, 1 << 30], ids=["480 MiB", "1 GiB"])
def test_a_cache_that_the_slots_cannot_exceed_makes_no_cold_pool(
    cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "last_level_cache", lambda device: cache)
    monkeypatch.setattr(buffers, "MOST_SLOTS", 8)
    pool = Pool(LARGE)
    assert len(pool.slots) == 8
    assert not pool.cold


@pytest.mark.parametrize(
    ("free", "slots", "cold"), [(1 << 20, 1, False), (40 << 20, 5, False), (1 << 40, 16, True)]
)
def test_the_slots_leave_most_of_the_free_memory_alone(
    free: int, slots: int, cold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "last_level_cache", lambda device: 8 << 20)
    monkeypatch.setattr(buffers, "free_memory", lambda: free)
    pool = Pool(LARGE)
    assert (len(pool.slots), pool.cold) == (slots, cold)


@pytest.mark.parametrize(
    ("limit", "free"),
    [("max", 1000), ("600", 530), ("50", 0), (None, 1000)],
    ids=["none", "tight", "over", "no group"],
)
def test_free_memory_is_what_the_control_group_leaves(
    limit: str | None, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("100\n")
        (tmp_path / "memory.stat").write_text("anon 70\ninactive_file 30\n")
    assert machine.free_memory() == free


def test_every_case_of_a_suite_has_a_name_of_its_own() -> None:
    for cases in (loss_cases("a", True, "cpu"), kernel_cases("b", True, "cpu")):
        assert len({case.key for case in cases}) == len(cases)


def test_load_counts_others_and_not_ourselves(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(100.0, 5.0), (103.0, 5.0)])
    own = iter([10.0, 11.0])
    monkeypatch.setattr(machine, "machine_seconds", lambda: next(readings))
    monkeypatch.setattr(machine, "own_seconds", lambda: next(own))
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with machine.LoadWindow() as window:
        pass
    assert window.load.neighbour_cores == 1.0
    assert window.load.contended


@pytest.mark.parametrize(
    ("others", "stolen", "contended"), [(0.05, 0.0, False), (0.5, 0.0, True), (0.0, 0.5, True)]
)
def test_what_counts_as_contended(
    others: float, stolen: float, contended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([(0.0, 0.0), (2.0 + others, stolen)])
    own, clock = iter([0.0, 2.0]), iter([0.0, 2.0])
    monkeypatch.setattr(machine, "machine_seconds", lambda: next(readings))
    monkeypatch.setattr(machine, "own_seconds", lambda: next(own))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with machine.LoadWindow() as window:
        pass
    assert window.load.contended is contended
