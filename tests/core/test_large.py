"""Sizes at which 32-bit indices and fp32 sums break."""

from __future__ import annotations

import math

import pytest
import torch
from bounds import RELATIVE, ULPS, check_gradient, check_scalar
from oracle import Options, expected
from places import Place
from problems import BF16, FP32
from torch import Tensor

import vidfast

GIB = 2**30


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo") as lines:
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return found["MemAvailable"]


def need_memory(device: torch.device, size: float) -> None:
    try:
        free = free_memory(device)
    except OSError:
        pytest.skip("cannot tell how much memory is free")
    if free < size:
        pytest.skip(f"needs {size / GIB:.1f} GiB, {free / GIB:.1f} are free")


def tiled(shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype = FP32) -> Tensor:
    """Normal values, a block of 2^20 + 7 again and again: 1e8 of them fresh would cost more than the test."""
    block = torch.randn((1 << 20) + 7, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    out = torch.empty(shape, device=device, dtype=dtype)
    flat, n = out.view(-1), block.numel()
    for begin in range(0, flat.numel(), n):
        part = flat[begin : begin + n]
        part.copy_(block[: part.numel()])
    return out


def sums_of_squares(mean: Tensor, target: Tensor, dim: int) -> Tensor:
    """S_c in fp64, a piece at a time."""
    sums = torch.zeros(mean.shape[dim], dtype=torch.float64, device=mean.device)
    axes = [d for d in range(mean.dim()) if d != dim]
    for m, t in zip(mean, target, strict=True):
        for a, b in zip(m.split(40_000, dim=2 - dim), t.split(40_000, dim=2 - dim), strict=True):
            r = (a.double() - b.double())[None]
            sums += r.square_().sum(axes)
    return sums


@pytest.mark.parametrize(
    ("shape", "dim"), [((4, 25, 1_000_000), 1), ((4, 62_500, 100), 2)], ids=["1e8-plane", "2.5e7-rows"]
)
def test_1e8_elements(backend: Place, shape: tuple[int, int, int], dim: int) -> None:
    backend.need(math.prod(shape))
    need_memory(backend.device, 3 * GIB)
    mean, target = tiled(shape, 1, backend.device).requires_grad_(), tiled(shape, 2, backend.device)
    channels = shape[dim]
    alpha = torch.linspace(-2, 4, channels, device=backend.device).requires_grad_()
    loss = backend.nll(mean, target, alpha, strategy="one_pass", channel_dim=dim)
    grad_mean, grad_alpha = torch.autograd.grad(loss, (mean, alpha))
    with torch.no_grad():
        wide = alpha.double()
        v = torch.logaddexp(wide, torch.zeros_like(wide)) + 1e-5
        sum_sq = sums_of_squares(mean, target, dim)
        m, k = mean.numel() / channels, 1 / mean.numel()
        logs, squares = m / 2 * torch.log(v), sum_sq / (2 * v)
        want, scale = k * (logs + squares).sum(), k * (logs.abs() + squares).sum()
        check_scalar("loss", loss, want.cpu().numpy(), scale.cpu().numpy(), RELATIVE[FP32])
        count, square = k * m / (2 * v) * wide.sigmoid(), k * squares / v * wide.sigmoid()
        want, scale = count - square, count + square
        check_scalar("d/d alpha", grad_alpha, want.cpu().numpy(), scale.cpu().numpy(), RELATIVE[FP32])
        first = (slice(0, 5000),) * 2
        last = (slice(-5000, None),) * 2
        for b, (rows, columns) in ((0, first), (3, last)):  # both ends of memory
            part = (b, rows, columns)
            exact = (
                k
                * (mean[part].double() - target[part].double())
                / (v[rows, None] if dim == 1 else v[columns])
            )
            check_gradient("d/d mean", grad_mean[part], exact.cpu().numpy(), ULPS[FP32])


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_strides_past_32_bits(backend: Place, strategy: str) -> None:
    """Three samples more than 2^31 elements apart: the memory is asked for, hardly any of it touched."""
    stride = 2**31 + 24
    need_memory(backend.device, 2 * (2 * stride + 4096))
    backend.need(stride)
    mean_memory = torch.empty(2 * stride + 4096, dtype=BF16, device=backend.device)
    mean = mean_memory.as_strided((3, 8, 50), (stride, 50, 1))
    mean.copy_(torch.randn(3, 8, 50))
    target = torch.randn(3, 8, 50, device=backend.device)
    alpha = torch.randn(8, device=backend.device).requires_grad_()
    want = expected(mean, target, alpha, 1.0, Options())
    m = mean.requires_grad_()
    loss = backend.nll(m, target, alpha, strategy=strategy)
    (grad,) = torch.autograd.grad(loss, m)
    check_scalar("loss", loss, want.loss, want.loss_scale, 1e-6)
    check_gradient("d/d mean", grad, want.grad_mean, 1)
    rows = mean_memory.as_strided((3, 40), (stride, 1)).detach()  # the other family
    t = torch.randn(3, 40, device=backend.device)
    a = torch.zeros(40, device=backend.device)
    r = rows.clone()
    assert torch.equal(backend.nll(rows, t, a), backend.nll(r, t, a))


@pytest.mark.slow(reason="2^31 elements: 13 GiB and half a minute")
@pytest.mark.parametrize("shape", [(1, 2, 2**30 + 12), (2**21 + 1, 1024)], ids=["plane", "rows"])
def test_more_than_2_to_the_31_elements(backend: Place, shape: tuple[int, ...]) -> None:
    backend.need(math.prod(shape))
    need_memory(backend.device, 14 * GIB)
    mean, target = tiled(shape, 1, backend.device, BF16), tiled(shape, 2, backend.device, BF16)
    alpha = torch.zeros(shape[1], device=backend.device)
    mean.requires_grad_()
    loss = backend.nll(mean, target, alpha, strategy="one_pass", reduction="sum")
    (grad,) = torch.autograd.grad(loss, mean)
    v = math.log(2) + 1e-5
    with torch.no_grad():
        total = 0.0
        flat = [x.view(-1) for x in (mean, target, grad)]
        for begin in range(0, mean.numel(), 1 << 20):
            part = slice(begin, begin + (1 << 20))
            total += (flat[0][part].double() - flat[1][part].double()).square_().sum().item()
        n = mean.numel()
        want = torch.tensor(n / 2 * math.log(v) + total / (2 * v), dtype=torch.float64).numpy()
        scale = torch.tensor(n / 2 * abs(math.log(v)) + total / (2 * v), dtype=torch.float64).numpy()
        check_scalar("loss", loss, want, scale, 1e-6)
        for part in (slice(0, 4096), slice(2**31 - 4096, 2**31 + 4), slice(-4096, None)):
            exact = (flat[0][part].double() - flat[1][part].double()) / v
            check_gradient("d/d mean", flat[2][part], exact.cpu().numpy(), 1)


def test_many_channels(backend: Place) -> None:
    """More channels than a GPU grid has rows (65535)."""
    shape = (2, 70_001, 3)
    backend.need(math.prod(shape))
    m, t = torch.randn(shape, device=backend.device), torch.randn(shape, device=backend.device)
    a = torch.randn(shape[1], device=backend.device)
    want = expected(m, t, a)
    for strategy in ("one_pass", "two_pass"):
        x, alpha = m.clone().requires_grad_(), a.clone().requires_grad_()
        loss = backend.nll(x, t, alpha, strategy=strategy)
        grads = torch.autograd.grad(loss, (x, alpha))
        check_scalar("loss", loss, want.loss, want.loss_scale, 1e-6)
        check_scalar("d/d alpha", grads[1], want.grad_alpha, want.alpha_scale, 1e-6)
        check_gradient("d/d mean", grads[0], want.grad_mean, 3)
    assert vidfast.gaussian_nll(m, t, a, backend="reference").isfinite()


def test_a_big_batch_of_single_elements(backend: Place) -> None:
    """More outer indices than a GPU grid has rows, one element each."""
    shape = (200_003, 2)
    backend.need(math.prod(shape))
    m, t = torch.randn(shape, device=backend.device), torch.randn(shape, device=backend.device)
    a = torch.zeros(2, device=backend.device)
    want = expected(m, t, a)
    big_m = torch.zeros(shape[0], 5, device=backend.device)  # rows apart, so that they cannot be joined
    big_m[:, 1:3] = m
    for mean in (m, big_m[:, 1:3]):
        x = mean.detach().requires_grad_()
        loss = backend.nll(x, t, a)
        check_scalar("loss", loss, want.loss, want.loss_scale, 1e-6)
        check_gradient("d/d mean", torch.autograd.grad(loss, x)[0], want.grad_mean, 3)
