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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_grid_does_not_show(
    backend: CudaBackend, native: ModuleType, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Any number of processors, of resident blocks, and any order of blocks gives the same bits."""
    mean, target, alpha = problem(shape, dtype)
    call = Call(1, 1e-5, k=0.5)
    machine = native.machine()
    losses, gradients, alphas = [], [], []
    for device, (processors, resident) in enumerate(((1, 1), (3, 2), (1000, 5)), start=1):
        machine.device, machine.processors, machine.resident = device, processors, resident
        machine.seed += 17
        loss, grad_mean, grad_alpha = primitives.forward_grad(backend, mean, target, alpha, call)
        losses += [loss, primitives.forward(backend, mean, target, alpha, call)[0]]
        gradients.append(grad_mean.view(torch.uint8))
        alphas.append(grad_alpha)
    for same in (losses, gradients, alphas):
        assert all(torch.equal(x, same[0]) for x in same)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_output_and_no_workspace_is_read_before_it_is_written(
    backend: CudaBackend, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    mean, target, alpha = problem(shape)
    call = Call(1, 1e-5, k=0.5)
    want = primitives.forward_grad(backend, mean, target, alpha, call)
    empty, empty_like = torch.empty, torch.empty_like
    # 0xff in every byte is NaN in every floating-point type, and no zero for a counter
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poison(empty_like(*a, **k)))
    got = primitives.forward_grad(backend, mean, target, alpha, call)
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


def test_auto_takes_it_and_says_so(backend: CudaBackend, as_on_a_gpu: None) -> None:
    mean, target, alpha = problem((2, 3, 4, 5))
    chosen = backends.choose("auto", mean, target, alpha, None)
    assert chosen is backend
    facts = vidfast.info()["backends"]
    assert isinstance(facts, dict)
    assert facts["cuda"]["available"] is True
    assert facts["cuda"]["architectures"] == "emulated"
