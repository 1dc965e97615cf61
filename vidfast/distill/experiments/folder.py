"""A folder that a call writes to: one call at a time works in it, and the time of all of them is kept."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError
from ..files import write_text

# Whoever holds this file's lock works in the folder; the file holds its process id and its machine's name.
LOCK = ".vidfast.lock"
CALLS = "calls.json"

# File systems that cannot lock; there nobody is kept out.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

_held: set[int] = set()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder and keep other calls out of it for the block.

    The lock is the operating system's and ends with the process, however that ends. Raises UserError, having written
    nothing, where another call holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor = _locked(path)
    _held.add(descriptor)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
        yield
    finally:
        # Removed while it is held: who has opened it in between finds that it is gone, and makes another.
        with suppress(OSError):
            path.unlink()
        _held.discard(descriptor)
        os.close(descriptor)


def _locked(path: Path) -> int:
    """The open file, locked. Raises UserError where another process has the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
        except BlockingIOError:
            who = _holder(os.pread(descriptor, 300, 0).decode(errors="replace"))
            os.close(descriptor)
            raise UserError(
                f"{path.parent}: {who} is working in it; wait until it has ended, or choose another --out"
            ) from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(text: str) -> str:
    """Who the lock's file says that it is."""
    process, _, machine = text.strip().partition(" ")
    if not process.isdigit():
        return "another process"
    return f"process {process}" + (f" of {machine}" if machine != socket.gethostname() else "")


def _let_go() -> None:
    """In a forked child, a loader's worker: it would keep the lock of a parent that is killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def timed(folder: Path) -> Iterator[list[float]]:
    """The seconds of every call for this folder, interrupted ones included; at the block's end with this one's."""
    path = folder / CALLS
    try:
        calls = [float(seconds) for seconds in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        calls = []
    started = time.monotonic()
    try:
        yield calls
    finally:
        calls.append(time.monotonic() - started)
        write_text(path, json.dumps(calls) + "\n")


def took(calls: Sequence[float]) -> str:
    """The time of all calls in words."""
    return f"{sum(calls):.0f} s" + (f" in {len(calls)} calls" if len(calls) > 1 else "")
