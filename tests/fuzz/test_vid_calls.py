"""Random calls of VIDLoss, fused and module by module."""

from __future__ import annotations

from collections.abc import Callable

from report import run_all
from vid_cases import make_case
from vid_execute import run_vid_case

CASES = 500


def test_random_regressors(seeds: range, note: Callable[[object], None]) -> None:
    run_all(seeds, lambda seed: run_vid_case(make_case(seed)), make_case, __file__, note)
