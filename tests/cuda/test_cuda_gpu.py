"""On a GPU: streams, graphs, devices and launches. The values are the shared suite's business (tests/core)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vidfast
from vidfast.backends.cuda import BACKEND

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or BACKEND.unavailable() is not None,
    reason=f"the CUDA back end cannot run here: {BACKEND.unavailable()}",
)

SHAPES = [(8, 64, 56, 56), (32, 128, 14, 14), (64, 512, 7, 7), (256, 1000), (4, 1, 300, 301)]


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cuda") -> list[Tensor]:
    torch.manual_seed(0)
    mean, target = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    return [mean.requires_grad_(), target, torch.randn(shape[1], device=device).requires_grad_()]


def step(tensors: list[Tensor], strategy: str = "one_pass") -> Callable[[], tuple[Tensor, ...]]:
    mean, target, alpha = tensors

    def run() -> tuple[Tensor, ...]:
        loss = vidfast.gaussian_nll(mean, target, alpha, strategy=strategy, backend="cuda")
        return (loss.detach(), *torch.autograd.grad(loss, (mean, alpha)))

    return run


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bitwise_the_same_from_run_to_run(shape: tuple[int, ...], strategy: str) -> None:
    run = step(problem(shape), strategy)
    want = run()
    for _ in range(20):
        assert same(run(), want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(shape: tuple[int, ...]) -> None:
    mean, target, alpha = problem(shape)
    want = vidfast.gaussian_nll(
        mean.double().cpu(), target.double().cpu(), alpha.double().cpu(), backend="reference"
    )
    got = vidfast.gaussian_nll(mean, target, alpha, backend="cuda")
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_variance_an_element(shape: tuple[int, ...], dtype: torch.dtype, strategy: str) -> None:
    """Bitwise the same from run to run, and from halves of one tensor; it agrees with the reference."""
    torch.manual_seed(0)
    both = torch.randn(shape[0], 2 * shape[1], *shape[2:], device="cuda", dtype=dtype)
    target = torch.randn(shape, device="cuda", dtype=dtype)

    def run(mean: Tensor, raw: Tensor) -> tuple[Tensor, ...]:
        mean, raw = (x.detach().requires_grad_() for x in (mean, raw))
        loss = vidfast.heteroscedastic_nll(mean, target, raw, strategy=strategy, backend="cuda")
        return (loss.detach(), *torch.autograd.grad(loss, (mean, raw)))

    want = run(*both.chunk(2, 1))
    for _ in range(10):
        assert same(run(*both.chunk(2, 1)), want)
    assert same(run(*(x.contiguous() for x in both.chunk(2, 1))), want)
    mean, raw = both.double().cpu().chunk(2, 1)
    exact = vidfast.heteroscedastic_nll(mean, target.double().cpu(), raw, backend="reference")
    torch.testing.assert_close(want[0].double().cpu(), exact, rtol=1e-6, atol=1e-6)


def test_a_side_stream_is_respected() -> None:
    """The kernel waits for what the side stream makes, which the default stream never waits for."""
    mean, target, alpha = problem((64, 256, 28, 28))
    want = step([mean, target, alpha])()
    torch.cuda.synchronize()
    late = torch.zeros_like(target)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(target)
        got = step([mean, late, alpha])()
    side.synchronize()
    assert same(got, want)


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_a_graph_replays_beside_eager_work_on_another_stream(strategy: str) -> None:
    """Counters and partial sums are each call's own: nothing that runs at the same time shares them."""
    captured, beside = problem((64, 256, 14, 14)), problem((3000, 96))
    run = step(captured, strategy)
    want, want_beside = run(), step(beside, strategy)()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(50):
        for x in got:
            x.fill_(torch.nan)
        graph.replay()
        with torch.cuda.stream(other):
            eager = step(beside, strategy)()
        torch.cuda.synchronize()
        assert same(got, want)
        assert same(eager, want_beside)


@pytest.mark.parametrize(("strategy", "most"), [("one_pass", 3), ("two_pass", 3)])
def test_three_kernels_a_step(strategy: str, most: int) -> None:
    mean, target, alpha = problem((32, 128, 14, 14))
    run = step([mean, target, alpha], strategy)
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.profiler.DeviceType.CUDA]
    ours = [n for n in names if "vidfast" in n]
    assert len(ours) == most, names
    assert not [n for n in names if "memset" in n.lower()], names


def test_a_process_forked_after_the_import_can_use_the_device() -> None:
    code = """
import os
import vidfast, vidfast.distill
process = os.fork()
if process == 0:
    import torch
    x = torch.ones(2, 3, device="cuda", requires_grad=True)
    vidfast.gaussian_nll(x, x.detach(), x.detach()[0]).backward()
    os._exit(0 if torch.isfinite(x.grad).all() else 1)
raise SystemExit(os.waitpid(process, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
def test_the_device_of_the_tensors_is_used() -> None:
    want = step(problem((16, 32, 14, 14), device="cuda:0"))()
    torch.cuda.set_device(0)
    got = step(problem((16, 32, 14, 14), device="cuda:1"))()
    assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in got)
    torch.testing.assert_close(got[0].cpu(), want[0].cpu(), rtol=0.1, atol=0.1)  # other random numbers


def test_more_than_2_to_the_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    shape = (1, 3, 1 << 10, (1 << 20) // 2 + (1 << 18))
    elements = shape[1] * shape[2] * shape[3]
    if free < 10 * elements:
        pytest.skip(f"{10 * elements >> 30} GiB of GPU memory are not free")
    assert elements > 1 << 31
    mean = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(mean).normal_()
    alpha = torch.zeros(3, device="cuda")
    loss, grad, _ = step([mean.requires_grad_(), target, alpha.requires_grad_()])()
    v = torch.nn.functional.softplus(torch.zeros((), dtype=torch.float64)) + 1e-5
    last = (mean.detach()[..., -1, -1000:].double() - target[..., -1, -1000:].double()) / (elements * v)
    torch.testing.assert_close(grad[..., -1, -1000:].double(), last, rtol=2e-2, atol=0)
    squares = sum(
        float((mean.detach()[:, :, i].double() - target[:, :, i].double()).square().sum())
        for i in range(shape[2])
    )
    assert loss.item() == pytest.approx(0.5 * (v.log().item() + squares / elements / v.item()), rel=1e-5)
