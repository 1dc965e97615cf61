"""A head by a back end's own kernel: products, loss and gradients in one call, tile by tile of positions.

Where a back end has such a kernel, it saves what :mod:`vidfast.head.parts` has to spend around a library's products:
their calls, features copied to where they can be multiplied, and sums of products that were rounded to 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidfast._torch import cpu_has_tiles, products_differ_from_convolutions
from vidfast.arguments import Call
from vidfast.backends.base import PartsBackend
from vidfast.head.gradients import Gradients, Wanted
from vidfast.head.stack import Stack
from vidfast.layout import rows_of
from vidfast.memory import empty_dense

# A kernel copies each weight twice, as its products read it. The most numbers of these copies; where activations are
# more, as many as those.
MOST_COPIED = 2 << 20


def takes(backend: PartsBackend, stack: Stack, student: Tensor, module: torch.dtype) -> bool:
    """Whether a head is computed by the back end's kernel, and not by a library's products.

    Not where a library has the processor's tiles (AMX), several times as fast as vectors are; nor where torch was asked
    for fp32 products of less precision, which it has and the kernel has not; nor where weights are so large beside the
    activations that copies of them would be most of a step's memory.

    Args:
        backend: That computes heads.
        stack: The layers.
        student: (B, C_s, positions).
        module: What a layer gives: fp32, bf16 or fp16.
    """
    if not backend.has_head(module, len(stack.weights)):
        return False
    sizes = [weight.shape[:2] for weight in stack.weights]
    copied = 2 * sum(out * into for out, into in sizes)
    activations = student.shape[0] * student.shape[2] * sum(sum(size) for size in sizes)
    if copied > max(MOST_COPIED, activations):
        return False
    if module is torch.float32:
        return not products_differ_from_convolutions()
    return not cpu_has_tiles(module)


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
    """The loss of a head and the wanted gradients, `factor` 1.

    Args:
        stack: The layers, that fit the student and the target.
        student: (B, C_s, positions), any strides.
        target: (B, C, positions), any strides.
        alpha: (C,).
        call: Of the whole batch.
        backend: The one with the kernel.
        module: What a layer gives: fp32, bf16 or fp16.
        wanted: Which gradients.
    """
    loss = _empty((), torch.float32)
    of_student = empty_dense(student, rows_of(student, 1).dense, student.dtype) if wanted.student else None
    of_alpha = _empty(alpha.shape, torch.float64)
    of_weights = [
        _empty(weight.shape[:2], torch.float32) if want else None
        for weight, want in zip(stack.weights, wanted.weights, strict=True)
    ]
    of_biases = [
        _empty(weight.shape[:1], torch.float32) if want else None
        for weight, want in zip(stack.weights, wanted.biases, strict=True)
    ]
    backend.head(
        student, target, alpha.contiguous(), *_matrices(stack), call, module,
        loss=loss, grad_student=of_student, grad_alpha=of_alpha, grad_weights=of_weights, grad_biases=of_biases,
    )  # fmt: skip
    return Gradients(loss, 1.0, of_student, of_alpha, of_weights, of_biases)


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
    loss, none = _empty((), torch.float32), [None] * len(stack.weights)
    backend.head(
        student, target, alpha.contiguous(), *_matrices(stack), call, module,
        loss=loss, grad_student=None, grad_alpha=None, grad_weights=none, grad_biases=none,
    )  # fmt: skip
    return loss


def _matrices(stack: Stack) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and biases without gaps."""
    return (
        [weight.detach().flatten(1).contiguous() for weight in stack.weights],
        [None if bias is None else bias.detach().contiguous() for bias in stack.biases],
    )


def _empty(shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")
