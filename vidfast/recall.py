"""Calls like one before: what their shapes, strides, dtypes, devices and options decide is worked out once.

Checking a call and reading its layout takes the host longer than a small problem takes a GPU. A loop over batches of
one shape asks for the same every time: here the answer is kept, and given again where nothing about the tensors or
the process is out of the ordinary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from vidfast._torch import (
    alike,
    dispatch_modes,
    in_forward_mode,
    interpreter_stack,
    is_functorch_wrapped,
    is_jit_tracing,
)
from vidfast.arguments import Call, check_call, check_weight, loss_factor, number_of
from vidfast.backends import still_takes
from vidfast.backends.base import Backend
from vidfast.layout import Layout, layout_of
from vidfast.positions import Weights, weights_of

# At most so many shapes and options are remembered; one more, and all are forgotten.
MOST = 4096
# At most so many calls of one shape and its options: of other dtypes, strides, devices, under autocast.
MOST_ALIKE = 8
# The types of channel_dim, eps, reduction, full, inplace, strategy and backend in a call that is remembered.
_TYPES = (int, float, str, bool, bool, str, str)

# The ways of a call.
REFERENCE, OPERATOR, KERNELS = "reference", "operator", "kernels"


class Settled(NamedTuple):
    """A checked call, and how it is computed.

    Attributes:
        call: All but the tensors.
        way: REFERENCE, OPERATOR or KERNELS.
        backend: Whose kernels compute it, if any do.
        layout: Of mean and target, if the back end walks them by one; None: not known yet.
        recalled: Whether there was a call like it. Its tensors are then plain ones, with memory of their own, and no
            transform, mode or tracer of torch's is around it.
        weights: Of this call; nothing is remembered of them.
    """

    call: Call
    way: str
    backend: Backend | None
    layout: Layout | None = None
    recalled: bool = False
    weights: Weights | None = None


# By the shapes of mean and of weights that are tensors, and the options: checks of the tensors
# (`vidfast._torch.alike`), the newest first.
_remembered: dict[Any, list[tuple[Callable[..., bool], Settled]]] = {}


def settled(
    mean: Tensor,
    target: Tensor,
    alpha: Tensor,
    options: tuple[Any, ...],
    weight: float | Tensor,
    choose_way: Callable[[Tensor, Tensor, Tensor, Call, Weights | None], tuple[str, Backend | None]],
    mask: Tensor | None = None,
) -> tuple[Tensor, Settled]:
    """(alpha as (C,), how a call is computed), as it was settled for one like it, or anew.

    Args:
        mean: Anything that a user may pass.
        target: Likewise.
        alpha: Likewise.
        options: The arguments of :func:`vidfast.gaussian_nll` that `_TYPES` names.
        weight: The factor of the loss. One that changes from step to step is no other call.
        choose_way: For a call that is like none before; :func:`vidfast.dispatch.choose_way`.
        mask: Of the call.

    Raises:
        TypeError, ValueError: An argument is not as it must be.
        RuntimeError: The back end asked for cannot run.
    """
    stale = None
    number = number_of(weight)
    more: tuple[Tensor, ...] = ()
    if mask is not None or number is not weight:
        more = tuple(x for x in (mask, weight) if isinstance(x, Tensor))
    given: Any = (mean, target, alpha, *more)
    shapes: Any = None
    if not is_dynamo_compiling():
        try:
            shapes = None if not more else (mask is None, *(x.shape for x in more))
            candidates = _remembered.get((mean.shape, options, shapes), ())
            # torch's check asks for strides, and those of a nested tensor end the process
            plain = target.layout is alpha.layout is torch.strided and not (
                target.is_nested or alpha.is_nested
            )
            plain = plain and all(x.layout is torch.strided and not x.is_nested for x in more)
            candidates = candidates if plain else ()
        except (AttributeError, TypeError, RuntimeError):  # no tensor, one without a shape, or no option
            candidates = ()
        for are_alike, found in candidates:
            if not are_alike(*given):
                continue
            # What `alike` says nothing of. True and 1.0 are equal to 1, but no channel_dim.
            if (
                tuple(map(type, options)) == _TYPES
                and type(number) is float
                and not is_jit_tracing()
                and not dispatch_modes()
                and not in_forward_mode()
                and not (found.call.strategy == "one_pass" and target.requires_grad)
                and still_takes(found.backend, mean, target, alpha)
            ):
                # 0.0 is equal to -0.0, but the loss has its sign
                same = number and found.call.weight == number
                found = found if same else _weighted(found, mean, number)
                if not more and mask is None:
                    return alpha, found
                return alpha, found._replace(weights=weights_of(mask, weight, mean, found.call.channel))
            stale = are_alike
            break
    channel_dim, eps, reduction, full, inplace, strategy, name = options
    alpha, call, weights = check_call(
        mean, target, alpha, channel_dim, eps, reduction, full, weight, inplace, strategy, name, mask
    )
    way, backend = choose_way(mean, target, alpha, call, weights)
    if is_compiling() or backend is None or not backend.walks or alpha is not given[2]:
        return alpha, Settled(call, way, backend, weights=weights)
    found = Settled(call, way, backend, layout_of(mean, target, call.channel))
    # Nothing is kept of what a transform of torch.func holds, or left behind.
    in_transform = interpreter_stack() is not None or any(map(is_functorch_wrapped, given))
    lasting = not in_transform and not in_forward_mode() and type(number) is float
    check = alike(*given) if lasting and tuple(map(type, options)) == _TYPES else None
    if check is not None:
        key = mean.shape, options, shapes
        if len(_remembered) >= MOST and key not in _remembered:
            _remembered.clear()
        others = [one for one in _remembered.get(key, []) if one[0] is not stale]
        _remembered[key] = [(check, found._replace(recalled=True)), *others][:MOST_ALIKE]
    return alpha, found._replace(weights=weights) if weights else found


def _weighted(found: Settled, mean: Tensor, weight: float) -> Settled:
    """What was settled, with this weight.

    Raises:
        ValueError: It is not finite.
    """
    call = found.call
    check_weight(weight)
    k = loss_factor(mean.shape, call.reduction, weight, call.masked)
    return found._replace(call=call._replace(weight=weight, k=k))
