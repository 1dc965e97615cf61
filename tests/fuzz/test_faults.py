"""The fuzz can fail: what is broken on purpose is noticed within the usual number of cases."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import test_calls
import test_vid_calls
import vid_cases
from cases import make_case
from execute import run_case
from faults import FAULTS, VID_FAULTS, broken
from places import Place
from vid_execute import run_vid_case


def first_failure(backend: Place | None, cases: int) -> int | None:
    """The first seed whose case fails; hooks are left out, which only ever change what is saved."""
    for seed in range(cases):
        try:
            if backend is None:
                run_vid_case(replace(vid_cases.make_case(seed), hook="none"))
            else:
                run_case(replace(make_case(seed), hook="none"), backend)
        except (AssertionError, RuntimeError):
            return seed
    return None


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_back_end_is_noticed(backend: Place, name: str) -> None:
    with broken(backend.name, FAULTS[name]()):
        assert first_failure(backend, test_calls.CASES) is not None


@pytest.mark.parametrize("name", VID_FAULTS)
def test_a_broken_regressor_is_noticed(name: str) -> None:
    with mock.patch.object(*VID_FAULTS[name]):
        assert first_failure(None, test_vid_calls.CASES) is not None


def test_nothing_is_noticed_where_nothing_is_broken(backend: Place) -> None:
    assert first_failure(backend, 300) is None
    assert first_failure(None, 100) is None
