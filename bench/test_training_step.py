"""A full distillation step of the papers' networks: what the loss costs, and what vidfast saves, end to end."""

from __future__ import annotations

from collections.abc import Callable

from bench.module_cases import training_cases
from bench.modules import ModuleSuite
from bench.training import TRAINING_STEP
from vidfast.report.results import TRAINING


def suite(full: bool, device: str) -> ModuleSuite:
    return ModuleSuite(TRAINING, training_cases, full, device, TRAINING_STEP)


def test_training_step(case: str, contender: str, record: Callable[[], None]) -> None:
    record()
