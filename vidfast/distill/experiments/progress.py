"""One progress bar for a whole experiment, in steps of training."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(total: int, *, quiet: bool) -> tqdm[Any]:
    """The bar on stderr; none where quiet, and none where stderr is no terminal."""
    return tqdm(
        total=total,
        unit="step",
        disable=True if quiet else None,  # None: tqdm looks whether it is a terminal
        dynamic_ncols=True,
        smoothing=0.02,
        file=sys.stderr,
    )


def skip(bar: tqdm[Any], steps: int) -> None:
    """Advance over work done earlier without taking it for speed: the time left follows from this run's steps."""
    if not bar.disable:
        bar.initial += steps
    bar.update(steps)
