"""Runs some cases and says of each that failed how to run it alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


def run_all(
    seeds: range,
    run: Callable[[int], None],
    describe: Callable[[int], object],
    file: str,
    note: Callable[[object], None] = lambda _: None,
) -> None:
    """Runs every seed; fails with all that failed.

    Args:
        seeds: The cases.
        run: Raises if a case fails.
        describe: Its one line.
        file: The test's file, for the command that repeats a case.
        note: Told each seed before it runs.
    """
    failed = []
    for seed in seeds:
        note(f"seed {seed} of {Path(file).name}")
        try:
            run(seed)
        except Exception as error:
            first = str(error).strip().split("\n")[0][:300]
            failed.append(
                f"{describe(seed)}\n  {type(error).__name__}: {first}\n"
                f"  alone: pytest tests/fuzz/{Path(file).name} --fuzz 1 --fuzz-seed {seed}"
            )
            last = error
    if failed:
        text = f"{len(failed)} of {len(seeds)} cases failed\n" + "\n".join(failed)
        if len(seeds) == 1:
            raise AssertionError(text) from last
        pytest.fail(text, pytrace=False)
