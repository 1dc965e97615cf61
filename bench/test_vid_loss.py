"""VIDLoss with its regressor, forward and backward, on the matched layers of the papers' network pairs."""

from __future__ import annotations

from collections.abc import Callable

from bench.cases import vid_loss_cases
from bench.modules import VID_LOSS, ModuleSuite


def suite(full: bool, device: str) -> ModuleSuite:
    return ModuleSuite("VIDLoss", vid_loss_cases, full, device, VID_LOSS)


def test_vid_loss(case: str, contender: str, record: Callable[[], None]) -> None:
    record()
