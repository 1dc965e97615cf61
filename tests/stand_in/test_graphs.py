"""Calls captured in a graph, on the stand-in of a GPU: run by tests/bench/test_gpu_run.py in a process of its own.

There a captured call does not run, its results are NaN until a replay, and a replay runs on the captured memory: what a
real graph does, and what a contender must not forget.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(
    "VIDFAST_EMULATED_CUDA" not in os.environ, reason="needs the stand-in of a GPU"
)

if "VIDFAST_EMULATED_CUDA" in os.environ:
    from bench.accuracy import Oracle
    from bench.buffers import EPS, FEWEST_SLOTS_OF_A_GRAPH, Pool
    from bench.cases import Case
    from bench.clock import DeviceClock
    from bench.device_kernels import PRIMITIVES, DeviceKernel
    from bench.graphs import GraphContender
    from bench.interleave import SHORTEST_SAMPLE, Budget, interleave
    from bench.machine import last_level_cache
    from bench.masked import masked_suite, small_masked_cases
    from bench.modules import VID_LOSS, ModuleSuite
    from bench.providers import CopyContender, StepContender, baselines, vidfast_providers
    from bench.record import measure, samples_of
    from bench.suites import KernelSuite, StepSuite
    from vidfast import primitives
    from vidfast.report.noise import Samples, times_faster

    CASE = Case("test", (3, 4, 5, 5), device="cuda", gradients=(1.0, 0.37))
    LAST = replace(CASE, layout="channels_last")
    HALF = replace(CASE, dtype=torch.float16)
    TOKENS = Case("test", (3, 7, 6), channel_dim=-1, device="cuda")
    BF16 = replace(CASE, dtype=torch.bfloat16, shape=(2, 3, 33, 33))
else:
    CASE = LAST = HALF = BF16 = TOKENS = None  # type: ignore[assignment]
    PRIMITIVES = {}


def oracle_of(case: Case, pool: Pool) -> Oracle:
    return Oracle(case, pool.pristine, pool.slots[0].target, pool.alpha, EPS)


def worst(errors: Any) -> float:
    return max(errors.loss, errors.grad_mean or 0.0, errors.grad_alpha or 0.0)


@pytest.mark.parametrize("primitive", list(PRIMITIVES))
@pytest.mark.parametrize(
    ("backend", "case"),
    [*(("cuda", case) for case in (CASE, LAST, HALF, BF16, TOKENS)), ("triton", CASE)],
    ids=lambda x: x if x is None or isinstance(x, str) else x.title,
)
def test_every_primitive_is_right_in_a_graph_time_after_time(
    case: Case, backend: str, primitive: str
) -> None:
    pool = Pool(case)
    kernel = DeviceKernel(backend, primitive, case, pool)
    contender = GraphContender(kernel, kernel.name)
    assert contender.calls == len(pool.slots) >= FEWEST_SLOTS_OF_A_GRAPH
    oracle = oracle_of(case, pool)
    bound = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}[case.dtype]
    for _ in range(3):
        loss, gradients = contender.prepare()()  # type: ignore[misc]
        if kernel.provider.compared:
            assert worst(oracle.errors(loss, gradients, kernel.incoming)) < bound
        assert contender.differing() == 0
        contender.finish()
        assert all(torch.equal(slot.mean, pool.pristine) for slot in pool.slots)
    assert kernel.provider.compared or case.dtype is torch.float16


@pytest.mark.parametrize("incoming", [1.0, 0.37])
def test_every_step_is_right_in_a_graph_time_after_time(incoming: float) -> None:
    pool = Pool(CASE)
    oracle = oracle_of(CASE, pool)
    providers = [p for p in vidfast_providers("cuda", False) if p.family == "vidfast"]
    assert {p.name.split()[1] for p in providers} >= {"default", "cuda", "triton"}
    for provider in providers:
        step = StepContender(provider, CASE, pool, provider.build(CASE), incoming)
        contender = GraphContender(step, provider.name)
        for _ in range(2):
            loss, gradients = contender.prepare()()  # type: ignore[misc]
            assert worst(oracle.errors(loss, gradients, incoming)) < 1e-6, provider.name
            assert contender.differing() == 0
            contender.finish()
            assert all(torch.equal(slot.mean, pool.pristine) for slot in pool.slots), provider.name


def test_a_capture_computes_nothing_and_each_slot_has_results_of_its_own() -> None:
    pool = Pool(CASE)
    contender = GraphContender(DeviceKernel("cuda", "forward_grad", CASE, pool), "x")
    losses = [result[0] for result in contender.results]
    assert all(loss.isnan() for loss in losses), "the stand-in's capture is one"
    gradients = {result[1][0].data_ptr() for result in contender.results}
    assert len(gradients) == contender.calls
    contender.prepare()()
    assert all(loss.isfinite() for loss in losses)


def test_the_copy_in_a_graph_is_undone() -> None:
    pool = Pool(CASE)
    contender = GraphContender(CopyContender(CASE, pool), "copy")
    assert torch.equal(pool.slots[0].mean, pool.pristine)
    contender.prepare()()
    assert all(torch.equal(slot.mean, slot.target) for slot in pool.slots)
    contender.finish()
    assert all(torch.equal(slot.mean, pool.pristine) for slot in pool.slots)


def measured(suite: Any, case: Case) -> dict[str, Any]:
    return measure(case, suite, suite.names(case), Budget(0.0, fewest=2, most=2))


def test_rows_of_graphs_have_times_errors_and_rates() -> None:
    suite = StepSuite("loss step", lambda *_: [], False, "cuda")
    rows = measured(suite, CASE)
    graphs = {name: row for name, row in rows.items() if " graph" in name}
    assert len(graphs) == 2 * 7
    for name, row in graphs.items():
        assert row.failure is None, f"{name}: {row.failure}"
        assert row.info["graph"] is True
        assert row.info["peak_extra_bytes"] is None
        assert row.info["error"]["grad_mean"] < 1e-6
        assert row.info["share_of_copy"] > 0
        assert len(row.timings.samples) == 2
        assert row.timings.calls_per_sample == row.info["slots"]
    assert rows["copy"].info["graph"] is True


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_heads_are_captured_whole_and_compared_after_a_replay(autocast: Any) -> None:
    head = Case("VIDLoss", (2, 6, 5, 5), device="cuda", autocast=autocast, extra={"student_channels": 3})
    suite = ModuleSuite("VIDLoss", lambda *_: [], True, "cuda", VID_LOSS, graphs=True)
    rows = measured(suite, head)
    graphs = {name: row for name, row in rows.items() if " graph" in name}
    assert [name.split(" graph")[0] for name in graphs] == list(VID_LOSS)
    assert all(name.endswith(" graph g=1") for name in graphs), "at the first incoming gradient alone"
    assert len(rows) == 3 * len(VID_LOSS)
    for name, row in rows.items():
        assert row.failure is None, f"{name}: {row.failure}"
        assert all(error < (1e-6 if autocast is None else 0.1) for error in row.info["error"].values()), name
    ours = rows["vidfast default graph g=1"]
    compiled, again = (rows[f"torch.compile{suffix} g=1"] for suffix in (" graph", ""))
    for row, count in ((compiled, ours.info["slots"]), (again, 1)):
        assert row.timings.calls_per_sample % count == 0
    seconds = [sample.seconds for sample in compiled.timings.samples]
    ratio = ours.info["times_compile"]
    assert ratio["value"] == pytest.approx(
        times_faster(samples_of(ours), Samples(compiled.timings.rounds, seconds)).value
    ), "a graph is held against the baseline's graph"


def test_steps_with_a_mask_are_captured_with_its_sum() -> None:
    """A replay sums the mask anew: the totals of a capture are NaN."""
    suite = masked_suite(True, "cuda")
    for case in small_masked_cases(suite.name, True, "cuda"):
        rows = measured(suite, case)
        bound = {torch.float32: 1e-6, torch.bfloat16: 8e-3}[case.dtype]
        assert len([name for name in rows if " graph" in name]) == 1 + 2 * 3
        for name, row in rows.items():
            assert row.failure is None, f"{name}: {row.failure}"
            assert all(error < bound for error in (row.info.get("error") or {}).values()), name


def test_a_kernel_that_is_wrong_has_its_error_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    build = DeviceKernel._build

    def wrong(self: Any) -> Callable[[Any], object]:
        call = build(self)

        def doubled(slot: Any) -> object:
            loss, gradients = call(slot)  # type: ignore[misc]
            if gradients is not None:
                primitives.scale(self.backend, torch.tensor(2.0), gradients[0], 1, None, torch.float32, True)
            return loss, gradients

        return doubled

    monkeypatch.setattr(DeviceKernel, "_build", wrong)
    rows = measured(KernelSuite("kernel alone", lambda *_: [], True, "cuda"), CASE)
    assert rows["cuda forward_grad"].info["error"]["grad_mean"] > 0.5


def test_a_slot_whose_results_differ_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Pool.__init__

    def one_slot_off(self: Any, case: Case, *arguments: Any, **options: Any) -> None:
        draw(self, case, *arguments, **options)
        self.slots[0].target.add_(1)

    oracle = Oracle.__init__

    def of_the_last(self: Any, case: Case, mean: Any, target: Any, *rest: Any) -> None:
        oracle(self, case, mean, target - 1, *rest)

    monkeypatch.setattr(Pool, "__init__", one_slot_off)
    monkeypatch.setattr(Oracle, "__init__", of_the_last)
    rows = measured(KernelSuite("kernel alone", lambda *_: [], True, "cuda"), CASE)
    assert "calls on equal inputs gave other results" in str(rows["cuda forward"].failure)


def test_the_lead_is_on_the_device_before_the_first_event() -> None:
    """What keeps the device busy is issued before the clock starts, and only for replays."""
    clock, order = DeviceClock("cuda"), list[str]()
    clock._keep_busy = lambda: order.append("lead")  # type: ignore[method-assign]
    clock.start.record = lambda: order.append("start")  # type: ignore[assignment]
    clock.end.record = lambda: order.append("end")  # type: ignore[assignment]
    clock.time([lambda: order.append("call")] * 2, 5, True)
    assert order == ["lead", "start", "call", "call", "end"]
    order.clear()
    clock.time([lambda: order.append("call")])
    assert order == ["start", "call", "end"]


def test_a_sample_is_the_seconds_of_one_call() -> None:
    """12 ms between the events, over 3 prepared calls of 4 calls each: 1 ms."""
    clock, reads = DeviceClock("cuda"), list[int]()
    clock.start.elapsed_time = lambda other: 12.0  # type: ignore[method-assign]
    clock._lead = SimpleNamespace(amax=lambda: reads.append(1))  # type: ignore[assignment]
    assert clock.time([lambda: None] * 3, 4, True).seconds == pytest.approx(1e-3)
    assert len(reads) == DeviceClock.LEAD_READS
    assert clock.time([lambda: None] * 3).seconds == pytest.approx(4e-3)
    assert len(reads) == DeviceClock.LEAD_READS, "only a replay has a lead"
    real = DeviceClock("cuda")
    assert 0 <= real.time([lambda: None] * 3, 7, True).seconds < 1.0
    assert real._lead is not None
    assert real._lead.nbytes == DeviceClock.LEAD_MULTIPLE * last_level_cache("cuda")


def test_nothing_is_called_for_the_first_time_in_a_capture() -> None:
    """Triton compiles, CUDA loads its module: neither may happen while a stream is captured."""
    pool = Pool(CASE)
    kernel = DeviceKernel("cuda", "forward_grad", CASE, pool)
    seen: list[bool] = []
    call = kernel.call

    def watched(slot: Any) -> object:
        seen.append(torch.cuda.CUDAGraph.capturing is not None)  # type: ignore[attr-defined]
        return call(slot)

    kernel.call = watched
    contender = GraphContender(kernel, "x")
    assert seen == [False] * 2 + [True] * contender.calls


def test_a_sample_is_as_many_replays_as_make_it_a_millisecond_long() -> None:
    """Each has its calls; what they wrote over is put back behind the last."""
    pool = Pool(CASE)
    contender = GraphContender(DeviceKernel("cuda", "forward_grad in place", CASE, pool), "x")
    replays: list[int] = []
    replay = contender.graph.replay
    contender.graph.replay = lambda: (replays.append(1), replay())  # type: ignore[method-assign]
    budget = Budget(0.0, fewest=2, most=2)
    of_a_replay = SHORTEST_SAMPLE / 2.5
    estimate = of_a_replay / contender.calls
    timings = interleave([contender], DeviceClock("cuda"), budget, [estimate], len(pool.slots))["x"]
    assert timings.calls_per_sample == 3 * contender.calls
    assert len(replays) == 2 * 3
    assert all(torch.equal(slot.mean, pool.pristine) for slot in pool.slots)


def test_a_fault_in_a_capture_is_the_one_that_is_raised_and_ends_the_capture() -> None:
    pool = Pool(CASE)
    kernel = DeviceKernel("cuda", "forward", CASE, pool)
    call = kernel.call

    def fails(slot: Any) -> object:
        if torch.cuda.CUDAGraph.capturing is not None:  # type: ignore[attr-defined]
            raise RuntimeError("the real reason")
        return call(slot)

    kernel.call = fails
    with pytest.raises(RuntimeError, match="the real reason"):
        GraphContender(kernel, "x")
    assert torch.cuda.CUDAGraph.capturing is None, "the next capture can begin"  # type: ignore[attr-defined]
    kernel.call = call
    assert GraphContender(kernel, "x").calls == len(pool.slots)


def test_only_the_full_selection_searches_with_max_autotune() -> None:
    names = [[p.name for p in baselines("cuda", full)] for full in (False, True)]
    assert "torch.compile max-autotune" not in names[0]
    assert "torch.compile max-autotune" in names[1]
