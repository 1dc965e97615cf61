"""What torch.compile and torch.export see of a call with one variance an element; see :mod:`vidfast.ops`.

Two operators with a derivative, one for each strategy, over three primitives without one. As there an operator's name
ends in a version, to be raised whenever anything in its backward or in a primitive's signature changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidfast import backends
from vidfast._torch import has_tangent
from vidfast.arguments import check_options, in_one_pass, loss_factor
from vidfast.backends import PLAIN
from vidfast.backends.base import Backend
from vidfast.heteroscedastic import primitives
from vidfast.heteroscedastic.arguments import HeteroscedasticCall, check_tensors
from vidfast.heteroscedastic.negative import check_no_negative
from vidfast.ops import check_constants, differentiable
from vidfast.positions import Weights
from vidfast.primitive_ops import define, empty_like, laid_out, with_weights
from vidfast.raw import NO_FORWARD_MODE, not_raw, vector
from vidfast.scaling import OF_OPERATORS, not_twice, scaled
from vidfast.tracing import savable_in_graph, weight_in_graph

_TENSORS = "Tensor mean, Tensor target, Tensor raw"
_WEIGHTS = "Tensor? mask, Tensor? factor"
_OPTIONS = (
    "int transform, float eps, float beta, int? channel, str reduction, bool full, float weight, str backend, "
    "bool negative_is_nan"
)


def _checked(
    mean: Tensor,
    target: Tensor,
    raw: Tensor,
    mask: Tensor | None,
    factor: Tensor | None,
    transform: int,
    eps: float,
    beta: float,
    channel: int | None,
    reduction: str,
    full: bool,
    weight: float,
    backend: str,
    negative_is_nan: bool,
) -> tuple[Backend, HeteroscedasticCall, Weights | None]:
    """(the back end, the call, weights that are tensors) of what an operator was given, by hand perhaps."""
    check_tensors(mean, target, raw)
    if transform not in range(4):
        raise ValueError(
            f"transform must be 0 (softplus), 1 (exp), 2 (log variance) or 3 (clamp), got {transform}"
        )
    if channel is not None and not 0 <= channel < mean.dim():
        raise ValueError(f"channel must be a dimension of mean, {tuple(mean.shape)}, got {channel}")
    check_options(1.0, reduction, weight)
    weight, weights = with_weights(mask, factor, weight, mean, channel)
    tensors = [mean, target, raw, *(weights.tensors if weights else ())]
    if has_tangent(*tensors):  # a compiled graph would drop it
        raise RuntimeError(NO_FORWARD_MODE)
    masked = mask is not None
    k = loss_factor(mean.shape, reduction, weight, masked)
    chosen = backends.choose(backend, mean, target, raw, not_raw(*tensors))
    if mean.numel() == 0:
        chosen = PLAIN
    call = HeteroscedasticCall(
        transform, eps, beta, channel, reduction, full, weight,
        backend=backend, k=k, masked=masked, negative_is_nan=negative_is_nan,
    )  # fmt: skip
    return chosen, call, weights


def _forward(mean: Tensor, target: Tensor, raw: Tensor, *rest: Any) -> Tensor:
    """The loss, a scalar. Arguments are those of :class:`HeteroscedasticCall`; `factor` is a factor of weight."""
    backend, call, weights = _checked(mean, target, raw, *rest)
    loss = primitives.forward(backend, mean, target, raw, call, weights)[0]
    check_no_negative(call, raw, loss)
    return loss


def _empty_loss(mean: Tensor, target: Tensor, raw: Tensor) -> Tensor:
    return mean.new_empty((), dtype=primitives.loss_dtype(mean, target, raw))


def _forward_fake(mean: Tensor, target: Tensor, raw: Tensor, *_: Any) -> Tensor:
    return _empty_loss(mean, target, raw)


forward = define(
    "heteroscedastic_nll_forward", f"({_TENSORS}, {_WEIGHTS}, {_OPTIONS}) -> Tensor", _forward, _forward_fake
)


def _forward_grad(
    mean: Tensor, target: Tensor, raw: Tensor, mean_wanted: bool, raw_wanted: bool, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d/d mean, d/d raw), both for g = 1, in their dtypes and mean's order of dimensions.

    One that is not wanted has no elements.
    """
    backend, call, weights = _checked(mean, target, raw, *rest)
    loss, _, of_mean, of_raw = primitives.forward_grad(
        backend, mean, target, raw, call, weights, (mean_wanted, raw_wanted)
    )
    check_no_negative(call, raw, loss)
    return (
        loss,
        mean.new_empty(0) if of_mean is None else laid_out(of_mean, mean),
        raw.new_empty(0) if of_raw is None else laid_out(of_raw, mean),
    )


def _forward_grad_fake(
    mean: Tensor, target: Tensor, raw: Tensor, mean_wanted: bool, raw_wanted: bool, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _empty_loss(mean, target, raw),
        empty_like(mean, mean.dtype) if mean_wanted else mean.new_empty(0),
        empty_like(mean, raw.dtype) if raw_wanted else raw.new_empty(0),
    )


forward_grad = define(
    "heteroscedastic_nll_forward_grad",
    f"({_TENSORS}, bool mean_wanted, bool raw_wanted, {_WEIGHTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _forward_grad,
    _forward_grad_fake,
)


def _backward(
    g: Tensor,
    mean: Tensor,
    target: Tensor,
    raw: Tensor,
    mean_wanted: bool,
    target_wanted: bool,
    raw_wanted: bool,
    *rest: Any,
) -> list[Tensor]:
    """The gradients that are wanted, in the order mean, target, raw, times g."""
    backend, call, weights = _checked(mean, target, raw, *rest)
    g = vector("g", g, 1, mean.device)
    mean_walked, _, _, rows = primitives.walked(backend, mean, target, raw, call.channel)
    wide = primitives.loss_dtype(mean, target, raw) is torch.float64
    counts = primitives.counted(backend, mean_walked, wide, call, weights, rows)
    _, *grads = primitives.backward(
        backend, g.resolve_neg(), mean, target, raw, call, counts, (mean_wanted, target_wanted, raw_wanted)
    )
    return [laid_out(x, mean) for x in grads if x is not None]


def _backward_fake(
    g: Tensor,
    mean: Tensor,
    target: Tensor,
    raw: Tensor,
    mean_wanted: bool,
    target_wanted: bool,
    raw_wanted: bool,
    *_: Any,
) -> list[Tensor]:
    wanted = zip((mean, target, raw), (mean_wanted, target_wanted, raw_wanted), strict=True)
    return [empty_like(mean, x.dtype) for x, w in wanted if w]


backward = define(
    "heteroscedastic_nll_backward",
    f"(Tensor g, {_TENSORS}, bool mean_wanted, bool target_wanted, bool raw_wanted, {_WEIGHTS}, {_OPTIONS}) "
    "-> Tensor[]",
    _backward,
    _backward_fake,
)


class _OnePass(torch.autograd.Function):
    """(loss, d/d mean, d/d raw) for g = 1; backward multiplies by g."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, target: Tensor, raw: Tensor, mean_wanted: bool, raw_wanted: bool, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of `forward_grad`."""
        check_constants(target, *rest[:2])
        loss, of_mean, of_raw = forward_grad(mean, target, raw, mean_wanted, raw_wanted, *rest)
        ctx.mark_non_differentiable(of_mean, of_raw)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(of_mean, of_raw, loss)
        ctx.channel, ctx.backend = rest[5] or 0, rest[9]
        return loss, of_mean, of_raw

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> Any:
        """g times what was made in forward."""
        none = (None,) * (len(ctx.needs_input_grad) - 3)
        if g is None:
            return (None, None, None, *none)
        *grads, loss = ctx.saved_tensors
        wants = ctx.needs_input_grad
        of_mean, of_raw = (
            scaled(g, x, ctx.channel, None, x.dtype, ctx.backend, loss, None)[0] if w else None
            for x, w in zip(grads, (wants[0], wants[2]), strict=True)
        )
        return (of_mean, None, of_raw, *none)


class _TwoPass(torch.autograd.Function):
    """The loss; backward computes the gradients from mean, target and raw."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, target: Tensor, raw: Tensor, *rest: Any) -> Tensor:
        """Of `forward`."""
        loss: Tensor = forward(mean, target, raw, *rest)
        mask, factor, *options = rest
        ctx.save_for_backward(mean, target, raw, loss, mask, factor)
        ctx.set_materialize_grads(False)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        """The gradients that are wanted, times g."""
        grads: list[Tensor | None] = [None, None, None]
        if g is not None:
            mean, target, raw, origin, mask, factor = ctx.saved_tensors
            want = ctx.needs_input_grad[:3]
            found = iter(backward(g, mean, target, raw, *want, mask, factor, *ctx.options))
            grads = [next(found) if wanted else None for wanted in want]
            if torch.is_grad_enabled():
                grads = not_twice(origin, *grads, advice=OF_OPERATORS)
        return (*grads, *(None for _ in ctx.needs_input_grad[3:]))


one_pass = differentiable(
    "heteroscedastic_nll_one_pass_v1",
    f"({_TENSORS}, bool mean_wanted, bool raw_wanted, {_WEIGHTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _forward_grad,
    _forward_grad_fake,
    _OnePass.apply,
    forward_grad,
)
two_pass = differentiable(
    "heteroscedastic_nll_two_pass_v1",
    f"({_TENSORS}, {_WEIGHTS}, {_OPTIONS}) -> Tensor",
    _forward,
    _forward_fake,
    _TwoPass.apply,
    forward,
)


def call_operator(
    mean: Tensor, target: Tensor, raw: Tensor, call: HeteroscedasticCall, weights: Weights | None = None
) -> Tensor:
    """The loss by an operator, while a call is traced.

    Args:
        mean: mu.
        target: t, mean's shape.
        raw: Of the variances, mean's shape.
        call: Everything else but tensors.
        weights: The tensors among it.
    """
    mask, given = (None, None) if weights is None else weights
    given = None if given is None else given.reshape(1)  # which tells it from a number (`with_factor`)
    weight, factor, outside = weight_in_graph(call.weight, mean.is_cpu)
    options = (
        call.transform, call.eps, call.beta, call.channel, call.reduction, call.full, weight, call.backend,
        call.negative_is_nan,
    )  # fmt: skip
    loss: Tensor
    needs = mean.requires_grad or raw.requires_grad
    if in_one_pass(call.strategy, needs, target.requires_grad, mean.dtype):
        wants = mean.requires_grad, raw.requires_grad
        loss = one_pass(mean, target, raw, *wants, mask, factor if given is None else given, *options)[0]
        return loss if outside is None else outside * loss
    kept = [savable_in_graph(x) for x in (mean, target, raw)]
    kept_weights = [None if x is None else savable_in_graph(x) for x in (mask, given)]
    loss = two_pass(*kept, *kept_weights, *options)
    # the second pass reads the incoming gradient anyway
    if factor is not None:
        outside = call.weight
    return loss if outside is None else outside * loss
