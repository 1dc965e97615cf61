"""Triton's PTX for sm_90, interpreted: every output against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bounds import check_call
from errors import Fault
from interpreted import Install, Interpreted
from memory import GlobalMemory
from places import Place
from problems import BF16, FP16, FP32, FP64, Case
from regimes import (
    CHANNELS_LAST,
    CUT_RUNS,
    EDGES,
    FOR_TRITON,
    LAST_ROW,
    LONG_ROWS,
    MANY_CHANNELS,
    ONE_CHANNEL,
    SHORT_PLANES,
    STRIDED,
    SWEPT,
    VECTORS,
    WHOLE_RUNS,
    Problem,
    all_problems,
    check_any_order,
)
from waves import Launch

import vidfast
from vidfast.backends.triton import launch

# Planes, rows with one weight each, rows that gather theirs, joined ones.
MASKED = (
    Problem(VECTORS, BF16, BF16, "two_pass", mask="bool"),
    Problem(SHORT_PLANES, FP32, BF16, mask="fp32"),
    Problem(EDGES, FP32, FP32, inplace=True, mask="bool"),
    Problem(ONE_CHANNEL, FP64, FP64, "two_pass", mask="fp32"),
    Problem(CUT_RUNS, FP32, FP32, mask="bool"),
    Problem(WHOLE_RUNS, FP64, FP64, mask="fp32"),
    Problem(LAST_ROW, FP32, FP32, "two_pass", mask="fp32"),
    Problem(CHANNELS_LAST, FP16, BF16, mask="bool"),
    Problem(MANY_CHANNELS, FP32, FP32, g=1.0, mask="fp32"),
    Problem(STRIDED, BF16, BF16, inplace=True, mask="bool"),
    Problem(LONG_ROWS, FP32, FP32, mask="blocks"),
)


@pytest.fixture
def gpu(install: Install, triton_launches: Any) -> tuple[Interpreted, Place]:
    return install("triton", triton_launches)


@pytest.mark.parametrize("problem", [*FOR_TRITON, *MASKED], ids=str)
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


@pytest.mark.parametrize("case", [VECTORS, CUT_RUNS, LONG_ROWS], ids=lambda c: c.name)
def test_what_does_not_count_is_not_loaded(install: Install, triton_launches: Any, case: Case) -> None:
    """Of vectors without a position that counts, and of such rows: a load of one is a fault."""
    mean, target, alpha = case.tensors(FP32)
    mask = torch.ones(case.shape[0], *case.shape[2:], dtype=torch.bool)
    mask.view(-1, 16 if mask.dim() > 1 else 1)[1::3] = False
    forgotten = ~mask

    def launches(
        primitive: str, inputs: tuple[Any, ...], outputs: dict[str, Any], memory: GlobalMemory
    ) -> list[Launch]:
        made: list[Launch] = triton_launches(primitive, inputs, outputs, memory)
        if primitive in ("forward", "forward_grad"):
            for x in inputs[:2]:
                for position in forgotten.nonzero():
                    memory.forget(x.movedim(1, -1)[tuple(position)])
        return made

    _, place = install("triton", launches)
    check_call(place, mean, target, alpha, strategy="one_pass", mask=mask)
    forgotten.view(-1)[0] = True
    with pytest.raises(Fault, match="that was not written"):
        check_call(place, mean, target, alpha, strategy="one_pass", mask=mask)


@pytest.mark.parametrize("kind", [torch.uint8, FP32, FP64], ids=str)
def test_totals(gpu: tuple[Interpreted, Place], kind: torch.dtype) -> None:
    """In one launch and in two, of weights at any address."""
    for count, ran in ((5, ["total"]), ((1 << 17) + 1, ["sum_positions", "total"])):
        found = []
        weights = (
            torch.randint(0, 255, (count,)).to(kind) if kind is torch.uint8 else torch.rand(count, dtype=kind)
        )
        for shift in (0, 1):
            there = torch.zeros(count + 1, dtype=kind)[shift : count + shift].copy_(weights)
            totals = torch.empty(2, dtype=FP64)
            gpu[0].total(there, torch.tensor(0.5), count, 3.0, 7, totals=totals)
            found.append(totals)
        assert [name for name, _ in gpu[0].ran[-len(ran) :]] == ran
        m = weights.double().sum()
        torch.testing.assert_close(found[0], torch.stack([m, 1.5 / (7 * m)]), rtol=1e-14, atol=0)
        assert torch.equal(*found), "the sum follows from the address"


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
