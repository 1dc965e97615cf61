"""What a call with one variance an element may be given, checked before anything is launched or written."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, SupportsIndex, TypeAlias, get_args

import torch
from torch import Tensor

from vidfast.arguments import (
    as_number,
    check_channel_dim,
    check_dense,
    check_options,
    loss_factor,
    number_of,
)
from vidfast.positions import Weights, weights_of

Transform: TypeAlias = Literal["softplus", "exp", "identity"]
TRANSFORMS: tuple[str, ...] = get_args(Transform)

# What kernels know: "exp" without a floor is a case of its own, in which raw is the logarithm.
SOFTPLUS, EXP, LOG_VARIANCE, CLAMP = range(4)


class HeteroscedasticCall(NamedTuple):
    """What was asked for, checked: everything about a call but its tensors.

    Attributes:
        transform: SOFTPLUS, EXP, LOG_VARIANCE or CLAMP: a number of csrc/heteroscedastic.h.
        eps: The smallest variance; 0 for LOG_VARIANCE alone.
        beta: The power of the variance, taken for a constant, that each element is multiplied by.
        channel: The dimension of the channels, not negative; None: there is none.
        reduction: One of "mean", "sum", "batchmean" and "none".
        full: Whether 1/2 log(2 pi) is added for each element.
        weight: A factor of the loss.
        inplace: Whether d/d mean and d/d raw may be written over mean and raw.
        strategy: "auto", "one_pass" or "two_pass".
        backend: "auto", "reference" or the name of a back end.
        k: The factor of the sum over all elements, as in :class:`vidfast.arguments.Call`.
        masked: Whether elements have weights.
        negative_is_nan: CLAMP: whether a negative variance makes the loss and its own gradients NaN.
    """

    transform: int
    eps: float
    beta: float = 0.0
    channel: int | None = None
    reduction: str = "mean"
    full: bool = False
    weight: float = 1.0
    inplace: bool = False
    strategy: str = "auto"
    backend: str = "auto"
    k: float = 0.0
    masked: bool = False
    negative_is_nan: bool = False

    @property
    def divides(self) -> bool:
        """Whether k is still to be divided by what the weights of all elements sum to."""
        return self.masked and self.reduction == "mean"


def check_call(
    mean: Tensor,
    target: Tensor,
    raw: Tensor,
    transform: str,
    eps: float,
    beta: float,
    channel_dim: SupportsIndex | None,
    reduction: str,
    full: bool,
    weight: float | Tensor,
    inplace: bool,
    strategy: str,
    backend: str,
    mask: Tensor | None,
) -> tuple[HeteroscedasticCall, Weights | None]:
    """(all but tensors, weights that are tensors) of a call of :func:`vidfast.heteroscedastic_nll`.

    The arguments are that function's.

    Raises:
        TypeError, ValueError: An argument is not as it must be.
    """
    check_tensors(mean, target, raw)
    kind, eps, beta = check_variance(transform, eps, beta)
    channel = None if channel_dim is None else check_channel(channel_dim, mean)
    _, number = check_options(1.0, reduction, number_of(weight), strategy, full, inplace)
    weights = weights_of(mask, weight, mean, channel)
    if reduction == "batchmean" and (channel == 0 or mean.dim() == 0):
        raise ValueError(
            f"reduction='batchmean' needs a batch in dimension 0, got shape {tuple(mean.shape)} and "
            f"channel_dim={channel_dim}"
        )
    if strategy == "one_pass" and torch.is_grad_enabled() and target.requires_grad:
        raise ValueError(
            "strategy='one_pass' has no gradient for target, which requires grad: use 'two_pass' or detach it"
        )
    # A Python number made from a traced shape would be another graph for every batch size: an operator makes its own.
    counted = reduction != "none" and type(mean.numel()) is int and not torch.compiler.is_compiling()
    masked = mask is not None
    k = loss_factor(mean.shape, reduction, number, masked) if counted else 0.0
    call = HeteroscedasticCall(
        kind, eps, beta, channel, reduction, full, number, inplace, strategy, backend, k, masked
    )
    return call, weights


def check_tensors(mean: Tensor, target: Tensor, raw: Tensor) -> None:
    """Checks that the three are dense floating tensors of one shape on one device.

    Raises:
        TypeError: Something is not a tensor, or has a dtype that is not fp16, bf16, fp32 or fp64.
        ValueError: Shapes or devices differ, or a tensor is sparse, nested or meta.
    """
    check_dense(mean=mean, target=target, raw=raw)
    if not mean.shape == target.shape == raw.shape:
        raise ValueError(
            "mean, target and raw must have the same shape (nothing is broadcast), got "
            f"{tuple(mean.shape)}, {tuple(target.shape)} and {tuple(raw.shape)}"
        )
    if not mean.device == target.device == raw.device:
        raise ValueError(
            f"mean, target and raw must be on one device, got {mean.device}, {target.device} and {raw.device}"
        )
    if mean.is_meta:
        raise ValueError("mean, target and raw must hold values, got tensors on the meta device")


def check_channel(channel_dim: SupportsIndex, mean: Tensor) -> int:
    """`channel_dim` as a dimension of mean, not negative.

    Raises:
        TypeError: It is no integer.
        ValueError: mean has no such dimension.
    """
    channel = check_channel_dim(channel_dim)
    if not -mean.dim() <= channel < mean.dim():
        raise ValueError(f"channel_dim={channel} is out of range for a tensor of shape {tuple(mean.shape)}")
    return channel % mean.dim()


def check_variance(transform: str, eps: float, beta: float = 0.0) -> tuple[int, float, float]:
    """(the transform's number, eps, beta) of what says how raw becomes a variance and counts.

    Raises:
        TypeError: eps or beta is no number.
        ValueError: There is no such transform, eps is no floor that it can have, or beta is negative or not finite.
    """
    if transform not in TRANSFORMS:
        raise ValueError(f"transform must be one of {TRANSFORMS}, got {transform!r}")
    eps, beta = as_number("eps", eps), as_number("beta", beta)
    floorless = transform == "exp" and eps == 0
    if not (0 < eps < math.inf or floorless):
        allowed = ", or 0 where transform='exp' and raw is the logarithm of the variance"
        raise ValueError(f"eps must be positive and finite{allowed}, got {eps}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be 0 or more and finite, got {beta}")
    kind = {"softplus": SOFTPLUS, "exp": LOG_VARIANCE if floorless else EXP, "identity": CLAMP}[transform]
    return kind, eps, beta
