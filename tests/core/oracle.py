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
    weight: float | Tensor = 1.0
    mask: Tensor | None = None

    @property
    def number(self) -> float:
        return float(self.weight)


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


def position_weights(mask: Tensor, shape: torch.Size, channel_dim: int, dtype: type = np.float64) -> Array:
    """The mask as the weight of each position, of this shape but for 1 in the place of the channels."""
    channel = channel_dim % len(shape)
    wanted = [1 if d == channel else n for d, n in enumerate(shape)]
    w = to_numpy(mask, dtype)
    if w.ndim == len(shape) - 1 and list(w.shape) == [n for d, n in enumerate(shape) if d != channel]:
        w = np.expand_dims(w, channel)
    elif w.ndim < len(shape):
        w = w.reshape([-1] + [1] * (len(shape) - 1))
    return np.broadcast_to(w, wanted)


def _counted(x: Array, o: Options, shape: torch.Size, dtype: type) -> tuple[Array, Array, Array]:
    """(weights, x where they are not 0, their sum: the values of a channel)."""
    if o.mask is None:
        return np.ones([1] * len(shape), dtype), x, dtype(math.prod(shape) // shape[o.channel_dim])
    w = position_weights(o.mask, shape, o.channel_dim, dtype)
    return w, np.where(w != 0, x, dtype(0)), w.sum()


def _k(shape: torch.Size, o: Options, m: Array) -> Array:
    channels = shape[o.channel_dim]
    sizes = {"mean": m * channels, "sum": m * 0 + 1, "batchmean": m * 0 + shape[0]}
    size = sizes[o.reduction]
    return type(m)(o.number) / size if size else type(m)(0)


def _scales(r: Array, alpha: Array, o: Options, shape: torch.Size, g: float) -> tuple[Array, Array]:
    axes = tuple(d for d in range(r.ndim) if d != o.channel_dim % r.ndim)
    w, r, m = _counted(r, o, shape, r.dtype.type)
    sum_sq = (w * np.square(r)).sum(axis=axes)
    k = abs(_k(shape, o, m))
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
    mask = None
    if o.mask is not None:
        mask = torch.from_numpy(position_weights(o.mask, mean.shape, o.channel_dim).copy())
    loss = reference.gaussian_nll(
        m, t, a,
        channel_dim=o.channel_dim, eps=o.eps, reduction=o.reduction, full=o.full, weight=o.number, mask=mask,
    )  # fmt: skip
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
    w, r, count = _counted(m - t, o, mean.shape, wide)
    axes = tuple(d for d in range(m.ndim) if d != axis)
    sum_sq = (w * np.square(r)).sum(axis=axes)
    k = _k(mean.shape, o, count)
    loss = k * (count * np.log(v) / 2 + sum_sq / (2 * v)).sum()
    if o.full:
        loss += k * count * a.size / 2 * np.log(2 * np.arccos(wide(-1)))
    grad_mean = wide(g) * k * w * r / v.reshape(shape)
    grad_alpha = wide(g) * k * (count / (2 * v) - sum_sq / (2 * v * v)) * sigmoid
    return Expected(loss, grad_mean, -grad_mean, grad_alpha, *_scales(r, a, o, mean.shape, g))


def expected(mean: Tensor, target: Tensor, alpha: Tensor, g: float = 1.0, o: Options = Options()) -> Expected:
    """By the reference in fp64; where an activation is fp64 itself, in long double."""
    exact = by_hand if torch.float64 in (mean.dtype, target.dtype) else by_reference
    return exact(mean, target, alpha, g, o)
