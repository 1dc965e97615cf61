"""What the generators draw in their first few hundred seeds, and what the guard zones notice."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from random import Random
from unittest import mock

import cases
import numpy as np
import pytest
import torch
import vid_cases
from cases import Case, make_case
from execute import NllCall
from guarded import LAYOUTS, SENTINELS, Memory, Plan, plan
from paths import PATHS
from places import Place
from results import results_in
from saved_hooks import HOOKS
from vid_cases import VidCase
from vid_execute import run_vid_case

from vidfast.head import way
from vidfast.head.function import Head

DRAWN = [make_case(seed) for seed in range(400)]
VID_DRAWN = [vid_cases.make_case(seed) for seed in range(400)]

EXPECTED: dict[str, Iterable[object]] = {
    "mean_layout": LAYOUTS,
    "target_layout": LAYOUTS,
    "alpha_layout": cases.ALPHA_LAYOUTS,
    "values": cases.VALUES,
    "sentinel": SENTINELS,
    "eps": cases.EPS,
    "reduction": cases.REDUCTIONS,
    "full": (False, True),
    "weight": cases.WEIGHTS,
    "g": cases.G,
    "incoming": cases.INCOMING,
    "strategy": cases.STRATEGIES,
    "inplace": (False, True),
    "aliased": (False, True),
    "wanted": cases.WANTED,
    "path": PATHS,
    "hook": ("none", *HOOKS),
    "outputs": cases.OUTPUTS,
    "threads": (1, 2, 3),
    "channel_dim": range(-5, 5),
}


@pytest.mark.parametrize("field", EXPECTED)
def test_everything_is_drawn(field: str) -> None:
    assert set(EXPECTED[field]) == {getattr(case, field) for case in DRAWN}


@pytest.mark.parametrize("pair", [("mean", "target"), ("mean", "alpha"), ("target", "alpha")], ids="-".join)
def test_every_pair_of_dtypes_is_drawn(pair: tuple[str, str]) -> None:
    drawn = {tuple(getattr(case, name) for name in pair) for case in DRAWN}
    assert drawn == set(itertools.product(cases.DTYPES, repeat=2))


def test_combinations_are_drawn() -> None:
    assert {len(case.shape) for case in DRAWN} == {1, 2, 3, 4, 5}
    assert any(1 in case.shape for case in DRAWN)
    assert any(max(case.shape) > 4000 for case in DRAWN)
    more = [make_case(seed) for seed in range(1000)]
    assert {(case.hook, case.one_pass) for case in more} == set(
        itertools.product(("none", *HOOKS), (False, True))
    )
    inplace = {case.path for case in more if case.inplace and case.one_pass}
    assert inplace == set(PATHS) - set(cases.WITHOUT_GRADIENT)
    assert any(case.asked != case.wanted for case in DRAWN)


def test_everything_is_drawn_for_the_regressor() -> None:
    def drawn(field: str) -> set[object]:
        return {getattr(case, field) for case in VID_DRAWN}

    assert drawn("student_layout") == drawn("teacher_layout") == set(LAYOUTS)
    assert drawn("student") == drawn("teacher") == set(cases.DTYPES)
    assert drawn("module") == {"fp32", "fp64"}
    assert drawn("hook") == {"none", *HOOKS}
    assert drawn("path") == set(PATHS) - {"create_graph"}
    assert drawn("arrangement") == {None, *vid_cases.ARRANGEMENTS}
    assert drawn("part") == set(vid_cases.PARTS)
    assert {len(case.student_size) for case in VID_DRAWN} == {0, 1, 2, 3}
    assert any(case.student_size != case.teacher_size for case in VID_DRAWN)
    assert {case.hook for case in VID_DRAWN if case.may_be_fused} == {"none", *HOOKS}


def test_most_regressors_are_fused() -> None:
    chosen = [case for case in VID_DRAWN[:120] if case.may_be_fused and case.hook == "none"]
    for case in chosen:
        with (
            mock.patch.object(Head, "apply", wraps=Head.apply) as learning,
            mock.patch.object(way.compute, "loss_alone", wraps=way.compute.loss_alone) as alone,
        ):
            run_vid_case(case)
            assert learning.called or alone.called, case
    assert len(chosen) > 15


def test_a_case_is_made_from_its_seed_and_prints_as_one_line() -> None:
    for seed in range(50):
        assert make_case(seed) == make_case(seed)
        assert eval(repr(make_case(seed)), {"Case": Case}) == make_case(seed)
        assert eval(repr(vid_cases.make_case(seed)), {"VidCase": VidCase}) == vid_cases.make_case(seed)
        assert "\n" not in repr(make_case(seed))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_have_the_elements_that_they_say(layout: str) -> None:
    memory, shape = Memory(), (3, 1, 4, 2)
    x = memory.place(
        "x", plan(layout, shape, 2, Random(3)), np.arange(1.0, 999.0), torch.float32, torch.device("cpu")
    )
    assert x.shape == shape
    assert x.isfinite().all()
    memory.check()


@pytest.mark.parametrize("sentinel", ["nan", "bits"])
def test_guard_zones_notice_what_is_written(sentinel: str) -> None:
    for at, message in ((-1, "beside"), (12, "beside"), (2, "beside"), (0, "was written")):
        memory = Memory(sentinel)
        x = memory.place("x", Plan((2, 2), (6, 1)), np.ones(9), torch.bfloat16, torch.device("cpu"))
        memory.check()
        x.as_strided((1,), (1,), x.storage_offset() + at).fill_(3.0)
        with pytest.raises(AssertionError, match=message):
            memory.check()


def test_results_are_stored_between_sentinels(backend: Place) -> None:
    case = next(c for c in DRAWN if c.one_pass and not c.inplace and c.asked == "ma")
    call = NllCall(replace(case, path="grad", hook="none"), backend)
    inputs = len(call.memory.zones)
    with results_in("guarded", call.memory):
        x = call.leaves()
        loss = call.run(x)
        call.grad(loss, x, 3.0)
    names = [zone.name for zone in call.memory.zones[inputs:]]
    assert names.count("a result") >= 3  # the loss, d/d mean and d/d alpha at least
