"""Where the PTX that is interpreted is kept, for the lines that a fault names."""

from __future__ import annotations

import os
from pathlib import Path


def kept(part: str) -> Path | None:
    """A folder of VIDFAST_PTX_KEEP, made if it is not there; None where that is not set."""
    folder = os.environ.get("VIDFAST_PTX_KEEP")
    if not folder:
        return None
    path = Path(folder) / part
    path.mkdir(parents=True, exist_ok=True)
    return path
