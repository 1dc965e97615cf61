"""Triton's PTX for sm_90, interpreted: every output against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import Install, Interpreted
from places import Place
from problems import FP32, Case
from regimes import (
    CUT_RUNS,
    FOR_TRITON,
    MANY_CHANNELS,
    SHORT_PLANES,
    SWEPT,
    Problem,
    all_problems,
    check_any_order,
)

import vidfast
from vidfast.backends.triton import launch


@pytest.fixture
def gpu(install: Install, triton_launches: Any) -> tuple[Interpreted, Place]:
    return install("triton", triton_launches)


@pytest.mark.parametrize("problem", FOR_TRITON, ids=str)
def test_results(gpu: tuple[Interpreted, Place], problem: Problem) -> None:
    problem.check(gpu[1])


# What the rule does not choose: tiles behind one another, a finish of many turns, one that starts early, small tiles.
@pytest.mark.parametrize(
    "numbers",
    [{"ahead": 0}, {"finish_depth": 2}, {"overlap": 1}, {"warps": 1, "vectors": 1, "smallest_chunk": 256}],
    ids=str,
)
@pytest.mark.parametrize("case", [SHORT_PLANES, MANY_CHANNELS, CUT_RUNS], ids=lambda c: c.name)
def test_other_free_numbers(
    install: Install, triton_launches: Any, case: Case, numbers: dict[str, int]
) -> None:
    backend, place = install("triton", triton_launches.changed(**numbers))
    Problem(case, FP32, FP32).check(place)
    assert {"sweep_planes", "sweep_rows"} & {name for name, _ in backend.ran}


def test_extents_beyond_32_bits(
    install: Install, triton_launches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a chunk begins is divided in 64 bits: planes and `scale`, in place in a slice of a batch."""
    for name in ("plan", "plan_scale"):
        right = getattr(launch, name)

        def wide(*args: Any, right: Any = right) -> Any:
            cut = right(*args)
            return cut._replace(narrow=False) if hasattr(cut, "narrow") else cut

        monkeypatch.setattr(launch, name, wide)
    case = Case("strided_planes", "chunks that begin within planes", (5, 3, 17, 19), 1, "batch_slice")
    backend, place = install("triton", triton_launches.changed(warps=1, vectors=1, smallest_chunk=256))
    Problem(case, FP32, FP32, inplace=True).check(place)
    assert backend.ran[0] == ("sweep_planes", backend.ran[0][1])
    assert backend.ran[0][1][0] > 5, "a plane has several chunks"


def test_alphas_gradient_alone(gpu: tuple[Interpreted, Place]) -> None:
    mean, target, alpha = SHORT_PLANES.tensors(FP32)
    want = torch.autograd.grad(
        vidfast.gaussian_nll(mean, target, alpha.requires_grad_(), backend="reference"), alpha
    )
    torch.testing.assert_close(torch.autograd.grad(gpu[1].nll(mean, target, alpha), alpha), want)
    assert gpu[0].ran[-1][0] == "alpha_gradient"


@pytest.mark.parametrize("case", [MANY_CHANNELS, CUT_RUNS], ids=lambda c: c.name)
def test_the_order_of_blocks_does_not_show(gpu: tuple[Interpreted, Place], case: Case) -> None:
    check_any_order(*gpu, case)
    assert any(name == "finish" and grid[0] > 1 for name, grid in gpu[0].ran)


@pytest.mark.slow(reason="every shape in every pair of dtypes: half an hour, most of it in Triton's compiler")
@pytest.mark.parametrize("case", SWEPT, ids=lambda c: c.name)
def test_every_problem(gpu: tuple[Interpreted, Place], case: Case) -> None:
    for problem in all_problems(case):
        problem.check(gpu[1])
