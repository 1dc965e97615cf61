"""What a call must return: equation 5 in fp64 by vidfast.reference, and in long double by hand.

The second shares nothing with the first (numpy, the gradients' closed form), so that each proves the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vidfast import reference

Array = np.ndarray  # fp64 or long double


@dataclass(frozen=True)
class Options:
    channel_dim: int = 1
    eps: float = 1e-5
    reduction: str = "mean"
    full: bool = False
    weight: float = 1.0


@dataclass(frozen=True)
class Expected:
    """Exact results (to fp64 or long double) and the scales that bounds are relative to."""

    loss: Array  # scalar
    grad_mean: Array
    grad_target: Array
    grad_alpha: Array  # (C,)
    loss_scale: Array  # k sum_c [M/2 |log v_c| + S_c / (2 v_c)]
    alpha_scale: Array  # (C,): |g| k [M/(2 v_c) + S_c/(2 v_c^2)] sigmoid(alpha_c)


def to_numpy(x: Tensor, dtype: type = np.float64) -> Array:
    return x.detach().cpu().double().numpy().astype(dtype)


def _k(shape: torch.Size, o: Options) -> float:
    sizes = {"mean": math.prod(shape), "sum": 1, "batchmean": shape[0]}
    return o.weight / sizes[o.reduction]


def _scales(r: Array, alpha: Array, o: Options, shape: torch.Size, g: float) -> tuple[Array, Array]:
    axes = tuple(d for d in range(r.ndim) if d != o.channel_dim % r.ndim)
    sum_sq = np.square(r).sum(axis=axes)
    m = r.size // alpha.size
    k = abs(_k(shape, o))
    with np.errstate(all="ignore"):
        v = np.logaddexp(alpha, alpha.dtype.type(0)) + alpha.dtype.type(o.eps)
        loss = k * (m / 2 * np.abs(np.log(v)) + sum_sq / (2 * v)).sum()
        sigmoid = np.exp(-np.logaddexp(-alpha, alpha.dtype.type(0)))
        return loss, abs(g) * k * (m / (2 * v) + sum_sq / (2 * v * v)) * sigmoid


def by_reference(
    mean: Tensor, target: Tensor, alpha: Tensor, g: float = 1.0, o: Options = Options()
) -> Expected:
    """vidfast.reference in fp64 and torch's autograd."""
    m, t, a = (x.detach().cpu().double().clone().requires_grad_() for x in (mean, target, alpha))
    loss = reference.gaussian_nll(
        m, t, a, channel_dim=o.channel_dim, eps=o.eps, reduction=o.reduction, full=o.full, weight=o.weight
    )
    grads = torch.autograd.grad(loss, (m, t, a), torch.tensor(g, dtype=torch.float64))
    scales = _scales(to_numpy(m) - to_numpy(t), to_numpy(a), o, mean.shape, g)
    return Expected(to_numpy(loss), *(to_numpy(x) for x in grads), *scales)


def by_hand(mean: Tensor, target: Tensor, alpha: Tensor, g: float = 1.0, o: Options = Options()) -> Expected:
    """The closed form of DESIGN's section 2, in long double."""
    wide = np.longdouble
    m, t, a = (to_numpy(x, wide) for x in (mean, target, alpha))
    axis = o.channel_dim % m.ndim
    shape = [1] * m.ndim
    shape[axis] = -1
    v = np.logaddexp(a, wide(0)) + wide(o.eps)
    sigmoid = np.exp(-np.logaddexp(-a, wide(0)))
    r = m - t
    axes = tuple(d for d in range(m.ndim) if d != axis)
    sum_sq = np.square(r).sum(axis=axes)
    count = r.size // a.size
    k = wide(o.weight) / wide(_k(mean.shape, Options(reduction=o.reduction)) ** -1)
    loss = k * (count * np.log(v) / 2 + sum_sq / (2 * v)).sum()
    if o.full:
        loss += k * r.size / 2 * np.log(2 * np.arccos(wide(-1)))
    grad_mean = wide(g) * k * r / v.reshape(shape)
    grad_alpha = wide(g) * k * (count / (2 * v) - sum_sq / (2 * v * v)) * sigmoid
    return Expected(loss, grad_mean, -grad_mean, grad_alpha, *_scales(r, a, o, mean.shape, g))


def expected(mean: Tensor, target: Tensor, alpha: Tensor, g: float = 1.0, o: Options = Options()) -> Expected:
    """By the reference in fp64; where an activation is fp64 itself, in long double."""
    exact = by_hand if torch.float64 in (mean.dtype, target.dtype) else by_reference
    return exact(mean, target, alpha, g, o)
