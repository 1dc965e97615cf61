"""Saved-tensor hooks that return another dtype or shape: a RuntimeError, never a wrong value or a crash."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import Place
from violations import Violation, run_apart

CASES = 200
BLOCK = 1000  # cases of one process


@pytest.mark.parametrize("what", ["gaussian_nll", "VIDLoss"])
def test_hooks_that_break_the_contract(backend: Place, what: str, seeds: range) -> None:
    if what == "VIDLoss" and not backend.is_cpu:
        pytest.skip("a head in parts is the CPU's")
    failed = run_apart(what, backend, seeds)
    text = [
        f"seed {seed}: {Violation(what, backend, seed)}\n  {found}\n  alone: pytest "
        f"tests/fuzz/{Path(__file__).name} -k {what} --fuzz 1 --fuzz-seed {seed}"
        for seed, found in failed
    ]
    if failed:
        pytest.fail(f"{len(failed)} of {len(seeds)} cases failed\n" + "\n".join(text), pytrace=False)
