"""Many trainings, several at once in processes of their own, with one progress bar in steps."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..errors import UserError
from .base import cores
from .progress import skip
from .runs import Job, Result, execute, stored

_steps: Any = None


class Counter:
    """A progress bar's stand-in in a worker: hands the steps done to the process that has the bar."""

    def __init__(self, sink: Callable[[int], None]) -> None:
        self.sink, self.waiting, self.sent = sink, 0, time.monotonic()

    def update(self, n: int, /) -> None:
        self.waiting += n
        # A message a step would cost more than some steps do.
        if time.monotonic() - self.sent > 0.3:
            self.flush()

    def flush(self) -> None:
        self.sink(self.waiting)
        self.waiting, self.sent = 0, time.monotonic()


def run_all(
    jobs: Sequence[Job],
    folder: Path,
    *,
    workers: int,
    bar: tqdm[Any],
    each: Callable[[Job, Result], None] = lambda job, result: None,
) -> list[Result]:
    """The results in the order of the jobs; what is stored already is not done again.

    each: called in this process with every job as it ends. On an interrupt the workers stop, and what they have
    done by their last checkpoints is continued by the next call. Raises UserError where a worker died.
    """
    results: dict[str, Result] = {}
    missing: dict[str, Job] = {}

    def done(job: Job, result: Result) -> None:
        results[job.digest] = result
        each(job, result)

    for job in jobs:
        result = stored(job, folder)
        if result is None:
            missing[job.digest] = job
        elif job.digest not in results:
            skip(bar, job.options.steps)
            done(job, result)

    if workers == 1 or len(missing) == 1:
        for job in missing.values():
            counter = Counter(bar.update)
            done(job, execute(job, folder, counter))
            counter.flush()
    elif missing:
        _in_processes(list(missing.values()), folder, min(workers, len(missing)), bar, done)
    return [results[job.digest] for job in jobs]


def _in_processes(
    jobs: Sequence[Job],
    folder: Path,
    workers: int,
    bar: tqdm[Any],
    done: Callable[[Job, Result], None],
) -> None:
    context = multiprocessing.get_context("spawn")
    steps = context.Queue()
    finished = threading.Event()

    def drain() -> None:
        while not finished.is_set():
            try:
                bar.update(steps.get(timeout=0.2))
            except queue.Empty:
                continue

    drainer = threading.Thread(target=drain, daemon=True)
    drainer.start()
    executor = ProcessPoolExecutor(
        workers, context, initializer=_start, initargs=(steps, max(1, cores() // workers))
    )
    try:
        waiting: dict[Future[Result], Job] = {executor.submit(_work, job, folder): job for job in jobs}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                done(waiting.pop(future), future.result())
        executor.shutdown()
    except BrokenProcessPool:
        raise UserError(
            "a process that was training died, for want of memory perhaps: give fewer --jobs; the same command "
            "continues where this one stopped"
        ) from None
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        finished.set()
        drainer.join()
        steps.close()


def _start(steps: Any, threads: int) -> None:
    """In a new worker."""
    global _steps
    _steps = steps
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, and they would wait for more work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: Job, folder: Path) -> Result:
    counter = Counter(_steps.put)
    result = execute(job, folder, counter)
    counter.flush()
    return result
