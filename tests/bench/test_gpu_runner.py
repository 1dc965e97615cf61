"""Stages one after another within a limit: what is cut off costs only itself, and what is there is whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from bench.gpu import runner
from bench.gpu.runner import ARCHIVE, INTERRUPTED, NOT_HERE, RESULTS, SUMMARY, Job, Runner, Stage, free_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(runner, "SHORTEST_STAGE_SECONDS", 0.2)


def stage(name: str, run: Callable[[Job], int | None], most: float = 30.0, prepared: bool = False) -> Stage:
    return Stage(name, f"what {name} does", most, run, prepared)


def says(text: str, code: int | None = None) -> Callable[[Job], int | None]:
    def run(job: Job) -> int | None:
        print(text)
        job.lines.write("check", backend=text, calls=1, wrong=0, errors=[])
        return code

    return run


def raises(_: Job) -> int:
    raise RuntimeError("a fault of its own")


def lines_of(out: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def verdicts(out: Path) -> dict[str, str]:
    return {line["stage"]: line["verdict"] for line in lines_of(out, "stage")}


def names_in(out: Path) -> set[str]:
    with tarfile.open(out / ARCHIVE) as archive:
        return set(archive.getnames())


def test_each_stage_has_its_verdict_its_output_and_a_line(tmp_path: Path) -> None:
    stages = [
        stage("good", says("all well")),
        stage("absent", says("there is no such tool", NOT_HERE)),
        stage("bad", says("two of three wrong", 1)),
        stage("broken", raises),
        stage("gone", lambda _: os.kill(os.getpid(), signal.SIGKILL)),
        stage("last", says("after all of them")),
    ]
    out = tmp_path / "out"
    assert Runner(stages, out, 60).run() == 1
    assert verdicts(out) == {
        "good": "ok",
        "absent": "not here",
        "bad": "failed",
        "broken": "failed",
        "gone": "failed",
        "last": "ok",
    }
    last_lines = {line["stage"]: line["last_line"] for line in lines_of(out, "stage")}
    assert last_lines["good"] == "all well"
    assert last_lines["broken"] == "RuntimeError: a fault of its own"
    assert [line["backend"] for line in lines_of(out, "check")] == [
        "all well",
        "there is no such tool",
        "two of three wrong",
        "after all of them",
    ]
    summary = (out / SUMMARY).read_text().splitlines()
    assert [line.split()[0] for line in summary] == [s.name for s in stages]
    assert names_in(out) == {RESULTS, SUMMARY, *(f"{s.name}.log" for s in stages)}
    assert len(list(out.iterdir())) == 3, "few files, so that all of them come back from a lent machine"


@pytest.mark.parametrize(
    ("last_line", "verdict"),
    [
        ("22 skipped in 1.37s", "not here"),
        ("3 skipped, 5 deselected in 0.10s", "not here"),
        ("2 passed, 22 skipped in 3.47s", "ok"),
        ("594 passed in 12.00s (0:00:12)", "ok"),
        ("every row was measured", "ok"),
    ],
)
def test_tests_that_were_all_skipped_are_not_ok(last_line: str, verdict: str, tmp_path: Path) -> None:
    Runner([stage("tests", says(last_line))], tmp_path, 60).run()
    assert verdicts(tmp_path) == {"tests": verdict}


def test_a_longer_limit_stretches_every_stage(tmp_path: Path) -> None:
    def tells(job: Job) -> None:
        print(f"{job.seconds:.0f}")

    Runner([stage("a", tells, most=10.0)], tmp_path, 2 * runner.LIMIT_SECONDS).run()
    assert lines_of(tmp_path, "stage")[0]["last_line"] == "20"


def test_where_nothing_ran_the_run_has_failed(tmp_path: Path) -> None:
    assert Runner([stage("a", says("a"))], tmp_path, 0.01).run() == 1
    assert verdicts(tmp_path) == {"a": "left out"}


def test_a_folder_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError):
            Runner([stage("a", says("a"))], out, 60)
    assert (tmp_path / "file").read_text() == "mine"


def test_all_good_is_zero(tmp_path: Path) -> None:
    stages = [stage("a", says("a")), stage("b", says("not needed", NOT_HERE))]
    assert Runner(stages, tmp_path, 60).run() == 0


def test_the_archive_is_whole_after_every_stage(tmp_path: Path) -> None:
    def looks(job: Job) -> int:
        print(sorted(names_in(job.out)))
        return 0

    stages = [stage("first", says("one")), stage("second", looks), stage("third", looks)]
    assert Runner(stages, tmp_path, 60).run() == 0
    seen = {line["stage"]: line["last_line"] for line in lines_of(tmp_path, "stage")}
    assert seen["second"] == str(sorted([RESULTS, SUMMARY, "first.log"]))
    assert seen["third"] == str(sorted([RESULTS, SUMMARY, "first.log", "second.log"]))


def test_a_stage_is_cut_off_at_its_own_limit_and_keeps_what_it_wrote(tmp_path: Path) -> None:
    def slow(job: Job) -> None:
        job.lines.write("check", backend="early", calls=1, wrong=0, errors=[])
        print("begun", flush=True)
        time.sleep(60)

    begin = time.monotonic()
    assert Runner([stage("slow", slow, most=0.5), stage("next", says("next"))], tmp_path, 60).run() == 0
    assert time.monotonic() - begin < 20
    assert verdicts(tmp_path) == {"slow": "cut off", "next": "ok"}
    assert [line["backend"] for line in lines_of(tmp_path, "check")] == ["early", "next"]


def test_a_stage_that_does_not_listen_is_killed_with_its_children(tmp_path: Path) -> None:
    def deaf(job: Job) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (job.out.parent / "child").write_text(str(child.pid))
        time.sleep(60)

    begin = time.monotonic()
    Runner([stage("deaf", deaf, most=1.0)], tmp_path / "out", 60).run()
    assert time.monotonic() - begin < 20
    assert verdicts(tmp_path / "out") == {"deaf": "cut off"}
    child = int((tmp_path / "child").read_text())
    assert until(lambda: not _alive(child), 5.0), "the child of a stage that was killed is still there"


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_every_stage_gets_what_is_left_of_the_limit(tmp_path: Path) -> None:
    given: list[str] = []

    def notes(job: Job) -> None:
        print(f"{job.seconds:.2f}")

    stages = [stage("first", notes, most=3.0), stage("second", lambda _: time.sleep(60))]
    stages += [stage("third", notes), stage("fourth", notes)]
    begin = time.monotonic()
    assert Runner(stages, tmp_path, 4.0).run() == 0
    assert time.monotonic() - begin < 20
    assert verdicts(tmp_path) == {
        "first": "ok",
        "second": "cut off",
        "third": "left out",
        "fourth": "left out",
    }
    given = [line["last_line"] for line in lines_of(tmp_path, "stage")]
    assert given[0] == "3.00"
    assert given[2] == "no time was left"


def test_what_stages_share_is_prepared_once_and_only_if_needed(tmp_path: Path) -> None:
    prepared: list[int] = []

    def prepare() -> None:
        prepared.append(1)

    def looks(_: Job) -> None:
        print(len(prepared))

    plain = [stage("a", looks)]
    assert Runner(plain, tmp_path / "plain", 60, prepare=prepare).run() == 0
    assert not prepared
    stages = [stage("before", looks), stage("b", looks, prepared=True), stage("c", looks, prepared=True)]
    assert Runner(stages, tmp_path / "prepared", 60, prepare=prepare).run() == 0
    seen = [line["last_line"] for line in lines_of(tmp_path / "prepared", "stage")]
    assert seen == ["0", "1", "1"]


def test_a_fault_in_what_is_shared_costs_the_stages_that_need_it(tmp_path: Path) -> None:
    def prepare() -> None:
        raise ImportError("no such package")

    stages = [stage("b", says("b"), prepared=True), stage("c", says("c"))]
    assert Runner(stages, tmp_path, 60, prepare=prepare).run() == 1
    assert verdicts(tmp_path) == {"b": "failed", "c": "ok"}
    assert lines_of(tmp_path, "stage")[0]["last_line"] == "ImportError: no such package"


def test_a_stage_has_a_soft_limit_before_its_hard_one(tmp_path: Path) -> None:
    def tells(job: Job) -> None:
        print(f"{job.deadline - time.monotonic():.0f} of {job.seconds:.0f}")

    Runner([stage("a", tells, most=100.0)], tmp_path, 60).run()
    assert lines_of(tmp_path, "stage")[0]["last_line"] == "53 of 60"


def test_what_a_stage_leaves_behind_is_ended(tmp_path: Path) -> None:
    def leaves(job: Job) -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(child.pid)

    Runner([stage("a", leaves)], tmp_path, 60).run()
    child = int(lines_of(tmp_path, "stage")[0]["last_line"])
    assert until(lambda: not _alive(child), 5.0), "what a stage had started is still there"


def test_an_earlier_run_is_not_written_over(tmp_path: Path) -> None:
    Runner([stage("a", says("first run"))], tmp_path, 60).run()
    before = (tmp_path / RESULTS).read_bytes()
    with pytest.raises(FileExistsError, match="must be a folder without results"):
        Runner([stage("a", says("second run"))], tmp_path, 60)
    assert (tmp_path / RESULTS).read_bytes() == before
    assert free_folder(tmp_path) == tmp_path.with_name(f"{tmp_path.name}-2")
    assert free_folder(tmp_path / "new") == tmp_path / "new"


PROGRAM = """
import sys, time
from pathlib import Path
from bench.gpu import runner
from bench.gpu.runner import Runner, Stage

runner.GRACE_SECONDS = 1.0

def quick(job):
    print("done")

def slow(job):
    print("begun", flush=True)
    (job.out.parent / "begun").touch()
    time.sleep(60)

stages = [Stage("quick", "q", 9, quick), Stage("slow", "s", 60, slow), Stage("never", "n", 9, quick)]
sys.exit(Runner(stages, Path(sys.argv[1]), 60).run())
"""


@pytest.mark.parametrize("ignored", [False, True], ids=["", "SIGINT ignored at start"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["INT", "TERM", "HUP"])
def test_an_interrupt_keeps_what_is_done(tmp_path: Path, number: int, ignored: bool) -> None:
    """A shell without job control starts background commands with SIGINT ignored: that must not make us deaf."""

    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(out)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=ignore if ignored else None
    )
    assert until((tmp_path / "begun").exists)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED
    assert verdicts(out) == {"quick": "ok", "slow": "cut off", "never": "left out"}
    assert names_in(out) == {RESULTS, SUMMARY, "quick.log", "slow.log"}
    end = printed.splitlines()[-4:]
    assert [line.split()[0] for line in end] == ["quick", "slow", "never", "results"]


def test_an_interrupt_comes_once(tmp_path: Path) -> None:
    """A second one would hit a stage while it writes down what it has."""
    program = PROGRAM.replace(
        "    time.sleep(60)",
        """    import signal
    seen = []
    signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    end = time.monotonic() + 0.6
    while not seen or time.monotonic() < end:
        time.sleep(0.01)
        end = end if seen else time.monotonic() + 0.6
    print("interrupts:", len(seen), flush=True)
    sys.exit(0)""",
    )
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert until((tmp_path / "begun").exists)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    with tarfile.open(out / ARCHIVE) as archive:
        log = archive.extractfile("slow.log")
        assert log is not None
        assert "interrupts: 1" in log.read().decode()


def test_a_runner_that_is_killed_takes_its_stage_along(tmp_path: Path) -> None:
    program = PROGRAM.replace(
        '(job.out.parent / "begun").touch()',
        'import os; (job.out.parent / "begun").write_text(str(os.getpid()))',
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "out")], cwd=ROOT)
    assert until(lambda: (tmp_path / "begun").exists() and (tmp_path / "begun").read_text())
    process.kill()
    process.wait()
    child = int((tmp_path / "begun").read_text())
    assert until(lambda: not _alive(child), 5.0), "the stage goes on without a limit"
    assert verdicts(tmp_path / "out") == {"quick": "ok"}, "what was done before is whole"
    assert RESULTS in names_in(tmp_path / "out")


def test_a_long_log_is_archived_by_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "END_BYTES", 100)

    def talks(job: Job) -> None:
        print("first line")
        for number in range(1000):
            print(f"line {number}")
        print("last line")

    assert Runner([stage("a", talks)], tmp_path, 60).run() == 0
    with tarfile.open(tmp_path / ARCHIVE) as archive:
        log = archive.extractfile("a.log")
        assert log is not None
        text = log.read().decode()
    assert text.startswith("first line")
    assert text.endswith("last line\n")
    assert "bytes ..." in text
    assert len(text) < 300
    assert lines_of(tmp_path, "stage")[0]["last_line"] == "last line"


def test_what_cannot_be_written_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, *_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Runner, "_write_archive", full)
    assert Runner([stage("a", says("a")), stage("b", says("b"))], tmp_path, 60).run() == 0
    assert verdicts(tmp_path) == {"a": "ok", "b": "ok"}
