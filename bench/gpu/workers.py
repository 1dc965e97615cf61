"""Items of work shared by processes: an item that breaks its process, or the device under it, costs only itself."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.lines import one_line

# A process that finds the device's context broken ends; another goes on with what is left of its share.
BROKEN = 3


def share(
    items: Sequence[Any], work: Callable[[Any], dict[str, Any]], processes: int, results: Path
) -> list[dict[str, Any] | None]:
    """work(item) for every item, in `processes` processes that are forked from this one.

    `results` is a folder for their files. What `work` returns must be JSON; an item whose process ended, or whose work
    raised, has {"error": ...} instead. In the order of items; None where an interrupt came first.

    The device must not have been used in this process: a forked child cannot use it then.
    """
    results.mkdir(parents=True, exist_ok=True)
    queues = [list(range(first, len(items), processes)) for first in range(min(processes, len(items)))]
    running: dict[int, int] = {}

    def begin(index: int) -> None:
        process = os.fork()
        if process == 0:
            _run(items, work, queues[index], results / f"{index}.jsonl")
        running[process] = index

    for index in range(len(queues)):
        begin(index)
    found: dict[int, dict[str, Any]] = {}
    try:
        while running:
            process, status = os.wait()
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
        for process, index in running.items():
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            found |= _take(results / f"{index}.jsonl")
    results.rmdir()
    return [found.get(item) for item in range(len(items))]


def _run(
    items: Sequence[Any], work: Callable[[Any], dict[str, Any]], queue: Sequence[int], path: Path
) -> None:
    """The child: a line a finished item. Never returns."""
    code = 0
    try:
        with path.open("w", encoding="utf-8", buffering=1) as file:
            for number in queue:
                try:
                    result = work(items[number])
                except Exception as error:
                    result = {"error": one_line(error)}
                file.write(json.dumps([number, result]) + "\n")
                if "CUDA error" in result.get("error", ""):
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
