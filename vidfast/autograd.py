"""The two strategies as autograd Functions. docs/kernel-notes.md counts their bytes.

one_pass writes d/d mean while it sums the loss, as if the incoming gradient g were 1; backward multiplies by g.
two_pass keeps mean and target and computes the gradients, times g, in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidfast import primitives, reference
from vidfast._torch import (
    base_of,
    fake_tensor,
    graph_is_retained,
    is_batched,
    is_functorch_wrapped,
    is_zero_tensor,
    plain_apply,
)
from vidfast.arguments import Call, in_one_pass
from vidfast.backends.plain import reference_nll
from vidfast.positions import Counts, Weights
from vidfast.raw import NO_FORWARD_MODE, restored, savable, save
from vidfast.recall import Settled
from vidfast.scaling import not_twice


def run_strategy(mean: Tensor, target: Tensor, alpha: Tensor, settled: Settled) -> Tensor:
    """The loss by a back end's kernels, by the strategy that suits the call.

    Args:
        mean: mu(s), with elements.
        target: t, mean's shape.
        alpha: (C,).
        settled: Everything else, and the back end, which supports the tensors.

    Raises:
        RuntimeError: In place, d/d mean would destroy what other code still uses.
    """
    loss: Tensor
    call, weights = settled.call, settled.weights
    if in_one_pass(call.strategy, mean.requires_grad, target.requires_grad, mean.dtype):
        if call.inplace:
            _check_inplace(mean, target, alpha, weights)
        loss = _apply(OnePass, settled)(mean, target, alpha, settled)[0]
    elif torch.is_grad_enabled() and (mean.requires_grad or target.requires_grad or alpha.requires_grad):
        loss = _apply(TwoPass, settled)(mean, target, alpha, settled)
    else:
        assert settled.backend is not None
        counts = primitives.counted(settled.backend, mean, target, call, weights, settled.layout)
        loss = primitives.forward(settled.backend, mean, target, alpha, call, settled.layout, counts)[0]
    return loss


def _apply(function: type[torch.autograd.Function], settled: Settled) -> Callable[..., Any]:
    """`function.apply`, or for a recalled call what that ends in, which takes the host a tenth of a small step less."""
    return plain_apply(function) if settled.recalled else function.apply


def _check_inplace(mean: Tensor, target: Tensor, alpha: Tensor, weights: Weights | None) -> None:
    """Checks that d/d mean may be written over mean.

    Raises:
        RuntimeError: Writing it would destroy what other code still uses.
    """
    begin, end = memory_of(mean)
    shared = None
    others = [("alpha", alpha), ("target", target)]
    if weights is not None:
        named = zip(("mask", "weight"), weights, strict=True)
        others += [(name, x) for name, x in named if x is not None and x.numel()]
    for name, other in others:
        other_begin, other_end = memory_of(other)
        if begin < other_end and other_begin < end:
            shared = name
    base = base_of(mean)
    if base is not None and base.is_leaf and base.requires_grad:
        what = "mean" if base is mean else "the tensor that mean is a view of"
        raise RuntimeError(
            f"inplace=True would overwrite {what}, a leaf that requires grad: pass inplace=False"
        )
    if shared is not None:
        raise RuntimeError(
            f"inplace=True would overwrite {shared}, which shares memory with mean: pass inplace=False"
        )


def memory_of(x: Tensor) -> tuple[int, int]:
    """The first address of x, and the one behind its last."""
    begin = x.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return begin, begin + (last + 1) * x.element_size()


def incoming(g: Tensor) -> Tensor:
    """g, whose memory the kernels read.

    Raises:
        RuntimeError: It has none: it is fake, or one of a batch of gradients (is_grads_batched, torch.func).
    """
    try:
        if type(g) is Tensor and g.data_ptr() != 0 and not g.is_neg():
            return g
    except RuntimeError:  # it has no memory: one of a batch, say
        pass
    if is_functorch_wrapped(g) or is_batched(g):
        raise RuntimeError(
            "vidfast's kernels take one incoming gradient, not a batch of them (is_grads_batched, "
            "torch.func): use backend='reference'"
        )
    if type(g) is not Tensor and isinstance(g, fake_tensor()):
        raise RuntimeError(
            "vidfast ran on real tensors, but the incoming gradient is a FakeTensor: call backward in the "
            "mode in which the loss was computed"
        )
    return g.clone() if is_zero_tensor(g) else g.resolve_neg()


class OnePass(torch.autograd.Function):
    """(loss, grad_alpha): loss = f(mean, target, alpha), with d/d mean already made; in place: over mean's memory.

    Only backward reads grad_alpha. Saved as an output, it also connects the gradients to the graph of mean and alpha,
    without keeping either.
    """

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, target: Tensor, alpha: Tensor, settled: Settled
    ) -> tuple[Tensor, Tensor]:
        """(loss, grad_alpha), of what :func:`run_strategy` was given."""
        call, _, backend, layout, _, weights = settled
        assert backend is not None
        counts = primitives.counted(backend, mean, target, call, weights, layout)
        loss, grad_mean, grad_alpha = primitives.forward_grad(
            backend, mean, target, alpha, call, layout, counts
        )
        if call.inplace:
            # a producer that saved its output now finds it changed, instead of using a gradient for it
            torch.autograd.graph.increment_version(mean)
        save(ctx, grad_mean, grad_alpha)
        ctx.scaled_by = backend, call.channel, alpha.dtype
        ctx.set_materialize_grads(False)
        return loss, grad_alpha

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> Any:
        """g times what was made in forward, in place where nothing else can read that again."""
        if g is None:
            return (None,) * 4
        (grad_mean, grad_alpha), own = restored(ctx, g.device)
        assert grad_alpha is not None
        of_graph, twice = grad_alpha, torch.is_grad_enabled()
        wants = ctx.needs_input_grad
        backend, channel, alpha_dtype = ctx.scaled_by
        grad_mean, grad_alpha = primitives.scale(
            backend,
            incoming(g),
            grad_mean if wants[0] else None,
            channel,
            (grad_alpha.detach() if twice else grad_alpha) if wants[2] else None,
            alpha_dtype,
            own and not graph_is_retained(),
        )
        if twice:
            grad_mean, grad_alpha = not_twice(of_graph, grad_mean, grad_alpha)
        return grad_mean, None, grad_alpha, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """There is no forward-mode derivative: a RuntimeError that says what to do."""
        raise RuntimeError(NO_FORWARD_MODE)


class TwoPass(torch.autograd.Function):
    """loss = f(mean, target, alpha), differentiable twice and in target."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, target: Tensor, alpha: Tensor, settled: Settled) -> Tensor:
        """The loss, of what :func:`run_strategy` was given."""
        call, _, backend, layout, _, weights = settled
        assert backend is not None
        counts = primitives.counted(backend, mean, target, call, weights, layout)
        loss, sum_sq = primitives.forward(backend, mean, target, alpha, call, layout, counts)
        wants = ctx.needs_input_grad
        # for alpha alone the sums of squares are enough, and the activations go free
        with_activations = wants[0] or wants[1]
        activations = (savable(mean), savable(target)) if with_activations else (None, None)
        if weights is None or counts is None:
            save(ctx, savable(alpha), sum_sq, *activations)
        else:
            positions = counts.positions if with_activations else None
            more = (None if x is None else savable(x) for x in (positions, weights.factor))
            save(ctx, savable(alpha), sum_sq, *activations, counts.totals, *more)
        ctx.call, ctx.backend = call, backend
        ctx.shape = mean.shape
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """The gradients that are wanted, times g; with create_graph, differentiable ones."""
        call: Call = ctx.call
        wants: tuple[bool, bool, bool] = ctx.needs_input_grad[:3]
        found, _ = restored(ctx, g.device)
        alpha, sum_sq, mean, target, totals, positions, factor = (*found, None, None, None)[:7]
        assert alpha is not None and sum_sq is not None  # noqa: PT018
        counts = None if totals is None else Counts(positions, totals)
        if torch.is_grad_enabled():
            saved = _Saved(alpha, sum_sq, mean, target, counts, factor)
            return (*_differentiable(g, saved, ctx.shape, call, wants), None)
        grads = primitives.backward(
            ctx.backend, incoming(g), mean, target, alpha, sum_sq, ctx.shape, call, wants, counts
        )
        return (*grads, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """There is no forward-mode derivative: a RuntimeError that says what to do."""
        raise RuntimeError(NO_FORWARD_MODE)


class _Saved(NamedTuple):
    """What two_pass kept; mean and target, and the positions' weights, where a gradient of theirs is wanted."""

    alpha: Tensor
    sum_sq: Tensor
    mean: Tensor | None
    target: Tensor | None
    counts: Counts | None
    factor: Tensor | None


def _differentiable(
    g: Tensor, saved: _Saved, shape: torch.Size, call: Call, wants: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """The same gradients as functions of g and the inputs, by way of the reference (create_graph=True)."""
    # Aliases: where target or alpha is computed from mean, a gradient of mean itself would hold their paths too,
    # and autograd, which follows those paths anyway, would count them twice.
    alpha, counts = saved.alpha.view_as(saved.alpha), saved.counts
    if saved.mean is not None and saved.target is not None:
        mean, target = (x.view_as(x) for x in (saved.mean, saved.target))
        inputs = (mean, target, alpha)
        positions = None if counts is None else counts.positions
        mask = positions
        if mask is not None and mask.dim() < mean.dim():
            mask = mask.unsqueeze(call.channel)
        loss = reference_nll(mean, target, alpha, call, Weights(mask, saved.factor))
    else:
        inputs = (alpha, alpha, alpha)  # only the last is wanted
        variance = reference.variance(alpha, call.eps, torch.float64)
        m, k = (shape.numel() // shape[call.channel], call.k) if counts is None else counts.totals
        loss = (k * 0.5 * (m * torch.log(variance) + saved.sum_sq / variance).sum()).to(g.dtype)
    wanted = [x for x, w in zip(inputs, wants, strict=True) if w]
    found = iter(torch.autograd.grad(loss, wanted, g, create_graph=True))
    return tuple(next(found) if w else None for w in wants)
