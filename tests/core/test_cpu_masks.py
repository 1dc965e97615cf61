"""Positions that count in the CPU back end: every instruction set, any number of threads, and what is not read."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import check_call
from masks import in_blocks, mask_for, spoilt
from places import Place
from problems import BF16, CASES, DTYPES, FP16, FP32, FP64, WAYS, Case, short
from test_determinism import PROBLEMS, digest
from torch import Tensor

import vidfast
from vidfast import memory
from vidfast.backends import cpu

BACKEND: Any = cpu.BACKEND
CPU = Place("cpu", torch.device("cpu"), None)

pytestmark = pytest.mark.skipif(memory._C is None, reason="the extension is not built")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_every_instruction_set_keeps_the_bounds(isa: str, dtype: torch.dtype) -> None:
    del isa
    for case in CASES:
        if case.numel > 20_000:
            continue
        for mask, value in ((mask_for(case), math.nan), (mask_for(case, FP32), math.inf)):
            tensors = spoilt(case, mask, value, dtype=dtype)
            for strategy in ("one_pass", "two_pass"):
                check_call(CPU, *tensors, strategy=strategy, g=2.0, channel_dim=case.channel_dim, mask=mask)
    for case in WAYS:
        for target_dtype in DTYPES:
            mask = mask_for(case, FP32)
            tensors = spoilt(case, mask, dtype=dtype, target_dtype=target_dtype)
            for strategy in ("one_pass", "two_pass"):
                check_call(CPU, *tensors, strategy=strategy, channel_dim=case.channel_dim, mask=mask)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=short)
def test_stretches_of_nothing(isa: str, dtype: torch.dtype) -> None:
    """Vectors, rows, runs and tasks in which no position counts, and alone ones among them."""
    del isa
    cases = (
        Case("pieces", "planes of several tasks", (2, 3, 40_003)),
        Case("planes", "several planes a task", (40, 5, 15, 15)),
        Case("joined", "joined rows, and some that are left", (2_003, 7)),
        Case("joined planes", "joined rows of small planes", (301, 3, 5)),
        Case("wide planes", "small planes in rows of several tiles", (150, 700, 3)),
        Case("rows", "one position a row", (601, 1027)),
        Case("vector", "one channel in a row", (70_001, 1)),
        Case("strided vector", "one channel, apart from each other", (701, 1), 1, "batch_slice"),
    )
    for case in cases:
        blocks = in_blocks(case)
        for mask in (blocks, blocks * torch.linspace(0.5, 1.5, blocks.numel()).view(blocks.shape)):
            tensors = spoilt(case, mask, dtype=dtype)
            for strategy in ("one_pass", "two_pass"):
                check_call(CPU, *tensors, strategy=strategy, channel_dim=case.channel_dim, mask=mask)


def _outputs(case: Case, mask: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Everything both strategies return; alpha is fp64, so that d/d alpha shows the last bit of the sums."""
    found: list[Tensor] = []
    for strategy in ("one_pass", "two_pass"):
        m, t, a = spoilt(case, mask, dtype=dtype, alpha_dtype=FP64)
        wanted = [m.requires_grad_(), a.requires_grad_()]
        if strategy == "two_pass":
            wanted.append(t.requires_grad_())
        loss = CPU.nll(m, t, a, strategy=strategy, channel_dim=case.channel_dim, mask=mask)
        found += [loss, *torch.autograd.grad(loss, wanted, torch.full_like(loss, 3.3))]
    return found


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=short)
@pytest.mark.parametrize("kind", [torch.bool, FP32], ids=["bool", "numbers"])
@pytest.mark.parametrize("case", PROBLEMS, ids=lambda c: c.name)
def test_the_same_for_any_number_of_threads(case: Case, kind: torch.dtype, dtype: torch.dtype) -> None:
    mask = mask_for(case, kind)
    found = set()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.add(digest(_outputs(case, mask, dtype)))
    assert len(found) == 1


@pytest.mark.parametrize("kind", [torch.uint8, FP32], ids=str)
def test_weights_at_any_address(isa: str, kind: torch.dtype) -> None:
    del isa
    for case in WAYS:
        mask = mask_for(case, kind)
        for offset in range(1, 4):
            wide = torch.full((mask.numel() + 8,), 3, dtype=kind)
            at = wide[offset : offset + mask.numel()].view(mask.shape).copy_(mask)
            check_call(
                CPU, *spoilt(case, at), strategy="one_pass", channel_dim=case.channel_dim, mask=at
            )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_bytes_are_the_numbers_that_they_are(isa: str, dtype: torch.dtype) -> None:
    """Blocks of zeros, of ones, of both and of other weights take different instructions, and no other rounding."""
    del isa
    kinds = torch.tensor(
        [[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0], [3, 1, 0, 255], [2, 2, 2, 2], [0, 0, 0, 1]]
    )
    for length in (8, 32, 64, 96):
        each = kinds.repeat(1, length // 4)[:, :length]
        order = torch.randperm(40, generator=torch.Generator().manual_seed(length)) % len(kinds)
        of_bytes = torch.cat([each[order].flatten(), kinds.flatten()]).to(torch.uint8)
        case = Case("contents", "blocks of all contents", (1, 3, of_bytes.numel()))
        found = [_outputs(case, mask.view(1, -1), dtype) for mask in (of_bytes, of_bytes.double())]
        for by_bytes, by_numbers in zip(*found, strict=True):
            assert torch.equal(by_bytes, by_numbers)


def test_a_variance_that_is_nan_stays_where_positions_count(isa: str) -> None:
    """0 times NaN would come to the others."""
    del isa
    for case in WAYS:
        for kind in (torch.bool, FP32):
            mask = mask_for(case, kind)
            mean, target, alpha = spoilt(case, mask)
            alpha.fill_(math.nan)
            for strategy in ("one_pass", "two_pass"):
                m = mean.detach().requires_grad_()
                t = target.detach().requires_grad_(strategy == "two_pass")
                loss = CPU.nll(m, t, alpha, strategy=strategy, channel_dim=case.channel_dim, mask=mask)
                wanted = (m, t) if strategy == "two_pass" else (m,)
                for grad in torch.autograd.grad(loss, wanted):
                    at_channel = grad.movedim(case.channel_dim, -1)
                    assert not at_channel[mask == 0].any()
                    assert at_channel[mask != 0].isnan().all()


# Pages that cannot be read hold what does not count: a read of them would end the process.
UNREADABLE = """
import ctypes, mmap, sys
import torch
import vidfast
from vidfast import _C

kept = []
mprotect = ctypes.CDLL(None, use_errno=True).mprotect
mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

def unreadable(shape, dtype, chosen):
    # Of such a shape, with no access to the pages that are not chosen.
    memory = mmap.mmap(-1, torch.Size(shape).numel() * dtype.itemsize)
    kept.append(memory)
    x = torch.frombuffer(memory, dtype=dtype).fill_(1.0)
    page = mmap.PAGESIZE
    for i, keep in enumerate(chosen):
        if not keep and mprotect(x.data_ptr() + i * page, page, 0) != 0:
            sys.exit(3)
    return x.view(shape)

for isa in ("baseline", "avx2", "avx512"):
    if not _C.cpu_select_isa(isa):
        continue
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        page = mmap.PAGESIZE // dtype.itemsize
        # planes of several pages, rows of one page, joined rows, joined small planes
        for shape in ((1, 3, 9 * page), (9, page), (9 * page // 8, 8), (9 * page // 64, 4, 16)):
            outer, width = shape[0], torch.Size(shape[1:]).numel()
            pages = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 1] * (3 if outer == 1 else 1), dtype=torch.bool)
            of_one_channel = pages.repeat_interleave(page).view(shape).select(1, 0)
            for mask in (of_one_channel, of_one_channel.double() * 0.5):
                for strategy in ("one_pass", "two_pass"):
                    mean = unreadable(shape, dtype, pages).requires_grad_()
                    target = unreadable(shape, dtype, pages).requires_grad_(strategy == "two_pass")
                    alpha = torch.zeros(shape[1], requires_grad=True)
                    loss = vidfast.gaussian_nll(mean, target, alpha, mask=mask, strategy=strategy, backend="cpu")
                    loss.backward()
                    assert not mean.grad.any() and not alpha.grad.isnan().any()
print("read")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect's numbers are Linux's")
def test_what_does_not_count_is_not_read() -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNREADABLE], capture_output=True, text=True, timeout=300,
        cwd=Path(vidfast.__file__).parents[1],
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr


def total(
    positions: Tensor | None, factor: Tensor | None, count: int, k: float, channels: int
) -> list[float]:
    totals = torch.full((2,), math.nan, dtype=FP64)
    BACKEND.total(positions, factor, count, k, channels, totals=totals)
    found: list[float] = totals.tolist()
    return found


@pytest.mark.parametrize("kind", [torch.uint8, FP32, FP64], ids=str)
@pytest.mark.parametrize("count", [1, 7, 8, 63, 16_384, 16_391, 400_003])
def test_totals(count: int, kind: torch.dtype) -> None:
    positions = torch.randint(0, 256, (count,)).to(kind) / (1 if kind is torch.uint8 else 7)
    positions = positions.to(kind)
    m = math.fsum(positions.double().tolist())
    for channels in (0, 1, 12):
        got_m, got_k = total(positions, None, count, 0.75, channels)
        assert got_m == pytest.approx(m, rel=1e-14)
        assert got_k == (0.75 / (got_m * channels or 1) if channels else 0.75) * (got_m != 0)
    found = set()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.add(tuple(total(positions, None, count, 0.75, 3)))
    assert len(found) == 1


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32, FP64], ids=short)
def test_totals_with_a_factor(dtype: torch.dtype) -> None:
    factor = torch.tensor(0.375, dtype=dtype)
    assert total(None, factor, 40, 2.0, 0) == [40.0, 0.75]
    assert total(None, factor, 40, 2.0, 3) == [40.0, 0.75 / 120]
    assert total(torch.ones(5, 3), factor, 15, 2.0, 1) == [15.0, 0.05]
    assert total(None, None, 40, 2.0, 1) == [40.0, 0.05]


def test_totals_that_are_no_numbers() -> None:
    assert total(torch.zeros(9), None, 9, 2.0, 1) == [0.0, 0.0]
    assert total(torch.zeros(9), torch.tensor(math.nan), 9, 2.0, 1) == [0.0, 0.0]
    m, k = total(torch.tensor([1.0, math.nan]), None, 2, 2.0, 1)
    assert math.isnan(m)
    assert math.isnan(k)
    m, k = total(torch.ones(2), torch.tensor(math.nan), 2, 2.0, 0)
    assert m == 2
    assert math.isnan(k)


def test_totals_without_positions_replace_k_and_m(isa: str) -> None:
    """A weight alone is on the device: every position counts, with M and k from memory."""
    del isa
    for case in WAYS:
        check_call(
            CPU, *case.tensors(), channel_dim=case.channel_dim, weight=torch.tensor(0.25, dtype=FP16), full=True
        )  # fmt: skip
