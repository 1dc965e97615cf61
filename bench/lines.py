"""A run as lines of JSON, each written when it is known: a run that is cut off keeps what it has measured.

One object a line, `kind` says which: `machine` (once, first), `row` (a contender of a case, as pytest-benchmark's file
has it), `failure` (a row that raised), `left_out` (a case for which no time was left), `check` (correctness) and
`stage` (what ran and how it ended). `vidfast report` reads them as it reads pytest-benchmark's files.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Lines:
    """The file, opened anew for every line, so that several processes may append to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, kind: str, **facts: Any) -> None:
        text = without_paths(json.dumps({"kind": kind, **facts}, default=str)) + "\n"
        with self.path.open("ab+") as file:
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a process was killed while it wrote
                    text = "\n" + text
            file.write(text.encode())


def without_paths(text: str) -> str:
    """The text without this machine's own folders, which do not belong into a stored run."""
    for folder in (str(ROOT), sys.prefix, str(Path.home()), tempfile.gettempdir()):
        if len(folder) > 1:
            text = text.replace(folder + "/", "")
    return text


def one_line(error: BaseException) -> str:
    """An error as a field of a line: its type and its text, 500 characters at most."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
