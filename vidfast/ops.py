"""The primitives as torch.library operators: what torch.compile and torch.export see.

`vidfast::gaussian_nll` and `vidfast::gaussian_nll_backward` are functional and two-pass. They take reduction and
weight, never k: a Python float made from a shape would be a new graph for every batch size. Eager calls do not
come here; they take the shorter path of `autograd`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vidfast import backends, primitives
from vidfast._torch import has_tangent
from vidfast.arguments import Call, check_options, check_tensors, loss_factor
from vidfast.backends import PLAIN
from vidfast.raw import NO_FORWARD_MODE, not_raw, vector
from vidfast.tracing import savable_in_graph

_OPTIONS = "int channel_dim, float eps, str reduction, bool full, float weight, str backend"


@torch.library.custom_op(
    "vidfast::gaussian_nll",
    mutates_args=(),
    schema=f"(Tensor mean, Tensor target, Tensor alpha, {_OPTIONS}) -> (Tensor, Tensor)",
)
def forward(
    mean: Tensor,
    target: Tensor,
    alpha: Tensor,
    channel_dim: int,
    eps: float,
    reduction: str,
    full: bool,
    weight: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(loss, sum_sq): the scalar of :func:`vidfast.gaussian_nll` and S_c = sum (mean - target)^2 [C], fp64.

    Arguments are those of :func:`vidfast.gaussian_nll`; channel_dim is not negative. Only loss is differentiable.
    """
    channel_dim, alpha = check_tensors(mean, target, alpha, channel_dim)  # by hand nothing was checked
    check_options(eps, reduction, weight)
    if has_tangent(mean, target, alpha):  # a compiled graph would drop it
        raise RuntimeError(NO_FORWARD_MODE)
    k = loss_factor(mean.shape, reduction, weight)
    chosen = backends.choose(backend, mean, target, alpha, not_raw(mean, target, alpha))
    if mean.numel() == 0:
        chosen = PLAIN
    call = Call(channel_dim, eps, reduction, full, weight, backend=backend, k=k)
    return primitives.forward(chosen, mean, target, alpha, call)


@forward.register_fake
def _(mean: Tensor, target: Tensor, alpha: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 in (mean.dtype, target.dtype)
    loss = mean.new_empty((), dtype=torch.float64 if wide else torch.float32)
    return loss, mean.new_empty(alpha.shape, dtype=torch.float64)


@torch.library.custom_op(
    "vidfast::gaussian_nll_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor? mean, Tensor? target, Tensor alpha, Tensor sum_sq, SymInt[] shape, "
    f"{_OPTIONS}, bool mean_wanted, bool target_wanted, bool alpha_wanted) -> Tensor[]",
)
def backward(
    g: Tensor,
    mean: Tensor | None,
    target: Tensor | None,
    alpha: Tensor,
    sum_sq: Tensor,
    shape: list[int],
    channel_dim: int,
    eps: float,
    reduction: str,
    full: bool,
    weight: float,
    backend: str,
    mean_wanted: bool,
    target_wanted: bool,
    alpha_wanted: bool,
) -> list[Tensor]:
    """The gradients that are wanted, in the order mean, target, alpha, times g.

    mean and target may be None where alpha's gradient alone is wanted; `shape` is theirs.
    """
    check_options(eps, reduction, weight)
    k = loss_factor(shape, reduction, weight)
    channel_dim %= len(shape)
    channels = shape[channel_dim]
    g, alpha = vector("g", g, 1, alpha.device), vector("alpha", alpha, channels, alpha.device)
    sum_sq = vector("sum_sq", sum_sq, channels, alpha.device, torch.float64)
    if mean is None or target is None:
        if mean_wanted or target_wanted:
            raise ValueError("mean and target must be given where a gradient of theirs is wanted, got None")
        chosen = backends.choose(backend, g, g, alpha, not_raw(g, alpha))
    else:
        check_tensors(mean, target, alpha, channel_dim)
        if list(mean.shape) != list(shape):
            raise ValueError(f"shape must be that of mean, {tuple(mean.shape)}, got {tuple(shape)}")
        chosen = backends.choose(backend, mean, target, alpha, not_raw(mean, target, alpha))
    if math.prod(shape) == 0:
        chosen = PLAIN
    call = Call(channel_dim, eps, reduction, full, weight, backend=backend, k=k)
    want = (mean_wanted, target_wanted, alpha_wanted)
    grads = primitives.backward(chosen, g.resolve_neg(), mean, target, alpha, sum_sq, shape, call, want)
    likes = (mean, mean, alpha)
    return [
        _laid_out(x, like) for x, like in zip(grads, likes, strict=True) if x is not None and like is not None
    ]


@backward.register_fake
def _(
    g: Tensor,
    mean: Tensor | None,
    target: Tensor | None,
    alpha: Tensor,
    sum_sq: Tensor,
    shape: list[int],
    channel_dim: int,
    eps: float,
    reduction: str,
    full: bool,
    weight: float,
    backend: str,
    mean_wanted: bool,
    target_wanted: bool,
    alpha_wanted: bool,
) -> list[Tensor]:
    grads = []
    if mean_wanted:
        assert mean is not None
        grads.append(_empty_like(mean, mean.dtype))
    if target_wanted:
        assert mean is not None and target is not None  # noqa: PT018
        grads.append(_empty_like(mean, target.dtype))
    if alpha_wanted:
        grads.append(_empty_like(alpha, alpha.dtype))
    return grads


def _empty_like(x: Tensor, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """What a gradient of x looks like: contiguous if x is, else in x's order of dimensions."""
    # torch.empty_like alone keeps the meaningless stride of a size of 1, and its fake kernel does not.
    order = torch.contiguous_format if x.is_contiguous() else torch.preserve_format
    return torch.empty_like(x, dtype=dtype, device=device or x.device, memory_format=order)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x with the strides that the fake kernel promised."""
    strides = _empty_like(like, x.dtype, "meta").stride()
    if x.stride() == strides:
        return x
    if all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), strides, strict=True)):
        return x.as_strided(x.shape, strides)  # they differ where a size is 1, and a stride means nothing
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    mean, target, alpha, *options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    # for alpha alone the sums of squares are enough, and the activations go free
    both = mean.requires_grad or target.requires_grad
    ctx.save_for_backward(mean if both else None, target if both else None, alpha, output[1])
    ctx.shape = mean.shape
    ctx.options = options


def _backward(ctx: Any, g: Tensor | None, _: Any) -> tuple[Any, ...]:
    grads: list[Any] = [None] * (3 + len(ctx.options))
    if g is None:
        return tuple(grads)
    mean, target, alpha, sum_sq = ctx.saved_tensors
    want = ctx.needs_input_grad[:3]
    found = iter(backward(g, mean, target, alpha, sum_sq, list(ctx.shape), *ctx.options, *want))
    for i, wanted in enumerate(want):
        if wanted:
            grads[i] = next(found)
    return tuple(grads)


torch.library.register_autograd("vidfast::gaussian_nll", _backward, setup_context=_setup_context)


def call_operator(mean: Tensor, target: Tensor, alpha: Tensor, call: Call) -> Tensor:
    """The loss by the operator, for :func:`vidfast.gaussian_nll` while it is traced.

    `weight` multiplies outside of it: an operator's float is a constant of the graph, so that every new one would be
    another graph. Nothing is lost by it, since the second pass reads the incoming gradient anyway.

    Args:
        mean: mu(s).
        target: t, mean's shape.
        alpha: (C,).
        call: Everything else.
    """
    kept = (savable_in_graph(x) for x in (mean, target, alpha))
    options = (call.channel, call.eps, call.reduction, call.full, 1.0, call.backend)
    loss: Tensor = forward(*kept, *options)[0]
    # Without a case for 1: dynamo makes every value a graph of its own once a float was not needed in one.
    return call.weight * loss
