"""The stages themselves: what they name exists, and what goes wrong in them does not pass for good."""

from __future__ import annotations

import ast
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import buffers, cases
from bench.buffers import Pool
from bench.cases import DEVICE_POINTS, Case, device_cases
from bench.clock import Sample
from bench.gpu import launches, measuring, smoke, stages, tuning, workers
from bench.gpu.runner import NOT_HERE, Job
from bench.interleave import Timings
from bench.lines import Lines
from bench.modules import VID_LOSS
from bench.record import Row

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    work = tmp_path / "work"
    work.mkdir()
    return Job(tmp_path, work, Lines(tmp_path / "results.jsonl"), 60.0, float("inf"), small=False)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[str, ...], dict[str, str]]]:
    """The commands that stages run, instead of running them; each ends with 7."""
    seen: list[tuple[tuple[str, ...], dict[str, str]]] = []

    def run(*words: str, **environment: str) -> int:
        seen.append((words, environment))
        return 7

    monkeypatch.setattr(stages, "command", run)
    return seen


# ---- what is named exists


def test_every_stage_has_a_name_a_sentence_and_a_limit() -> None:
    names = [stage.name for stage in stages.STAGES]
    assert len(set(names)) == len(names)
    assert names[: len(stages.ALWAYS)] == list(stages.ALWAYS)
    assert names.index("smoke") < names.index("rates") < names.index("tune") < names.index("memcheck")
    for stage in stages.STAGES:
        assert stage.what
        assert 10 <= stage.most_seconds <= 200


def test_the_points_that_stages_pick_are_there() -> None:
    for picked in (measuring.STEP_POINTS, measuring.TUNING_POINTS, launches.SHOWN):
        chosen = device_cases("s", "cuda", indices=picked)
        assert [case.shape for case in chosen] == [DEVICE_POINTS[i][0] for i in picked]
        assert [case.dtype for case in chosen] == [DEVICE_POINTS[i][1] for i in picked]
    assert len(measuring.STEP_POINTS) == 3, "whole steps on three shapes"
    assert len(device_cases("s", "cuda")) == len(DEVICE_POINTS)


def test_the_points_cover_dtypes_layouts_and_the_papers_pairs() -> None:
    points = device_cases("s", "cuda")
    assert len({case.key for case in points}) == len(points)
    assert {case.dtype for case in points} == {torch.float32, torch.bfloat16, torch.float16}
    for layout in ("contiguous", "channels_last"):
        assert {torch.bfloat16, torch.float32, torch.float16} <= {
            c.dtype for c in points if c.layout == layout
        }
    assert set(cases.LAYER_PAIRS) <= {case.shape for case in points}
    assert points[0].nbytes >= 100e6, "the most telling first"
    tokens = next(case for case in points if case.shape == cases.TOKENS)
    assert tokens.channels == cases.TOKENS[-1]


def test_the_tests_that_stages_run_exist(
    job: Job, commands: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: object())
    for stage in (stages.core_cuda, stages.on_the_gpu, stages.core_triton):
        assert stage(job) == 7, "the exit code of the tests is the stage's"
    backends = []
    for words, environment in commands:
        assert words[words.index("-n") + 1] == str(stages.processes()), "side by side where xdist is"
        paths = [word for word in words if word.startswith("tests/")]
        assert paths
        assert all((ROOT / path).exists() for path in paths)
        for name in environment:
            if name.startswith("VIDFAST_TEST_"):
                assert name in (ROOT / "tests" / "core" / "places.py").read_text()
        backends.append(environment.get("VIDFAST_TEST_BACKEND"))
    assert backends == ["cuda", None, "triton"]


def test_the_profiler_asks_for_kernels_that_there_are(
    job: Job, commands: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "toolkit", lambda name: f"/tools/{name}")
    assert stages.profile(job) == 7
    (words, _), pattern = commands[0], stages.KERNELS_OF_OURS.removeprefix("regex:")
    assert stages.KERNELS_OF_OURS in words
    assert words[words.index("--clock-control") + 1] == "none", "a lent device's clocks are left alone"
    cuda = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.[ch]*"))
    triton = (ROOT / "vidfast" / "backends" / "triton" / "kernels.py").read_text()
    for name, text in (("planes", cuda), ("rows", cuda), ("sweep_planes", triton), ("sweep_rows", triton)):
        assert re.search(rf"(__global__ void [^{{;]*\b|def ){name}\(", text), name
        assert re.search(pattern, name)
    assert not re.search(pattern, "distribution_elementwise_grid_stride_kernel")


def test_memcheck_fails_on_a_fault_and_sees_every_tensor(
    job: Job, commands: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "toolkit", lambda name: f"/tools/{name}")
    assert stages.memcheck(job) == 7
    words, environment = commands[0]
    assert words[words.index("--error-exitcode") + 1] not in ("0", "1")
    assert environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@pytest.mark.parametrize("stage", [stages.profile, stages.memcheck])
def test_a_tool_that_is_missing_is_not_here(
    stage: Any, job: Job, commands: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "toolkit", lambda name: None)
    assert stage(job) == NOT_HERE
    assert not commands


def test_no_profile_is_no_success(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "toolkit", lambda name: f"/tools/{name}")
    monkeypatch.setattr(stages, "command", lambda *words, **environment: 0)
    assert stages.profile(job) == 1
    (job.work / "ncu.ncu-rep").write_bytes(b"report")
    assert stages.profile(job) == 0


# ---- what goes wrong is said


def problem_of(error: str | None) -> Any:
    return lambda problem, device: (
        {} if error is None or problem.shape != smoke.SHAPES[0] else {"error": error}
    )


@pytest.mark.parametrize(("error", "code"), [(None, 0), ("d mean: 1 of 9", 1)])
def test_smoke_fails_where_a_result_is_wrong(
    error: str | None,
    code: int,
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(stages, "backends", lambda: ["cuda", "triton"])
    monkeypatch.setattr(smoke, "check", problem_of(error))
    assert stages.smoke(job) == code
    said = capsys.readouterr().out
    assert (f"{smoke.SHAPES[0][0]}x" in said) == bool(error)
    written = job.lines.path.read_text()
    assert ('"wrong": 0' in written) == (error is None)


def test_smoke_says_why_no_back_end_runs(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> list[str]:
        raise RuntimeError("CUDA error: no device")

    monkeypatch.setattr(stages, "backends", fails)
    assert stages.smoke(job) == 1
    assert "CUDA error: no device" in capsys.readouterr().out


def rows_of(failure: Exception | None) -> Any:
    good = Row(Timings(1, 1, [0], [Sample(1e-6, 0.0)]), {"share_of_copy": 0.5})
    return {"a": good, "b": Row(failure=failure)} if failure else {"a": good}


def with_failures(failures: dict[str, Exception]) -> Any:
    def measure_all(suite: Any, chosen: list[Case], *_: Any) -> Any:
        for case in chosen:
            yield case, rows_of(failures.get(case.note))

    return measure_all


CASES = [(None, Case("s", (2, 3), note=note)) for note in "xyz"]


@pytest.mark.parametrize("broken", [False, True])
def test_a_row_that_failed_fails_the_stage_and_costs_only_itself(
    broken: bool, job: Job, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where it broke the device's context: another process goes on with the next case."""
    failure = RuntimeError("CUDA: an illegal memory access was encountered")
    monkeypatch.setattr("bench.measured.measure_all", with_failures({"x": failure}))
    monkeypatch.setattr(measuring, "device_is_broken", lambda: broken)
    assert measuring.measured(job, CASES, seconds=1.0) == 1
    said = capfd.readouterr().out
    assert said.count("a: 1.00 us, 50% of the copy") == 3
    assert str(failure) in said
    assert "1 rows failed" in said


def test_a_process_that_ends_costs_its_case(
    job: Job, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def measure_all(suite: Any, chosen: list[Case], *_: Any) -> Any:
        if chosen[0].note == "y":
            os._exit(11)
        yield chosen[0], rows_of(None)

    monkeypatch.setattr("bench.measured.measure_all", measure_all)
    assert measuring.measured(job, CASES, seconds=1.0) == 1
    assert capfd.readouterr().out.count("a: 1.00 us") == 2
    assert "the process ended with 11" in job.lines.path.read_text()


def test_all_good_is_zero(
    job: Job, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.measured.measure_all", with_failures({}))
    assert measuring.measured(job, CASES, seconds=1.0) == 0
    assert "every row was measured" in capfd.readouterr().out


def test_a_device_that_answers_is_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda n, device: zeros(n))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert workers.device_is_broken() is False

    def fails() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    assert workers.device_is_broken() is True


def test_a_machine_without_a_back_end_fails_the_stage(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.measured.write_machine", lambda *_, **__: None)
    for found, code in (([], 1), (["cuda"], 0)):
        monkeypatch.setattr(stages, "backends", lambda found=found: found)
        assert stages.machine(job) == code
    assert "back ends that run here: none" in capsys.readouterr().out


def test_tuning_wants_a_build_for_it(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "backends", lambda: ["triton"])
    assert measuring.tune(job) == NOT_HERE
    monkeypatch.setattr(measuring, "backends", lambda: ["cuda"])
    monkeypatch.setattr(tuning, "native", lambda: object())
    assert measuring.tune(job) == NOT_HERE
    assert "python -m bench.gpu.build" in capsys.readouterr().out
    assert measuring.tune_triton(job) == NOT_HERE
    assert "the Triton back end does not run here" in capsys.readouterr().out


def test_tritons_numbers_are_put_back_and_make_other_plans() -> None:
    backend = tuning.load("triton")
    before = backend.rule  # type: ignore[attr-defined]
    for values in tuning.triton_suite().settings().values():
        with tuning.triton_numbers(values):
            assert backend.rule == before._replace(**values) != before  # type: ignore[attr-defined]
        assert backend.rule is before  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="nothing"), tuning.triton_numbers({"nothing": 1}):
        pass
    names = {name for values in tuning.triton_suite(overlaps=False).settings().values() for name in values}
    assert names == set(tuning.TRITON_GRID) - {"overlap"}


@pytest.mark.parametrize(
    ("capability", "wanted"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)]
)
def test_an_early_start_wants_a_device_for_it(
    capability: tuple[int, int], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    import torch
    from triton.backends.nvidia.compiler import CUDAOptions

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert tuning.triton_overlaps() is (wanted and "launch_pdl" in CUDAOptions.__dataclass_fields__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not tuning.triton_overlaps()


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Case]]:
    """What a stage would measure, instead of measuring it."""
    noted: list[tuple[Any, Case]] = []

    def note(job: Job, pairs: list[tuple[Any, Case]], seconds: float) -> int:
        noted.extend(pairs)
        return 0

    monkeypatch.setattr(measuring, "measured", note)
    return noted


def test_no_module_is_measured_twice(job: Job, chosen: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads have a stage of their own; whole steps are not compiled, which takes longer than the stage has."""
    monkeypatch.setattr(measuring, "warm_heads", lambda job, cases: None)
    assert measuring.modules(job) == 0
    assert {suite.name for suite, _ in chosen} == {"training step"}
    assert len(chosen) == 4, "two pairs of networks in two precisions"
    for suite, case in chosen:
        assert suite.names(case) == ["eager g=1", "vidfast default g=1"]
    chosen.clear()
    assert measuring.head(job) == 0
    assert {suite.name for suite, _ in chosen} == {"VIDLoss"}
    assert all(len(suite.names(case)) == 8 for suite, case in chosen), "four rows, and each as a graph"


def test_heads_of_linear_layers_are_measured_too(
    job: Job, chosen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: list[Case] = []
    monkeypatch.setattr(measuring, "warm_heads", lambda job, cases: warmed.extend(cases))
    assert measuring.head(job) == 0
    assert warmed == [case for _, case in chosen]
    assert any(case.channel_dim == -1 for case in warmed)


@pytest.mark.parametrize("broken", [False, True])
def test_heads_are_compiled_side_by_side_before_they_are_measured(
    broken: bool, job: Job, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def build(name: str) -> Any:
        def prepare() -> Any:
            if broken and name == "vidfast compiled":
                raise RuntimeError("no such operator")
            return lambda: print(f"ran {name}", flush=True)

        return lambda case, pool: lambda incoming: SimpleNamespace(prepare=prepare)

    monkeypatch.setattr("bench.modules.VID_LOSS", {name: build(name) for name in VID_LOSS})
    measuring.warm_heads(job, [Case("VIDLoss", (2, 3, 2, 2), gradients=(1.0,))])
    said = capfd.readouterr().out
    assert "ran torch.compile" in said
    assert "ran eager" not in said
    assert ("| vidfast compiled: RuntimeError: no such operator" in said) == broken
    assert "compiled in" in said


# ---- cold buffers


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_slots_of_a_cold_case_are_four_times_the_cache(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("s", (4, 8, 4, 4), device=device)
    monkeypatch.setattr(buffers, "last_level_cache", lambda device: 64 * case.nbytes)
    on_the_cpu = replace(case, device="cpu")
    fewest = buffers.FEWEST_SLOTS_OF_A_GRAPH if device == "cuda" else 1
    monkeypatch.setattr(Case, "on_gpu", property(lambda self: device == "cuda"))
    pool = Pool(on_the_cpu)
    assert len(pool.slots) * 2 * case.nbytes == 4 * 64 * case.nbytes
    assert pool.cold
    monkeypatch.setattr(buffers, "last_level_cache", lambda device: 1)
    assert len(Pool(on_the_cpu).slots) == fewest
    assert len(Pool(on_the_cpu, slots=3).slots) == 3


def test_nothing_of_a_stage_is_imported_from_outside_the_checkout() -> None:
    """A GPU machine has the checkout and a handful of packages: a stray import would end a run there."""
    known = {"bench", "vidfast", "torch", "pytest", "cpuinfo", "psutil", "pybind11", "triton", "numpy"}
    import sys

    for path in [*(ROOT / "bench").glob("*.py"), *(ROOT / "bench" / "gpu").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                assert top in known or top in sys.stdlib_module_names, f"{path.name} imports {name}"
