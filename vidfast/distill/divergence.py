"""The Kullback-Leibler divergence of softened outputs, of large logits in parts: no second copy of all in fp32.

    sum_p w_p sum_n q_pn (log q_pn - log r_pn),   q = softmax(z_t / T),  r = softmax(z_s / T)

over positions p and classes n. Its gradient with respect to z_s is w_p (r_pn - q_pn) / T.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Elements of the logits that are computed at once, 16 MiB in fp32; a position's classes are never cut.
PART = 2**22


def divergence(
    student: Tensor, teacher: Tensor, dim: int, temperature: float, weights: Tensor | None = None
) -> Tensor:
    """The sum above, a scalar in fp32, or in fp64 if logits are.

    Large logits are computed some positions at a time, in backward too, unless that is to be differentiated again. A
    graph of torch.compile has the plain formula, whose passes the compiler joins.

    student, teacher: logits of one shape, the teacher's without gradient. dim: the classes' dimension, not negative.
    weights: w, of the logits' shape with 1 in the place of the classes, each other size 1 or the logits'; where it is 0
        nothing is used of the logits, NaN or not. None: 1 for all.
    """
    if student.numel() <= PART or torch.compiler.is_compiling():
        return _plain(student, teacher, dim, temperature, weights)
    if weights is not None:
        weights = weights.expand([1 if d == dim else n for d, n in enumerate(student.shape)])
    total: Tensor = _InParts.apply(student, teacher, weights, dim, temperature)  # type: ignore[no-untyped-call]
    return total


def _plain(student: Tensor, teacher: Tensor, dim: int, temperature: float, weights: Tensor | None) -> Tensor:
    log_s, log_t = _logarithms(student, teacher, dim, temperature, weights)
    values = (log_t.exp() * (log_t - log_s)).sum(dim)
    return values.sum() if weights is None else (values * weights.squeeze(dim).to(values.dtype)).sum()


def _logarithms(
    student: Tensor, teacher: Tensor, dim: int, temperature: float, weights: Tensor | None
) -> list[Tensor]:
    """log r and log q, in fp32 or wider; of zeros where the weight is 0."""
    softened = [z.to(torch.promote_types(z.dtype, torch.float32)) / temperature for z in (student, teacher)]
    if weights is not None:
        # in place, as logits are large
        softened = [z.masked_fill_(weights == 0, 0) for z in softened]
    return [torch.log_softmax(z, dim) for z in softened]


class _InParts(torch.autograd.Function):
    """`divergence`, one part after the other."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor | None, dim: int, temperature: float
    ) -> Tensor:
        ctx.save_for_backward(student, teacher, weights)
        ctx.dim, ctx.temperature = dim, temperature
        total = None
        for part in _parts(student.shape, dim):
            w = None if weights is None else weights[part]
            value = _plain(student[part], teacher[part], dim, temperature, w)
            total = value if total is None else total + value
        assert total is not None
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        student, teacher, weights = ctx.saved_tensors
        # create_graph=True: a derivative of this gradient is wanted, so all of it is kept
        if torch.is_grad_enabled():
            total = _plain(student, teacher, ctx.dim, ctx.temperature, weights)
            (found,) = torch.autograd.grad(total, student, gradient, create_graph=True)
            return found, None, None, None, None
        # The incoming gradient is multiplied in before rounding: a loss scaler's factor keeps fp16 from underflow.
        factor = gradient / ctx.temperature
        found = torch.empty_like(student)
        for part in _parts(student.shape, ctx.dim):
            w = None if weights is None else weights[part]
            log_s, log_t = _logarithms(student[part], teacher[part], ctx.dim, ctx.temperature, w)
            difference = log_s.exp_() - log_t.exp_()
            if w is not None:
                difference = difference.mul_(w)
            found[part] = difference.mul_(factor)
        return found, None, None, None, None


def _parts(shape: torch.Size, dim: int) -> Iterator[tuple[slice, ...]]:
    """Index ranges of the first two dimensions that are not the classes', of about PART elements each."""
    axes = [d for d in range(len(shape)) if d != dim][:2]
    inner = axes[-1] if len(axes) == 2 else None
    samples = shape[axes[0]]
    each = max(1, shape.numel() // samples)
    step = max(1, PART // each)
    length = 1 if inner is None else shape[inner]
    inner_step = length if each <= PART else max(1, PART * length // each)
    for begin in range(0, samples, step):
        for inner_begin in range(0, length, inner_step):
            part = [slice(None)] * len(shape)
            part[axes[0]] = slice(begin, begin + step)
            if inner is not None:
                part[inner] = slice(inner_begin, inner_begin + inner_step)
            yield tuple(part)
