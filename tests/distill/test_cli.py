"""The command line, end to end on a tiny budget, and every wrong use as one line."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import vidfast
from vidfast import cli
from vidfast.distill.experiments import compare, search, teacher
from vidfast.distill.files import save_checkpoint
from vidfast.distill.models import build
from vidfast.distill.trainer import TrainOptions

TINY = [
    "distill",
    "--teacher=wrn-10-1",
    "--steps=4",
    "--teacher-steps=6",
    "--samples-per-class=2",
    "--seeds=2",
    "--device=cpu",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDFAST_CACHE", str(cache))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def assert_one_line(result: tuple[int, str, str], *words: str, code: int = 2) -> None:
    assert result[0] == code, result
    assert result[1] == ""
    lines = [line for line in result[2].splitlines() if line]
    assert len(lines) == 1, result[2]
    assert lines[0].startswith("vidfast")
    for word in words:
        assert word in lines[0]


def test_distill_writes_a_run_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, text, progress = run(capsys, *TINY, "--out", out)
    assert code == 0
    assert "student alone" in text
    assert "student + VID-I" in text
    assert progress.count("M = 2") == 4
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.csv", "curves.png", "report.md", "checkpoints",
    }  # fmt: skip
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    config = json.loads((out / "config.json").read_text())
    assert config["training"]["vid"]["steps"] == 4
    assert config["samples_per_class"] == [2]
    assert config["seeds"] == [0, 1]

    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = [row for row in rows if row["step"] == "4"]
    assert [(row["arm"], row["seed"]) for row in last] == [
        ("alone", "0"), ("vid", "0"), ("alone", "1"), ("vid", "1"),
    ]  # fmt: skip
    assert all(row["loss_vid"] for row in last if row["arm"] == "vid")

    # The table's numbers are those of the metrics.
    accuracies = [float(row["test_accuracy"]) for row in last if row["arm"] == "vid"]
    cell = f"{sum(accuracies) / 2:.1f} ± {abs(accuracies[0] - accuracies[1]) / 2**0.5:.1f}"
    assert cell in text
    assert cell in (out / "report.md").read_text()

    # The saved student is the network whose accuracy was reported.
    name = out / "checkpoints" / "vid-m2-seed1" / "student.safetensors"
    student = build("wrn-10-1", in_channels=1, num_classes=10).eval()
    student.load_state_dict(safetensors.torch.load_file(name))
    from vidfast.distill.data import DATA_SETS

    test = DATA_SETS["digits"]().test
    with torch.no_grad():
        right = (student(test.images).argmax(1) == test.labels).float().mean()
    assert 100 * float(right) == pytest.approx(accuracies[1], abs=1e-4)


def test_resume_finishes_what_was_begun_and_changes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(capsys, *TINY, "--out", whole)[0] == 0
    original, done = compare.train_student, []

    def interrupted(*args: object, **kwargs: object) -> object:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(compare, "train_student", interrupted)
    code, _, errors = run(capsys, *TINY, "--out", broken, "--quiet")
    assert code == 130
    assert f"vidfast: interrupted; continue with the same options, --out {broken} and --resume" in errors
    monkeypatch.setattr(compare, "train_student", original)

    assert_one_line(run(capsys, *TINY, "--out", broken), "is not empty", "--resume")
    assert_one_line(
        run(capsys, *TINY, "--batch-size=5", "--out", broken, "--resume"), "training.vid.batch_size"
    )
    assert run(capsys, *TINY, "--out", broken, "--resume")[0] == 0
    assert (broken / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    for path in whole.glob("checkpoints/*/student.safetensors"):
        assert (broken / path.relative_to(whole)).read_bytes() == path.read_bytes()

    # A damaged checkpoint is named.
    damaged = broken / "checkpoints" / "alone-m2-seed0" / "checkpoint.pt"
    damaged.write_bytes(damaged.read_bytes()[:100])
    result = run(capsys, *TINY, "--out", broken, "--resume", "--quiet")
    assert_one_line(result, "alone-m2-seed0", "damaged")
    (broken / "config.json").write_text("{")
    assert_one_line(run(capsys, *TINY, "--out", broken, "--resume"), "config.json: damaged")
    (broken / "config.json").unlink()
    assert_one_line(run(capsys, *TINY, "--out", broken, "--resume"), "holds no run", "no config.json")


def test_the_teacher_is_cached_and_a_damaged_cache_is_replaced(tmp_path: Path) -> None:
    from vidfast.distill.data import DATA_SETS

    data, said = DATA_SETS["digits"](), []
    options = TrainOptions(steps=3, device="cpu")

    def get(options: TrainOptions = options, cache: Path = tmp_path) -> tuple[dict[str, torch.Tensor], bool]:
        network, metrics, cached = teacher.trained_teacher(
            "wrn-10-1", data, options, cache=cache, say=said.append
        )
        assert not network.training
        assert 0 <= metrics["test_accuracy"] <= 100
        return network.state_dict(), cached

    first, cached = get()
    assert not cached
    again, cached = get()
    assert cached
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not get(TrainOptions(steps=3, lr=0.01, device="cpu"))[1]
    assert said == []

    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"damaged")
    replaced, cached = get()
    assert not cached
    assert all(torch.equal(first[key], replaced[key]) for key in first)
    assert len(said) == 1
    assert "damaged" in said[0]
    assert get()[1]

    # So is a file of another kind, without what is reported of a teacher.
    path = teacher.cache_path(tmp_path, "wrn-10-1", data, options)
    for metrics in ({"step": 3}, None, {"test_accuracy": "high"}):
        save_checkpoint(path, {"network": first, "metrics": metrics})
        assert not get()[1]
        assert "its metrics lack test_accuracy" in said[-1]
    save_checkpoint(path, {"network": 5, "metrics": {"test_accuracy": 1.0}})
    assert not get()[1]
    assert get()[1]

    # A cache that cannot be written is done without.
    (tmp_path / "file").write_text("")
    assert not get(cache=tmp_path / "file" / "cache")[1]
    assert "not cached" in said[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["required"]),
        (["distil"], ["invalid choice"]),
        (["distill", "--stepz=3"], ["unrecognized arguments"]),
        (["distill", "--steps=0"], ["--steps", "1 or more"]),
        (["distill", "--seeds=two"], ["--seeds", "'two'"]),
        (["distill", "--weight=-1"], ["--weight"]),
        (["distill", "--lr=nan"], ["--lr"]),
        (["distill", "--lr=0.1"], ["--lr needs --optimizer"]),
        (["distill", "--optimizer=sgd"], ["--optimizer sgd needs --lr"]),
        (["distill", "--reduction=sum", "--accumulation=2"], ["--reduction sum", "--accumulation"]),
        (["distill", "--student=wrn-11-1"], ["depth 6n"]),
        (["distill", "--teacher=wrm-16-2"], ["unknown network", "'wrn'"]),
        (["distill", "--data=digit"], ["unknown data set", "'digits'"]),
        (["distill", "--regressor=linaer"], ["unknown regressor", "'linear'"]),
        (["distill", "--init-var=0"], ["init_var"]),
        (["distill", "--backend=abacus"], ["backend", "abacus"]),
        (["distill", "-m", "5", "200"], ["200 images a class"]),
        (["distill", "--resume"], ["--out"]),
    ],
)
def test_wrong_use_is_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    out = tmp_path / "run"
    if arguments[:1] == ["distill"] and "--resume" not in arguments:
        arguments = [*arguments, f"--out={out}"]
    assert_one_line(run(capsys, *arguments), *words)
    assert not out.exists()


def test_cuda_asked_for_where_there_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_one_line(run(capsys, "distill", "--device=cuda"), "no CUDA device")


def test_folders_that_cannot_be_used_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_one_line(run(capsys, *TINY, "--out", tmp_path / "file"), "this is a file")
    assert_one_line(run(capsys, *TINY, "--out", tmp_path / "file" / "run"), "Not a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert_one_line(run(capsys, *TINY, "--out", tmp_path / "run"), "Permission denied")


def test_read_only_file_system_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert_one_line(run(capsys, *TINY, "--out", tmp_path / "run"), "run", "Read-only file system")


def test_a_loss_that_is_not_finite_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [*TINY, "--optimizer=sgd", "--lr=1e30", "--steps=20", "--quiet", f"--out={tmp_path / 'run'}"]
    assert_one_line(run(capsys, *arguments), "term 'task' became inf or nan", code=1)


def test_missing_extras_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("safetensors", "sklearn") else found(name)
    )
    result = run(capsys, "distill")
    assert_one_line(result, "safetensors, scikit-learn", "pip install 'vidfast[train]'")


def test_info_prints_what_info_returns(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, errors = run(capsys, "info")
    assert code == 0
    assert errors == ""
    assert vidfast.__version__ in text
    for name in vidfast.info()["backends"]:  # type: ignore[attr-defined]
        assert f"\n  {name}\n" in text
    assert "available" in text


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "distill", "--help")
    assert code == 0
    for option in ("--teacher", "--samples-per-class", "--weight", "--init-var", "--resume", "--backend"):
        assert option in text
    code, text, _ = run(capsys, "--version")
    assert (code, text) == (0, f"vidfast {vidfast.__version__}\n")


def python(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_importing_vidfast_imports_nothing_of_distill() -> None:
    code = (
        "import sys, vidfast; "
        "print([m for m in sys.modules if m.startswith('vidfast.distill') or m in "
        "('accelerate', 'sklearn', 'matplotlib', 'safetensors')])"
    )
    out, errors = python("-c", code).communicate(timeout=240)
    assert out == "[]\n", errors


def test_the_library_and_info_need_no_extras() -> None:
    code = (
        "import sys; "
        "sys.modules.update(dict.fromkeys(['accelerate', 'sklearn', 'matplotlib', 'tqdm', 'safetensors'])); "
        "import vidfast.distill, vidfast.distill.models; from vidfast.cli import main; sys.exit(main(['info']))"
    )
    process = python("-c", code)
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "backends" in out


def test_interrupting_the_process_leaves_one_line(tmp_path: Path) -> None:
    arguments = [*TINY, "--steps=100000", f"--out={tmp_path / 'run'}"]
    # Who runs the tests in the background may have SIGINT ignored, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = python("-m", "vidfast", *arguments)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        config = tmp_path / "run" / "config.json"
        deadline = time.monotonic() + 60
        while not config.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("vidfast: interrupted")


def test_an_interrupt_while_text_is_executed_ends_with_the_same_code() -> None:
    # As one in the middle of an import that makes a dataclass: CPython kills the process for it, caught or not.
    code = (
        "import sys, vidfast.cli; from vidfast.distill.commands import distill\n"
        "distill.run = lambda arguments: exec('raise KeyboardInterrupt')\n"
        "sys.exit(vidfast.cli.main(['distill']))"
    )
    process = python("-c", f"exec({code!r})")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    assert errors.strip() == "vidfast: interrupted"


def test_search_records_and_continues(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "search.csv"
    monkeypatch.setattr(search, "SAMPLES", (2,))
    monkeypatch.setattr(search, "RATES", (("adamw", 0.003), ("sgd", 1e30)))
    options = TrainOptions(steps=12, device="cpu")
    first = search.Search(out, "wrn-10-1", "wrn-10-1", options, 3)
    best = first.best(search.student_alone())
    assert best.optimizer == "adamw"
    rows = list(csv.DictReader(out.open()))
    # The diverged candidate counts as 0, and is recorded.
    assert [(row["optimizer"], float(row["validation_accuracy"]) == 0) for row in rows] == [
        ("adamw", False),
        ("sgd", True),
    ]
    monkeypatch.setattr(search, "train_student", None)
    second = search.Search(out, "wrn-10-1", "wrn-10-1", options, 3)
    assert second.best(search.student_alone()) == best
    assert (
        len(
            {
                c.key()["init_var"]
                for c in search.vid_variances(search.vid_weights([best], [1], ["linear"])[0])
            }
        )
        > 1
    )
    assert set(search.SEARCH_SEEDS).isdisjoint(range(100))
