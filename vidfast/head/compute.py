"""A head's loss and gradients: by a back end's kernel or in parts, and in fp16 with k where it does not vanish.

Gradients of fp16 activations go without the loss's factor k, which is about 1/N and vanishes there: they carry a power
of two that keeps them in range, and `Gradients.factor` is what is left of k.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vidfast.head import kernel, parts
from vidfast.head.gradients import Gradients, HeadCall, Wanted

# The most that 1 / v_c becomes in fp16, whose largest value is 65504; and what is taken off where that was too much.
_MOST_IN_FP16, _LESS_IN_FP16, _SMALLEST_INSIDE = 16.0, 2.0**-12, 2.0**-40


def gradients(head: HeadCall, wanted: Wanted) -> Gradients:
    """The loss of a head and the wanted gradients. Where fp16 overflowed on the way, computed once more, smaller."""
    narrow = stores_fp16(head.module, head.student.dtype)
    k, alpha, eps = head.call.k, head.alpha, head.call.eps
    inside, factor = _split_factor(k, alpha, eps, head.positions) if narrow else (k, 1.0)
    compute = kernel.gradients if kernel.takes(head) else parts.gradients
    while True:
        found = compute(head._replace(call=head.call._replace(k=inside)), wanted)
        if factor != 1.0:
            found = _times(found, factor)
        if not narrow or not _overflowed(found) or abs(inside) < _SMALLEST_INSIDE:
            return found
        inside, factor = inside * _LESS_IN_FP16, factor / _LESS_IN_FP16


def loss_alone(head: HeadCall) -> Tensor:
    """The loss of a head, a scalar in fp32, where no gradient is wanted."""
    return kernel.loss_alone(head) if kernel.takes(head) else parts.loss_alone(head)


def stores_fp16(module: torch.dtype, student: torch.dtype) -> bool:
    """Whether a gradient for g = 1 is stored in fp16, of an activation or of the student: it goes without k then."""
    return torch.float16 in (module, student)


def _times(found: Gradients, factor: float) -> Gradients:
    """With the factor in everything but the student's gradient."""
    for x in (found.loss, found.alpha, *found.weights, *found.biases):
        if x is not None:
            x.mul_(factor)
    return found._replace(factor=factor)


def _split_factor(k: float, alpha: Tensor, eps: float, positions: Tensor | None) -> tuple[float, float]:
    """(what of k goes into fp16 gradients, the power of two that is left of it).

    A gradient is w r / v_c times the first, with w the weight of its position. With the smallest variance v, and the
    largest weight taken for 1, it is at most 16 r where v is below 1/16, and where v is above 1 about what r is beside
    the standard deviation.
    """
    mantissa, exponent = math.frexp(k)
    smallest = float(F.softplus(alpha.detach().double()).min()) + eps
    down = 0
    if math.isfinite(smallest) and smallest * _MOST_IN_FP16 < 1:
        down = math.ceil(-math.log2(_MOST_IN_FP16 * smallest))
    elif math.isfinite(smallest) and smallest > 1:
        down = -math.floor(math.log2(smallest) / 2)
    largest = 1.0 if positions is None else float(positions.max())
    if math.isfinite(largest) and largest > 0:
        down += math.frexp(largest)[1] - 1
    return math.ldexp(mantissa, -down), math.ldexp(1.0, min(exponent + down, 1023))


def _overflowed(found: Gradients) -> bool:
    """Whether a gradient is not finite though the loss is: an fp16 value became too large on the way."""
    if not math.isfinite(found.loss.item()):
        return False
    tensors = (x for x in (found.student, *found.weights, *found.biases) if x is not None)
    return not all(bool(torch.isfinite(x).all()) for x in tensors)
