"""Positions that count in the CPU back end's kernel for heads: every instruction set, width, layout and dtype."""

from __future__ import annotations

import math

import pytest
import torch
from head_problems import _C, CLOSE, Problem, checked
from problems import BF16, FP16, FP32, LAYOUTS, short
from torch import Tensor

from vidfast.backends import cpu
from vidfast.head import kernel
from vidfast.head.gradients import Wanted

pytestmark = pytest.mark.skipif(_C is None, reason="the extension is not built")

MODULES = [FP32, BF16, FP16]
BYTES = torch.uint8


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read before it is written shows, and so does what a tile that is left out does not write."""
    scratch, empty, dense = cpu.empty_scratch, kernel._empty, kernel.empty_dense
    monkeypatch.setattr(cpu, "empty_scratch", lambda *args: scratch(*args).fill_(0xFF))
    monkeypatch.setattr(kernel, "_empty", lambda *args: empty(*args).fill_(math.nan))
    monkeypatch.setattr(kernel, "empty_dense", lambda *args: dense(*args).fill_(math.nan))


def masked(
    batch: int,
    widths: tuple[int, ...],
    positions: int,
    kind: torch.dtype = BYTES,
    share: float = 0.6,
    bias: bool = True,
) -> Problem:
    """With NaN where nothing counts: about a part of the positions, and the second of three stretches."""
    problem = Problem(batch, widths, positions, bias)
    # not divided by how many there are, as in fp16 it has to be
    problem.k = 1 / 64
    chosen = torch.rand(batch * positions) < share
    chosen[batch * positions // 3 : 2 * batch * positions // 3] = False
    weights = chosen if kind is BYTES else chosen * (torch.randint(1, 16, chosen.shape) / 8)
    problem.counted = weights.view(batch, positions).to(kind)
    spoil(problem, problem.student, problem.target)
    return problem


def spoil(problem: Problem, *features: Tensor) -> None:
    """Stores NaN where nothing counts."""
    assert problem.counted is not None
    for x in features:
        x.masked_fill_((problem.counted == 0).unsqueeze(1), math.nan)


def unselected(problem: Problem, of_student: Tensor | None) -> Tensor:
    """The student's gradient where nothing counts."""
    assert problem.counted is not None
    assert of_student is not None
    return of_student.transpose(1, 2)[problem.counted == 0]


@pytest.mark.parametrize("module", MODULES, ids=short)
@pytest.mark.parametrize("kind", [BYTES, FP32], ids=["bytes", "numbers"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("widths", [(5, 6), (20, 40, 17), (33, 49, 97, 48)], ids=str)
def test_any_widths(
    head_isa: str, widths: tuple[int, ...], bias: bool, kind: torch.dtype, module: torch.dtype
) -> None:
    del head_isa
    problem = masked(3, widths, 150, kind, bias=bias)
    found = problem.run(module)
    checked(found, problem.exact(), CLOSE[module])
    assert not unselected(problem, found[1]).any()


@pytest.mark.parametrize("module", [FP32, BF16], ids=short)
@pytest.mark.parametrize(
    ("batch", "positions"),
    [(1, 2), (1, 31), (2, 16), (3, 49), (64, 1), (33, 7), (1, 4099), (3, 2001)],
    ids=str,
)
def test_any_number_of_positions(head_isa: str, batch: int, positions: int, module: torch.dtype) -> None:
    """Tiles that end inside of a sample or hold many, parts that are not full, and many units."""
    del head_isa
    for kind in (BYTES, FP32):
        problem = masked(batch, (8, 24, 12), positions, kind)
        assert problem.counted is not None
        problem.counted[0, 0] = 2
        for x in (problem.student, problem.target):
            x[0, :, 0] = 0.5
        checked(problem.run(module), problem.exact(), CLOSE[module])


@pytest.mark.parametrize("dtype", MODULES, ids=short)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith("expanded")])
@pytest.mark.parametrize("which", ["student", "target"])
def test_any_layout(head_isa: str, which: str, layout: str, dtype: torch.dtype) -> None:
    del head_isa
    problem = masked(5, (17, 24, 23), 41)
    placed = LAYOUTS[layout](getattr(problem, which).to(dtype))
    found = problem.run(FP32, **{which: placed})
    close = 5e-3 if which == "student" and dtype is not FP32 else 3e-6
    checked(found, problem.exact(**{which: placed}), close)
    if which == "student":
        assert not unselected(problem, found[1]).any()


@pytest.mark.parametrize("module", [FP32, BF16], ids=short)
def test_any_set_of_gradients(head_isa: str, module: torch.dtype) -> None:
    """What is asked for is what it is together with all others, bit by bit; with none it is the loss alone."""
    del head_isa
    problem = masked(3, (9, 20, 17, 10), 250)
    whole = problem.run(module)
    for bits in range(2**7):
        want = [bool(bits >> i & 1) for i in range(7)]
        some = problem.run(module, Wanted(want[0], want[1:4], want[4:]))
        for ours, right in zip(some, whole, strict=True):
            assert ours is None or right is None or torch.equal(ours, right)
    alone = kernel.loss_alone(problem.head(module))
    assert whole[0] is not None
    assert torch.equal(alone, whole[0])


@pytest.mark.parametrize("module", MODULES, ids=short)
@pytest.mark.parametrize("kind", [BYTES, FP32], ids=["bytes", "numbers"])
def test_nothing_selected(head_isa: str, kind: torch.dtype, module: torch.dtype) -> None:
    del head_isa
    for batch, positions in ((2, 5), (3, 100)):
        problem = masked(batch, (9, 20, 7), positions, kind, share=0.0)
        for x in problem.run(module):
            assert x is not None
            assert not x.any()
        assert not kernel.loss_alone(problem.head(module)).any()


@pytest.mark.parametrize("module", MODULES, ids=short)
@pytest.mark.parametrize("kind", [BYTES, FP32], ids=["bytes", "numbers"])
def test_weights_of_1_are_no_mask(head_isa: str, kind: torch.dtype, module: torch.dtype) -> None:
    """Bit by bit."""
    del head_isa
    problem = Problem(5, (9, 20, 7), 83, True)
    problem.k = 0.01
    without = problem.run(module)
    problem.counted = torch.ones(5, 83, dtype=kind)
    for ours, right in zip(problem.run(module), without, strict=True):
        assert ours is not None
        assert right is not None
        assert torch.equal(ours, right)


@pytest.mark.parametrize("module", MODULES, ids=short)
def test_a_variance_that_is_nan_stays_where_positions_count(head_isa: str, module: torch.dtype) -> None:
    """0 times NaN would come to the others."""
    del head_isa
    problem = masked(3, (9, 20, 7), 100)
    problem.alpha[2] = math.nan
    of_student = problem.run(module)[1]
    assert of_student is not None
    assert of_student.isnan().any()
    assert not unselected(problem, of_student).any()


@pytest.mark.parametrize("module", [FP32, BF16], ids=short)
@pytest.mark.parametrize("widths", [(8, 24, 12), (64, 256, 128)], ids=str)
def test_the_same_for_any_number_of_threads(
    head_isa: str, widths: tuple[int, ...], module: torch.dtype
) -> None:
    del head_isa
    problem = masked(4, widths, 3001)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(problem.run(module))
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            assert x is not None
            assert y is not None
            assert torch.equal(x, y)
