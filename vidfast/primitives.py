"""The four primitives on torch's tensors: inputs are copied where need be, outputs allocated, a back end fills them.

forward, forward_grad, backward and scale are those of :class:`vidfast.backends.base.Backend`, which says what each
computes. Shapes, dtypes and devices are right when a tensor comes here, and strides may be any: what a saved-tensor
hook gave back was checked by :func:`vidfast.raw.restored`, what an operator was given by
:mod:`vidfast.primitive_ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vidfast.arguments import Call
from vidfast.backends.base import Backend
from vidfast.layout import Layout, RowLayout, layout_of, layout_without, rows_of
from vidfast.memory import empty_dense, empty_loss
from vidfast.positions import Counts, Weights, as_weights, expanded, positions_of

_F64 = torch.float64


def counted(
    backend: Backend,
    mean: Tensor,
    target: Tensor,
    call: Call,
    weights: Weights | None,
    layout: Layout | None = None,
) -> Counts | None:
    """What counts in a call with weights that are tensors; None where there are none.

    Args:
        backend: That supports the tensors.
        mean: mu(s), any shape.
        target: t, mean's shape.
        call: Everything else; k is the part of it that is known here.
        weights: Of the call.
        layout: As in :func:`forward`.
    """
    if weights is None:
        return None
    mask, positions = weights.mask, None
    if layout is None:
        layout = layout_of(mean, target, call.channel, backend.walks)
    if mask is not None and backend.walks:
        positions = positions_of(mask, mean, target, call.channel, layout)
    elif mask is not None:
        positions = expanded(mask, mean.shape, call.channel)
    return _counts(backend, positions, weights.factor, layout, call, mean)


def counted_without(
    backend: Backend, like: Tensor, shape: Sequence[int], call: Call, weights: Weights | None
) -> Counts | None:
    """The totals alone, where mean and target are not there.

    Args:
        backend: That supports the tensors.
        like: A tensor on their device, of the loss's dtype.
        shape: Of mean and target.
        call: As in :func:`counted`.
        weights: Of the call.
    """
    if weights is None:
        return None
    positions = None
    if weights.mask is not None:
        whole = expanded(weights.mask, shape, call.channel)
        positions = as_weights(whole, like.dtype is _F64).contiguous()
    counts = _counts(backend, positions, weights.factor, layout_without(shape, call.channel), call, like)
    return counts._replace(positions=None)


def _counts(
    backend: Backend,
    positions: Tensor | None,
    factor: Tensor | None,
    layout: Layout,
    call: Call,
    like: Tensor,
) -> Counts:
    totals = torch.empty(2, dtype=_F64, device=like.device)
    channels = layout.channels if call.divides else 0
    backend.total(positions, factor, layout.outer * layout.inner, call.k, channels, totals=totals)
    return Counts(positions, totals)


def forward(
    backend: Backend,
    mean: Tensor,
    target: Tensor,
    alpha: Tensor,
    call: Call,
    layout: Layout | None = None,
    counts: Counts | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss and the sums of squares.

    Args:
        backend: That supports the tensors.
        mean: mu(s), any shape.
        target: t, mean's shape.
        alpha: (C,).
        call: Everything else.
        layout: Of mean and target, by :func:`vidfast.layout.layout_of`; None: not known yet.
        counts: By :func:`counted`.

    Returns:
        The loss, a scalar, fp64 if mean or target is, else fp32; S_c = sum (mean - target)^2, (C,) in fp64.
    """
    mean, target, layout = as_walked(mean, target, call.channel, backend.walks, layout=layout)
    alpha = alpha.contiguous()
    loss = empty_loss(mean, target)
    sum_sq = torch.empty_like(alpha, dtype=_F64)
    backend.forward(mean, target, alpha, layout, call, loss=loss, sum_sq=sum_sq, counts=counts)
    return loss, sum_sq


def forward_grad(
    backend: Backend,
    mean: Tensor,
    target: Tensor,
    alpha: Tensor,
    call: Call,
    layout: Layout | None = None,
    counts: Counts | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients for an incoming gradient of 1.

    The arguments are those of :func:`forward`. With `call.inplace` d/d mean is written over mean.

    Returns:
        The loss; d/d mean, of mean's shape and dtype and without gaps in its order of dimensions, in place a detached
        alias of mean; d/d alpha, (C,) in fp64.

    Raises:
        RuntimeError: In place, mean would have to be copied.
    """
    mean, target, layout = as_walked(mean, target, call.channel, backend.walks, call.inplace, layout)
    alpha = alpha.contiguous()
    loss = empty_loss(mean, target)
    grad_mean = mean.detach() if call.inplace else empty_dense(mean, layout.dense, mean.dtype)
    grad_alpha = torch.empty_like(alpha, dtype=_F64)
    backend.forward_grad(
        mean,
        target,
        alpha,
        layout,
        call,
        loss=loss,
        grad_mean=grad_mean,
        grad_alpha=grad_alpha,
        counts=counts,
    )
    return loss, grad_mean, grad_alpha


def backward(
    backend: Backend,
    g: Tensor,
    mean: Tensor | None,
    target: Tensor | None,
    alpha: Tensor,
    sum_sq: Tensor,
    shape: Sequence[int],
    call: Call,
    want: tuple[bool, bool, bool],
    counts: Counts | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of mean, target and alpha, those that `want` names, times the scalar g.

    Args:
        backend: That supports the tensors.
        g: The incoming gradient, a scalar in memory of its own.
        mean: As in forward. None, as target, where alpha's gradient alone is wanted.
        target: As in forward.
        alpha: (C,).
        sum_sq: (C,) in fp64, forward's.
        shape: Of mean and target.
        call: Everything else.
        want: Whether the gradients of mean, of target and of alpha are wanted.
        counts: forward's; its positions may be stored in any way.

    Returns:
        The gradients in the dtypes of mean, target and alpha, without gaps in mean's order of dimensions; None where
        one is not wanted.
    """
    alpha, sum_sq = alpha.contiguous(), sum_sq.contiguous()
    if counts is not None:  # a saved-tensor hook may give them back laid out in any way
        counts = counts._replace(totals=counts.totals.contiguous())
    grad_mean = grad_target = None
    if want[0] or want[1]:
        assert mean is not None, "gradients of the activations need the activations"
        assert target is not None, "gradients of the activations need the activations"
        mean, target, layout = as_walked(mean, target, call.channel, backend.walks)
        grad_mean = empty_dense(mean, layout.dense, mean.dtype) if want[0] else None
        # in mean's order of dimensions, so that one description serves all four tensors
        grad_target = empty_dense(mean, layout.dense, target.dtype) if want[1] else None
        if counts is not None and counts.positions is not None and backend.walks:
            positions = positions_of(counts.positions, mean, target, call.channel, layout)
            counts = counts._replace(positions=positions)
    else:
        mean = target = None
        layout = layout_without(shape, call.channel)
    grad_alpha = torch.empty_like(alpha) if want[2] else None
    backend.backward(
        g,
        mean,
        target,
        alpha,
        sum_sq,
        layout,
        call,
        grad_mean=grad_mean,
        grad_target=grad_target,
        grad_alpha=grad_alpha,
        counts=counts,
    )
    return grad_mean, grad_target, grad_alpha


def scale(
    backend: Backend,
    g: Tensor,
    grad_mean: Tensor | None,
    channel: int,
    grad_alpha: Tensor | None,
    alpha_dtype: torch.dtype,
    in_place: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """What :func:`forward_grad` made, times the scalar g.

    Args:
        backend: That made it.
        g: The incoming gradient, a scalar in memory of its own.
        grad_mean: d/d mean, any strides; None where it is not wanted.
        channel: The dimension of its channels.
        grad_alpha: d/d alpha, (C,) in fp64; None where it is not wanted.
        alpha_dtype: Of d/d alpha as it is returned.
        in_place: Whether grad_mean is scaled where it is stored.

    Returns:
        grad_mean and grad_alpha times g, the latter in `alpha_dtype`; None where one was.
    """
    rows: RowLayout | None = None
    result = scaled_alpha = None
    if grad_mean is not None:
        rows = rows_of(grad_mean, channel)
        if rows.copies:  # a saved-tensor hook may give it back laid out in any way
            grad_mean = grad_mean.contiguous()
        result = grad_mean if in_place else empty_dense(grad_mean, rows.dense, grad_mean.dtype)
    if grad_alpha is not None:
        grad_alpha = grad_alpha.contiguous()
        scaled_alpha = torch.empty_like(grad_alpha, dtype=alpha_dtype)
    backend.scale(g, rows, grad_mean, grad_alpha, result=result, scaled_alpha=scaled_alpha)
    return result, scaled_alpha


def as_walked(
    mean: Tensor,
    target: Tensor,
    channel: int,
    walks: bool = True,
    inplace: bool = False,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor, Layout]:
    """mean and target as kernels walk them, themselves or detached copies, and how.

    Args:
        mean: Any shape with elements.
        target: mean's shape.
        channel: The dimension of the channels, not negative.
        walks: Whether kernels walk them; otherwise they are handed back as they came, but in place.
        inplace: Whether mean is to be written over, and may not be copied.
        layout: Of both, as they are to be walked; None: not known yet.

    Raises:
        RuntimeError: It would have to be.
    """
    if layout is None:
        layout = layout_of(mean, target, channel, walks or inplace)
    if layout.copies_mean:
        if inplace:
            raise RuntimeError(
                f"inplace=True needs a mean whose memory is dense, got shape {tuple(mean.shape)} with strides "
                f"{mean.stride()}: pass inplace=False"
            )
        mean = mean.detach().contiguous()
    if layout.copies_target:
        target = empty_dense(mean, layout.dense, target.dtype).copy_(target.detach())
    return mean, target, layout
