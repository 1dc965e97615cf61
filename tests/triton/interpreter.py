"""Whether the installed Triton's interpreter runs here: asked once, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache


@lru_cache(maxsize=1)
def interpreter_fault() -> str | None:
    """Why it does not, or None."""
    code = "import vidfast.backends.triton as t; print(t.BACKEND.unavailable() or '')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return f"the question failed: {done.stderr[-300:]}"
    return done.stdout.strip() or None
