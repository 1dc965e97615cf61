"""What a call of the CUDA back end does, seen on the emulated device: launches, order, faults."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

import vidfast
from vidfast import backends, primitives
from vidfast.arguments import Call
from vidfast.backends.cuda import CudaBackend
from vidfast.positions import Counts, Weights, check_mask

# One shape for each mapping and each way to the sums: planes, pieces, rows, joined rows, one block of the finish or
# several.
SHAPES = [(3, 5, 32, 32), (2, 2, 9001), (6, 24, 7, 7), (13, 3, 7, 7), (9, 21, 14, 14), (20011, 8), (33, 1000)]


@pytest.fixture
def backend(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaBackend]:
    backend = CudaBackend(native, None, "cpu", lambda index: 0)
    monkeypatch.setitem(backends._loaded, "cuda", backend)
    machine = native.machine()
    before = machine.device, machine.processors, machine.resident
    yield backend
    machine.device, machine.processors, machine.resident = before
    machine.fail(0)
    machine.fail_launches(0)


def counted(backend: CudaBackend, mean: Tensor, target: Tensor, call: Call, mask: Tensor) -> Counts | None:
    return primitives.counted(
        backend, mean, target, call, Weights(check_mask(mask, mean, call.channel), None)
    )


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sweep_and_its_finish(backend: CudaBackend, native: ModuleType, shape: tuple[int, ...]) -> None:
    mean, target, alpha = problem(shape)
    mean.requires_grad_()
    alpha.requires_grad_()
    machine = native.machine()

    def counted() -> tuple[int, int]:
        return machine.launches, machine.memsets

    for strategy in ("one_pass", "two_pass"):
        launches, memsets = counted()
        loss = vidfast.gaussian_nll(mean, target, alpha, strategy=strategy, backend="cuda")
        assert counted() == (launches + 2, memsets)
        loss.backward()
        assert counted() == (launches + 3, memsets)


def weights(shape: tuple[int, ...], kind: torch.dtype = torch.bool) -> Tensor:
    """Of each position: the middle third does not count."""
    w = torch.rand(shape[0], *shape[2:]).add(0.25)
    flat = w.view(-1)
    flat[flat.numel() // 3 : 2 * flat.numel() // 3] = 0
    return w.to(kind)


@pytest.mark.parametrize(("count", "launches"), [(1 << 16, 1), ((1 << 16) + 1, 2), (300_000, 2)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
def test_a_mask_adds_the_launches_of_its_total(
    backend: CudaBackend, native: ModuleType, kind: torch.dtype, count: int, launches: int
) -> None:
    """One, of very many positions two; no memset; and none more in backward."""
    mean, target, alpha = problem((count, 1))
    mean.requires_grad_()
    machine = native.machine()
    before = machine.launches, machine.memsets
    loss = vidfast.gaussian_nll(mean, target, alpha, mask=weights((count, 1), kind), backend="cuda")
    assert (machine.launches, machine.memsets) == (before[0] + launches + 2, before[1])
    loss.backward()
    assert (machine.launches, machine.memsets) == (before[0] + launches + 3, before[1])


def test_a_weight_on_the_device_walks_as_without(backend: CudaBackend, native: ModuleType) -> None:
    """Its kernels are those without a mask."""
    mean, target, alpha = problem((3, 5, 32, 32))
    kernels: list[int] = []
    machine = native.machine()
    for weight in (1.0, torch.ones(())):
        machine.instead = lambda launch: kernels.append(launch.offset)
        try:
            vidfast.gaussian_nll(mean, target, alpha, weight=weight, backend="cuda")
        finally:
            machine.instead = None
    assert len(kernels) == 5
    assert kernels[:2] == kernels[3:]


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_grid_does_not_show(
    backend: CudaBackend,
    native: ModuleType,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    mask: torch.dtype | None,
) -> None:
    """Any number of processors, of resident blocks, and any order of blocks gives the same bits."""
    mean, target, alpha = problem(shape, dtype)
    call = Call(1, 1e-5, k=0.5)
    counts = None if mask is None else counted(backend, mean, target, call, weights(shape, mask))
    machine = native.machine()
    losses, gradients, alphas = [], [], []
    for device, (processors, resident) in enumerate(((1, 1), (3, 2), (1000, 5)), start=1):
        machine.device, machine.processors, machine.resident = device, processors, resident
        machine.seed += 17
        loss, grad_mean, grad_alpha = primitives.forward_grad(
            backend, mean, target, alpha, call, counts=counts
        )
        losses += [loss, primitives.forward(backend, mean, target, alpha, call, counts=counts)[0]]
        gradients.append(grad_mean.view(torch.uint8))
        alphas.append(grad_alpha)
    for same in (losses, gradients, alphas):
        assert all(torch.equal(x, same[0]) for x in same)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_output_and_no_workspace_is_read_before_it_is_written(
    backend: CudaBackend, shape: tuple[int, ...], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean, target, alpha = problem(shape)
    call = Call(1, 1e-5, k=0.5)
    mask = weights(shape) if masked else None

    def results() -> tuple[Tensor, ...]:
        counts = None if mask is None else counted(backend, mean, target, call, mask)
        return primitives.forward_grad(backend, mean, target, alpha, call, counts=counts)

    want = results()
    empty, empty_like = torch.empty, torch.empty_like
    # 0xff in every byte is NaN in every floating-point type, and no zero for a counter
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poison(empty_like(*a, **k)))
    got = results()
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    scaled = primitives.scale(backend, torch.tensor(1.0), got[1], 1, got[2], torch.float32, True)
    assert scaled[1] is not None
    assert torch.equal(scaled[1], want[2].float())


def _poison(x: Tensor) -> Tensor:
    flat = x.reshape(-1)
    flat.view(torch.uint8).fill_(0xFF)
    return x


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` prefers the CPU's back end for the CPU's tensors, which here stand for a GPU's."""
    monkeypatch.setattr(backends, "_CPU_FIRST", backends.NAMES)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (35, "driver supports CUDA 11.4"),
        (100, "no CUDA device"),
        (209, "TORCH_CUDA_ARCH_LIST=7.7"),
        (222, "rebuild"),
    ],
)
def test_a_device_that_cannot_run_it_is_named_and_passed_over(
    backend: CudaBackend, native: ModuleType, as_on_a_gpu: None, error: int, says: str
) -> None:
    native.machine().fail(error)
    reason = native.cuda_unavailable() or native.cuda_device_unsupported()
    assert says in reason
    backend._missing = reason
    mean, target, alpha = problem((2, 3, 4, 4))
    chosen = backends.choose("auto", mean, target, alpha, None)
    assert chosen is None or chosen.name != "cuda"
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run here"):
        vidfast.gaussian_nll(mean, target, alpha, backend="cuda")


def test_a_failed_launch_names_the_kernel_and_its_arguments(backend: CudaBackend, native: ModuleType) -> None:
    mean, target, alpha = problem((2, 3, 4, 5))
    native.machine().fail_launches(9)
    with pytest.raises(RuntimeError, match=r"rows \(forward\)<<<.*outer=2, C=3, inner=20, mean=f32@0x"):
        vidfast.gaussian_nll(mean, target, alpha, backend="cuda")
    mask = torch.ones(2, 4, 5)
    with pytest.raises(RuntimeError, match=r"total<<<.*positions@0x.*count=40"):
        vidfast.gaussian_nll(mean, target, alpha, mask=mask, backend="cuda")
    counts = Counts(mask, torch.ones(2, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"rows \(forward\)<<<.*inner=20, .*mask=f32@0x.*totals@0x"):
        primitives.forward(backend, mean, target, alpha, Call(1, 1e-5), counts=counts)


def test_auto_takes_it_and_says_so(backend: CudaBackend, as_on_a_gpu: None) -> None:
    mean, target, alpha = problem((2, 3, 4, 5))
    chosen = backends.choose("auto", mean, target, alpha, None)
    assert chosen is backend
    facts = vidfast.info()["backends"]
    assert isinstance(facts, dict)
    assert facts["cuda"]["available"] is True
    assert facts["cuda"]["architectures"] == "emulated"
