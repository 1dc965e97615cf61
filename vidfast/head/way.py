"""Which way a head takes: in one pass, as an operator of a compiled graph, or layer by layer."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from vidfast import backends
from vidfast._torch import (
    constant_while_traced,
    in_forward_mode,
    in_functorch,
    products_differ_from_convolutions,
)
from vidfast.arguments import Call, loss_factor
from vidfast.backends.base import Backend, PartsBackend
from vidfast.dispatch import compiles_to_operator
from vidfast.head import compute
from vidfast.head.function import Head
from vidfast.head.gradients import HeadCall
from vidfast.head.operator import call_operator, counted
from vidfast.head.stack import Stack, flat_positions
from vidfast.positions import Weights, expanded
from vidfast.raw import DTYPES, not_raw

log = logging.getLogger("vidfast")
_logged: set[str] = set()


def head_nll(
    stack: Stack,
    student: Tensor,
    target: Tensor,
    alpha: Tensor,
    call: Call,
    weights: Weights | None = None,
) -> Tensor | None:
    """The loss of a stack of layers and its Gaussian in one pass, or None where it has to be layer by layer.

    Args:
        stack: The layers.
        student: (B, ..., C_s, ...), with the channels in `call.channel`.
        target: Of the student's shape but for its C channels, without gradient.
        alpha: (C,).
        call: Everything else but tensors; its `k` is not read.
        weights: The tensors among it, by :func:`vidfast.positions.weights_of` for the target.

    Returns:
        A scalar in fp32. With None the reason is logged once, at level DEBUG by the logger "vidfast".
    """
    module = module_dtype(stack, student)
    tensors = (student, target, alpha, *stack.tensors, *(weights.tensors if weights else ()))
    reason = obstacle(stack, student, target, alpha, call, module, tensors)
    if torch.compiler.is_compiling():
        if reason is not None or module is None or not _compiles(call, tensors):
            return None
        mask = None if weights is None else _flat_mask(weights.mask, target, call.channel)
        factor = None if weights is None or weights.factor is None else weights.factor.reshape(1)
        student, target = (flat_positions(x, call.channel) for x in (student, target))
        return call_operator(stack, student, target, alpha, call, module, mask, factor)
    if reason is None:
        chosen = backends.choose(call.backend, student, target, alpha, None)
        if not chosen.in_parts:
            reason = f"the back end {chosen.name} computes the loss alone"
        else:
            _say(f"a regressor and its loss are computed in one pass, by the back end {chosen.name}")
            return _in_one_pass(stack, student, target, alpha, call, weights, chosen, module)
    note(reason)
    return None


def _flat_mask(mask: Tensor | None, target: Tensor, channel: int) -> Tensor | None:
    """(B, 1, positions) of a mask that fits the target."""
    if mask is None:
        return None
    return flat_positions(expanded(mask, target.shape, channel), channel)


def _compiles(call: Call, tensors: tuple[Tensor, ...]) -> bool:
    """Whether a graph is to have the operator of heads."""
    return (
        call.backend in ("auto", "cpu") and _cpu_is_built() and compiles_to_operator(call.backend, *tensors)
    )


@constant_while_traced
def _cpu_is_built() -> bool:
    return backends.load("cpu").unavailable() is None


def note(reason: str) -> None:
    """Says once why a head is computed layer by layer; a compiler's trace says nothing."""
    _say(f"a regressor is computed layer by layer: {reason}")


def _say(text: str) -> None:
    """Once."""
    if not torch.compiler.is_compiling() and text not in _logged:
        _logged.add(text)
        log.debug(text)


def module_dtype(stack: Stack, student: Tensor) -> torch.dtype | None:
    """What the layers give: autocast's dtype, or that of the student and all weights; None where these differ."""
    dtypes = {student.dtype, *(x.dtype for x in stack.tensors)}
    if torch.is_autocast_enabled(student.device.type) and torch.float64 not in dtypes:
        return torch.get_autocast_dtype(student.device.type)
    return student.dtype if len(dtypes) == 1 else None


def obstacle(
    stack: Stack,
    student: Tensor,
    target: Tensor,
    alpha: Tensor,
    call: Call,
    module: torch.dtype | None,
    tensors: tuple[Tensor, ...],
) -> str | None:
    """Why a head cannot be computed in one pass, or None. tensors: all that there are."""
    if call.backend == "reference" or call.reduction == "none":
        return f"backend={call.backend!r}, reduction={call.reduction!r}"
    if not all(x.is_cpu for x in tensors):
        return "it is not on the CPU"
    if module not in (torch.float32, torch.bfloat16, torch.float16) or target.dtype is torch.float64:
        return f"student is {student.dtype}, the layers give {module or 'several types'}, target is {target.dtype}"
    if alpha.dtype not in DTYPES:
        return f"alpha is {alpha.dtype}"
    if not torch.compiler.is_compiling() and (target.numel() == 0 or student.numel() == 0):
        return "there is no element"  # a graph's operator finds out by itself: here it would be a guard
    if not _fits(stack, student, target, alpha, call.channel):
        shapes = "" if torch.compiler.is_compiling() else f", {tuple(student.shape)} to {tuple(target.shape)}"
        return f"the layers do not lead from student to target{shapes}"
    if target.requires_grad:
        return "the target requires grad"
    if module is torch.float32 and stack.convolutions and products_differ_from_convolutions():
        return "torch.set_float32_matmul_precision or fp32_precision lets convolutions and products of matrices differ"
    grad = torch.is_grad_enabled()
    if grad and alpha.requires_grad and not any(x.requires_grad for x in (student, *stack.tensors)):
        return "only alpha's gradient is wanted"  # for which the sums of squares are enough
    if torch.compiler.is_compiling():
        return None
    if (reason := not_raw(*tensors)) is not None:
        return reason
    if in_functorch(*tensors) or in_forward_mode():
        return "a transform of torch.func or a forward-mode derivative is around it"
    return None


def _fits(stack: Stack, student: Tensor, target: Tensor, alpha: Tensor, channel: int) -> bool:
    if student.dim() < 2 or student.dim() != target.dim():
        return False
    others = [
        (s, t) for d, (s, t) in enumerate(zip(student.shape, target.shape, strict=True)) if d != channel
    ]
    return (
        all(s == t for s, t in others)
        and alpha.shape == target.shape[channel : channel + 1]
        and stack.fits(student.shape[channel], target.shape[channel])
    )


def _in_one_pass(
    stack: Stack,
    student: Tensor,
    target: Tensor,
    alpha: Tensor,
    call: Call,
    weights: Weights | None,
    backend: Backend,
    module: torch.dtype | None,
) -> Tensor:
    assert module is not None
    in_parts: PartsBackend = backend  # type: ignore[assignment]
    k = loss_factor(target.shape, call.reduction, call.weight, call.masked)
    mask = None if weights is None else _flat_mask(weights.mask, target, call.channel)
    student, target = (flat_positions(x, call.channel) for x in (student, target))
    call = call._replace(channel=1, inplace=True, k=k)
    call, positions, values = counted(in_parts, target, call, mask, weights.factor if weights else None)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (student, *stack.tensors)):
        loss: Tensor = Head.apply(  # type: ignore[no-untyped-call]
            student, target, alpha, call, in_parts, module, stack.convolutions, (positions, values),
            *stack.weights, *stack.biases,
        )[0]  # fmt: skip
        return loss
    return compute.loss_alone(
        HeadCall(stack, student, target, alpha, call, in_parts, module, positions, values)
    )
