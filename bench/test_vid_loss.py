"""VIDLoss with its regressor, forward and backward, on the matched layers of the papers' network pairs."""

from __future__ import annotations

from collections.abc import Callable

from bench.module_cases import vid_loss_cases
from bench.modules import VID_LOSS, ModuleSuite
from vidfast.report.results import HEAD


def suite(full: bool, device: str) -> ModuleSuite:
    return ModuleSuite(HEAD, vid_loss_cases, full, device, VID_LOSS, graphs=True)


def test_vid_loss(case: str, contender: str, record: Callable[[], None]) -> None:
    record()
