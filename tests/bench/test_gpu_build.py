"""Which extension a GPU run takes: the one in place, unless it is not of these sources or has no CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.gpu import build, stages
from bench.gpu.runner import Job
from bench.lines import Lines
from vidfast import _C

ROOT = Path(__file__).parents[2]


def digest() -> str:
    return str(build._setup().digest())


def native(**changes: Any) -> SimpleNamespace:
    good = {
        "cuda_forward": None,
        "sources": digest(),
        "cuda_free_numbers": dict,
        "cuda_unavailable": lambda: "",
        "cuda_device_unsupported": lambda: "",
    }
    return SimpleNamespace(**{k: v for k, v in {**good, **changes}.items() if v is not ...})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"cuda_forward": ...}, "without CUDA"),
        ({"sources": "0123456789ab"}, "other sources"),
        ({"sources": ...}, "other sources"),
        ({"cuda_free_numbers": ...}, "without VIDFAST_TUNE"),
        ({"cuda_device_unsupported": lambda: "rebuild for 9.0"}, "rebuild for 9.0"),
        ({"cuda_unavailable": lambda: "no driver", "cuda_device_unsupported": lambda: "no driver"}, None),
    ],
)
def test_what_must_be_built_anew(
    changes: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "load_extension", lambda path: native(**changes))
    found = build.stale(Path("x"))
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_a_file_that_does_not_load_is_built_anew(tmp_path: Path) -> None:
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"no library")
    assert "does not load" in str(build.stale(broken))


@pytest.mark.parametrize(
    ("before", "builds", "code"),
    [(None, 1, 0), ({"sources": "old"}, 1, 0), ({}, 0, 0), ({"cuda_unavailable": lambda: "no driver"}, 0, 1)],
    ids=["none in place", "stale", "good", "no driver"],
)
def test_the_stage_builds_only_where_that_helps(
    before: dict[str, Any] | None, builds: int, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    in_place = [None if before is None else native(**before)]
    made: list[int] = []

    def make() -> None:
        made.append(1)
        in_place[0] = native()

    monkeypatch.setattr(build, "build", make)
    monkeypatch.setattr(build, "in_place", lambda: None if in_place[0] is None else Path("x.so"))
    monkeypatch.setattr(build, "load_extension", lambda path: in_place[0])
    job = Job(tmp_path, tmp_path, Lines(tmp_path / "results.jsonl"), 60.0, float("inf"), small=False)
    assert stages.build(job) == code
    assert len(made) == builds


def test_it_is_built_so_that_it_can_be_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def fake_build(library: Path, scratch: Path, options: list[str]) -> None:
        seen.append(list(options))
        library.mkdir()
        (library / "_C.so").write_text("new")

    monkeypatch.setattr(build, "_setup", lambda: SimpleNamespace(build=fake_build))
    monkeypatch.setenv("VIDFAST_CUDA", "auto")
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.main([str(tmp_path / "new")]) == 0
    assert seen == [["-DVIDFAST_TUNE=ON"]]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["_C.so"], "and nothing else is left there"
    assert os.environ["VIDFAST_CUDA"] == "1"
    assert os.environ["MAX_JOBS"] == "3"


def test_a_build_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(library: Path, scratch: Path, options: list[str]) -> None:
        library.mkdir()
        (library / "_C.so").write_text("half")
        raise subprocess.CalledProcessError(1, "ninja")

    monkeypatch.setattr(build, "_setup", lambda: SimpleNamespace(build=fails))
    (tmp_path / "_C.so").write_text("whole")
    assert build.main([str(tmp_path)]) == 1
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("_C.so", "whole")]


def test_a_build_that_fails_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(into: Path) -> None:
        raise RuntimeError("VIDFAST_CUDA=1, but there is no nvcc")

    monkeypatch.setattr(build, "build", fails)
    assert build.main([]) == 1
    assert capsys.readouterr().err == "bench.gpu.build: VIDFAST_CUDA=1, but there is no nvcc\n"


def test_the_installed_extension_knows_its_sources() -> None:
    assert _C.sources == digest(), "the extension is not of these sources: build it again"


def test_the_digest_sees_every_native_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = build._setup()
    for name in ("CMakeLists.txt", "csrc/cuda/planes.cu"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    found = {setup.digest()}
    for name in ("CMakeLists.txt", "csrc/cuda/planes.cu", "csrc/new.h"):
        (tmp_path / name).write_text("changed")
        found.add(setup.digest())
    (tmp_path / "csrc" / "new.h").rename(tmp_path / "csrc" / "other.h")
    found.add(setup.digest())
    assert len(found) == 5


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--wrong", 2)])
def test_the_builder_has_a_command_line(argument: str, code: int) -> None:
    command = [sys.executable, "-m", "bench.gpu.build", argument]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert ("TORCH_CUDA_ARCH_LIST" in done.stdout) if code == 0 else ("unrecognized arguments" in done.stderr)
