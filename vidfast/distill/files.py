"""Files that are either the old one or the new one whole, and checkpoints that cannot run code."""

from __future__ import annotations

import csv
import io
import os
import pickle
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, missing or of another run; the text names the file and says why."""


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that takes `path`'s place when the block ends without an exception, atomically.

    Raises OSError where the folder cannot be written.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner reads; a result should get the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path, names: Sequence[str]) -> None:
    """Remove what a killed process left of files that it was writing with `replacing`."""
    for name in names:
        for path in folder.glob(f".{name}.*"):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as CSV, atomically; the columns are all keys in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Save tensors and plain Python values, atomically."""
    with replacing(path) as file:
        torch.save(dict(state), file)


def load_checkpoint(path: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Load what `save_checkpoint` saved, onto the CPU, with the unpickler that runs no code.

    Raises CheckpointError if the file is missing, damaged, or lacks one of `keys`.
    """
    try:
        # On a damaged file torch may warn of what it takes for the format, before it fails.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
        # torch reads tensors without looking at the archive's checksums.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise RuntimeError(f"the checksum of {damaged} is wrong")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such checkpoint") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: wanted a checkpoint file, this is a folder") from None
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OSError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path}: damaged, or not a checkpoint ({type(error).__name__}: "
            f"{reason[0][:120] if reason else 'empty'})"
        ) from error
    missing = [key for key in keys if not isinstance(state, dict) or key not in state]
    if missing:
        raise CheckpointError(
            f"{path}: not a checkpoint of this kind, it lacks {', '.join(map(repr, missing))}"
        )
    assert isinstance(state, dict)
    return state
