"""A head in one pass as an autograd Function: backward multiplies what forward has made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidfast import primitives
from vidfast._torch import graph_is_retained
from vidfast.arguments import Call
from vidfast.autograd import incoming
from vidfast.backends.base import PartsBackend
from vidfast.head.compute import gradients
from vidfast.head.gradients import HeadCall, Wanted
from vidfast.head.stack import Stack
from vidfast.raw import NO_FORWARD_MODE, restored, save
from vidfast.scaling import not_twice


class Head(torch.autograd.Function):
    """(loss, grad_alpha) of (student, target, alpha, *weights, *biases), with every gradient already made for g = 1.

    student (B, C_s, P) and target (B, C, P), over P positions. See :class:`vidfast.autograd.OnePass` for grad_alpha.
    Gradients are those of the values that made the loss: what is changed in place before backward changes none of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        target: Tensor,
        alpha: Tensor,
        call: Call,
        backend: PartsBackend,
        module: torch.dtype,
        convolutions: bool,
        counts: tuple[Tensor | None, float],
        *layers: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(loss, grad_alpha), of what :class:`vidfast.head.gradients.HeadCall` holds.

        counts: its positions and values. layers: the weights, then as many biases or None.
        """
        half = len(layers) // 2
        weights: Any = layers[:half]
        stack = Stack(weights, layers[half:], convolutions)
        wants = ctx.needs_input_grad
        wanted = Wanted(wants[0], wants[8 : 8 + half], wants[8 + half :])
        found = gradients(HeadCall(stack, student, target, alpha, call, backend, module, *counts), wanted)
        save(ctx, found.student, found.alpha, *found.weights, *found.biases)
        ctx.backend, ctx.alpha_dtype, ctx.factor = backend, alpha.dtype, found.factor
        ctx.layers = [None if x is None else (x.shape, x.stride(), x.dtype) for x in layers]
        ctx.set_materialize_grads(False)
        return found.loss, found.alpha

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> Any:
        """g times what was made in forward."""
        if g is None:
            return (None,) * (8 + len(ctx.layers))
        (student, grad_alpha, *layers), own = restored(ctx, g.device)
        assert grad_alpha is not None
        of_graph, twice = grad_alpha, torch.is_grad_enabled()
        g = incoming(g)
        own = own and not graph_is_retained()
        grad_alpha = (grad_alpha.detach() if twice else grad_alpha) if ctx.needs_input_grad[2] else None
        if ctx.factor == 1.0:
            student, grad_alpha = primitives.scale(
                ctx.backend, g, student, 1, grad_alpha, ctx.alpha_dtype, own
            )
        else:
            rest = g.double() * ctx.factor
            student = primitives.scale(ctx.backend, rest, student, 1, None, ctx.alpha_dtype, own)[0]
            grad_alpha = primitives.scale(ctx.backend, g, None, 1, grad_alpha, ctx.alpha_dtype, False)[1]
        # never in place: the sums stay for a second backward, and are small
        scaled = [
            None if x is None else laid_out((x * g).to(like[2]), *like[:2])
            for x, like in zip(layers, ctx.layers, strict=True)
        ]
        if twice:
            student, grad_alpha, *scaled = not_twice(of_graph, student, grad_alpha, *scaled)
        return student, None, grad_alpha, None, None, None, None, None, *scaled

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """There is no forward-mode derivative: a RuntimeError that says what to do."""
        raise RuntimeError(NO_FORWARD_MODE)


def laid_out(x: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """(out, in) as the weight (out, in, 1, ...), with its strides: one in channels_last counts its ones otherwise."""
    dense = strides[: x.dim()] == x.stride()
    return x.as_strided(shape, strides) if dense else x.reshape(shape)
