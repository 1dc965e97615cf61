"""A folder that one call works in: others are refused and told who it is, however it ended nobody is kept out later."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vidfast.cli import main
from vidfast.distill.errors import UserError
from vidfast.distill.experiments.folder import CALLS, LOCK, held, timed, took

LONG = ["--steps=100000", "--teacher-steps=2", "--seeds=1", "--device=cpu", "--quiet"]
TABLE = ["experiment", "table1", *LONG, "--samples=2", "--rows", "Student", "--jobs=1"]
FIGURE = ["experiment", "figure2", *LONG, "--samples=2"]
DISTILL = ["distill", *LONG, "--teacher=wrn-10-1", "--samples-per-class=2"]


def wait_for(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("first", "others"),
    [
        (TABLE, [TABLE, FIGURE]),
        (DISTILL, [DISTILL, [*DISTILL, "--resume"]]),
    ],
    ids=["experiment", "distill"],
)
def test_a_second_call_is_refused_and_a_killed_one_keeps_nobody_out(
    first: list[str], others: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    where = ["--out", str(out), "--cache", str(tmp_path / "cache")]
    with running("-m", "vidfast", *first, *where) as process:
        wait_for(lambda: any(out.glob("*.json")))
        for other in others:
            before = {path: path.read_bytes() for path in out.glob("*.json")}
            assert main([*other, *where]) == 2
            error = capsys.readouterr().err
            assert f"{out}: process {process.pid} is working in it" in error
            assert error.count("\n") == 1
            assert {path: path.read_bytes() for path in out.glob("*.json")} == before
        assert process.poll() is None
        process.kill()
        process.wait()
        assert (out / LOCK).exists()
        with held(out):
            pass
        assert not (out / LOCK).exists()


def test_a_child_of_a_killed_process_keeps_nobody_out(tmp_path: Path) -> None:
    """As a loader's worker may for some seconds."""
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from vidfast.distill.experiments.folder import held\n"
        "with held(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if child:\n"
        "        print(child, flush=True)\n"
        "    time.sleep(100)\n"
    )
    with running("-c", code, str(tmp_path)) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            with pytest.raises(UserError, match=f"process {process.pid} is working"), held(tmp_path):
                pass
            process.kill()
            process.wait()
            os.kill(child, 0)
            with held(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_one_at_a_time_though_the_file_is_removed_each_time(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        done = 0
        while done < 30:
            try:
                with held(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0)
                    inside.pop()
                    done += 1
            except UserError:
                time.sleep(0)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 180
    assert list(tmp_path.iterdir()) == []


def test_a_holder_on_another_machine_is_named(tmp_path: Path) -> None:
    with held(tmp_path):
        (tmp_path / LOCK).write_text("12 elsewhere\n")
        with pytest.raises(UserError, match="process 12 of elsewhere is working in it"), held(tmp_path):
            pass
        (tmp_path / LOCK).write_text("")
        with pytest.raises(UserError, match="another process is working in it"), held(tmp_path):
            pass


def test_a_file_system_without_locks_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(code: int) -> Callable[[int, int], None]:
        def flock(descriptor: int, how: int) -> None:
            raise OSError(code, os.strerror(code))

        return flock

    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK))
    with held(tmp_path):
        pass
    monkeypatch.setattr(fcntl, "flock", refusing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), held(tmp_path):
        pass


def test_the_time_of_every_call_counts(tmp_path: Path) -> None:
    (tmp_path / CALLS).write_text("damaged")
    with timed(tmp_path) as calls:
        pass
    assert len(calls) == 1
    with pytest.raises(KeyboardInterrupt), timed(tmp_path):
        raise KeyboardInterrupt
    (tmp_path / CALLS).write_text(json.dumps([10.0, *json.loads((tmp_path / CALLS).read_text())]))
    with timed(tmp_path) as calls:
        pass
    assert len(calls) == 4
    assert took(calls) == "10 s in 4 calls"
    assert took([3.2]) == "3 s"
