"""Gradients that forward made for an incoming gradient of 1, times the one that arrives in backward.

:func:`scaled` is for the backward of operators in a compiled graph, :func:`not_twice` for every such backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from vidfast import primitive_ops
from vidfast._torch import donates_buffers

_EAGER = (
    "one pass keeps only the first derivative: for a second one use strategy='two_pass' in gaussian_nll and "
    "GaussianNLL, backend='reference' in vid_head, VIDLoss and a Distiller's methods"
)
OF_OPERATORS = (
    "vidfast's operators, which compiled graphs call, have only first derivatives: "
    "for a second one use backend='reference'"
)


class _NotTwice(torch.autograd.Function):
    """Passes gradients on; differentiating them is an error that says what to do."""

    @staticmethod
    def forward(ctx: FunctionCtx, origin: Tensor, advice: str, *grads: Tensor) -> Any:
        ctx.advice = advice  # type: ignore[attr-defined]
        return tuple(g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Tensor) -> Any:
        raise RuntimeError(ctx.advice)  # type: ignore[attr-defined]


def not_twice(origin: Tensor, *grads: Tensor | None, advice: str = _EAGER) -> list[Tensor | None]:
    """The gradients, seen to depend on `origin`, so that a second derivative never silently comes out as zero."""
    present = [g for g in grads if g is not None]
    passed = iter(_NotTwice.apply(origin, advice, *present))  # type: ignore[no-untyped-call]
    return [None if g is None else next(passed) for g in grads]


def scaled(
    g: Tensor,
    grad: Tensor | None,
    channel: int,
    grad_alpha: Tensor | None,
    alpha_dtype: torch.dtype,
    backend: str,
    loss: Tensor,
    alpha: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """g times what an operator's forward made for g = 1: for the backward that is registered for it.

    By a functional operator, so that what was saved stays as it was: a graph that is kept gives the same numbers again,
    under any compiler. Where what was saved is Inductor's to write over, it calls `vidfast::scale_` instead, which has
    nothing to do where g is exactly 1 (:func:`vidfast._torch.mutate_where_donated`).

    Args:
        g: The incoming gradient, a scalar.
        grad: The large gradient, of mean or of what it is computed from, any strides; None where it is not wanted.
        channel: The dimension of its channels.
        grad_alpha: d/d alpha, (C,) in fp64; None where it is not wanted.
        alpha_dtype: Of d/d alpha as it is returned.
        backend: "auto", "reference" or the name of a back end.
        loss: The operator's result as its backward was given it again, which leads to everything it was computed from.
        alpha: What the operator was given, where it requires grad: a graph's input, which outlives what is between.

    Returns:
        grad and grad_alpha times g, the latter in `alpha_dtype`; None where one was. A second derivative is an error.
    """
    if grad is None:
        found = None if grad_alpha is None else (grad_alpha * g.double()).to(alpha_dtype)
    else:
        origin = loss if alpha is None else alpha
        grad, found = primitive_ops.scale(
            grad, g, grad_alpha, channel, alpha_dtype, backend, origin, donates_buffers()
        )
        found = None if grad_alpha is None else found
    if torch.is_grad_enabled():
        grad, found = not_twice(loss, grad, found, advice=OF_OPERATORS)
    return grad, found
