"""The numbers of the CPU back end's kernel for heads: every instruction set, width, layout and dtype."""

from __future__ import annotations

import pytest
import torch
from head_problems import _C, BACKEND, CLOSE, Problem, checked
from heads import distance
from problems import BF16, FP16, FP32, ISAS, LAYOUTS, short

from vidfast.arguments import Call
from vidfast.backends import cpu
from vidfast.head import kernel
from vidfast.head.gradients import HeadCall, Wanted
from vidfast.head.stack import Stack

pytestmark = pytest.mark.skipif(_C is None, reason="the extension is not built")


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read before it is written shows: memory of earlier calls often holds what is right."""
    scratch, empty = cpu.empty_scratch, kernel._empty
    monkeypatch.setattr(cpu, "empty_scratch", lambda *args: scratch(*args).fill_(0xFF))
    monkeypatch.setattr(kernel, "_empty", lambda *args: empty(*args).fill_(float("nan")))


@pytest.mark.parametrize("module", [FP32, BF16, FP16], ids=short)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "widths", [(5, 6), (16, 32), (20, 40, 17), (3, 64, 100, 1), (33, 49, 97, 48)], ids=str
)
def test_any_widths(head_isa: str, widths: tuple[int, ...], bias: bool, module: torch.dtype) -> None:
    """Below, at, and beside whole vectors and panels."""
    del head_isa
    problem = Problem(3, widths, 50, bias)
    # without k, as in fp16 it has to be
    problem.k = 0.01
    checked(problem.run(module), problem.exact(), CLOSE[module])


@pytest.mark.parametrize("module", [FP32, BF16], ids=short)
@pytest.mark.parametrize(
    ("batch", "positions"), [(1, 1), (1, 31), (2, 16), (3, 49), (64, 1), (33, 7), (1, 4099)], ids=str
)
def test_any_number_of_positions(head_isa: str, batch: int, positions: int, module: torch.dtype) -> None:
    """Tiles that end inside of a sample or hold many, and parts that are not full."""
    del head_isa
    problem = Problem(batch, (8, 24, 12), positions, True)
    problem.k = 1 / 64
    checked(problem.run(module), problem.exact(), CLOSE[module])


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=short)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["student", "target"])
def test_any_layout(head_isa: str, which: str, layout: str, dtype: torch.dtype) -> None:
    """What lies between a feature's values is NaN."""
    del head_isa
    problem = Problem(5, (17, 24, 23), 41)
    placed = LAYOUTS[layout](getattr(problem, which).to(dtype))
    problem.k = 0.01  # d student is of the student's type
    found = problem.run(FP32, **{which: placed})
    checked(
        found, problem.exact(**{which: placed}), 5e-3 if which == "student" and dtype is not FP32 else 3e-6
    )
    if which == "student":
        assert found[1] is not None
        assert found[1].dtype is dtype


def test_strides_of_any_kind(head_isa: str) -> None:
    del head_isa
    problem = Problem(6, (8, 12), 20)
    for placed in (
        problem.student[:1].expand(6, 8, 20),
        problem.student[:, :, :1].expand(6, 8, 20),
        problem.student.flip(2),
        problem.student.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        problem.student.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    ):
        checked(problem.run(student=placed), problem.exact(student=placed), 3e-6)


@pytest.mark.parametrize("positions", [37, 700])
@pytest.mark.parametrize("module", [FP32, BF16], ids=short)
def test_any_set_of_gradients(head_isa: str, module: torch.dtype, positions: int) -> None:
    """What is asked for is what it is together with all others, bit by bit; with none it is the loss alone."""
    del head_isa
    problem = Problem(3, (9, 20, 17, 10), positions, True)
    whole = problem.run(module)
    for bits in range(2**7):
        want = [bool(bits >> i & 1) for i in range(7)]
        some = problem.run(module, Wanted(want[0], want[1:4], want[4:]))
        expected = [True, want[0], True, *want[1:]]
        for ours, right, asked in zip(some, whole, expected, strict=True):
            assert (ours is not None) == asked
            assert ours is None or right is None or torch.equal(ours, right)
    alone = kernel.loss_alone(problem.head(module))
    assert whole[0] is not None
    assert torch.equal(alone, whole[0])


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("where", ["student", "target", "weight", "bias", "alpha"])
@pytest.mark.parametrize("module", [FP32, BF16, FP16], ids=short)
def test_what_is_not_finite_stays_where_it_belongs(
    head_isa: str, module: torch.dtype, where: str, value: float
) -> None:
    """Zeros that fill up vectors, times infinity, come into no result."""
    del head_isa
    problem = Problem(2, (5, 9, 6), 43, True)
    problem.k = 0.01
    bias = problem.biases[0]
    assert bias is not None
    places = {
        "student": problem.student, "target": problem.target, "weight": problem.weights[0], "bias": bias,
        "alpha": problem.alpha,
    }  # fmt: skip
    places[where].view(-1)[1] = value
    for ours, right in zip(problem.run(module), problem.exact(), strict=True):
        if ours is not None and right is not None:
            torch.testing.assert_close(
                ours.double(),
                right,
                equal_nan=True,
                rtol=0.05,
                atol=0.05 * float(right.nan_to_num(0, 0, 0).abs().max()),
            )


def test_channels_that_are_not_there_take_no_part(head_isa: str) -> None:
    """Of 6 channels 16 are computed: infinity times zero among the others must not come back to the student."""
    del head_isa
    problem = Problem(1, (5, 6), 8)
    problem.weights[0].fill_(1.0)
    problem.student[0, 0, 3] = float("inf")
    found = problem.run()[1]
    assert found is not None
    assert bool((found[0, :, 3] == float("inf")).all())
    assert bool(found[0, :, :3].isfinite().all())


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=short)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels last"])
def test_a_16_bit_students_gradient_is_rounded_to_nearest(
    head_isa: str, dtype: torch.dtype, last: bool
) -> None:
    del head_isa
    problem = Problem(2, (24, 16), 40)
    problem.k = 0.01
    problem.target[0, 3, 5] = float("nan")
    student = problem.student.to(dtype)
    if last:
        student = student.transpose(1, 2).contiguous().transpose(1, 2)
    exact32, found = problem.run(student=problem.student)[1], problem.run(student=student)[1]
    assert exact32 is not None
    assert found is not None
    torch.testing.assert_close(found, exact32.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [FP32, torch.float64, BF16, FP16], ids=short)
def test_any_type_of_the_variances(head_isa: str, dtype: torch.dtype) -> None:
    del head_isa
    problem = Problem(2, (5, 6), 43)
    problem.alpha = problem.alpha.to(dtype)
    checked(problem.run(), problem.exact(), 3e-6)


@pytest.mark.parametrize("bias_dtype", [FP32, BF16], ids=short)
@pytest.mark.parametrize("weight_dtype", [FP32, BF16, FP16], ids=short)
def test_weights_and_biases_of_any_type_and_strides(
    head_isa: str, weight_dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    del head_isa
    problem = Problem(2, (5, 9, 6), 43, True)
    first, second = problem.weights
    bias = problem.biases[0]
    assert bias is not None
    problem.weights = [
        torch.stack([first, first + 1], 2).to(weight_dtype)[:, :, 0],
        second.t().contiguous().to(weight_dtype).t(),
    ]
    problem.biases = [torch.stack([bias, bias + 1], 1).to(bias_dtype)[:, 0], None]
    problem.k = 0.01
    checked(problem.run(BF16), problem.exact(), CLOSE[BF16])


def test_sums_over_many_positions_stay_exact(head_isa: str) -> None:
    """A weight's gradient is added up in blocks: of 2^19 positions nothing is lost beside the sum."""
    del head_isa
    n = 1 << 19
    student, target = torch.full((1, 1, n), 1.0), torch.full((1, 1, n), 0.1)
    stack = Stack((torch.zeros(1, 1),), (None,), False)
    call = Call(1, 1e-5, "sum", k=1.0)
    wanted = Wanted(False, [True], [False])
    found = kernel.gradients(HeadCall(stack, student, target, torch.zeros(1), call, BACKEND, FP32), wanted)
    variance = torch.log(torch.tensor(2.0, dtype=torch.float64)) + 1e-5
    weight = found.weights[0]
    assert weight is not None
    right = -float(torch.tensor(0.1)) * n / float(variance)
    assert abs(weight.item() / right - 1) < 1e-5


def test_gradients_of_many_positions_are_as_exact_as_of_few(head_isa: str) -> None:
    del head_isa
    problem = Problem(40, (16, 32, 16), 1500, True)
    for ours, right in zip(problem.run()[2:], problem.exact()[2:], strict=True):
        assert ours is not None
        assert right is not None
        assert distance(ours, right) < 2e-7


@pytest.mark.parametrize("module", [BF16, FP16], ids=short)
def test_16_bits_are_rounded_alike_by_every_instruction_set(module: torch.dtype) -> None:
    """Products of these values are exact in fp32 in any order: what differs then is rounding."""
    problem = Problem(2, (16, 32, 16), 40, True)
    problem.target = (problem.target * 8).round() / 8
    problem.alpha = torch.zeros(16)
    before, found = _C.cpu_isa(), []
    try:
        for name in ISAS[1:]:
            if _C.cpu_select_isa(name):
                found.append(problem.run(module)[:1])
    finally:
        assert _C.cpu_select_isa(before)
    for other in found[1:]:
        assert other[0] is not None
        assert found[0][0] is not None
        torch.testing.assert_close(other[0], found[0][0], rtol=1e-6, atol=0)
