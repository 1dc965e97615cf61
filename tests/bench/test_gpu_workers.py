"""Work shared by processes: a fault costs one item."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from bench.gpu.workers import ask, share

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("processes", [1, 2, 3, 20])
def test_every_item_has_its_result_in_order(processes: int, tmp_path: Path) -> None:
    found = share(list(range(7)), lambda n: {"square": n * n}, processes, tmp_path / "w")
    assert found == [{"square": n * n} for n in range(7)]
    assert not (tmp_path / "w").exists(), "nothing is left behind"


def test_other_children_of_the_process_are_left_alone(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
    found = share(list(range(3)), lambda n: {"n": time.sleep(0.3) or n}, 1, tmp_path / "w")
    assert found == [{"n": n} for n in range(3)]
    assert other.wait() == 7


def test_a_question_is_asked_in_a_process_of_its_own(tmp_path: Path) -> None:
    answer, error = ask(os.getpid, tmp_path / "w")
    assert error is None
    assert answer != os.getpid()
    assert ask(lambda: 1 // 0, tmp_path / "w")[0] is None
    assert ask(lambda: os._exit(5), tmp_path / "w") == (None, "the process ended with 5")


def test_nothing_to_do(tmp_path: Path) -> None:
    assert share([], lambda n: {}, 3, tmp_path / "w") == []


def faulty(n: int) -> dict[str, Any]:
    if n == 1:
        raise ValueError("one is\nwrong")
    if n == 3:
        os._exit(11)
    if n == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"process": os.getpid()}


@pytest.mark.parametrize("processes", [1, 2])
def test_an_item_that_breaks_its_process_costs_itself_alone(processes: int, tmp_path: Path) -> None:
    found = share(list(range(7)), faulty, processes, tmp_path / "w")
    assert found[1] == {"error": "ValueError: one is wrong"}
    assert found[3] == {"error": "the process ended with 11"}
    assert found[4] == {"error": "the process ended with -9"}
    assert all(found[n] is not None and "process" in found[n] for n in (0, 2, 5, 6))  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["error", "failed"])
@pytest.mark.parametrize("is_broken", [True, False])
def test_after_a_fault_of_the_device_another_process_goes_on(
    is_broken: bool, kind: str, tmp_path: Path
) -> None:
    """A context with an illegal access in it fails every later call; another error leaves it as it was."""

    def work(n: int) -> dict[str, Any]:
        if n == 1 and kind == "error":
            raise RuntimeError("CUDA: an illegal memory access was encountered")
        return {"process": os.getpid(), "failed": int(n == 1)}

    found = share(list(range(4)), work, 1, tmp_path / "w", lambda: is_broken)
    first, second, third, last = found
    assert first is not None
    assert second is not None
    assert third is not None
    assert second.get("error", "") == (
        "" if kind == "failed" else "RuntimeError: CUDA: an illegal memory access was encountered"
    )
    assert (first["process"] != third["process"]) == is_broken
    assert third == last


def test_a_device_is_asked_only_where_something_went_wrong(tmp_path: Path) -> None:
    found = share([1, 2], lambda n: {"failed": 0}, 1, tmp_path / "w", lambda: bool(1 / 0))
    assert found == [{"failed": 0}] * 2


PROGRAM = """
import sys, time
from pathlib import Path
from bench.gpu.workers import share

def work(n):
    if n < 2:
        return {"n": n}
    Path(sys.argv[1], f"waits{n}").touch()
    time.sleep(60)

print(share(list(range(4)), work, 2, Path(sys.argv[1]) / "w"))
"""


def test_an_interrupt_keeps_what_is_done(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert until(lambda: len(list(tmp_path.glob("waits*"))) == 2)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=30)
    assert printed.strip() == "[{'n': 0}, {'n': 1}, None, None]"
