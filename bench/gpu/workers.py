"""The device, and work shared by processes on it: what breaks a process, or the device in it, costs only itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from bench.lines import one_line

DEVICE = "cuda"
MOST_PROCESSES = 12
# A process that finds the device's context broken ends; another goes on with what is left of its share.
BROKEN = 3


def processes() -> int:
    return max(1, min(MOST_PROCESSES, os.cpu_count() or 1))


def backends() -> list[str]:
    from bench.backends import runnable

    return [name for name in runnable(DEVICE) if name != "cpu"]


def device_is_broken() -> bool:
    """Whether nothing can be done any more on the CUDA device of this process, as after an illegal access."""
    import torch

    try:
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def share(
    items: Sequence[Any],
    work: Callable[[Any], dict[str, Any]],
    processes: int,
    results: Path,
    is_broken: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any] | None]:
    """work(item) for every item, in `processes` processes that are forked from this one.

    The device must not have been used in this process: a forked child cannot use it then.

    Args:
        items: What is to be done.
        work: Returns something that is JSON; where it raises, the item's result is {"error": the error in one line}.
        processes: How many, at most one an item.
        results: A folder for their files, gone afterwards.
        is_broken: Asked after an item with a result for "error" or "failed". A process for which it holds ends, and
            another goes on with what is left of its share.

    Returns:
        The results in the order of items. {"error": ...} too for an item whose process ended; None where an interrupt
        came first.
    """
    results.mkdir(parents=True, exist_ok=True)
    queues = [list(range(first, len(items), processes)) for first in range(min(processes, len(items)))]
    running: dict[int, int] = {}

    def begin(index: int) -> None:
        # no interrupt between a process and its place in `running`
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        process = os.fork()
        if process == 0:
            _run(items, work, queues[index], results / f"{index}.jsonl", is_broken)
        running[process] = index
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])

    found: dict[int, dict[str, Any]] = {}
    try:
        for index in range(len(queues)):
            begin(index)
        while running:
            process, status = _next_to_end(running)
            index = running.pop(process)
            done = _take(results / f"{index}.jsonl")
            found |= done
            left = [item for item in queues[index] if item not in done]
            code = os.waitstatus_to_exitcode(status)
            if left and code != BROKEN:
                found[left[0]] = {"error": f"the process ended with {code}"}
                left = left[1:]
            queues[index] = left
            if left:
                begin(index)
    except KeyboardInterrupt:
        # a second one must not cost what the first left
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for process in running:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        for index in range(len(queues)):
            found |= _take(results / f"{index}.jsonl")
        signal.signal(signal.SIGINT, handler)
    shutil.rmtree(results, ignore_errors=True)
    return [found.get(item) for item in range(len(items))]


def ask(question: Callable[[], Any], results: Path) -> tuple[Any, str | None]:
    """(answer, None) to a question that is asked in a process of its own, or (None, the error in one line).

    Raises:
        KeyboardInterrupt: An interrupt came first.
    """
    result = share([None], lambda _: {"answer": question()}, 1, results)[0]
    if result is None:
        raise KeyboardInterrupt
    return result.get("answer"), result.get("error")


def _next_to_end(processes: Collection[int]) -> tuple[int, int]:
    """Waits until one of them ends: (process, status). Others of this process's children are not ours to wait for."""
    while True:
        for process in processes:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                return ended, status
        time.sleep(0.002)


def _run(
    items: Sequence[Any],
    work: Callable[[Any], dict[str, Any]],
    queue: Sequence[int],
    path: Path,
    is_broken: Callable[[], bool],
) -> None:
    """The child: a line a finished item. Never returns."""
    code = 0
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that shares the work ends this one
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        with path.open("w", encoding="utf-8", buffering=1) as file:
            for number in queue:
                try:
                    result = work(items[number])
                except Exception as error:
                    result = {"error": one_line(error)}
                file.write(json.dumps([number, result]) + "\n")
                if (result.get("error") or result.get("failed")) and is_broken():
                    code = BROKEN
                    break
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _take(path: Path) -> dict[int, dict[str, Any]]:
    """What a process has finished, and its file away."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    path.unlink()
    found = {}
    for line in lines:
        try:
            number, result = json.loads(line)
        except ValueError:  # cut off while it was written
            break
        found[number] = result
    return found
