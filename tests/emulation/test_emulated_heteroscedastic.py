"""What a call with one variance an element does on the emulated device: launches, order, faults."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

import vidfast
from vidfast import backends
from vidfast.backends.cuda import CudaBackend


@pytest.fixture(autouse=True)
def machine(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.setitem(backends._loaded, "cuda", CudaBackend(native, None, "cpu", lambda index: 0))
    machine = native.machine()
    before = machine.device, machine.processors, machine.resident
    yield machine
    machine.device, machine.processors, machine.resident = before
    machine.fail_launches(0)


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).requires_grad_(i != 1) for i in range(3)]


def results(tensors: list[Tensor], **options: object) -> list[Tensor]:
    """The loss and the gradients of mean and raw."""
    loss = vidfast.heteroscedastic_nll(*tensors, backend="cuda", **options)  # type: ignore[arg-type]
    return [loss.detach(), *torch.autograd.grad(loss, (tensors[0], tensors[2]))]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("strategy", "in_backward"), [("one_pass", 2), ("two_pass", 1)])
def test_a_sweep_and_its_finish(native: ModuleType, strategy: str, in_backward: int, masked: bool) -> None:
    """No memset; a mask adds the launch of its total. One pass has its two gradients scaled, two passes walk again."""
    tensors, machine = problem((3, 5, 8, 8)), native.machine()
    mask = torch.rand(3, 8, 8) < 0.5 if masked else None
    launches, memsets = machine.launches, machine.memsets
    loss = vidfast.heteroscedastic_nll(
        *tensors, strategy=strategy, mask=mask, channel_dim=1 if masked else None, backend="cuda"
    )
    assert (machine.launches, machine.memsets) == (launches + 2 + masked, memsets)
    loss.backward()
    assert (machine.launches, machine.memsets) == (launches + 2 + masked + in_backward, memsets)


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(33, 1000), (20011,), (6, 24, 7, 7)], ids=str)
def test_the_grid_does_not_show(
    native: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, strategy: str
) -> None:
    """Any number of processors, of resident blocks, and any order of blocks gives the same bits."""
    tensors, machine, found = problem(shape, dtype), native.machine(), []
    for device, (processors, resident) in enumerate(((1, 1), (3, 2), (1000, 5)), start=1):
        machine.device, machine.processors, machine.resident = device, processors, resident
        machine.seed += 17
        found.append(results(tensors, strategy=strategy))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, found[0], strict=True))


def test_where_tensors_are_stored_does_not_show() -> None:
    """Halves of one tensor, of odd width, misaligned: the loss and the gradients have the bits of contiguous ones."""
    for shape in ((9, 77), (301, 1), (5, 3, 9)):
        torch.manual_seed(0)
        both, target = torch.randn(shape[0], 2 * shape[1], *shape[2:]), torch.randn(shape)
        halves = [x.detach().requires_grad_() for x in both.chunk(2, 1)]
        shifted = [torch.cat((torch.zeros(1), x.detach().reshape(-1)))[1:].view(shape) for x in halves]
        for mean, raw in (halves, [x.requires_grad_() for x in shifted]):
            packed = [x.detach().clone(memory_format=torch.contiguous_format) for x in (mean, raw)]
            got = results([mean, target, raw])
            want = results([packed[0].requires_grad_(), target, packed[1].requires_grad_()])
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_a_failed_launch_names_the_kernel_and_its_arguments(native: ModuleType) -> None:
    tensors = problem((2, 3, 4, 5))
    native.machine().fail_launches(9)
    with pytest.raises(
        RuntimeError,
        match=r"heteroscedastic \(forward\)<<<1, 256, 64>>>\(elements=120, row=120, transform=0, mean=f32@0x.* gap 0",
    ):
        vidfast.heteroscedastic_nll(*tensors, backend="cuda")
