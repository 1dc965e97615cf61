"""How a head is cut into parts: how many samples, stored how, multiplied in which type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vidfast._torch import cpu_multiplies
from vidfast.head.arrangement import Arrangement, Columns, Planes, Rows
from vidfast.head.gradients import HeadCall
from vidfast.head.stack import as_samples
from vidfast.layout import rows_of

# The widest activation of a part of the batch, in fp32 and in 16 bits: it stays in the cache, and a product over it is
# worth starting. docs/kernel-notes.md, "The head".
PART_BYTES = {"planes": 4 << 20, "rows": 8 << 20, "columns": 8 << 20}
NARROW_PART_BYTES = {"planes": 1 << 20, "rows": 2 << 20, "columns": 2 << 20}
# A part is no more than this share of the batch, where that is not too little: what a step stores stays small beside
# what it would store of the whole.
FEWEST_PARTS, FEWEST_BYTES = 12, 512 << 10
# Matrix products of one sample each are the fastest over many positions and few channels: no tensor is reordered.
FEWEST_POSITIONS, MOST_CHANNELS = 128, 256


class Plan(NamedTuple):
    """How a head is computed; it follows from shapes, strides, dtypes and the processor.

    Attributes:
        arrangement: How activations of a part are stored.
        samples: Of a part.
        positions: Of a sample.
        module: The dtype of what a layer gives: fp32, bf16 or fp16.
        products: The dtype in which activations are stored and multiplied.
    """

    arrangement: type[Arrangement]
    samples: int
    positions: int
    module: torch.dtype
    products: torch.dtype


def plan_for(student: Tensor, widths: Sequence[int], module: torch.dtype) -> Plan:
    """How to compute a head.

    Args:
        student: (B, C_s, positions), with elements.
        widths: What each layer gives.
        module: The dtype of that: fp32, bf16 or fp16.

    Returns:
        The plan. It does not depend on values or on the number of threads.
    """
    products = torch.float32 if module is torch.float32 or not cpu_multiplies(module) else module
    batch, channels, positions = student.shape
    widest = max(channels, *widths)
    arrangement = _arrangement(student, widest, products)
    limits = PART_BYTES if products is torch.float32 else NARROW_PART_BYTES
    sample = products.itemsize * widest * positions
    most = min(limits[arrangement.name], max(batch * sample // FEWEST_PARTS, FEWEST_BYTES))
    return Plan(arrangement, evenly(batch, max(most // sample, 1)), positions, module, products)


def planned(head: HeadCall) -> tuple[Tensor, Tensor, Plan]:
    """(student, target, how to compute the head), the features as they are cut and read.

    The student is copied where it is expanded, overlapping or cut in its positions.
    """
    student = head.student.contiguous() if rows_of(head.student, 1).copies else head.student
    student, target = as_samples(student, head.target)
    return student, target, plan_for(student, [weight.shape[0] for weight in head.stack.weights], head.module)


def _arrangement(student: Tensor, widest: int, products: torch.dtype) -> type[Arrangement]:
    if not student.is_contiguous() and student.transpose(1, 2).is_contiguous():
        return Rows
    if student.shape[2] < FEWEST_POSITIONS:
        return Rows
    if widest <= MOST_CHANNELS:
        return Planes
    return Rows if products is torch.float32 else Columns


def evenly(batch: int, most: int) -> int:
    """Samples of a part, at most about `most`: of one size, and an even one, since threads share it by samples."""
    parts = math.ceil(batch / most)
    samples = math.ceil(batch / parts)
    return min(samples + samples % 2, batch) if most > 1 else 1
