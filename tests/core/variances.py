"""What a call with one variance an element must return, in long double by hand, and how far off results may be.

The oracle shares nothing with `vidfast.heteroscedastic` (numpy, the gradients' closed form). Bounds are stated here
once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from bounds import as_leaf
from oracle import Array, position_weights, to_numpy
from places import Place
from problems import LAYOUTS, Case
from torch import Tensor

import vidfast

# Relative to the sum of the terms' magnitudes; log v counts as 1 at least: near v = 1 it is as far off as v.
LOSS = {torch.float32: 1e-6, torch.float64: 1e-13}
# Relative to |d/d mean|, and to |f| / 2 (1 + r^2 / v) p of d/d raw, which crosses zero; by the type computed in.
GRADIENT = {torch.float32: 1.2e-6, torch.float64: 4e-15}
# Of v^beta more: for each unit of |beta log v|.
POWER = {torch.float32: 2.4e-7, torch.float64: 6e-16}

TRANSFORMS: dict[str, dict[str, Any]] = {
    "softplus": {"transform": "softplus", "eps": 1e-3},
    "exp": {"transform": "exp", "eps": 1e-3},
    "log_variance": {"transform": "exp", "eps": 0.0},
    "identity": {"transform": "identity", "eps": 0.05},
}
BETAS = (0.0, 0.5, 1.0, 0.7)


@dataclass(frozen=True)
class Expected:
    """Exact results in long double, and the scales that bounds are relative to, for each element."""

    loss: Array
    loss_scale: Array
    grad_mean: Array
    grad_raw: Array
    raw_scale: Array
    power: Array  # |beta log v|
    flushed: Array  # what d/d raw loses where exp is below the normal numbers of fp32
    elements: Array = field(repr=False)  # reduction="none"


def weights_of(mask: Tensor | None, shape: torch.Size, channel_dim: int | None) -> Array:
    if mask is None:
        return np.ones(tuple(shape), np.longdouble)
    if channel_dim is not None:
        return np.broadcast_to(position_weights(mask, shape, channel_dim, np.longdouble), tuple(shape))
    w = to_numpy(mask, np.longdouble)
    if w.ndim < len(shape):
        w = w.reshape([-1] + [1] * (len(shape) - 1))
    return np.broadcast_to(w, tuple(shape))


def expected(
    mean: Tensor,
    target: Tensor,
    raw: Tensor,
    g: float = 1.0,
    *,
    transform: str = "softplus",
    eps: float = 1e-5,
    beta: float = 0.0,
    channel_dim: int | None = None,
    reduction: str = "mean",
    full: bool = False,
    weight: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Expected:
    """Of :func:`vidfast.heteroscedastic_nll`; gradients for the incoming gradient g."""
    m, t, u = (to_numpy(x, np.longdouble) for x in (mean, target, raw))
    w = weights_of(mask, mean.shape, channel_dim)
    m, t, u = (np.where(w == 0, np.longdouble(0), x) for x in (m, t, u))
    with np.errstate(all="ignore"):
        if transform == "softplus":
            v = np.maximum(u, 0) + np.log1p(np.exp(-np.abs(u))) + eps
            slope = np.where(u >= 0, 1, np.exp(-np.abs(u))) / (1 + np.exp(-np.abs(u))) / v
        elif transform == "exp":
            v = np.exp(u) + eps
            slope = np.exp(u) / v if eps else np.ones_like(u)
        else:
            v = np.maximum(u, eps)
            slope = 1 / v
        log_v = np.log(v)
        r = m - t
        ratio = r * r / v
        power = v**beta if beta else np.ones_like(v)
        constant = np.log(2 * np.pi) if full else 0.0
        each = np.where(w == 0, 0, w * power * (log_v + ratio + constant) / 2)
        size = np.where(w == 0, 0, w * power * (1 + np.abs(log_v) + ratio + constant) / 2)
        k = np.longdouble(float(weight))
        if reduction == "mean":
            k = k / w.sum() if w.sum() else np.longdouble(0)
        elif reduction == "batchmean":
            k = k / mean.shape[0]
        f = g * k * w * power
        return Expected(
            k * each.sum(), abs(k) * size.sum(),
            np.where(w == 0, 0, f * r / v),
            np.where(w == 0, 0, f * (1 - ratio) / 2 * slope),
            np.where(w == 0, 0, np.abs(f) * (1 + ratio) / 2 * slope),
            np.abs(beta * log_v),
            np.where(w == 0, 0, np.abs(f) * (1 + ratio) / 2 * 2e-38 / v),
            float(weight) * each,
        )  # fmt: skip


def check_near(what: str, got: Tensor, want: Array, allowed: Array, g: float = 1.0) -> None:
    """|got - want| <= allowed, got's own rounding added, twice where one pass meets g; NaN only where want is."""
    info = torch.finfo(got.dtype)
    value = to_numpy(got, np.longdouble)
    assert value.shape == np.shape(want), f"{what}: got shape {value.shape}, want {np.shape(want)}"
    with np.errstate(invalid="ignore", over="ignore"):
        own = 1.01 * np.abs(want) * info.eps + 4 * max(1.0, abs(g)) * info.tiny * (
            info.eps if got.dtype is torch.float16 else 1
        )
        good = (
            (np.abs(value - want) <= allowed + own)
            | (value == want)
            | (np.isnan(value) & np.isnan(want))
            | (
                (np.abs(want) >= 0.99 * info.max)
                & (np.sign(value) == np.sign(want))
                & (np.abs(value) >= 0.99 * info.max)
            )
        )
    if not np.all(good):
        bad = np.flatnonzero(~np.ravel(good))
        at = bad[0]
        raise AssertionError(
            f"{what}: {bad.size} of {value.size} are out of bounds; the first, {at}: got {np.ravel(value)[at]}, want "
            f"{np.ravel(want)[at]}, allowed {np.ravel(allowed + own)[at] if np.size(allowed) > 1 else allowed + own}"
        )


def check_results(
    want: Expected,
    dtype: torch.dtype,
    loss: Tensor,
    grad_mean: Tensor | None,
    grad_target: Tensor | None,
    grad_raw: Tensor | None,
    g: float = 1.0,
) -> None:
    """All outputs of one call against the oracle; `dtype` is what is computed in."""
    relative = GRADIENT[dtype] + POWER[dtype] * want.power
    check_near(
        "loss",
        loss,
        want.loss,
        (LOSS[dtype] + POWER[dtype] * np.max(want.power, initial=0)) * want.loss_scale,
    )
    if grad_mean is not None:
        check_near("d/d mean", grad_mean, want.grad_mean, relative * np.abs(want.grad_mean), g)
    if grad_target is not None:
        check_near("d/d target", grad_target, -want.grad_mean, relative * np.abs(want.grad_mean), g)
    if grad_raw is not None:
        flushed = want.flushed if dtype is torch.float32 else 0
        check_near("d/d raw", grad_raw, want.grad_raw, relative * want.raw_scale + flushed, g)


def computed_in(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype is torch.float64 for x in tensors) else torch.float32


def tensors_of(
    case: Case,
    kind: str = "softplus",
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype | None = None,
    raw_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """mean, target and raw in the case's layouts: variances from about 0.02 to 6."""
    random = np.random.default_rng(seed)
    mean, target = (torch.from_numpy(random.standard_normal(case.shape)) for _ in range(2))
    raw = torch.from_numpy(random.uniform(*((0.01, 4.0) if kind == "identity" else (-4.0, 2.0)), case.shape))
    lay_mean, lay_target = LAYOUTS[case.mean_layout], LAYOUTS[case.target_layout or case.mean_layout]
    return (
        lay_mean(mean.to(device, dtype)),
        lay_target(target.to(device, target_dtype or dtype)),
        lay_mean(raw.to(device, raw_dtype or dtype)),
    )


def check_call(
    backend: Place,
    mean: Tensor,
    target: Tensor,
    raw: Tensor,
    *,
    g: float = 1.0,
    strategy: str = "one_pass",
    **options: Any,
) -> tuple[Tensor, ...]:
    """Runs one call forward and backward and holds every output to its bound. Inputs must come out untouched."""
    dtype = computed_in(mean, target, raw)
    g = float(torch.tensor(g, dtype=dtype))
    want = expected(mean, target, raw, g, **options)
    before = [x.detach().clone() for x in (mean, target, raw)]
    one_pass = strategy == "one_pass"
    m, u = as_leaf(mean), as_leaf(raw)
    t = target.detach() if one_pass else as_leaf(target)
    loss = vidfast.heteroscedastic_nll(m, t, u, strategy=strategy, backend=backend.name, **options)
    assert loss.shape == ()
    assert loss.dtype == dtype
    wanted = (m, u) if one_pass else (m, t, u)
    grads = torch.autograd.grad(loss, wanted, torch.tensor(g, dtype=dtype, device=loss.device))
    for x, grad in zip(wanted, grads, strict=True):
        assert (grad.dtype, grad.shape, grad.device) == (x.dtype, x.shape, x.device)
    check_results(want, dtype, loss, grads[0], None if one_pass else grads[1], grads[-1], g)
    for x, old in zip((mean, target, raw), before, strict=True):
        assert torch.equal(x.nan_to_num(nan=7.0), old.nan_to_num(nan=7.0)), "an input was written"
    return loss, *grads
