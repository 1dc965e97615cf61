"""The reference is equation 5: against a restatement in long double that shares nothing with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracle import Options, by_hand, by_reference
from problems import BY_NAME, FP32, FP64
from torch.distributions import Normal

import vidfast
from vidfast import reference

CASES = ("plane_49", "rows_tail", "vector", "channels_in_front", "transformer", "conv_3d", "channels_last")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_reference_is_the_closed_form(name: str, reduction: str, full: bool) -> None:
    case = BY_NAME[name]
    mean, target, alpha = case.tensors(FP64, alpha_dtype=FP64)
    options = Options(case.channel_dim, 1e-3, reduction, full, -1.75)
    one, other = (f(mean, target, alpha, 2.5, options) for f in (by_reference, by_hand))
    for field in ("loss", "grad_mean", "grad_target", "grad_alpha", "loss_scale", "alpha_scale"):
        np.testing.assert_allclose(
            getattr(one, field), getattr(other, field).astype(float), rtol=1e-12, atol=1e-13, err_msg=field
        )


def test_full_reference_is_the_normal_distribution() -> None:
    mean, target, alpha = BY_NAME["plane_49"].tensors(FP64, alpha_dtype=FP64)
    sigma = reference.variance(alpha, 1e-5).sqrt().view(-1, 1, 1)
    want = -Normal(mean, sigma.expand_as(mean)).log_prob(target)
    torch.testing.assert_close(vidfast.gaussian_nll(mean, target, alpha, reduction="none", full=True), want)
    torch.testing.assert_close(vidfast.gaussian_nll(mean, target, alpha, full=True), want.mean())
    got = vidfast.gaussian_nll(mean, target, alpha, reduction="none", weight=-3.0)
    torch.testing.assert_close(got, -3 * (want - 0.5 * math.log(2 * math.pi)))
    torch.testing.assert_close(vidfast.log_likelihood_map(mean, target, alpha), -want.sum(1))


@pytest.mark.parametrize(("shape", "channel"), [((3, 4, 5, 6), 1), ((3, 5, 4), -1), ((4, 3), 0), ((3, 4), 1)])
def test_log_likelihood_map_drops_the_channels(shape: tuple[int, ...], channel: int) -> None:
    mean, target = torch.randn(shape), torch.randn(shape)
    alpha = torch.randn(4)
    got = vidfast.log_likelihood_map(mean, target, alpha, channel_dim=channel)
    sigma = (
        reference.variance(alpha, 1e-5)
        .sqrt()
        .view([-1 if d == channel % len(shape) else 1 for d in range(len(shape))])
    )
    want = Normal(mean, sigma.expand(shape)).log_prob(target).sum(channel)
    assert got.shape == want.shape
    assert got.dtype == FP32
    torch.testing.assert_close(got, want)


def test_log_likelihood_map_is_differentiable_and_keeps_fp64() -> None:
    mean, target = torch.randn(2, 3, 4, dtype=FP64, requires_grad=True), torch.randn(2, 3, 4)
    got = vidfast.log_likelihood_map(mean, target, torch.zeros(3))
    assert got.dtype == FP64
    got.sum().backward()
    v = math.log(2) + 1e-5
    torch.testing.assert_close(mean.grad, (target - mean.detach()) / v)


def test_variance_has_no_cut_off() -> None:
    # F.softplus returns x itself beyond 20, and log(1 + exp(x)) is 0 below -37 and inf above 709
    alpha = torch.tensor([-1e4, -700.0, -40.0, -1.0, 0.0, 19.0, 21.0, 30.0, 1e4], dtype=FP64)
    want = [math.log1p(math.exp(a)) if a < 0 else a + math.log1p(math.exp(-a)) for a in alpha.tolist()]
    got = reference.variance(alpha, 1e-300)
    np.testing.assert_allclose(got.numpy(), np.array(want) + 1e-300, rtol=1e-15)
    assert got[6] > 21.0
    assert got[0] == 1e-300


def test_reference_differentiates_twice() -> None:
    mean, target, alpha = (
        x.requires_grad_()
        for x in (
            torch.randn(2, 3, 2, dtype=FP64),
            torch.randn(2, 3, 2, dtype=FP64),
            torch.randn(3, dtype=FP64),
        )
    )
    for reduction in ("mean", "none"):
        torch.autograd.gradgradcheck(
            lambda m, t, a, how=reduction: reference.gaussian_nll(m, t, a, reduction=how),
            (mean, target, alpha),
        )
