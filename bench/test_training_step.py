"""A full distillation step, WRN-40-2 -> WRN-16-1: what the loss costs, and what vidfast saves, end to end."""

from __future__ import annotations

from collections.abc import Callable

from bench.cases import training_cases
from bench.modules import TRAINING_STEP, ModuleSuite


def suite(full: bool, device: str) -> ModuleSuite:
    return ModuleSuite("training step", training_cases, full, device, TRAINING_STEP)


def test_training_step(case: str, contender: str, record: Callable[[], None]) -> None:
    record()
