"""What a head may be given, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from vidfast.arguments import (
    SCALAR_REDUCTIONS,
    Call,
    check_channel_dim,
    check_options,
    check_tensors,
)
from vidfast.head.stack import Stack
from vidfast.raw import DTYPES


def check_head(
    student: Tensor,
    target: Tensor,
    alpha: Tensor,
    weights: Tensor | Sequence[Tensor],
    biases: Tensor | Sequence[Tensor | None] | None,
    channel_dim: SupportsIndex,
    eps: float,
    reduction: str,
    weight: float,
    backend: str,
) -> tuple[Stack, Tensor, Call]:
    """(the layers, alpha as (C,), everything else) of a call of :func:`vidfast.vid_head`, whose arguments these are.

    Raises:
        TypeError, ValueError: An argument is not as it must be.
    """
    if reduction not in SCALAR_REDUCTIONS:
        raise ValueError(f"reduction must be one of {SCALAR_REDUCTIONS}, got {reduction!r}")
    eps, weight = check_options(eps, reduction, weight)
    # target against itself: what is wrong with it or with alpha is said as gaussian_nll does
    channel, alpha = check_tensors(target, target, alpha, channel_dim)
    _check_student(student, target, channel, check_channel_dim(channel_dim))
    if reduction == "batchmean" and channel == 0:
        raise ValueError(
            "reduction='batchmean' needs a batch in dimension 0, but channel_dim=0 is the channels"
        )
    stack = _check_layers(weights, biases, student, target.shape[channel], channel)
    return stack, alpha, Call(channel, eps, reduction, weight=weight, inplace=True, backend=backend)


def _check_student(student: Tensor, target: Tensor, channel: int, given: int) -> None:
    if not isinstance(student, Tensor):
        raise TypeError(f"student must be a torch.Tensor, got {type(student).__name__}")
    if student.layout is not torch.strided or student.is_nested:
        raise ValueError(f"student must be a dense (strided) tensor, got layout {student.layout}")
    if student.dtype not in DTYPES:
        raise TypeError(f"student must be float16, bfloat16, float32 or float64, got {student.dtype}")
    wanted, got = list(target.shape), list(student.shape)
    if len(wanted) < 2:
        raise ValueError(f"student and target must have two or more dimensions, got {tuple(wanted)}")
    if (
        len(got) != len(wanted)
        or got[:channel] + got[channel + 1 :] != wanted[:channel] + wanted[channel + 1 :]
    ):
        raise ValueError(
            f"student and target must have the same shape but for their channels in dimension {given}, got "
            f"{tuple(got)} and {tuple(wanted)}"
        )
    if student.device != target.device:
        raise ValueError(
            f"student and target must be on one device, got {student.device} and {target.device}"
        )


def _check_layers(
    weights: Tensor | Sequence[Tensor],
    biases: Tensor | Sequence[Tensor | None] | None,
    student: Tensor,
    targets: int,
    channel: int,
) -> Stack:
    layers = (weights,) if isinstance(weights, Tensor) else tuple(weights)
    if not layers:
        raise ValueError("weights must be one or more tensors, got none")
    if biases is None:
        biases = (None,) * len(layers)
    given = (biases,) if isinstance(biases, Tensor) else tuple(biases)
    if len(given) != len(layers):
        raise ValueError(f"biases must be as many as weights, {len(layers)}, got {len(given)}")
    channels, convolutions = student.shape[channel], False
    mixed = torch.is_autocast_enabled(student.device.type)
    for number, (matrix, bias) in enumerate(zip(layers, given, strict=True)):
        name = f"weights[{number}]"
        if not isinstance(matrix, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(matrix).__name__}")
        if matrix.dim() < 2 or set(matrix.shape[2:]) - {1} or matrix.shape[1] != channels:
            raise ValueError(
                f"{name} must be (out, {channels}), or (out, {channels}, 1, ...) of a 1x1 convolution, got "
                f"{tuple(matrix.shape)}"
            )
        channels, convolutions = matrix.shape[0], convolutions or matrix.dim() > 2
        _check_like(name, matrix, student, mixed)
        if bias is not None:
            if not isinstance(bias, Tensor):
                raise TypeError(f"biases[{number}] must be a torch.Tensor or None, got {type(bias).__name__}")
            if tuple(bias.shape) != (channels,):
                raise ValueError(f"biases[{number}] must be ({channels},), got {tuple(bias.shape)}")
            _check_like(f"biases[{number}]", bias, student, mixed)
    if channels != targets:
        raise ValueError(
            f"weights[{len(layers) - 1}] must lead to target's {targets} channels, got {channels}"
        )
    return Stack(layers, given, convolutions)


def _check_like(name: str, x: Tensor, student: Tensor, mixed: bool) -> None:
    if x.device != student.device:
        raise ValueError(f"{name} must be on student's device, {student.device}, got {x.device}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    casts = mixed and torch.float64 not in (x.dtype, student.dtype)
    if x.dtype != student.dtype and not casts:
        raise TypeError(
            f"{name} must have student's dtype, {student.dtype}, outside of autocast, got {x.dtype}"
        )
