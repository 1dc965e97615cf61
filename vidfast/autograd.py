"""The two strategies as autograd Functions. docs/kernel-notes.md counts their bytes.

one_pass writes d/d mean while it sums the loss, as if the incoming gradient g were 1; backward multiplies by g.
two_pass keeps mean and target and computes the gradients, times g, in backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from vidfast import reference
from vidfast.backends import Backend
from vidfast.layout import Layout, prepare
from vidfast.raw import restored, savable, save


class Call(NamedTuple):
    """Everything about a call but its tensors."""

    backend: Backend
    channel: int
    eps: float
    reduction: str
    full: bool
    weight: float
    k: float


# mean and target as the kernels walk them (the arguments themselves, or detached copies), and how.
Walked = tuple[Tensor, Tensor, Layout]


_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


def graph_is_retained() -> bool:
    """Whether the backward pass that is running may be run again; True where torch cannot tell."""
    return _keep_graph is None or bool(_keep_graph())


NO_FORWARD_MODE = (
    "vidfast.gaussian_nll's kernels have no forward-mode derivative: use backend='reference' for it"
)


def incoming(g: Tensor) -> Tensor:
    """g, whose memory the kernels read.

    :raises RuntimeError: it has none: it is fake, or one of a batch of gradients (is_grads_batched, torch.func).
    """
    if _is_wrapped(g) or _is_batched(g):
        raise RuntimeError(
            "vidfast.gaussian_nll's kernels take one incoming gradient, not a batch of them (is_grads_batched, "
            "torch.func): use backend='reference'"
        )
    if type(g) is not Tensor and isinstance(g, _fake_tensor()):
        raise RuntimeError(
            "vidfast.gaussian_nll ran on real tensors, but the incoming gradient is a FakeTensor"
        )
    return g.clone() if g._is_zerotensor() else g.resolve_neg()


def _fake_tensor() -> type:
    from torch._subclasses.fake_tensor import FakeTensor

    return FakeTensor


class _NotTwice(torch.autograd.Function):
    """Passes gradients on; differentiating them is an error that says what to do."""

    @staticmethod
    def forward(ctx: FunctionCtx, origin: Tensor, *grads: Tensor) -> Any:
        return tuple(g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Tensor) -> Any:
        raise RuntimeError(
            "strategy='one_pass' keeps only the first derivative of gaussian_nll: "
            "for a second one use strategy='two_pass', or in VIDLoss backend='reference'"
        )


def not_twice(origin: Tensor, *grads: Tensor | None) -> list[Tensor | None]:
    """The gradients, seen to depend on `origin`, so that a second derivative never silently comes out as zero."""
    present = [g for g in grads if g is not None]
    passed = iter(_NotTwice.apply(origin, *present))  # type: ignore[no-untyped-call]
    return [None if g is None else next(passed) for g in grads]


class OnePass(torch.autograd.Function):
    """(loss, origin): loss = f(mean, target, alpha), with d/d mean already made; inplace: over mean's memory.

    origin has no elements. Saved, it leads from the gradients back to mean and alpha without keeping them.
    """

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, target: Tensor, alpha: Tensor, call: Call, walked: Walked, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        loss, grad_mean, grad_alpha = call.backend.forward_grad(
            walked[0], walked[1], alpha.contiguous(), walked[2], call.k, call.eps, call.full, inplace
        )
        if inplace:
            # a producer that saved its output now finds it changed, instead of using a gradient for it
            torch.autograd.graph.increment_version(mean)
        origin = loss.new_empty(0)
        save(ctx, grad_mean, grad_alpha, origin=origin)
        ctx.call = call
        ctx.alpha_dtype = alpha.dtype
        ctx.set_materialize_grads(False)
        return loss, origin

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> Any:
        if g is None:
            return (None,) * 6
        (grad_mean, grad_alpha), origin, own = restored(ctx, g.device)
        assert origin is not None
        wants = ctx.needs_input_grad
        grad_mean, grad_alpha = ctx.call.backend.scale(
            incoming(g),
            grad_mean if wants[0] else None,
            ctx.call.channel,
            grad_alpha if wants[2] else None,
            ctx.alpha_dtype,
            own and not graph_is_retained(),
        )
        if torch.is_grad_enabled():
            grad_mean, grad_alpha = not_twice(origin, grad_mean, grad_alpha)
        return grad_mean, None, grad_alpha, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(NO_FORWARD_MODE)


class TwoPass(torch.autograd.Function):
    """loss = f(mean, target, alpha), differentiable twice and in target."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, target: Tensor, alpha: Tensor, call: Call, walked: Walked) -> Tensor:
        loss, sum_sq = call.backend.forward(
            walked[0], walked[1], alpha.contiguous(), walked[2], call.k, call.eps, call.full
        )
        wants = ctx.needs_input_grad
        # for alpha alone the sums of squares are enough, and the activations go free
        activations = (savable(mean), savable(target)) if wants[0] or wants[1] else ()
        save(ctx, savable(alpha), sum_sq, *activations)
        ctx.call = call
        ctx.layout = walked[2]
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        call: Call = ctx.call
        wants: tuple[bool, bool, bool] = ctx.needs_input_grad[:3]
        found, _, _ = restored(ctx, g.device)
        alpha, sum_sq, *activations = (x for x in found if x is not None)
        if torch.is_grad_enabled():
            return (*_differentiable(g, alpha, sum_sq, activations, call, ctx.layout, wants), None, None)
        mean = target = None
        layout: Layout = ctx.layout
        if activations:
            mean, target, layout = prepare(activations[0], activations[1], call.channel)
        grads = call.backend.backward(
            incoming(g), mean, target, alpha.contiguous(), sum_sq, layout, call.k, call.eps, wants
        )
        return (*grads, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(NO_FORWARD_MODE)


def _differentiable(
    g: Tensor,
    alpha: Tensor,
    sum_sq: Tensor,
    activations: list[Tensor],
    call: Call,
    layout: Layout,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """The same gradients as functions of g and the inputs, by way of the reference (create_graph=True)."""
    # Aliases: where target or alpha is computed from mean, a gradient of mean itself would hold their paths too,
    # and autograd, which follows those paths anyway, would count them twice.
    alpha = alpha.view_as(alpha)
    if activations:
        mean, target = (x.view_as(x) for x in activations)
        inputs = (mean, target, alpha)
        loss = reference.gaussian_nll(
            mean,
            target,
            alpha,
            channel_dim=call.channel,
            eps=call.eps,
            reduction=call.reduction,
            full=call.full,
            weight=call.weight,
        )
    else:
        inputs = (alpha, alpha, alpha)  # only the last is wanted
        wide = alpha.double()
        variance = torch.logaddexp(wide, torch.zeros_like(wide)) + call.eps
        count = layout.outer * layout.inner
        loss = (call.k * 0.5 * (count * torch.log(variance) + sum_sq / variance).sum()).to(g.dtype)
    wanted = [x for x, w in zip(inputs, wants, strict=True) if w]
    found = iter(torch.autograd.grad(loss, wanted, g, create_graph=True))
    return tuple(next(found) if w else None for w in wants)


def one_pass(
    mean: Tensor, target: Tensor, alpha: Tensor, call: Call, walked: Walked, inplace: bool
) -> Tensor:
    """The loss by :class:`OnePass`."""
    loss: Tensor = OnePass.apply(mean, target, alpha, call, walked, inplace)[0]  # type: ignore[no-untyped-call]
    return loss


def two_pass(mean: Tensor, target: Tensor, alpha: Tensor, call: Call, walked: Walked) -> Tensor:
    """The loss by :class:`TwoPass`."""
    loss: Tensor = TwoPass.apply(mean, target, alpha, call, walked)  # type: ignore[no-untyped-call]
    return loss
