"""A head's loss and gradients: by a back end's kernel or in parts, and in fp16 with k where it does not vanish.

Gradients of fp16 activations go without the loss's factor k, which is about 1/N and vanishes there: they carry a power
of two that keeps them in range, and `Gradients.factor` is what is left of k.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vidfast.arguments import Call
from vidfast.backends.base import PartsBackend
from vidfast.head import kernel, parts
from vidfast.head.gradients import Gradients, Wanted
from vidfast.head.plan import planned
from vidfast.head.stack import Stack

# The most that 1 / v_c becomes in fp16, whose largest value is 65504; and what is taken off where that was too much.
_MOST_IN_FP16, _LESS_IN_FP16, _SMALLEST_INSIDE = 16.0, 2.0**-12, 2.0**-40


def gradients(
    stack: Stack,
    student: Tensor,
    target: Tensor,
    alpha: Tensor,
    call: Call,
    backend: PartsBackend,
    module: torch.dtype,
    wanted: Wanted,
) -> Gradients:
    """The loss of a head and its gradients.

    Args:
        stack: The layers, that fit the student and the target.
        student: (B, C_s, positions), any strides, with elements.
        target: (B, C, positions), any strides; not fp64.
        alpha: (C,).
        call: Of the whole batch, with channel 1, in place.
        backend: The back end that computes it.
        module: What a layer gives: fp32, bf16 or fp16.
        wanted: Which gradients.

    Returns:
        The loss and the wanted gradients. Where fp16 overflowed on the way they are computed once more, smaller.
    """
    narrow = stores_fp16(module, student.dtype)
    inside, factor = _split_factor(call.k, alpha, call.eps) if narrow else (call.k, 1.0)
    compute = kernel.gradients if kernel.takes(backend, stack, student, module) else _in_parts
    while True:
        found = compute(stack, student, target, alpha, call._replace(k=inside), backend, module, wanted)
        if factor != 1.0:
            found = _times(found, factor)
        if not narrow or not _overflowed(found) or abs(inside) < _SMALLEST_INSIDE:
            return found
        inside, factor = inside * _LESS_IN_FP16, factor / _LESS_IN_FP16


def loss_alone(
    stack: Stack,
    student: Tensor,
    target: Tensor,
    alpha: Tensor,
    call: Call,
    backend: PartsBackend,
    module: torch.dtype,
) -> Tensor:
    """The loss, a scalar in fp32, where no gradient is wanted. The arguments are those of :func:`gradients`."""
    if kernel.takes(backend, stack, student, module):
        return kernel.loss_alone(stack, student, target, alpha, call, backend, module)
    samples, target, plan = planned(student, target, stack.weights, module)
    return parts.loss_alone(stack, samples, target, alpha, call, backend, plan)


def stores_fp16(module: torch.dtype, student: torch.dtype) -> bool:
    """Whether a gradient for g = 1 is stored in fp16, of an activation or of the student: it goes without k then."""
    return torch.float16 in (module, student)


def _in_parts(
    stack: Stack,
    student: Tensor,
    target: Tensor,
    alpha: Tensor,
    call: Call,
    backend: PartsBackend,
    module: torch.dtype,
    wanted: Wanted,
) -> Gradients:
    """As :func:`vidfast.head.parts.gradients`, with the student's gradient in the student's shape."""
    samples, target, plan = planned(student, target, stack.weights, module)
    found = parts.gradients(stack, samples, target, alpha, call, backend, plan, wanted)
    if found.student is None or found.student.shape == student.shape:
        return found
    batch, channels, positions = student.shape  # every position was a sample
    return found._replace(student=found.student.view(batch, positions, channels).transpose(1, 2))


def _times(found: Gradients, factor: float) -> Gradients:
    """With the factor in everything but the student's gradient."""
    for x in (found.loss, found.alpha, *found.weights, *found.biases):
        if x is not None:
            x.mul_(factor)
    return found._replace(factor=factor)


def _split_factor(k: float, alpha: Tensor, eps: float) -> tuple[float, float]:
    """(what of k goes into fp16 gradients, the power of two that is left of it).

    A gradient is r / v_c times the first. With the smallest variance v it is at most 16 r where v is below 1/16, and
    where v is above 1 about what r is beside the standard deviation.
    """
    mantissa, exponent = math.frexp(k)
    smallest = float(F.softplus(alpha.detach().double()).min()) + eps
    down = 0
    if math.isfinite(smallest) and smallest * _MOST_IN_FP16 < 1:
        down = math.ceil(-math.log2(_MOST_IN_FP16 * smallest))
    elif math.isfinite(smallest) and smallest > 1:
        down = -math.floor(math.log2(smallest) / 2)
    return math.ldexp(mantissa, -down), math.ldexp(1.0, min(exponent + down, 1023))


def _overflowed(found: Gradients) -> bool:
    """Whether a gradient is not finite though the loss is: an fp16 value became too large on the way."""
    if not math.isfinite(found.loss.item()):
        return False
    tensors = (x for x in (found.student, *found.weights, *found.biases) if x is not None)
    return not all(bool(torch.isfinite(x).all()) for x in tensors)
