"""The bounds can fail: a deliberately wrong result is caught by each of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bounds import (
    ULPS,
    check_gradient,
    check_results,
    check_scalar,
    check_unbiased,
    round_to,
    ulp_distance,
    ulp_of,
    ulps_allowed,
)
from oracle import expected
from problems import BF16, BY_NAME, DTYPES, FP16, FP32, FP64, Case, short

CASE = Case("bounds", "many channels of many elements", (8, 64, 16, 16))


def truncated(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """x rounded towards zero."""
    exact = torch.from_numpy(x)
    rounded = exact.to(dtype)
    away = rounded.double().abs() > exact.abs()
    return torch.where(away, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_ulp_distance_counts_neighbours(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, -1.0, 0.0, 30000.0, 1e-7, -2.0], dtype=dtype)
    up = torch.nextafter(x, torch.full_like(x, torch.inf))
    assert ulp_distance(x, x).tolist() == [0] * 6
    assert ulp_distance(x, up).tolist() == [1] * 6
    assert ulp_distance(torch.nextafter(up, torch.full_like(x, torch.inf)), x).tolist() == [2] * 6
    assert ulp_distance(-torch.zeros(1, dtype=dtype), torch.zeros(1, dtype=dtype)).item() == 0
    normal = x[[0, 1, 5]]
    assert torch.equal(
        ulp_of(normal.double() * 1.25, dtype),
        torch.nextafter(normal.abs(), torch.full_like(normal, 9)).double() - normal.abs().double(),
    )


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=short)
def test_truncation_violates_the_bias_bound(dtype: torch.dtype) -> None:
    mean, target, alpha = CASE.tensors(dtype)
    want = expected(mean, target, alpha, 65536.0)
    check_unbiased("rounded", round_to(want.grad_mean, dtype), want.grad_mean)
    wrong = truncated(want.grad_mean, dtype)
    check_gradient("one ulp is no elementwise error", wrong, want.grad_mean, max(1, ULPS[dtype]))
    with pytest.raises(AssertionError, match=r"away from zero is -0\.(49|50)"):
        check_unbiased("truncated", wrong, want.grad_mean)


def test_rounding_down_violates_the_bias_bound() -> None:
    mean, target, alpha = CASE.tensors(BF16)
    want = expected(mean, target, alpha)
    rounded = round_to(want.grad_mean, BF16)
    up = rounded.double() > torch.from_numpy(want.grad_mean)
    down = torch.where(up, torch.nextafter(rounded, torch.full_like(rounded, -torch.inf)), rounded)
    with pytest.raises(AssertionError, match=r"upwards is -0\.(49|50)"):
        check_unbiased("rounded down", down, want.grad_mean)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_one_ulp_too_many_is_caught(dtype: torch.dtype) -> None:
    mean, target, alpha = BY_NAME["plane_49"].tensors(dtype)
    want = expected(mean, target, alpha, 1e4)
    got = round_to(want.grad_mean, dtype)
    index = (1, 2, 3, 4)
    for _ in range(ULPS[dtype]):
        got[index] = torch.nextafter(got[index], torch.tensor(torch.inf, dtype=dtype))
    check_gradient("at the bound", got, want.grad_mean, ULPS[dtype])
    got[index] = torch.nextafter(got[index], torch.tensor(torch.inf, dtype=dtype))
    with pytest.raises(AssertionError, match=r"1 of \d+ values are out of bounds"):
        check_gradient("one beyond", got, want.grad_mean, ULPS[dtype])


def test_only_a_gpu_and_only_fp64_is_allowed_more() -> None:
    """fp32 3 and 4, fp64 4 and 4 (6 in GPU code), bf16 1 and 2."""
    for dtype in DTYPES:
        assert ulps_allowed(dtype, False, False) == ULPS[dtype]
        for scaled in (False, True):
            extra = ulps_allowed(dtype, scaled, True) - ulps_allowed(dtype, scaled, False)
            assert extra == (2 if dtype is FP64 else 0)
    assert [ulps_allowed(FP64, scaled, True) for scaled in (False, True)] == [6, 6]
    assert [ulps_allowed(FP32, scaled, False) for scaled in (False, True)] == [3, 4]
    assert [ulps_allowed(BF16, scaled, False) for scaled in (False, True)] == [1, 2]


def test_wrong_results_are_caught() -> None:
    mean, target, alpha = BY_NAME["plane_49"].tensors(FP32)
    want = expected(mean, target, alpha)
    loss = round_to(want.loss, FP32)
    grads = [round_to(x, FP32) for x in (want.grad_mean, want.grad_target, want.grad_alpha)]
    check_results(want, loss, *grads)
    with pytest.raises(AssertionError, match="loss"):
        check_results(want, loss + 3e-6 * float(want.loss_scale), *grads)
    with pytest.raises(AssertionError, match="d/d alpha"):
        check_results(want, loss, grads[0], grads[1], grads[2] * (1 + 1e-4))
    with pytest.raises(AssertionError, match="d/d target"):
        check_results(want, loss, grads[0], grads[0], grads[2])
    with pytest.raises(AssertionError, match="d/d mean"):
        check_results(want, loss, grads[0] * (1 + 1e-6), grads[1], grads[2])
    with pytest.raises(AssertionError, match="loss"):
        check_results(want, torch.tensor(torch.nan), *grads)


def test_missing_nan_is_caught() -> None:
    nan, one = np.array([np.nan]), np.array([1.0])
    check_scalar("both", torch.tensor([torch.nan]), nan, one, 1e-6)
    for got, want in (
        (torch.tensor([1.0]), nan),
        (torch.tensor([torch.nan]), one),
        (torch.tensor([torch.inf]), one),
    ):
        with pytest.raises(AssertionError, match="what"):
            check_scalar("what", got, want, one, 1e-6)
        with pytest.raises(AssertionError, match="what"):
            check_gradient("what", got, want, 3)


def test_the_mean_in_fp32_would_be_caught() -> None:
    """Summing 2^24 fp32 squares one after another loses what the bound asks for."""
    ones = np.full(1 << 14, np.float32(1 / 3))
    running = np.cumsum(np.tile(np.square(ones), 64), dtype=np.float32)[-1]
    exact = np.square(ones.astype(float)).sum() * 64
    with pytest.raises(AssertionError, match="running sum"):
        check_scalar("running sum", torch.tensor(running), np.asarray(exact), np.asarray(exact), 1e-6)
    assert FP64 in DTYPES
