"""The CPU back end's kernel for heads: its threads and memory, and when it is taken."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from head_problems import _C, BACKEND, Problem
from heads import Ways, by_kernel, distance, exact, gradients, in_parts_alone, layers, spread_alpha
from problems import BF16, FP16, FP32, short
from torch import Tensor

import vidfast
from vidfast import _torch, memory
from vidfast.backends import cpu
from vidfast.head import kernel

pytestmark = pytest.mark.skipif(_C is None, reason="the extension is not built")


def workspace(problem: Problem, threads: int) -> int:
    """Bytes that the kernel asks for."""
    layers = [(1, 0, 0, 0, w.shape[1], w.shape[0], 1, 0) for w in problem.weights]
    feature, (batch, channels, positions) = (1, 0, 1, 1, 1), problem.target.shape
    head = _C.CpuHead(
        batch, channels, positions, feature, feature, layers, 1, 0, 1e-5, 1.0, 0, feature, 1, 0, False, 0.0
    )
    bytes_: int = head.workspace_bytes(threads)
    return bytes_


def test_threads_have_memory_of_their_own_where_sums_are_small(head_isa: str) -> None:
    """Else those below would say nothing of threads that share, or do not share, their parts."""
    del head_isa
    small, large = Problem(9, (20, 64, 48), 2000), Problem(4, (400, 700, 500), 1000)
    assert workspace(small, 4) > workspace(small, 1) + 2 * 400_000
    assert workspace(large, 2) <= workspace(large, 1) + 700_000


@pytest.mark.parametrize("positions", [77, 333, 2000], ids="9 x {}".format)
@pytest.mark.parametrize("module", [FP32, BF16, FP16], ids=short)
def test_numbers_depend_on_no_thread(head_isa: str, module: torch.dtype, positions: int) -> None:
    del head_isa
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


@pytest.mark.parametrize("module", [FP32, BF16, FP16], ids=short)
@pytest.mark.parametrize("count", [1, 2, 32, 129, 700])
def test_nothing_is_written_beside_the_outputs(head_isa: str, count: int, module: torch.dtype) -> None:
    """Nor beside the workspace, by one thread or by more than there is work for."""
    del head_isa
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


def test_more_layers_than_a_kernel_has_are_refused(head_isa: str) -> None:
    del head_isa
    feature, layer = (1, 0, 1, 1, 1), (1, 0, 0, 0, 4, 4, 0, 0)
    for count in (0, 4):
        assert count == 0 or not BACKEND.has_head(FP32, count)
        with pytest.raises(ValueError, match=f"a head must have 1 to 3 layers, got {count}"):
            _C.CpuHead(
                1, 4, 4, feature, feature, [layer] * count, 1, 0, 1e-5, 1.0, 0, feature, 0, 0, False, 0.0
            )


def test_without_a_kernel_no_head_is_made(head_isa: str) -> None:
    del head_isa
    feature, layer = (1, 0, 1, 1, 1), (1, 0, 0, 0, 4, 4, 0, 0)
    with pytest.raises(RuntimeError, match="no kernel for such a head"):
        _C.CpuHead(1, 4, 4, feature, feature, [layer], 1, 0, 1e-5, 1.0, 1, feature, 0, 0, False, 0.0)


def test_another_instruction_set_meanwhile_changes_nothing(head_isa: str) -> None:
    """A head keeps the kernels that its workspace was measured for."""
    del head_isa
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


def test_instructions_of_each_set(head_isa: str) -> None:
    """With AVX-512 bf16 that is multiplied as such; all else in fp32."""
    for module, number in ((FP32, 0), (BF16, 2), (FP16, 3)):
        wanted = head_isa if head_isa != "avx512_bf16" or module is BF16 else "avx512"
        assert _C.cpu_head_instructions(number, 3) == wanted
    assert _C.cpu_head_instructions(1, 1) is None


def way(ways: Ways, count: int = 2, module: torch.dtype = FP32, amp: torch.dtype | None = None) -> str:
    """What computes a head of so many layers."""
    regressor = layers("maps", *(5, *[8] * (count - 1), 6)).to(module)
    student, target = torch.randn(3, 5, 6, 7, dtype=module), torch.randn(3, 6, 6, 7)
    gradients(regressor, spread_alpha(6), student, target, 1, amp)
    return ways.names.pop()


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    return Ways(monkeypatch)


def test_it_is_taken_where_nothing_is_faster(
    head_isa: str, ways: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    del head_isa
    monkeypatch.setattr(kernel, "cpu_has_tiles", lambda _: False)
    for count in (1, 2, 3):
        assert way(ways, count) == "kernel"
    assert way(ways, module=BF16) == way(ways, module=FP16) == "kernel"
    assert way(ways, amp=BF16) == way(ways, amp=FP16) == "kernel"
    assert way(ways, 4) != "kernel"


def test_weights_far_larger_than_activations_are_not_copied(
    head_isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    del head_isa
    monkeypatch.setattr(kernel, "MOST_COPIED", 2000)
    for positions, taken in ((30, False), (31, True)):
        assert kernel.takes(Problem(1, (30, 40, 20), positions).head(FP32)) == taken
    assert kernel.takes(Problem(1, (50, 20), 1).head(FP32))


def test_tiles_of_the_processor_are_faster(
    head_isa: str, ways: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    del head_isa
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


def test_products_of_less_precision_are_the_librarys(head_isa: str, ways: Ways) -> None:
    """Of linear layers: what torch was asked for, it does, and convolutions then go layer by layer."""
    del head_isa
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
