"""Whole modules on the clock: what rows compute, in which precision, with which code, and what is stored of it."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import vidfast
from bench import machine, module_cases
from bench.buffers import Pool
from bench.cases import SCALER_FACTOR, Case
from bench.interleave import Budget
from bench.memory import peak_extra_bytes
from bench.module_cases import (
    COMPILED_STEPS,
    DEVICE_HEADS,
    PAIRS,
    head_cases,
    training_cases,
    under_autocast,
    vid_loss_cases,
)
from bench.modules import VID_LOSS, ModuleSuite
from bench.providers import COMPILE, DEFAULT, EAGER
from bench.record import measure
from bench.training import TRAINING_STEP, TermWatch, distillation_of, watched
from vidfast.distill import VID
from vidfast.report.results import COMPILED_DEFAULT

PAIR = Case("test", (2, 6, 5, 4), cold=False, note="from 3", extra={"student_channels": 3})
STEP = replace(
    module_cases.small_training_cases("training step", True, "cpu")[0],
    skip=frozenset(),
    gradients=(1.0, 0.37),
)
HALVES = [(None, 1e-6), (torch.bfloat16, 0.1), (torch.float16, 0.02)]


@pytest.fixture
def native_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with every instruction."""
    monkeypatch.setattr(module_cases, "multiplies_in", lambda dtype, device: True)


@pytest.fixture
def no_native_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_cases, "multiplies_in", lambda dtype, device: False)


# ---- VIDLoss


@pytest.mark.parametrize("name", [EAGER, DEFAULT])
@pytest.mark.parametrize("incoming", [1.0, 0.37])
@pytest.mark.parametrize(("autocast", "bound"), HALVES, ids=["fp32", "bf16", "fp16"])
def test_vid_loss_rows_know_their_error(name: str, incoming: float, autocast: Any, bound: float) -> None:
    case = replace(PAIR, autocast=autocast)
    factor = incoming * (SCALER_FACTOR if autocast is torch.float16 else 1.0)
    contender = VID_LOSS[name](case, Pool(case))(factor)
    errors = contender.errors()
    assert errors is not None
    assert max(errors.loss, errors.grad_mean or 0, errors.grad_alpha or 0) < bound
    assert ((errors.grad_mean or 0) > 1e-5) == (autocast is not None), "the forward runs in that precision"
    contender.incoming = 2 * factor
    step = contender.step
    contender.step = lambda: 2 * step()
    wrong = contender.errors()
    assert wrong is not None
    assert min(wrong.loss, wrong.grad_mean or 0, wrong.grad_alpha or 0) > 0.5, "the comparison can fail"


@pytest.mark.parametrize("name", [COMPILE, COMPILED_DEFAULT])
def test_compiled_rows_compile_in_their_first_call_under_the_autocast(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And backward, the compiled one too, runs outside of it."""
    seen: list[tuple[str, bool]] = []

    def compiled(module: torch.nn.Module, **options: Any) -> Any:
        assert options == {"dynamic": False, "fullgraph": True}
        seen.append(("compile", torch.is_autocast_enabled("cpu")))

        def call(student: torch.Tensor, teacher: torch.Tensor) -> Any:
            student.register_hook(lambda g: seen.append(("backward", torch.is_autocast_enabled("cpu"))))
            seen.append(("forward", torch.is_autocast_enabled("cpu")))
            return module(student, teacher)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    case = replace(PAIR, autocast=torch.bfloat16)
    VID_LOSS[name](case, Pool(case))(1.0).prepare()()
    assert seen == [("compile", False), ("forward", True), ("backward", False)]


def test_the_gradient_of_an_earlier_step_is_not_taken_off_the_peak() -> None:
    """It is released before the clock of the memory starts: else every peak would lack one feature of the student's."""
    contender = VID_LOSS[EAGER](PAIR, Pool(PAIR))(1.0)
    first = peak_extra_bytes(contender.prepare(), "cpu")
    again = peak_extra_bytes(contender.prepare(), "cpu")
    assert first == again
    hidden, mean = (2 * 5 * 4 * width * 4 for width in (2 * 6, 6))
    assert first >= 2 * hidden + mean, "what the public formula keeps for backward"


def test_every_row_of_a_pair_has_its_precision_and_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    case = replace(PAIR, autocast=torch.bfloat16)
    suite = ModuleSuite("VIDLoss", lambda *_: [], True, "cpu", VID_LOSS, graphs=True)
    rows = measure(case, suite, suite.names(case), Budget(0.0, fewest=2, most=2))
    assert list(rows) == [f"{name} g={g}" for name in VID_LOSS for g in ("1", "0.37")], "no graphs on a CPU"
    for name, row in rows.items():
        assert row.failure is None, f"{name}: {row.failure}"
        assert row.info is not None
        assert row.info["case"] == "2x6x5x4 float32 from 3 autocast bfloat16"
        assert (row.info["dtype"], row.info["autocast"]) == ("float32", "bfloat16")
        assert row.info["peak_extra_bytes"] > 0
        assert row.info["error"]["grad_mean"] < 0.1


def test_every_pair_is_measured_in_both_precisions(native_halves: None) -> None:
    cases = vid_loss_cases("VIDLoss", True, "cpu")
    assert len({case.key for case in cases}) == len(cases)
    for autocast in (None, torch.bfloat16):
        assert [case.shape for case in cases if case.autocast is autocast] == [shape for shape, _ in PAIRS]
    scaled = [case for case in cases if case.autocast is torch.float16]
    assert [case.gradients for case in scaled] == [(SCALER_FACTOR,)]
    assert {case.dtype for case in cases} == {torch.float32}, "features stay in fp32"
    assert [case.autocast for case in vid_loss_cases("VIDLoss", False, "cpu")] == [None, torch.bfloat16]


def test_without_instructions_for_it_autocast_is_measured_in_few_samples(no_native_halves: None) -> None:
    cases = vid_loss_cases("VIDLoss", True, "cpu")
    assert torch.float16 not in {case.autocast for case in cases}
    for case in cases:
        assert (case.fewest, len(case.gradients)) == ((7, 2) if case.autocast is None else (0, 1))
    assert under_autocast(PAIR, torch.float16).gradients == (SCALER_FACTOR,)


@pytest.mark.parametrize(
    ("line", "multiplies"),
    [
        ("flags\t\t: fpu avx2 f16c", (False, False)),
        ("flags\t\t: avx2 avx512f avx512_bf16", (True, False)),
        ("flags\t\t: amx_bf16 amx_tile avx512_fp16", (True, True)),
        ("Features\t: asimd asimdhp bf16", (True, True)),
        ("model name\t: avx512_bf16", (False, False)),
    ],
)
def test_what_a_processor_multiplies_in(
    line: str, multiplies: tuple[bool, bool], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n")
    monkeypatch.setattr(machine, "PROCESSOR_FACTS", path)
    machine.instructions.cache_clear()
    found = tuple(machine.multiplies_in(dtype, "cpu") for dtype in (torch.bfloat16, torch.float16))
    machine.instructions.cache_clear()
    assert found == multiplies
    assert machine.multiplies_in(torch.float16, "cuda")


# ---- a GPU's heads


def test_the_heads_of_a_gpu_come_in_the_order_of_their_value() -> None:
    cases = head_cases("cuda")
    assert len({case.key for case in cases}) == len(cases) == len(DEVICE_HEADS)
    precisions = {
        shape: {case.autocast for case in cases if case.shape == shape}
        for shape in {case.shape for case in cases}
    }
    assert all(found == {None, torch.bfloat16} for found in precisions.values())
    assert {shape for shape, _ in PAIRS} | {(64, 256, 56, 56), (32 * 197, 768)} == set(precisions)
    assert cases[0].autocast is torch.bfloat16, "how people train comes first"
    assert {case.gradients for case in cases} == {(1.0,)}
    names = ModuleSuite("VIDLoss", lambda *_: [], True, "cuda", VID_LOSS, graphs=True).names(cases[0])
    assert names == [f"{name}{suffix} g=1" for suffix in ("", " graph") for name in VID_LOSS]


ROWS = Case("test", (7, 6), channel_dim=-1, cold=False, note="from 3", extra={"student_channels": 3})


def test_a_head_of_linear_layers_is_vid_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    right = vidfast.vid_head

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        called.append(options["channel_dim"])
        return right(*args, **options)

    monkeypatch.setattr(vidfast, "vid_head", counted)
    for name in (EAGER, DEFAULT):
        called.clear()
        contender = VID_LOSS[name](ROWS, Pool(ROWS))(1.0)
        errors = contender.errors()
        assert errors is not None
        assert max(errors.loss, errors.grad_mean or 0, errors.grad_alpha or 0) < 1e-6
        assert all(parameter.grad is not None for parameter in contender.module.parameters())
        assert called == ([-1] if name == DEFAULT else [])


# ---- training steps


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(ctx.seconds)
        return grads[0], None


class SleepyRegressor(torch.nn.Conv1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return Sleep.apply(x, 0.025) if x.shape[1] == 3 else x  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("public_code", [False, True])
def test_the_pairs_of_a_step_are_clocked_forward_and_backward(public_code: bool) -> None:
    """One regressor sleeps in both directions, behind one that does not; nothing else of the step is counted."""
    term = VID(pairs={"a": "a", "b": "b"}, regressor=lambda s, t: SleepyRegressor(s[1], t[1], 1))
    term.regressors, term.likelihoods = torch.nn.ModuleList(), torch.nn.ModuleList()
    students = [torch.randn(2, 5, 7, requires_grad=True) for _ in range(2)]
    teachers = [torch.randn(2, n, 7) for n in (3, 4)]
    for student, teacher in zip(students, teachers, strict=True):
        term.build_pair(student.detach(), teacher)
    plain = sum(
        term.pair_loss(index, student.detach(), teacher, 0.5)
        for index, (student, teacher) in enumerate(zip(students, teachers, strict=True))
    )
    watch = TermWatch("cpu")
    term.pair_loss = watched(term, watch)  # type: ignore[method-assign]
    watch.public_code = public_code
    total = sum(
        term.pair_loss(index, Sleep.apply(student, 0.2), teacher, 0.5)  # type: ignore[no-untyped-call]
        for index, (student, teacher) in enumerate(zip(students, teachers, strict=True))
    )
    assert isinstance(total, torch.Tensor)
    torch.testing.assert_close(total.detach(), torch.as_tensor(plain).detach())
    total.backward()  # type: ignore[no-untyped-call]
    assert 0.05 <= watch.seconds < 0.4, "the producers' own sleep, another 0.8 s, is not the pairs'"
    assert all(x.grad is not None for x in students)


@pytest.mark.parametrize("incoming", [1.0, 0.37])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_all_rows_of_a_training_step_are_one_network_and_one_loss(
    incoming: float, autocast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share every weight, so that nothing but the pairs' code can make their times differ."""
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    case = replace(STEP, autocast=autocast)
    rows = {name: built(case, Pool(case))(incoming) for name, built in TRAINING_STEP.items()}
    assert len({id(row.module) for row in rows.values()}) == 1
    losses, gradients = [], []
    for name, row in rows.items():
        row.module.eval()  # running statistics would move between the two
        loss, _ = row.prepare()()  # type: ignore[misc]
        losses.append(loss)
        gradients.append([p.grad.clone() for p in row.module.parameters() if p.grad is not None])
        assert (row.part_seconds(1) is None) == (name in COMPILED_STEPS), (
            "a compiled step has no clock inside"
        )
    for loss in losses[1:]:
        torch.testing.assert_close(losses[0], loss, rtol=1e-5 if autocast is None else 1e-2, atol=0)
    for others in gradients[1:]:
        for eager, ours in zip(gradients[0], others, strict=True):
            error = (eager - ours).norm() / eager.norm()
            assert error < (1e-4 if autocast is None else 0.1)


def test_compiled_steps_are_whole_and_each_has_its_own_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph a row, without a break; ours has vidfast's operator, the public formula's has none."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    rows = [TRAINING_STEP[name](STEP, Pool(STEP))(1.0) for name in (COMPILE, COMPILED_DEFAULT)]
    for row in [*rows, *rows]:
        row.prepare()()
    assert ["vidfast" in graph for graph in graphs] == [False, True], "compiled once each"
    assert all("cross_entropy" in graph for graph in graphs), "with the networks and the task's loss"
    distillation_of.cache_clear()
    torch.compiler.reset()


def test_steps_are_compiled_for_the_first_networks_alone(native_halves: None) -> None:
    full, short = (training_cases("training step", full, "cpu") for full in (True, False))
    assert len({case.key for case in full}) == len(full) == 4
    assert [bool(case.skip) for case in full] == [False, True, False, True]
    assert [case.autocast for case in full] == [None, None, torch.bfloat16, torch.bfloat16]
    assert all(case.skip == COMPILED_STEPS for case in short)
    suite = ModuleSuite("training step", training_cases, True, "cpu", TRAINING_STEP)
    assert {name.split(" g=")[0] for name in suite.names(full[1])} == {EAGER, DEFAULT}


def test_a_step_in_bf16_of_minutes_is_left_out(no_native_halves: None) -> None:
    assert {case.autocast for case in training_cases("training step", True, "cpu")} == {None}
