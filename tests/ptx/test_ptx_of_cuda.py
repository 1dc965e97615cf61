"""nvcc's PTX of the CUDA kernels, interpreted: every output against the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bounds import check_call
from errors import Fault
from interpreted import Install, Interpreted
from memory import GlobalMemory
from nvcc_launches import NvccLaunches
from places import Place
from problems import BF16, FP32, Case
from regimes import (
    CUT_RUNS,
    EDGES,
    LONG_ROWS,
    MANY_CHANNELS,
    MASKED,
    ONE_CHANNEL,
    PIECES,
    PROBLEMS,
    SHORT_PLANES,
    SWEPT,
    VECTORS,
    WHOLE_RUNS,
    Problem,
    all_problems,
    check_any_order,
)
from waves import Launch

import vidfast


@pytest.fixture
def cuda(install: Install, nvcc_launches: NvccLaunches) -> tuple[Interpreted, Place]:
    return install("cuda", nvcc_launches)


@pytest.fixture(autouse=True)
def _as_it_was(native: Any) -> Iterator[None]:
    machine, before = native.machine(), native.cuda_free_numbers()
    device, processors = machine.device, machine.processors
    yield
    machine.device, machine.processors = device, processors
    for name, value in before.items():
        native.cuda_set_free_number(name, value)


@pytest.mark.parametrize("problem", [*PROBLEMS, *MASKED], ids=str)
def test_results(cuda: tuple[Interpreted, Place], problem: Problem) -> None:
    problem.check(cuda[1])


def test_the_problems_take_every_way(cuda: tuple[Interpreted, Place]) -> None:
    """Which kernels of sums a shape takes, so that a change of the plan does not leave one out unseen."""
    backend, place = cuda

    def sweep_and_finish(case: Case) -> tuple[str, str, bool]:
        backend.ran.clear()
        place.nll(*case.tensors(FP32))
        (sweep, _), (finish, grid) = backend.ran
        return sweep.split("<")[0], finish, grid[0] > 1

    assert {
        c.name: sweep_and_finish(c)[0] for c in (SHORT_PLANES, PIECES, EDGES, ONE_CHANNEL)
    } == dict.fromkeys(("short_planes", "pieces", "edges", "one_channel"), "planes")
    assert sweep_and_finish(CUT_RUNS)[:2] == ("rows", "finish<true>")
    assert sweep_and_finish(WHOLE_RUNS)[:2] == ("rows", "finish<false>")
    assert sweep_and_finish(MANY_CHANNELS) == ("rows", "finish<false>", True)


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
@pytest.mark.parametrize("case", [VECTORS, LONG_ROWS], ids=lambda c: c.name)
def test_what_does_not_count_is_not_loaded(
    install: Install, nvcc_launches: NvccLaunches, case: Case, strategy: str
) -> None:
    """Of vectors without a position that counts, and of such tokens: a load of one is a fault."""
    mean, target, alpha = case.tensors(FP32)
    mask = torch.ones(case.shape[0], *case.shape[2:], dtype=torch.bool)
    mask.view(-1, 16 if mask.dim() > 1 else 1)[1::3] = False
    forgotten = ~mask

    def launches(
        primitive: str, inputs: tuple[Any, ...], outputs: dict[str, Any], memory: GlobalMemory
    ) -> list[Launch]:
        made = nvcc_launches(primitive, inputs, outputs, memory)
        activations = {"forward": inputs[:2], "forward_grad": inputs[:2], "backward": inputs[1:3]}
        for x in activations.get(primitive, ()):
            for position in forgotten.nonzero():
                memory.forget(x.movedim(1, -1)[tuple(position)])
        return made

    _, place = install("cuda", launches)
    check_call(place, mean, target, alpha, strategy=strategy, mask=mask)
    forgotten.view(-1)[0] = True
    with pytest.raises(Fault, match="that was not written"):
        check_call(place, mean, target, alpha, strategy=strategy, mask=mask)


def test_alphas_gradient_alone(cuda: tuple[Interpreted, Place]) -> None:
    backend, place = cuda
    mean, target, alpha = SHORT_PLANES.tensors(FP32)
    want = torch.autograd.grad(
        vidfast.gaussian_nll(mean, target, alpha.requires_grad_(), backend="reference"), alpha
    )
    got = torch.autograd.grad(place.nll(mean, target, alpha), alpha)
    torch.testing.assert_close(got, want)
    assert backend.ran[-1][0] == "alpha_only"


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_gradient_that_is_scaled_twice(cuda: tuple[Interpreted, Place], dtype: torch.dtype) -> None:
    """Out of place, since the graph is retained, and then in place."""
    _, place = cuda
    mean, target, alpha = EDGES.tensors(dtype)
    loss = place.nll(mean.requires_grad_(), target, alpha, strategy="one_pass")
    g = torch.tensor(3.0)
    first = torch.autograd.grad(loss, mean, g, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, mean, g)[0])


@pytest.mark.parametrize("case", [MANY_CHANNELS, CUT_RUNS, PIECES], ids=lambda c: c.name)
def test_the_order_of_blocks_does_not_show(cuda: tuple[Interpreted, Place], case: Case) -> None:
    check_any_order(*cuda, case)


@pytest.mark.parametrize("processors", [1, 100])
def test_the_size_of_the_grid_does_not_show(
    cuda: tuple[Interpreted, Place], native: Any, processors: int
) -> None:
    """One load of the device, of fewer blocks than chunks or of more."""
    native.machine().device, native.machine().processors = 40 + processors % 7, processors
    Problem(CUT_RUNS, FP32, FP32).check(cuda[1])


@pytest.mark.parametrize("name", ["kOverlap", "kPrefetch"])
@pytest.mark.parametrize("case", [PIECES, LONG_ROWS], ids=lambda c: c.name)
def test_without_what_only_makes_it_faster(
    cuda: tuple[Interpreted, Place], native: Any, case: Case, name: str
) -> None:
    native.cuda_set_free_number(name, 0)
    Problem(case, FP32, FP32).check(cuda[1])


@pytest.mark.slow(reason="every shape in every pair of dtypes: ten minutes")
@pytest.mark.parametrize("case", SWEPT, ids=lambda c: c.name)
def test_every_problem(cuda: tuple[Interpreted, Place], case: Case) -> None:
    for problem in all_problems(case):
        problem.check(cuda[1])
