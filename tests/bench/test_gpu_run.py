"""`bench/gpu.sh` on the stand-in of a GPU (tests/stand_in): every stage, its results, and what a cut leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from bench.gpu import __main__ as gpu_main
from bench.gpu.stages import STAGES
from vidfast.report import main, readme
from vidfast.report.results import HEAD, KERNEL, MASKS, OVERHEAD, STEP, Run, load

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests" / "stand_in"
NAMES = [stage.name for stage in STAGES]


@pytest.fixture(scope="module")
def environment(emulated_module: Path) -> dict[str, str]:
    sys.path.insert(0, str(ROOT / "tests" / "triton"))
    from interpreter import interpreter_fault

    if (fault := interpreter_fault()) is not None:
        pytest.skip(fault)
    return {
        **os.environ,
        "VIDFAST_EMULATED_CUDA": str(emulated_module),
        "VIDFAST_TEST_DEVICE": "cpu",
        "TRITON_INTERPRET": "1",
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(STAND_IN / "site"), str(ROOT), os.environ.get("PYTHONPATH")])
        ),
        "PATH": os.pathsep.join([str(STAND_IN / "bin"), os.environ.get("PATH", "")]),
    }


def gpu_sh(*arguments: str) -> list[str]:
    return ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments]


@pytest.fixture(scope="module")
def finished(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run. The limit is no test: a busy machine may take its time."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    done = subprocess.run(
        gpu_sh("--limit", "400", "--small", "--out", str(out)),
        env=environment,
        capture_output=True,
        text=True,
    )
    logs = logs_of(out) if (out / "all.tgz").exists() else {}
    assert done.returncode == 0, done.stdout + done.stderr + "\n".join(logs.values())[-8000:]
    return out


def logs_of(out: Path) -> dict[str, str]:
    with tarfile.open(out / "all.tgz") as archive:
        return {
            name: archive.extractfile(name).read().decode(errors="replace")  # type: ignore[union-attr]
            for name in archive.getnames()
            if name.endswith(".log")
        }


def lines_of(out: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def test_every_stage_runs_to_its_end(finished: Path) -> None:
    stages = lines_of(finished, "stage")
    assert [line["stage"] for line in stages] == NAMES
    verdicts = {line["stage"]: line["verdict"] for line in stages}
    # what is asked of streams and launches, nothing but a GPU can answer
    assert verdicts == {**dict.fromkeys(NAMES, "ok"), "gpu": "not here"}, stages
    summary = (finished / "summary.txt").read_text().splitlines()
    assert [line.split()[0] for line in summary] == NAMES
    assert {line["stage"]: line["last_line"] for line in stages}["ncu"].startswith("a report of")
    logs = logs_of(finished)
    assert set(logs) == {f"{name}.log" for name in NAMES}
    for name in ("core-cuda", "core-triton"):
        assert " passed" in logs[f"{name}.log"]
    assert "0 of them wrong" in logs["memcheck.log"]
    with tarfile.open(finished / "all.tgz") as archive:
        assert "ncu.ncu-rep" in archive.getnames()
    assert {path.name for path in finished.iterdir()} == {"results.jsonl", "summary.txt", "all.tgz"}


def test_the_first_line_tells_the_machine(finished: Path) -> None:
    first = json.loads((finished / "results.jsonl").read_text().splitlines()[1])
    assert first["kind"] == "machine", "the build's stage comes first, then this"
    own = first["machine_info"]["vidfast"]
    assert own["gpu"]["name"] == "Stand-in"
    assert own["vidfast"]["vidfast"]
    assert len(own["sources"]) == 12
    assert first["datetime"]
    text = (finished / "results.jsonl").read_text()
    for folder in (ROOT, Path.home(), Path(sys.prefix), Path(tempfile.gettempdir())):
        assert f"{folder}/" not in text, "a stored run names no folder of the machine"


def run_of(finished: Path) -> Run:
    return load(finished / "results.jsonl")


def test_every_row_is_right_and_has_a_rate(finished: Path) -> None:
    run = run_of(finished)
    assert not run.failures
    assert not run.left_out
    assert {row.suite for row in run.rows} == {
        KERNEL,
        OVERHEAD,
        STEP,
        HEAD,
        MASKS,
        "training step",
        "tuning",
        "tuning triton",
    }
    for row in run.rows:
        bound = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 2e-3}[row.facts["dtype"]]
        bound = 0.1 if row.autocast else bound  # three layers in bf16, and the gates of their ReLUs
        for error in (row.facts.get("error") or {}).values():
            assert error is None or error < bound, row.key
    kernels = [row for row in run.of(KERNEL) if row.provider != "copy"]
    assert {row.provider.split()[0] for row in kernels} == {"cuda", "triton"}
    assert all(row.graph and row.cold for row in kernels)
    for row in kernels:
        assert (row.share_of_copy is None) == row.provider.endswith("scale g=1"), row.key
    passes = {row.provider.split(" ", 1)[1]: row.facts["bytes"] / row.pass_bytes for row in kernels}
    assert passes == {
        "forward": 2,
        "forward_grad": 3,
        "forward_grad in place": 3,
        "backward": 3,
        "scale g=1": 0,
        "scale g=0.37": 2,
    }
    assert all(row.facts.get("error") for row in kernels if row.facts["dtype"] != "float16")


def test_launches_and_the_host_are_counted_in_the_overhead_alone(finished: Path) -> None:
    run = run_of(finished)
    case = run.cases(OVERHEAD)[0]
    one_pass = run.find(OVERHEAD, case, "vidfast cuda one_pass")
    assert one_pass is not None
    assert one_pass.facts["launches"] == 3, "the sweep, its finish, and the scaling"
    assert one_pass.facts["host_seconds"] > 0
    assert all("launches" not in row.facts for row in run.of(STEP))


def test_heads_are_measured_with_autograd_and_as_graphs_in_both_precisions(finished: Path) -> None:
    """Every row of every case, and the results of a graph are compared after it was replayed."""
    rows = run_of(finished).of(HEAD)
    steps = {"eager", "torch.compile", "vidfast default", "vidfast compiled"}
    for autocast in (None, "bfloat16"):
        of_precision = [row for row in rows if row.autocast == autocast]
        assert {row.provider for row in of_precision if not row.graph} == steps
        assert {row.provider for row in of_precision if row.graph} == {f"{name} graph" for name in steps}
        errors = [row.facts["error"]["grad_mean"] for row in of_precision]
        assert (max(errors) > 1e-4) == (autocast is not None), "autocast was on where it says so"
    for row in rows:
        assert row.facts["host_seconds"] > 0
        assert (row.facts["peak_extra_bytes"] is None) == row.graph
        assert row.incoming == 1.0


def test_masks_are_measured_beside_no_mask_and_as_graphs(finished: Path) -> None:
    """Of every back end; nothing is captured that waits for the device."""
    run = run_of(finished)
    strategies = ("cuda one_pass", "cuda one_pass in place", "triton one_pass")
    ours = {f"vidfast {strategy}{end}" for strategy in strategies for end in ("", " without a mask")}
    assert {row.facts["walk"] for row in run.of(MASKS)} == {"rows", "planes"}
    for case in run.cases(MASKS):
        rows = {row.provider: row for row in run.of(MASKS) if row.case == case}
        graphs = {f"{name} graph" for name in (*ours, "torch.compile")}
        assert set(rows) == {"copy", "indexing", "torch.compile", *ours, *graphs}
        assert all(row.facts["error"] for name, row in rows.items() if name != "copy")
        assert all(rows[name].graph for name in graphs)


def test_the_pairs_of_a_training_step_are_clocked_by_events(finished: Path) -> None:
    rows = run_of(finished).of("training step")
    assert len(rows) == 2
    for row in rows:
        assert 0 < row.facts["pair_seconds"] < 1.5 * row.seconds.high


def test_the_free_numbers_are_tried_beside_the_built_ones(finished: Path) -> None:
    rows = run_of(finished).of("tuning")
    names = {row.provider for row in rows}
    assert {"copy", "as built", "kPlane=512"} <= names
    assert all(row.graph for row in rows)
    rows = run_of(finished).of("tuning triton")
    assert {"copy", "as built", "ahead=0", "finish_depth=64"} <= {row.provider for row in rows}
    assert all(row.graph for row in rows)


def test_the_report_reads_it(finished: Path, tmp_path: Path) -> None:
    assert main([str(finished / "results.jsonl"), "--output", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    for heading in (
        "What ran",
        "Kernels alone",
        "Free numbers of the CUDA back end",
        "Free numbers of the Triton back end",
        "Host overhead",
        "Masks",
    ):
        assert f"### {heading}" in text
    assert "cuda: 98 of 98 calls, 0 wrong" in text
    assert "bench/gpu.sh, --small: a rehearsal" in text
    assert "driver 1.2.3, power limit 700.00 W, highest clock 1980 MHz" in text
    assert (tmp_path / "results-kernels.svg").exists()
    block = readme.block([run_of(finished)])
    assert "**Stand-in**" in block
    assert "the same as a CUDA graph: device time" in block
    assert block.index("float32 from 8 autocast bfloat16") < block.index("one pass, device time")
    assert "pending" not in block


def test_the_checks_on_the_stand_in(environment: dict[str, str]) -> None:
    """What needs a device in this process: graphs, events."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(STAND_IN)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    last = done.stdout.splitlines()[-1]
    assert " passed" in last
    assert "skipped" not in last


def test_the_suites_of_pytest_run_on_a_gpu_too(environment: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "--bench-device=cuda"]
    command += ["-k", "overhead and (saves or cuda)", "--bench-seconds=0.01"]
    command += ["--benchmark-quiet", f"--benchmark-json={path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    run = load(path)
    assert run.device == "Stand-in"
    graphs = [row.provider for row in run.rows if row.graph and row.incoming == 1.0]
    assert graphs == [f"vidfast cuda {s} graph" for s in ("two_pass", "one_pass", "one_pass in place")]


def test_what_stages_share_does_not_touch_the_device() -> None:
    """A process that is forked from one that has used CUDA cannot use it."""
    code = """
import torch
def touched(*arguments, **options):
    raise AssertionError("the device was asked")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = touched
for name in ("_cuda_getDeviceCount", "_cuda_init"):
    if hasattr(torch._C, name):
        setattr(torch._C, name, touched)
from bench.gpu import stages
stages.prepare()
assert not torch.cuda.is_initialized()
print("untouched")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "untouched", done.stderr


def test_interrupted_after_a_third_the_finished_stages_are_there(
    environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        gpu_sh("--limit", "400", "--small", "--out", str(out)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    results = out / "results.jsonl"
    assert until(lambda: results.exists() and any(row["extra_info"] for row in lines_of(out, "row")), 120.0)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    verdicts = {line["stage"]: line["verdict"] for line in lines_of(out, "stage")}
    assert verdicts == {
        **dict.fromkeys(("build", "machine", "smoke"), "ok"),
        "rates": "cut off",
        **dict.fromkeys(NAMES[4:], "left out"),
    }
    run = load(out / "results.jsonl")
    assert run.checks[0]["wrong"] == 0
    assert run.of(KERNEL), "what was measured before the cut"
    assert set(logs_of(out)) == {f"{name}.log" for name in NAMES[:4]}
    assert main([str(out / "results.jsonl"), "--output", str(tmp_path / "page")]) == 0


def test_one_stage_alone(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = gpu_sh("--small", "--only", "smoke")
    done = subprocess.run(command, env={**environment, "OUT": str(out)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["stage"] for line in lines_of(out, "stage")] == ["build", "machine", "smoke"]
    assert load(out / "results.jsonl").device == "Stand-in", "whatever was asked for, the report can read it"
    again = subprocess.run(command, env={**environment, "OUT": str(out)}, capture_output=True, text=True)
    assert again.returncode == 2
    assert "must be a folder without results" in again.stderr
    assert again.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--only", "smok"), "invalid choice"),
        (("--limit", "0"), "positive number"),
        (("--limit", "x"), "float"),
    ],
)
def test_wrong_use_is_said(arguments: tuple[str, ...], complaint: str) -> None:
    done = subprocess.run(
        gpu_sh(*arguments), env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert complaint in done.stderr


@pytest.mark.parametrize(
    ("changes", "arguments", "complaint"),
    [
        ({"PYTHON": "/no/such/python"}, (), "PYTHON must name an interpreter, got /no/such/python"),
        ({}, ("--out", "{tmp}/file"), "--out must be a folder that can be written"),
        ({}, ("--out", "{tmp}/file/below"), "--out must be a folder that can be written"),
    ],
)
def test_what_cannot_begin_is_one_line(
    changes: dict[str, str],
    arguments: tuple[str, ...],
    complaint: str,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    command = gpu_sh(*(argument.format(tmp=tmp_path) for argument in arguments))
    done = subprocess.run(command, env={**environment, **changes}, capture_output=True, text=True)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


def test_missing_packages_are_named_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_main, "gpu_name", lambda: "x")
    monkeypatch.setattr(gpu_main, "PACKAGES", ("torch", "no_such_package", "nor_this"))
    assert gpu_main.main(["--out", str(tmp_path / "out")]) == 2
    assert "lacks no_such_package, nor_this: name another interpreter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    """nvidia-smi fails here, wherever these tests run."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]]),
    }
    done = subprocess.run(
        gpu_sh("--out", str(tmp_path / "out")), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no NVIDIA GPU" in done.stderr
    assert not (tmp_path / "out").exists()
