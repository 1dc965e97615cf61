"""Random calls of heteroscedastic_nll in every memory layout, dtype, transform, option and way to be differentiated."""

from __future__ import annotations

from collections.abc import Callable

from heteroscedastic_cases import make_case, run_case
from places import Place
from report import run_all

CASES = 3000
BLOCK = 100


def test_random_calls(backend: Place, seeds: range, note: Callable[[object], None]) -> None:
    run_all(seeds, lambda seed: run_case(make_case(seed), backend), make_case, __file__, note)
