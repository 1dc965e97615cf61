"""A head by a back end's own kernel: products, loss and gradients in one call, tile by tile of positions.

Where a back end has such a kernel, it saves what :mod:`vidfast.head.parts` has to spend around a library's products:
their calls, features copied to where they can be multiplied, and sums of products that were rounded to 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidfast._torch import cpu_has_tiles, products_differ_from_convolutions
from vidfast.head.gradients import Gradients, HeadCall, Wanted
from vidfast.head.stack import Stack
from vidfast.layout import rows_of
from vidfast.memory import empty_dense

# A kernel copies each weight twice, as its products read it. The most numbers of these copies; where activations are
# more, as many as those.
MOST_COPIED = 2 << 20


def takes(head: HeadCall) -> bool:
    """Whether a head is computed by the back end's kernel, and not by a library's products.

    Not where a library has the processor's tiles (AMX), several times as fast as vectors are; nor where torch was asked
    for fp32 products of less precision, which it has and the kernel has not; nor where weights are so large beside the
    activations that copies of them would be most of a step's memory.
    """
    sizes = [weight.shape[:2] for weight in head.stack.weights]
    if not head.backend.has_head(head.module, len(sizes)):
        return False
    copied = 2 * sum(out * into for out, into in sizes)
    activations = head.student.shape[0] * head.student.shape[2] * sum(sum(size) for size in sizes)
    if copied > max(MOST_COPIED, activations):
        return False
    if head.module is torch.float32:
        return not products_differ_from_convolutions()
    return not cpu_has_tiles(head.module)


def gradients(head: HeadCall, wanted: Wanted) -> Gradients:
    """The loss of a head and the wanted gradients, `factor` 1."""
    student, weights = head.student, head.stack.weights
    found = Gradients(
        _empty((), torch.float32),
        1.0,
        empty_dense(student, rows_of(student, 1).dense, student.dtype) if wanted.student else None,
        _empty(head.alpha.shape, torch.float64),
        [
            _empty(weight.shape[:2], torch.float32) if want else None
            for weight, want in zip(weights, wanted.weights, strict=True)
        ],
        [
            _empty(weight.shape[:1], torch.float32) if want else None
            for weight, want in zip(weights, wanted.biases, strict=True)
        ],
    )
    _run(head, found.loss, found.student, found.alpha, found.weights, found.biases)
    return found


def loss_alone(head: HeadCall) -> Tensor:
    """The loss, a scalar in fp32, where no gradient is wanted."""
    loss, no_layers = _empty((), torch.float32), [None] * len(head.stack.weights)
    _run(head, loss, None, None, no_layers, no_layers)
    return loss


def _run(
    head: HeadCall,
    loss: Tensor,
    of_student: Tensor | None,
    of_alpha: Tensor | None,
    of_weights: Sequence[Tensor | None],
    of_biases: Sequence[Tensor | None],
) -> None:
    head.backend.head(
        head.student, head.target, head.alpha.contiguous(), *_matrices(head.stack), head.call, head.module,
        loss=loss, grad_student=of_student, grad_alpha=of_alpha, grad_weights=of_weights, grad_biases=of_biases,
        positions=head.positions, values=head.values,
    )  # fmt: skip


def _matrices(stack: Stack) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and biases without gaps."""
    return (
        [weight.detach().flatten(1).contiguous() for weight in stack.weights],
        [None if bias is None else bias.detach().contiguous() for bias in stack.biases],
    )


def _empty(shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")
