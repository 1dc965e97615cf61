"""What torch.compile and torch.export see of a call: two operators with a derivative, one for each strategy.

Eager calls do not come here; they take the shorter path of :mod:`vidfast.autograd`, whose strategies these are. What
stands in a graph once torch has differentiated it are the operators of :mod:`vidfast.primitive_ops`. `inplace` is
ignored: a graph's operators are functional, and its compiler decides what is written over.

An operator's name ends in a version. **It is raised whenever anything in its backward changes, or in the signature of a
primitive's operator**: torch keeps compiled graphs on disk by the names of the operators that dynamo saw, and knows
nothing of a backward that is registered for one, nor of what that calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vidfast import primitive_ops
from vidfast.arguments import Call, in_one_pass
from vidfast.positions import Weights
from vidfast.primitive_ops import LIBRARY, OPTIONS, TENSORS, WEIGHTS, define
from vidfast.scaling import OF_OPERATORS, not_twice, scaled
from vidfast.tracing import savable_in_graph, weight_in_graph


def differentiable(
    name: str,
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    apply: Callable[..., Any],
    without: Callable[..., Any],
) -> Any:
    """A new operator of torch.ops.vidfast that has a derivative.

    Its implementation for autograd is written here, and not by torch.library.register_autograd, so that a graph that
    torch has differentiated calls the primitive alone: autograd's Python took longer than a small problem's kernel.

    Args:
        name: Of the operator, with its version.
        schema: Its arguments and results.
        kernel: What it does below autograd, as `primitive_ops.define` has it.
        fake: What its results look like.
        apply: Of the torch.autograd.Function with its derivative, which calls a primitive's operator.
        without: That operator, for calls that need no gradient.
    """

    def of_autograd(*args: Any) -> Any:
        return apply(*args) if torch.is_grad_enabled() and _any_requires_grad(args) else without(*args)

    operator = define(name, schema, kernel, fake)
    LIBRARY.impl(name, of_autograd, "Autograd")
    return operator


def _any_requires_grad(args: Sequence[Any]) -> bool:
    """Whether a tensor among the arguments or in a list of them requires grad."""
    return any(
        x.requires_grad if isinstance(x, Tensor) else isinstance(x, list | tuple) and _any_requires_grad(x)
        for x in args
    )


def check_constants(target: Tensor, mask: Tensor | None, factor: Tensor | None) -> None:
    """Checks that what one pass has no gradient for wants none.

    Raises:
        ValueError: One of them requires grad.
    """
    for name, x in (("target", target), ("mask", mask), ("factor", factor)):
        if x is not None and x.requires_grad:
            raise ValueError(f"{name} must not require grad in one pass, got a tensor that does")


class _OnePass(torch.autograd.Function):
    """(loss, d/d mean, d/d alpha) for g = 1; backward multiplies by g."""

    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        target: Tensor,
        alpha: Tensor,
        factor: Tensor | None,
        channel: int,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of `primitive_ops.forward_grad`."""
        *options, backend, mask = (*rest, None)[:6]
        check_constants(target, mask, factor)
        loss, grad_mean, grad_alpha = primitive_ops.forward_grad(
            mean, target, alpha, factor, channel, *options, backend, mask
        )
        ctx.mark_non_differentiable(grad_mean, grad_alpha)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_mean, grad_alpha, loss, alpha if alpha.requires_grad else None)
        ctx.channel, ctx.backend = channel, backend
        ctx.alpha = alpha.shape, alpha.dtype
        return loss, grad_mean, grad_alpha

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> Any:
        """g times what was made in forward."""
        none = (None,) * (len(ctx.needs_input_grad) - 3)
        if g is None:
            return (None, None, None, *none)
        of_mean, of_alpha, loss, alpha = ctx.saved_tensors
        wants, (shape, dtype) = ctx.needs_input_grad, ctx.alpha
        of_mean, of_alpha = scaled(
            g,
            of_mean if wants[0] else None,
            ctx.channel,
            of_alpha if wants[2] else None,
            dtype,
            ctx.backend,
            loss,
            alpha,
        )
        if of_alpha is not None and of_alpha.shape != shape:
            of_alpha = of_alpha.view(shape)
        return (of_mean, None, of_alpha, *none)


class _TwoPass(torch.autograd.Function):
    """(loss, sums of squares); backward computes the gradients from mean and target."""

    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        target: Tensor,
        alpha: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:
        """Of `primitive_ops.forward`."""
        *options, mask, factor = (*rest, None, None)[:8]
        loss, sum_sq = primitive_ops.forward(mean, target, alpha, *rest)
        ctx.mark_non_differentiable(sum_sq)
        ctx.set_materialize_grads(False)
        # for alpha alone the sums of squares are enough, and the activations go free
        both = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        kept = (mean, target) if both else (None, None)
        ctx.save_for_backward(*kept, alpha, sum_sq, loss, mask, factor)
        ctx.shape, ctx.options, ctx.given = mean.shape, options, len(rest)
        return loss, sum_sq

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> Any:
        """The gradients that are wanted, times g."""
        grads: list[Tensor | None] = [None, None, None]
        if g is not None:
            mean, target, alpha, sum_sq, origin, mask, factor = ctx.saved_tensors
            want, shape = ctx.needs_input_grad[:3], list(ctx.shape)
            found = iter(
                primitive_ops.backward(
                    g, mean, target, alpha, sum_sq, shape, *ctx.options, *want, mask, factor
                )
            )
            grads = [next(found) if wanted else None for wanted in want]
            if torch.is_grad_enabled():
                grads = not_twice(origin, *grads, advice=OF_OPERATORS)
        return (*grads, *(None for _ in range(ctx.given)))


one_pass = differentiable(
    "gaussian_nll_one_pass_v2",
    f"({TENSORS}, Tensor? factor, {OPTIONS}, Tensor? mask=None) -> (Tensor, Tensor, Tensor)",
    primitive_ops.forward_grad_kernel,
    primitive_ops.forward_grad_fake,
    _OnePass.apply,
    primitive_ops.forward_grad,
)
two_pass = differentiable(
    "gaussian_nll_two_pass_v2",
    f"({TENSORS}, {OPTIONS}, {WEIGHTS}) -> (Tensor, Tensor)",
    primitive_ops.forward_kernel,
    primitive_ops.forward_fake,
    _TwoPass.apply,
    primitive_ops.forward,
)


def call_operator(
    mean: Tensor, target: Tensor, alpha: Tensor, call: Call, weights: Weights | None = None
) -> Tensor:
    """The loss by an operator, for :func:`vidfast.gaussian_nll` while it is traced.

    Args:
        mean: mu(s).
        target: t, mean's shape.
        alpha: (C,).
        call: Everything else but tensors.
        weights: The tensors among it.
    """
    mask, given = (None, None) if weights is None else weights
    given = None if given is None else given.reshape(1)  # which tells it from a number (`with_factor`)
    weight, factor, outside = weight_in_graph(call.weight, mean.is_cpu)
    options = (call.channel, call.eps, call.reduction, call.full, weight, call.backend)
    loss: Tensor
    if in_one_pass(call.strategy, mean.requires_grad, target.requires_grad, mean.dtype):
        loss = one_pass(mean, target, alpha, factor if given is None else given, *options, mask)[0]
        return loss if outside is None else outside * loss
    kept = [savable_in_graph(x) for x in (mean, target, alpha)]
    kept_weights = (None if x is None else savable_in_graph(x) for x in (mask, given))
    loss = two_pass(*kept, *options, *kept_weights)[0]
    # the second pass reads the incoming gradient anyway
    if factor is not None:
        outside = call.weight
    return loss if outside is None else outside * loss
