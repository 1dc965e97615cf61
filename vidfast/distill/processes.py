"""A command in several processes, as `torchrun` and `accelerate launch` start them: one speaks and writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import TypeVar

import torch

T = TypeVar("T")


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_cpu(device: str) -> bool:
    """Whether to tell Accelerate that it is on the CPU: without a GPU it joins several processes only if told so."""
    return device == "cpu" or (process_count() > 1 and not torch.cuda.is_available())


def is_main() -> bool:
    """Whether this is the process that writes files: the first of several, or the only one."""
    return process_count() == 1 or int(os.environ.get("RANK", "0")) == 0


@contextmanager
def one_voice(*, cpu: bool) -> Iterator[None]:
    """Join the other processes for the block, in which only the first one's stdout and stderr go anywhere.

    Does nothing where there is one process. cpu: the processes compute on the CPU, whatever else there is.
    """
    if process_count() == 1:
        yield
        return
    from accelerate import PartialState

    state = PartialState(cpu=cpu)
    with open(os.devnull, "w") as nowhere:
        if is_main():
            yield
        else:
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield
    # Not after an exception: the others may be waiting for this process, and its end is what frees them.
    with suppress(RuntimeError):
        state.destroy_process_group()


def from_main(work: Callable[[], T]) -> T:
    """What `work` returns in the first process, in all of them; only that one does it.

    If it raises there, the others leave without a word.
    """
    if process_count() == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    done: list[tuple[bool, T | None]] = [(False, None)]
    failed: BaseException | None = None
    if is_main():
        try:
            done = [(True, work())]
        except BaseException as error:
            failed = error
    broadcast_object_list(done, from_process=0)
    if failed is not None:
        raise failed
    good, value = done[0]
    if not good:
        raise SystemExit(2)
    return value  # type: ignore[return-value]
