"""Calls like one before: what their shapes, strides, dtypes, devices and options decide is worked out once.

Checking a call and reading its layout takes the host longer than a small problem takes a GPU. A loop over batches of
one shape asks for the same every time: here the answer is kept, and given again where nothing about the tensors or
the process is out of the ordinary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.compiler import is_compiling

from vidfast._torch import alike, in_forward_mode, is_jit_tracing
from vidfast.arguments import Call, check_call, check_weight, loss_factor
from vidfast.backends import still_takes
from vidfast.backends.base import Backend
from vidfast.layout import Layout, layout_of

# So many different calls are remembered; one more, and all are forgotten.
MOST = 4096
# And so many of one shape and its options: of other dtypes, strides, devices, under autocast.
MOST_ALIKE = 8
# The types of channel_dim, eps, reduction, full, weight, inplace, strategy and backend in a call that may be recalled:
# True and 1.0 are equal to 1, but no channel_dim.
_TYPES = (int, float, str, bool, float, bool, str, str)
# Where among them the weight is: one that changes from step to step is no other call.
_WEIGHT = 4


# The ways of a call.
REFERENCE, OPERATOR, KERNELS = "reference", "operator", "kernels"


class Settled(NamedTuple):
    """A checked call, and how it is computed.

    Attributes:
        call: All but the tensors.
        way: REFERENCE, OPERATOR or KERNELS.
        backend: Whose kernels compute it, if any do.
        layout: Of mean and target, if the back end walks them by one; None: not known yet.
    """

    call: Call
    way: str
    backend: Backend | None
    layout: Layout | None = None


# By the shape of mean and the options but the weight: checks of the tensors (`vidfast._torch.alike`), the newest first.
_settled: dict[Any, list[tuple[Callable[..., bool], Settled]]] = {}


def settled(
    mean: Tensor,
    target: Tensor,
    alpha: Tensor,
    options: tuple[Any, ...],
    choose_way: Callable[[Tensor, Tensor, Tensor, Call], tuple[str, Backend | None]],
) -> tuple[Tensor, Settled]:
    """(alpha as (C,), how a call is computed), as it was settled for one like it, or anew.

    Args:
        mean: Anything that a user may pass.
        target: Likewise.
        alpha: Likewise.
        options: The other arguments of :func:`vidfast.gaussian_nll`, in its order.
        choose_way: For a call that is like none before; :func:`vidfast.dispatch.choose_way`.

    Raises:
        TypeError, ValueError: An argument is not as it must be.
        RuntimeError: The back end asked for cannot run.
    """
    traced = is_compiling()
    if not traced:
        known = _recall(mean, target, alpha, options)
        if known is not None:
            return alpha, known
    given = alpha
    alpha, call = check_call(mean, target, alpha, *options)
    way, backend = choose_way(mean, target, alpha, call)
    if traced or backend is None or not backend.walks or alpha is not given:
        return alpha, Settled(call, way, backend)
    found = Settled(call, way, backend, layout_of(mean, target, call.channel))
    are_alike = alike(mean, target, alpha)
    if are_alike is not None and tuple(map(type, options)) == _TYPES:
        if len(_settled) >= MOST:
            _settled.clear()
        key = mean.shape, options[:_WEIGHT], options[_WEIGHT + 1 :]
        _settled[key] = [(are_alike, found), *_settled.get(key, [])][:MOST_ALIKE]
    return alpha, found


def _recall(mean: Tensor, target: Tensor, alpha: Tensor, options: tuple[Any, ...]) -> Settled | None:
    """What was settled for a call like this one; None: there was none.

    Tensors that have an answer are plain and strided, with memory of their own, on one device and stored as its layout
    says; no transform, mode or tracer of torch's is around them.

    Raises:
        ValueError: The weight is not finite.
    """
    weight, found = options[_WEIGHT], None
    try:
        for are_alike, one in _settled[mean.shape, options[:_WEIGHT], options[_WEIGHT + 1 :]]:
            if are_alike(mean, target, alpha):
                found = one
                break
    except (
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
    ):  # but the first: what has no shape, or is no option
        return None
    if found is None:
        return None
    call, _, backend, _ = found
    if (
        is_jit_tracing()
        or in_forward_mode()
        or tuple(map(type, options)) != _TYPES
        or not still_takes(backend, mean, target, alpha)
        or (call.strategy == "one_pass" and target.requires_grad)
    ):
        return None
    if call.weight != weight:
        check_weight(weight)
        call = call._replace(weight=weight, k=loss_factor(mean.shape, call.reduction, weight))
        found = found._replace(call=call)
    return found
