"""The two strategies as autograd Functions, with one variance an element. docs/kernel-notes.md counts their bytes.

one_pass writes d/d mean and d/d raw while it sums the loss, as if the incoming gradient g were 1; backward multiplies
by g. two_pass keeps mean, target and raw and computes the gradients, times g, in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidfast import primitives as channels
from vidfast._torch import base_of, graph_is_retained, marker
from vidfast.arguments import in_one_pass
from vidfast.autograd import incoming, memory_of
from vidfast.backends.base import Backend
from vidfast.heteroscedastic import primitives, reference
from vidfast.heteroscedastic.arguments import HeteroscedasticCall
from vidfast.heteroscedastic.halves import Halves, Routes, halves_of
from vidfast.heteroscedastic.layout import Rows, rows_of
from vidfast.positions import Counts, Weights
from vidfast.raw import NO_FORWARD_MODE, restored, savable, save
from vidfast.scaling import not_twice


def run_strategy(
    mean: Tensor,
    target: Tensor,
    raw: Tensor,
    call: HeteroscedasticCall,
    weights: Weights | None,
    backend: Backend,
) -> Tensor:
    """The loss by a back end's kernels, by the strategy that suits the call.

    Args:
        mean: mu, with elements.
        target: t, mean's shape.
        raw: Of the variances, mean's shape.
        call: Everything else but tensors.
        weights: The tensors among it.
        backend: Which supports the tensors.

    Raises:
        RuntimeError: In place, a gradient would destroy what other code still uses.
    """
    needs = mean.requires_grad or raw.requires_grad
    in_one = in_one_pass(call.strategy, needs, target.requires_grad, mean.dtype)
    if not in_one and not (torch.is_grad_enabled() and (needs or target.requires_grad)):
        return primitives.forward(backend, mean, target, raw, call, weights)[0]
    rows = rows_of(mean, target, raw, call.channel) if backend.walks else None
    halves = None if rows is None else halves_of(mean, raw, rows)
    inputs = (
        (mean, target, raw, None, None) if halves is None else (mean, target, raw, halves.whole, marker())
    )
    if not in_one:
        loss: Tensor = TwoPass.apply(*inputs, call, weights, backend, rows, halves)  # type: ignore[no-untyped-call]
        return loss
    if call.inplace:
        _check_inplace(mean, target, raw, weights, halves)
    loss = OnePass.apply(*inputs, call, weights, backend, rows, halves)  # type: ignore[no-untyped-call]
    return loss


def _check_inplace(
    mean: Tensor, target: Tensor, raw: Tensor, weights: Weights | None, halves: Halves | None
) -> None:
    """Checks that d/d mean may be written over mean, and d/d raw over raw.

    Raises:
        RuntimeError: Writing them would destroy what other code still uses.
    """
    both = {"mean": mean, "raw": raw}
    others = {"target": target, **both}
    if weights is not None:
        named = zip(("mask", "weight"), weights, strict=True)
        others.update((name, x) for name, x in named if x is not None and x.numel())
    for name, x in both.items():
        if not x.requires_grad:
            continue
        base = base_of(x)
        if base is not None and base.is_leaf and base.requires_grad:
            what = name if base is x else f"the tensor that {name} is a view of"
            raise RuntimeError(
                f"inplace=True would overwrite {what}, a leaf that requires grad: pass inplace=False"
            )
        begin, end = memory_of(x)
        for other, y in others.items():
            # the rows of halves take turns in memory
            if other == name or (halves is not None and other in both):
                continue
            other_begin, other_end = memory_of(y)
            if begin < other_end and other_begin < end:
                raise RuntimeError(
                    f"inplace=True would overwrite {other}, which shares memory with {name}: pass inplace=False"
                )


def _returned(
    ctx: Any, whole: Tensor | None, of_mean: Tensor | None, of_target: Tensor | None, of_raw: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients for the inputs mean, target, raw, whole and marker: the whole's, or its halves'."""
    if whole is not None:
        if ctx.routes.to_whole(ctx.next_functions[4][0]):
            return None, of_target, None, whole, None
        of_mean, of_raw = ctx.halves.parts(whole)
    return of_mean, of_target, of_raw, None, None


class OnePass(torch.autograd.Function):
    """loss = f(mean, target, raw), with d/d mean and d/d raw already made; in place: over their memory.

    whole and marker, if there are any, only tell autograd where a gradient may go (`halves`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        target: Tensor,
        raw: Tensor,
        whole: Tensor | None,
        mark: Tensor | None,
        call: HeteroscedasticCall,
        weights: Weights | None,
        backend: Backend,
        rows: Rows | None,
        halves: Halves | None,
    ) -> Tensor:
        """The loss, of what :func:`run_strategy` was given."""
        wants = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        loss, of_whole, of_mean, of_raw = primitives.forward_grad(
            backend, mean, target, raw, call, weights, wants, rows, halves
        )
        if call.inplace:
            # a producer that saved its output now finds it changed, instead of using a gradient for it
            for x in (mean, raw) if halves is None else (mean,):  # halves have one version
                if x.requires_grad:
                    torch.autograd.graph.increment_version(x)
        if of_whole is None:
            save(ctx, of_mean, of_raw, loss)
        else:
            save(ctx, of_whole, None, loss)
            ctx.halves, ctx.routes = halves._replace(whole=None), Routes(mean, raw)  # type: ignore[union-attr, arg-type]
        ctx.backend, ctx.channel, ctx.of_whole = backend, call.channel or 0, of_whole is not None
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        """g times what was made in forward, in place where nothing else can read that again."""
        nothing = (None,) * 5
        if g is None:
            return nothing + nothing
        (first, second, loss), own = restored(ctx, g.device, large=2)
        twice = torch.is_grad_enabled()
        in_place = own and not graph_is_retained()
        wanted = ctx.needs_input_grad
        g = incoming(g)
        if not ctx.of_whole:
            first, second = (
                x if w else None for x, w in zip((first, second), (wanted[0], wanted[2]), strict=True)
            )
        first, second = (
            None if x is None else channels.scale(ctx.backend, g, x, ctx.channel, None, x.dtype, in_place)[0]
            for x in (first, second)
        )
        if twice:
            assert loss is not None
            first, second = not_twice(loss, first, second)
        if ctx.of_whole:
            return _returned(ctx, first, None, None, None) + nothing
        return _returned(ctx, None, first, None, second) + nothing

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """There is no forward-mode derivative: a RuntimeError that says what to do."""
        raise RuntimeError(NO_FORWARD_MODE)


class TwoPass(torch.autograd.Function):
    """loss = f(mean, target, raw), differentiable twice and in target."""

    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        target: Tensor,
        raw: Tensor,
        whole: Tensor | None,
        mark: Tensor | None,
        call: HeteroscedasticCall,
        weights: Weights | None,
        backend: Backend,
        rows: Rows | None,
        halves: Halves | None,
    ) -> Tensor:
        """The loss, of what :func:`run_strategy` was given."""
        loss, counts = primitives.forward(backend, mean, target, raw, call, weights, rows)
        kept: list[Tensor | None] = [mean, target, raw]
        if counts is not None and weights is not None:
            kept += [counts.totals, counts.positions, weights.factor]
        save(ctx, *(None if x is None else savable(x) for x in kept))
        ctx.call, ctx.backend, ctx.halves = call, backend, None
        if halves is not None:
            ctx.routes, ctx.halves = Routes(mean, raw), halves._replace(whole=halves.whole.detach())
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """The gradients that are wanted, times g; with create_graph, differentiable ones."""
        call: HeteroscedasticCall = ctx.call
        nothing = (None,) * 5
        found, _ = restored(ctx, g.device)
        mean, target, raw, totals, positions, factor = (*found, None, None, None)[:6]
        assert mean is not None and target is not None and raw is not None  # noqa: PT018
        wants = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            mask = positions
            if mask is not None and call.channel is not None and mask.dim() < mean.dim():
                mask = mask.unsqueeze(call.channel)
            weights = None if totals is None else Weights(mask, factor)
            return _differentiable(g, (mean, target, raw), call, weights, wants) + (None,) * 7
        counts = None if totals is None else Counts(positions, totals)
        halves = ctx.halves if wants[0] and wants[2] else None
        grads = primitives.backward(ctx.backend, incoming(g), mean, target, raw, call, counts, wants, halves)
        return _returned(ctx, *grads) + nothing

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """There is no forward-mode derivative: a RuntimeError that says what to do."""
        raise RuntimeError(NO_FORWARD_MODE)


def _differentiable(
    g: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    call: HeteroscedasticCall,
    weights: Weights | None,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """The gradients as functions of g and the inputs, by way of the reference (create_graph=True)."""
    # Aliases: where one is computed from another, a gradient of the other itself would hold its paths too, and
    # autograd, which follows those paths anyway, would count them twice.
    inputs = [x.view_as(x) for x in tensors]
    mean, target, raw = inputs
    loss = reference.nll(mean, target, raw, call, weights)
    wanted = [x for x, w in zip(inputs, wants, strict=True) if w]
    found = iter(torch.autograd.grad(loss, wanted, g, create_graph=True))
    return tuple(next(found) if w else None for w in wants)
