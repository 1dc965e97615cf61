"""What a head may be given, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from vidfast.arguments import (
    SCALAR_REDUCTIONS,
    Call,
    check_channel_dim,
    check_options,
    check_tensors,
    number_of,
)
from vidfast.head.stack import Stack
from vidfast.positions import Weights, weights_of
from vidfast.raw import DTYPES

_HINT = ": of a module pass its .weight and .bias"


def check_head(
    student: Tensor,
    target: Tensor,
    alpha: Tensor,
    weights: Tensor | Sequence[Tensor] | nn.ParameterList,
    biases: Tensor | Sequence[Tensor | None] | nn.ParameterList | None,
    channel_dim: SupportsIndex,
    eps: float,
    reduction: str,
    weight: float | Tensor,
    backend: str,
    mask: Tensor | None = None,
) -> tuple[Stack, Tensor, Call, Weights | None]:
    """(the layers, alpha as (C,), all but tensors, weights that are tensors) of a call of :func:`vidfast.vid_head`.

    The arguments are that function's.

    Raises:
        TypeError, ValueError: An argument is not as it must be.
    """
    if reduction not in SCALAR_REDUCTIONS:
        raise ValueError(f"reduction must be one of {SCALAR_REDUCTIONS}, got {reduction!r}")
    eps, number = check_options(eps, reduction, number_of(weight))
    _check_feature("target", target)
    _check_feature("student", student)
    given = check_channel_dim(channel_dim)
    if isinstance(alpha, Tensor) and -target.dim() <= given < target.dim():
        channels, found = target.shape[given], alpha.numel()
        if found not in (1, channels) and found == target.shape[-1]:
            raise ValueError(
                f"alpha must be one number for each of the {channels} channels in dimension {given} of "
                f"{tuple(target.shape)}, got {found}: where the channels are last, pass channel_dim=-1"
            )
    channel, alpha = check_tensors(target, target, alpha, given)
    _check_student(student, target, channel, given)
    if reduction == "batchmean" and channel == 0:
        raise ValueError(
            "reduction='batchmean' needs a batch in dimension 0, but channel_dim=0 is the channels"
        )
    stack = _check_layers(weights, biases, student, target.shape[channel], channel)
    tensors = weights_of(mask, weight, target, channel)
    call = Call(
        channel, eps, reduction, weight=number, inplace=True, backend=backend, masked=mask is not None
    )
    return stack, alpha, call, tensors


def _check_feature(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        raise ValueError(f"{name} must be a dense (strided) tensor, got layout {x.layout}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.is_meta:
        raise ValueError(f"{name} must hold values, got a tensor on the meta device")


def _check_student(student: Tensor, target: Tensor, channel: int, given: int) -> None:
    wanted, got = list(target.shape), list(student.shape)
    if len(wanted) < 2:
        raise ValueError(f"student and target must have two or more dimensions, got {tuple(wanted)}")
    if (
        len(got) != len(wanted)
        or got[:channel] + got[channel + 1 :] != wanted[:channel] + wanted[channel + 1 :]
    ):
        raise ValueError(
            f"student and target must have the same shape but for their channels in dimension {given}, got "
            f"{tuple(got)} and {tuple(wanted)}: of maps of two sizes pool the larger first, as VIDLoss does"
        )
    if student.device != target.device:
        raise ValueError(
            f"student and target must be on one device, got {student.device} and {target.device}"
        )


def _check_layers(
    weights: Tensor | Sequence[Tensor] | nn.ParameterList,
    biases: Tensor | Sequence[Tensor | None] | nn.ParameterList | None,
    student: Tensor,
    targets: int,
    channel: int,
) -> Stack:
    layers = _as_tuple("weights", weights)
    if not layers:
        raise ValueError("weights must be one or more tensors, got none")
    if biases is None:
        biases = (None,) * len(layers)
    given = _as_tuple("biases", biases)
    if len(given) != len(layers):
        raise ValueError(f"biases must be as many as weights, {len(layers)}, got {len(given)}")
    channels, convolutions = student.shape[channel], False
    mixed = torch.is_autocast_enabled(student.device.type)
    for number, (matrix, bias) in enumerate(zip(layers, given, strict=True)):
        name = f"weights[{number}]"
        if not isinstance(matrix, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(matrix).__name__}{_HINT}")
        if matrix.dim() < 2 or set(matrix.shape[2:]) - {1} or matrix.shape[1] != channels:
            raise ValueError(
                f"{name} must be (out, {channels}), or (out, {channels}, 1, ...) of a 1x1 convolution without groups, "
                f"got {tuple(matrix.shape)}; a matrix (in, out) is passed as .t(), and for any other layer call "
                "gaussian_nll on its output"
            )
        channels, convolutions = matrix.shape[0], convolutions or matrix.dim() > 2
        _check_like(name, matrix, student, mixed)
        if bias is not None:
            if not isinstance(bias, Tensor):
                raise TypeError(
                    f"biases[{number}] must be a torch.Tensor or None, got {type(bias).__name__}{_HINT}"
                )
            if tuple(bias.shape) != (channels,):
                raise ValueError(f"biases[{number}] must be ({channels},), got {tuple(bias.shape)}")
            _check_like(f"biases[{number}]", bias, student, mixed)
    if channels != targets:
        raise ValueError(
            f"weights[{len(layers) - 1}] must lead to target's {targets} channels, got {channels}"
        )
    return Stack(layers, given, convolutions)


def _as_tuple(name: str, given: object) -> tuple[Any, ...]:
    if isinstance(given, Tensor):
        return (given,)
    if not isinstance(given, (Sequence, nn.ParameterList)):
        raise TypeError(f"{name} must be a tensor or a list of tensors, got {type(given).__name__}{_HINT}")
    return tuple(given)


def _check_like(name: str, x: Tensor, student: Tensor, mixed: bool) -> None:
    if x.device != student.device:
        raise ValueError(f"{name} must be on student's device, {student.device}, got {x.device}")
    if x.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense (strided) tensor, got layout {x.layout}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    casts = mixed and torch.float64 not in (x.dtype, student.dtype)
    if x.dtype != student.dtype and not casts:
        raise TypeError(
            f"{name} must have student's dtype, {student.dtype}, outside of autocast, got {x.dtype}"
        )
