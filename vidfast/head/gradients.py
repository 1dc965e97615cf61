"""A head that is to be computed, what of it is wanted, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vidfast.arguments import Call
from vidfast.backends.base import PartsBackend
from vidfast.head.stack import Stack


class HeadCall(NamedTuple):
    """A head and how to compute it.

    Attributes:
        stack: The layers, that fit the student and the target.
        student: (B, C_s, positions), any strides, with elements.
        target: (B, C, positions), any strides; not fp64.
        alpha: (C,).
        call: Of the whole batch, with channel 1, in place; its k is all of it, whatever is masked.
        backend: The back end that computes it.
        module: What a layer gives: fp32, bf16 or fp16.
        positions: (B, positions) without gaps, the weight of each: uint8 or fp32; None: 1 each. Where it is 0 neither
            the student nor the target is used.
        values: M, what the positions' weights sum to.
    """

    stack: Stack
    student: Tensor
    target: Tensor
    alpha: Tensor
    call: Call
    backend: PartsBackend
    module: torch.dtype
    positions: Tensor | None = None
    values: float = 0.0


class Gradients(NamedTuple):
    """What a head gives: the loss and its gradients for an incoming gradient of 1.

    Attributes:
        loss: A scalar in fp32.
        factor: What the student's gradient has to be multiplied with yet. 1 where nothing is stored in fp16.
        student: (B, C_s, positions), of the student's dtype and order of dimensions; None where it is not wanted.
        alpha: (C,) in fp64.
        weights: (out, in) each in fp32, or None.
        biases: (out,) each in fp32, or None.
    """

    loss: Tensor
    factor: float
    student: Tensor | None
    alpha: Tensor
    weights: list[Tensor | None]
    biases: list[Tensor | None]


class Wanted(NamedTuple):
    """Which gradients are wanted.

    Attributes:
        student: The student's.
        weights: Of each layer, the weight's.
        biases: Of each layer, the bias's.
    """

    student: bool
    weights: Sequence[bool]
    biases: Sequence[bool]
