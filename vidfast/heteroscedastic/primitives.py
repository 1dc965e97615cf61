"""The primitives with one variance an element on torch's tensors: inputs are copied where need be, outputs allocated.

They are those of :class:`vidfast.backends.base.Backend`, which says what each computes. Shapes, dtypes and devices are
right when a tensor comes here, and strides may be any.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vidfast.backends.base import Backend
from vidfast.heteroscedastic.arguments import HeteroscedasticCall
from vidfast.heteroscedastic.halves import Halves
from vidfast.heteroscedastic.layout import Rows, rows_of, rows_without
from vidfast.layout import position_strides
from vidfast.memory import empty_dense
from vidfast.positions import Counts, Weights, as_weights, expanded

_F64 = torch.float64


def loss_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if one of them is, else fp32."""
    return _F64 if any(x.dtype is _F64 for x in tensors) else torch.float32


def walked(
    backend: Backend, mean: Tensor, target: Tensor, raw: Tensor, channel: int | None, rows: Rows | None = None
) -> tuple[Tensor, Tensor, Tensor, Rows]:
    """The three as a back end walks them, themselves or detached copies, and how.

    Args:
        backend: That supports the tensors.
        mean: Any shape with elements.
        target: mean's shape.
        raw: mean's shape.
        channel: The dimension of the channels, not negative; None: there is none.
        rows: Of the three; None: not known yet.
    """
    if not backend.walks:
        return mean, target, raw, rows_without(mean.shape, channel)
    if rows is None:
        rows = rows_of(mean, target, raw, channel)
    if rows.copies_mean:
        mean = mean.detach().contiguous()
    if rows.copies_target:
        target = empty_dense(mean, rows.dense, target.dtype).copy_(target.detach())
    if rows.copies_raw:
        raw = empty_dense(mean, rows.dense, raw.dtype).copy_(raw.detach())
    return mean, target, raw, rows


def counted(
    backend: Backend, like: Tensor, wide: bool, call: HeteroscedasticCall, weights: Weights | None, rows: Rows
) -> Counts | None:
    """What counts in a call with weights that are tensors; None where there are none.

    Args:
        backend: That supports the tensors.
        like: mean, or a tensor of its shape on its device.
        wide: Whether fp64 is computed in.
        call: Everything else; k is the part of it that is known here.
        weights: Of the call.
        rows: Of mean, target and raw as they are walked.
    """
    if weights is None:
        return None
    positions, shape, channel = None, like.shape, call.channel
    if weights.mask is not None:
        whole = weights.mask.expand(shape) if channel is None else expanded(weights.mask, shape, channel)
        positions = stored(whole, shape, channel, rows.dense, wide) if backend.walks else whole
    values = like.numel() // (1 if channel is None else max(shape[channel], 1))
    totals = torch.empty(2, dtype=_F64, device=like.device)
    divisor = 0 if not call.divides else 1 if channel is None else shape[channel]
    backend.total(positions, weights.factor, values, call.k, divisor, totals=totals)
    return Counts(positions, totals)


def stored(
    mask: Tensor, shape: Sequence[int], channel: int | None, dense: tuple[int, ...] | None, wide: bool
) -> Tensor:
    """A mask as kernels read it: itself, or a copy, without gaps in mean's order of dimensions.

    Args:
        mask: Of mean's shape, with 1 in the place of the channels if there are any.
        shape: Of mean.
        channel: The dimension of the channels, not negative; None: there is none.
        dense: As `Rows.dense`.
        wide: Whether numbers are fp64.
    """
    x = as_weights(mask if channel is None else mask.squeeze(channel), wide)
    if channel is not None:
        strides = position_strides(tuple(shape), channel, dense)
    else:
        strides = torch.empty(tuple(shape), device="meta").stride() if dense is None else dense
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def forward(
    backend: Backend,
    mean: Tensor,
    target: Tensor,
    raw: Tensor,
    call: HeteroscedasticCall,
    weights: Weights | None = None,
    rows: Rows | None = None,
) -> tuple[Tensor, Counts | None]:
    """(the loss, a scalar, fp64 if one of the three is, else fp32; what counted)."""
    mean, target, raw, rows = walked(backend, mean, target, raw, call.channel, rows)
    dtype = loss_dtype(mean, target, raw)
    counts = counted(backend, mean, dtype is _F64, call, weights, rows)
    loss = torch.empty((), dtype=dtype, device=mean.device)
    backend.heteroscedastic_forward(mean, target, raw, rows, call, loss=loss, counts=counts)
    return loss, counts


def forward_grad(
    backend: Backend,
    mean: Tensor,
    target: Tensor,
    raw: Tensor,
    call: HeteroscedasticCall,
    weights: Weights | None,
    wants: tuple[bool, bool],
    rows: Rows | None = None,
    halves: Halves | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss, and its gradients for an incoming gradient of 1.

    Args:
        backend: That supports the tensors.
        mean: Any shape with elements.
        target: mean's shape.
        raw: mean's shape.
        call: Everything else. With `inplace` the gradients are written over mean and raw.
        weights: Of the call.
        wants: Whether the gradients of mean and of raw are wanted.
        rows: Of the three; None: not known yet.
        halves: If mean and raw are two halves whose gradients are to be one tensor.

    Returns:
        The loss; the gradient of the whole, of which the other two are then views, or None; d/d mean and d/d raw, in
        their dtypes and without gaps in mean's order of dimensions, or in place detached aliases; None where one is
        not wanted.

    Raises:
        RuntimeError: In place, mean or raw would have to be copied.
    """
    given = mean, raw
    mean, target, raw, rows = walked(backend, mean, target, raw, call.channel, rows)
    dtype = loss_dtype(mean, target, raw)
    counts = counted(backend, mean, dtype is _F64, call, weights, rows)
    loss = torch.empty((), dtype=dtype, device=mean.device)
    if call.inplace:
        for name, x, copied, wanted in zip(
            ("mean", "raw"), given, (rows.copies_mean, rows.copies_raw), wants, strict=True
        ):
            if copied and wanted:
                raise RuntimeError(
                    f"inplace=True needs a {name} that is walked where it is stored, got shape {tuple(x.shape)} with "
                    f"strides {x.stride()}: pass inplace=False"
                )
        whole = None if halves is None else halves.whole.detach()
        of_mean, of_raw = (x.detach() if w else None for x, w in zip((mean, raw), wants, strict=True))
        rows = rows._replace(grad_mean_stride=rows.mean_stride, grad_raw_stride=rows.raw_stride)
    else:
        whole, of_mean, of_raw, rows = _empty_gradients(mean, raw, rows, halves, *wants)
    backend.heteroscedastic_forward_grad(
        mean, target, raw, rows, call, loss=loss, grad_mean=of_mean, grad_raw=of_raw, counts=counts
    )
    return loss, whole, of_mean, of_raw


def _empty_gradients(
    mean: Tensor, raw: Tensor, rows: Rows, halves: Halves | None, mean_wanted: bool, raw_wanted: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Rows]:
    """Memory for the gradients of the whole, mean and raw, those that are wanted; the rows with its strides."""
    if halves is not None:
        whole = halves.empty_whole()
        rows = rows._replace(grad_mean_stride=rows.mean_stride, grad_raw_stride=rows.raw_stride)
        return whole, *halves.parts(whole), rows
    of_mean = empty_dense(mean, rows.dense, mean.dtype) if mean_wanted else None
    of_raw = empty_dense(mean, rows.dense, raw.dtype) if raw_wanted else None
    return None, of_mean, of_raw, rows


def backward(
    backend: Backend,
    g: Tensor,
    mean: Tensor,
    target: Tensor,
    raw: Tensor,
    call: HeteroscedasticCall,
    counts: Counts | None,
    wants: tuple[bool, bool, bool],
    halves: Halves | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the whole (see :func:`forward_grad`), mean, target and raw, times the scalar g.

    Args:
        backend: That supports the tensors.
        g: The incoming gradient, a scalar in memory of its own.
        mean: As in forward.
        target: As in forward.
        raw: As in forward.
        call: Everything else.
        counts: forward's; its positions may be stored in any way.
        wants: Whether the gradients of mean, of target and of raw are wanted.
        halves: If mean and raw are two halves whose gradients are to be one tensor.
    """
    mean, target, raw, rows = walked(backend, mean, target, raw, call.channel)
    if counts is not None:  # a saved-tensor hook may give them back laid out in any way
        positions = counts.positions
        if positions is not None and backend.walks:
            around = positions if call.channel is None else positions.unsqueeze(call.channel)
            positions = stored(around, mean.shape, call.channel, rows.dense, positions.dtype is _F64)
        counts = Counts(positions, counts.totals.contiguous())
    whole, of_mean, of_raw, rows = _empty_gradients(mean, raw, rows, halves, wants[0], wants[2])
    of_target = empty_dense(mean, rows.dense, target.dtype) if wants[1] else None
    backend.heteroscedastic_backward(
        g,
        mean,
        target,
        raw,
        rows,
        call,
        grad_mean=of_mean,
        grad_target=of_target,
        grad_raw=of_raw,
        counts=counts,
    )
    return whole, of_mean, of_target, of_raw
