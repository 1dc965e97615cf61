"""Heads by the CPU back end's own kernel: every instruction set, shape and layout, and when it is taken."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from heads import Ways, by_kernel, distance, exact, gradients, in_parts_alone, layers, spread_alpha
from problems import BF16, FP16, FP32, ISAS, LAYOUTS, short
from torch import Tensor

import vidfast
from vidfast import _torch, memory
from vidfast.arguments import Call
from vidfast.backends import cpu
from vidfast.head import kernel
from vidfast.head.gradients import Wanted
from vidfast.head.stack import Stack

pytestmark = pytest.mark.skipif(memory._C is None, reason="the extension is not built")
_C: Any = memory._C
BACKEND: Any = cpu.BACKEND
# Of 16-bit modules: rounding of activations, each to half a unit; of fp32 the products' own.
CLOSE = {FP32: 3e-6, BF16: 2e-2, FP16: 3e-3}


@pytest.fixture(params=ISAS[1:])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.cpu_isa()
    if not _C.cpu_select_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    assert _C.cpu_select_isa(before)


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read before it is written shows: memory of earlier calls often holds what is right."""
    scratch, empty = cpu.empty_scratch, kernel._empty
    monkeypatch.setattr(cpu, "empty_scratch", lambda *args: scratch(*args).fill_(0xFF))
    monkeypatch.setattr(kernel, "_empty", lambda *args: empty(*args).fill_(float("nan")))


class Problem:
    """A head whose activations are exact in 16 bits up to the last layer: a ReLU decides as it does in fp64."""

    def __init__(
        self, batch: int, widths: tuple[int, ...], positions: int, bias: bool = False, seed: int = 0
    ) -> None:
        torch.manual_seed(seed)
        self.student = torch.randint(-4, 5, (batch, widths[0], positions)) / 4
        self.target = torch.randn(batch, widths[-1], positions)
        self.weights = [
            torch.randint(-2, 3, (out, into)) / 4 * (torch.rand(out, into) < 4 / into)
            for into, out in pairwise(widths)
        ]
        self.biases = [torch.randint(-2, 3, (w.shape[0],)) / 4 if bias else None for w in self.weights]
        self.alpha = torch.linspace(-1.0, 3.0, widths[-1])
        self.k = 1.0 / self.target.numel()

    def run(
        self, module: torch.dtype = FP32, wanted: Wanted | None = None, **features: Tensor
    ) -> list[Tensor | None]:
        """[loss, d student, d alpha, d weights..., d biases...] of the kernel."""
        n = len(self.weights)
        wanted = wanted or Wanted(True, [True] * n, [b is not None for b in self.biases])
        stack = Stack(tuple(self.weights), tuple(self.biases), False)
        found = kernel.gradients(
            stack, features.get("student", self.student), features.get("target", self.target), self.alpha,
            Call(1, 1e-5, "mean", k=self.k), BACKEND, module, wanted,
        )  # fmt: skip
        return [found.loss, found.student, found.alpha, *found.weights, *found.biases]

    def exact(self, **features: Tensor) -> list[Tensor | None]:
        """The same in fp64."""
        leaves = [features.get("student", self.student), self.alpha, *self.weights, *self.biases]
        s, alpha, *layered = (None if x is None else x.double().requires_grad_() for x in leaves)
        assert s is not None
        assert alpha is not None
        n, x = len(self.weights), s
        for index in range(n):
            weight, bias = layered[index], layered[n + index]
            assert weight is not None
            x = torch.einsum("oc,bcp->bop", weight, torch.relu(x) if index else x)
            x = x if bias is None else x + bias[:, None]
        v = (torch.nn.functional.softplus(alpha) + 1e-5)[:, None]
        target = features.get("target", self.target).double()
        loss = self.k * (0.5 * (v.log() + (target - x) ** 2 / v)).sum()
        inputs = [s, alpha, *layered]
        given = iter(torch.autograd.grad(loss, [x for x in inputs if x is not None]))
        return [loss.detach(), *(None if x is None else next(given) for x in inputs)]


def checked(found: list[Tensor | None], wanted: list[Tensor | None], close: float) -> None:
    for ours, right in zip(found, wanted, strict=True):
        assert (ours is None) == (right is None)
        if ours is not None and right is not None:
            assert ours.shape == right.shape
            assert distance(ours, right) < close


@pytest.mark.parametrize("module", [FP32, BF16, FP16], ids=short)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "widths", [(5, 6), (16, 32), (20, 40, 17), (3, 64, 100, 1), (33, 49, 97, 48)], ids=str
)
def test_any_widths(isa: str, widths: tuple[int, ...], bias: bool, module: torch.dtype) -> None:
    """Below, at, and beside whole vectors and panels."""
    del isa
    problem = Problem(3, widths, 50, bias)
    # without k, as in fp16 it has to be
    problem.k = 0.01
    checked(problem.run(module), problem.exact(), CLOSE[module])


@pytest.mark.parametrize("module", [FP32, BF16], ids=short)
@pytest.mark.parametrize(
    ("batch", "positions"), [(1, 1), (1, 31), (2, 16), (3, 49), (64, 1), (33, 7), (1, 4099)], ids=str
)
def test_any_number_of_positions(isa: str, batch: int, positions: int, module: torch.dtype) -> None:
    """Tiles that end inside of a sample or hold many, and parts that are not full."""
    del isa
    problem = Problem(batch, (8, 24, 12), positions, True)
    problem.k = 1 / 64
    checked(problem.run(module), problem.exact(), CLOSE[module])


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=short)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["student", "target"])
def test_any_layout(isa: str, which: str, layout: str, dtype: torch.dtype) -> None:
    """What lies between a feature's values is NaN."""
    del isa
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


def test_strides_of_any_kind(isa: str) -> None:
    del isa
    problem = Problem(6, (8, 12), 20)
    for placed in (
        problem.student[:1].expand(6, 8, 20),
        problem.student[:, :, :1].expand(6, 8, 20),
        problem.student.flip(2),
        problem.student.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        problem.student.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    ):
        checked(problem.run(student=placed), problem.exact(student=placed), 3e-6)


def workspace(problem: Problem, threads: int) -> int:
    """Bytes that the kernel asks for."""
    layers = [(1, 0, 0, 0, w.shape[1], w.shape[0], 1, 0) for w in problem.weights]
    feature, (batch, channels, positions) = (1, 0, 1, 1, 1), problem.target.shape
    head = _C.CpuHead(batch, channels, positions, feature, feature, layers, 1, 0, 1e-5, 1.0, 0, feature, 1)
    bytes_: int = head.workspace_bytes(threads)
    return bytes_


def test_threads_have_memory_of_their_own_where_sums_are_small(isa: str) -> None:
    """Else those below would say nothing of threads that share, or do not share, their parts."""
    del isa
    small, large = Problem(9, (20, 64, 48), 2000), Problem(4, (400, 700, 500), 1000)
    assert workspace(small, 4) > workspace(small, 1) + 2 * 400_000
    assert workspace(large, 2) <= workspace(large, 1) + 700_000


@pytest.mark.parametrize("positions", [77, 333, 2000], ids="9 x {}".format)
@pytest.mark.parametrize("module", [FP32, BF16, FP16], ids=short)
def test_numbers_depend_on_no_thread(isa: str, module: torch.dtype, positions: int) -> None:
    del isa
    problem = Problem(9, (20, 64, 48), positions, True)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4, 7, 32):
            torch.set_num_threads(threads)
            found.append([x for x in problem.run(module) if x is not None])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("positions", [37, 700])
@pytest.mark.parametrize("module", [FP32, BF16], ids=short)
def test_any_set_of_gradients(isa: str, module: torch.dtype, positions: int) -> None:
    """What is asked for is what it is together with all others, bit by bit; with none it is the loss alone."""
    del isa
    problem = Problem(3, (9, 20, 17, 10), positions, True)
    whole = problem.run(module)
    for bits in range(2**7):
        want = [bool(bits >> i & 1) for i in range(7)]
        some = problem.run(module, Wanted(want[0], want[1:4], want[4:]))
        expected = [True, want[0], True, *want[1:]]
        for ours, right, asked in zip(some, whole, expected, strict=True):
            assert (ours is not None) == asked
            assert ours is None or right is None or torch.equal(ours, right)
    stack = Stack(tuple(problem.weights), tuple(problem.biases), False)
    call = Call(1, 1e-5, "mean", k=problem.k)
    alone = kernel.loss_alone(stack, problem.student, problem.target, problem.alpha, call, BACKEND, module)
    assert whole[0] is not None
    assert torch.equal(alone, whole[0])


@pytest.mark.parametrize("module", [FP32, BF16, FP16], ids=short)
@pytest.mark.parametrize("count", [1, 2, 32, 129, 700])
def test_nothing_is_written_beside_the_outputs(isa: str, count: int, module: torch.dtype) -> None:
    """Nor beside the workspace, by one thread or by more than there is work for."""
    del isa
    problem = Problem(1, (20, 33, 18), count, True)
    run = memory.empty_scratch
    spare = 4096
    taken: list[Tensor] = []

    def guarded(n: int, dtype: torch.dtype) -> Tensor:
        taken.append(run(n + spare, dtype).fill_(0xFF))
        return taken[-1][:n]

    wide = torch.full((3, 22, count + 2), 7.0)
    before = torch.get_num_threads()
    try:
        for threads in (1, 24):
            torch.set_num_threads(threads)
            inside = wide[1:2, 1:21, 1:-1]
            with (
                mock.patch.object(cpu, "empty_scratch", guarded),
                mock.patch.object(kernel, "empty_dense", lambda *_, inside=inside: inside),
            ):
                problem.run(module)
            assert bool((taken[-1][-spare:] == 0xFF).all())
            assert not bool((inside == 7).any())
            outside = wide.clone()
            outside[1:2, 1:21, 1:-1] = 7
            assert bool((outside == 7).all())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("where", ["student", "target", "weight", "bias", "alpha"])
@pytest.mark.parametrize("module", [FP32, BF16, FP16], ids=short)
def test_what_is_not_finite_stays_where_it_belongs(
    isa: str, module: torch.dtype, where: str, value: float
) -> None:
    """Zeros that fill up vectors, times infinity, come into no result."""
    del isa
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


def test_channels_that_are_not_there_take_no_part(isa: str) -> None:
    """Of 6 channels 16 are computed: infinity times zero among the others must not come back to the student."""
    del isa
    problem = Problem(1, (5, 6), 8)
    problem.weights[0].fill_(1.0)
    problem.student[0, 0, 3] = float("inf")
    found = problem.run()[1]
    assert found is not None
    assert bool((found[0, :, 3] == float("inf")).all())
    assert bool(found[0, :, :3].isfinite().all())


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=short)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels last"])
def test_a_16_bit_students_gradient_is_rounded_to_nearest(isa: str, dtype: torch.dtype, last: bool) -> None:
    del isa
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
def test_any_type_of_the_variances(isa: str, dtype: torch.dtype) -> None:
    del isa
    problem = Problem(2, (5, 6), 43)
    problem.alpha = problem.alpha.to(dtype)
    checked(problem.run(), problem.exact(), 3e-6)


@pytest.mark.parametrize("bias_dtype", [FP32, BF16], ids=short)
@pytest.mark.parametrize("weight_dtype", [FP32, BF16, FP16], ids=short)
def test_weights_and_biases_of_any_type_and_strides(
    isa: str, weight_dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    del isa
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


def test_sums_over_many_positions_stay_exact(isa: str) -> None:
    """A weight's gradient is added up in blocks: of 2^19 positions nothing is lost beside the sum."""
    del isa
    n = 1 << 19
    student, target = torch.full((1, 1, n), 1.0), torch.full((1, 1, n), 0.1)
    stack = Stack((torch.zeros(1, 1),), (None,), False)
    call = Call(1, 1e-5, "sum", k=1.0)
    wanted = Wanted(False, [True], [False])
    found = kernel.gradients(stack, student, target, torch.zeros(1), call, BACKEND, FP32, wanted)
    variance = torch.log(torch.tensor(2.0, dtype=torch.float64)) + 1e-5
    weight = found.weights[0]
    assert weight is not None
    right = -float(torch.tensor(0.1)) * n / float(variance)
    assert abs(weight.item() / right - 1) < 1e-5


def test_gradients_of_many_positions_are_as_exact_as_of_few(isa: str) -> None:
    del isa
    problem = Problem(40, (16, 32, 16), 1500, True)
    for ours, right in zip(problem.run()[2:], problem.exact()[2:], strict=True):
        assert ours is not None
        assert right is not None
        assert distance(ours, right) < 2e-7


def test_more_layers_than_a_kernel_has_are_refused() -> None:
    feature, layer = (1, 0, 1, 1, 1), (1, 0, 0, 0, 4, 4, 0, 0)
    for count in (0, 4):
        assert count == 0 or not BACKEND.has_head(FP32, count)
        with pytest.raises(ValueError, match=f"a head must have 1 to 3 layers, got {count}"):
            _C.CpuHead(1, 4, 4, feature, feature, [layer] * count, 1, 0, 1e-5, 1.0, 0, feature, 0)


def test_without_a_kernel_no_head_is_made(isa: str) -> None:
    del isa
    feature, layer = (1, 0, 1, 1, 1), (1, 0, 0, 0, 4, 4, 0, 0)
    with pytest.raises(RuntimeError, match="no kernel for such a head"):
        _C.CpuHead(1, 4, 4, feature, feature, [layer], 1, 0, 1e-5, 1.0, 1, feature, 0)


def test_another_instruction_set_meanwhile_changes_nothing(isa: str) -> None:
    """A head keeps the kernels that its workspace was measured for."""
    del isa
    problem = Problem(2, (16, 32, 16), 40)
    run = cpu.empty_scratch
    before = _C.cpu_isa()
    want = problem.run(BF16)

    def meanwhile(*args: Any) -> Tensor:
        assert _C.cpu_select_isa("baseline")
        return run(*args)

    try:
        with mock.patch.object(cpu, "empty_scratch", meanwhile):
            found = problem.run(BF16)
    finally:
        assert _C.cpu_select_isa(before)
    for x, y in zip(want, found, strict=True):
        assert x is None or y is None or torch.equal(x, y)


def test_instructions_of_each_set(isa: str) -> None:
    """With AVX-512 bf16 that is multiplied as such; all else in fp32."""
    for module, number in ((FP32, 0), (BF16, 2), (FP16, 3)):
        wanted = isa if isa != "avx512_bf16" or module is BF16 else "avx512"
        assert _C.cpu_head_instructions(number, 3) == wanted
    assert _C.cpu_head_instructions(1, 1) is None


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


# ---- when it is taken


def way(ways: Ways, count: int = 2, module: torch.dtype = FP32, amp: torch.dtype | None = None) -> str:
    """What computes a head of so many layers."""
    regressor = layers("maps", *(5, *[8] * (count - 1), 6)).to(module)
    student, target = torch.randn(3, 5, 6, 7, dtype=module), torch.randn(3, 6, 6, 7)
    gradients(regressor, spread_alpha(6), student, target, 1, amp)
    return ways.names.pop()


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    return Ways(monkeypatch)


def test_it_is_taken_where_nothing_is_faster(isa: str, ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    del isa
    monkeypatch.setattr(kernel, "cpu_has_tiles", lambda _: False)
    for count in (1, 2, 3):
        assert way(ways, count) == "kernel"
    assert way(ways, module=BF16) == way(ways, module=FP16) == "kernel"
    assert way(ways, amp=BF16) == way(ways, amp=FP16) == "kernel"
    assert way(ways, 4) != "kernel"


def test_weights_far_larger_than_activations_are_not_copied(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    del isa
    monkeypatch.setattr(kernel, "MOST_COPIED", 2000)
    stack = Stack((torch.empty(40, 30), torch.empty(20, 40)), (None, None), False)
    for positions, taken in ((30, False), (31, True)):
        assert kernel.takes(BACKEND, stack, torch.empty(1, 30, positions), FP32) == taken
    small = Stack((torch.empty(20, 50),), (None,), False)
    assert kernel.takes(BACKEND, small, torch.empty(1, 50, 1), FP32)


def test_tiles_of_the_processor_are_faster(isa: str, ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    del isa
    monkeypatch.setattr(kernel, "cpu_has_tiles", lambda dtype: dtype is BF16)
    assert way(ways, amp=BF16) != "kernel"
    assert way(ways, amp=FP16) == "kernel"
    assert way(ways) == "kernel"


def test_without_vectors_heads_are_computed_in_parts(ways: Ways) -> None:
    before = _C.cpu_isa()
    assert _C.cpu_select_isa("baseline")
    try:
        assert way(ways) != "kernel"
    finally:
        assert _C.cpu_select_isa(before)


def test_products_of_less_precision_are_the_librarys(isa: str, ways: Ways) -> None:
    """Of linear layers: what torch was asked for, it does, and convolutions then go layer by layer."""
    del isa
    weight, alpha = torch.randn(6, 5, requires_grad=True), torch.zeros(6)
    student, target = torch.randn(40, 5), torch.randn(40, 6)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        vidfast.vid_head(student, target, alpha, weight, channel_dim=-1).backward()
        differ = _torch.products_differ_from_convolutions()
    finally:
        torch.set_float32_matmul_precision(before)
    assert ways.names == ["rows" if differ else "kernel"]


@pytest.mark.parametrize("name", ["amx_bf16", "avx512_bf16"])
def test_what_torch_says_of_tiles(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(_torch, "_capabilities", lambda: {name: True})
    monkeypatch.setattr(_torch, "_mkldnn", mock.Mock(_is_mkldnn_bf16_supported=lambda: True))
    _torch.cpu_multiplies.cache_clear()
    _torch.cpu_has_tiles.cache_clear()
    try:
        assert _torch.cpu_multiplies(BF16)
        assert _torch.cpu_has_tiles(BF16) == (name == "amx_bf16")
    finally:
        _torch.cpu_multiplies.cache_clear()
        _torch.cpu_has_tiles.cache_clear()


@pytest.mark.parametrize("amp", [None, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_both_ways_are_the_same_head(amp: torch.dtype | None) -> None:
    regressor, alpha = layers("maps", 24, 48, 32, bias=True), spread_alpha(32)
    student, target = torch.randn(12, 24, 6, 7), torch.randn(12, 32, 6, 7)
    g = 65536.0 if amp is FP16 else 1.0
    found = []
    for chosen in (by_kernel, in_parts_alone):
        with chosen:
            found.append(gradients(regressor, alpha, student, target, 1, amp, g))
    for ours, other, right in zip(*found, exact(regressor, alpha, student, target, 1), strict=True):
        assert distance(ours, right) <= max(1.25 * distance(other, right), 1e-6)
