"""Positions that count: the weight that a mask gives to each, and a weight of the loss that is on the device.

A position is one place of the activations, all channels together: a pixel, a token, a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from vidfast._torch import is_functorch_wrapped
from vidfast.layout import Layout, position_strides
from vidfast.raw import DTYPES, address, describe, not_raw, savable

_FLOATS = frozenset(DTYPES)
_INTEGERS = frozenset(
    getattr(torch, name)
    for name in ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")
    if hasattr(torch, name)
)
# These are weights byte by byte as they are stored.
_BYTES = (torch.bool, torch.uint8)


class Counts(NamedTuple):
    """What counts, for a back end.

    Attributes:
        positions: The weight of each position, in the shape of mean without its channels, stored without gaps in
            mean's order of dimensions, [outer, inner]: uint8, or the type that r is computed in. None: 1 each. A back
            end that does not walk gets a mask of mean's number of dimensions, as it came.
        totals: (2,) in fp64: M, the sum of the positions' weights, and k.
    """

    positions: Tensor | None
    totals: Tensor


def native_counts(counts: Counts | None) -> tuple[int, bool, int]:
    """(address of the positions' weights, whether they are bytes, address of the totals); 0 for what is not there.

    Without counts M and k are those that the host knows.
    """
    if counts is None:
        return 0, False, 0
    positions, totals = counts
    return address(positions), positions is not None and positions.dtype is torch.uint8, totals.data_ptr()


class Weights(NamedTuple):
    """What a caller gave that is a tensor: weights of positions, and one of the loss.

    Attributes:
        mask: By :func:`check_mask`, of mean's number of dimensions; None: every position counts 1.
        factor: By :func:`check_factor`, one number that the loss is multiplied by; None: 1.
    """

    mask: Tensor | None
    factor: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        return [x for x in self if x is not None]


def weights_of(mask: Tensor | None, weight: object, mean: Tensor, channel: int | None) -> Weights | None:
    """The mask and the weight of a call, checked; None where neither is a tensor.

    Args:
        mask: As :func:`check_mask` takes it, or without channels :func:`check_mask_of_elements`; or None.
        weight: The factor of the loss; a number is for others to check.
        mean: (B, C, ...), with the channels in `channel`.
        channel: The dimension of the channels, not negative; None: there is none.

    Raises:
        TypeError, ValueError: As :func:`check_mask` and :func:`check_factor`.
    """
    factor = check_factor(weight, mean.device) if isinstance(weight, Tensor) else None
    if mask is None and factor is None:
        return None
    if mask is not None:
        mask = check_mask_of_elements(mask, mean) if channel is None else check_mask(mask, mean, channel)
    return Weights(mask, factor)


def check_mask(mask: object, mean: Tensor, channel: int) -> Tensor:
    """`mask` with mean's number of dimensions, where that of the channels is 1.

    Args:
        mask: A weight for each position: bool, integers or floating numbers. Its shape is mean's without the channel
            dimension, or with 1 there and any other size 1, or (B,).
        mean: (B, C, ...), with the channels in `channel`.
        channel: The dimension of the channels, not negative.

    Raises:
        TypeError: It is no tensor, or of another dtype.
        ValueError: Its shape or device does not fit, it requires grad or is sparse, nested or meta, or on the CPU a
            weight is negative. On a GPU that is not looked for.
    """
    mask = check_mask_kind(mask, mean.device)
    shape = tuple(mean.shape)
    without = shape[:channel] + shape[channel + 1 :]
    given = tuple(mask.shape)
    if given == without:
        found = mask.unsqueeze(channel)
    elif (
        len(given) == len(shape)
        and given[channel] == 1
        and all(n in (1, m) for d, (n, m) in enumerate(zip(given, shape, strict=True)) if d != channel)
    ):
        found = mask
    elif len(given) == 1 and channel != 0 and given[0] == shape[0]:
        found = mask.reshape(-1, *[1] * (len(shape) - 1))
    else:
        kept = tuple(1 if d == channel else n for d, n in enumerate(shape))
        sample = "" if channel == 0 or len(shape) < 3 else f", or ({shape[0]},), a weight a sample"
        raise ValueError(
            f"mask must have the activations' shape without channels, {without}, or {kept} where any size may be 1"
            f"{sample}, got {given}"
        )
    return found


def check_mask_of_elements(mask: object, mean: Tensor) -> Tensor:
    """`mask` with mean's number of dimensions, where nothing is said of channels: a weight for each element.

    Args:
        mask: As :func:`check_mask` takes it, but for its shape: mean's, where any size may be 1, or (B,).
        mean: Of any shape.

    Raises:
        TypeError, ValueError: As :func:`check_mask`.
    """
    mask = check_mask_kind(mask, mean.device)
    shape, given = tuple(mean.shape), tuple(mask.shape)
    if len(given) == len(shape) and all(n in (1, m) for n, m in zip(given, shape, strict=True)):
        return mask
    if len(given) == 1 and shape and given[0] == shape[0]:
        return mask.reshape(-1, *[1] * (len(shape) - 1))
    sample = f", or ({shape[0]},), a weight a sample" if shape else ""
    raise ValueError(
        f"mask must have mean's shape, {shape}, where any size may be 1{sample}, got {given}; where a dimension is the "
        "channels (channel_dim), without it"
    )


def check_mask_kind(mask: object, device: torch.device) -> Tensor:
    """The mask, of which all but its shape is checked: a tensor of weights on this device, without gradient.

    One that was made under torch.inference_mode is copied: autograd saves no such tensor for backward.

    Raises:
        TypeError, ValueError: As :func:`check_mask`.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor or None, got {type(mask).__name__}")
    if mask.is_nested or mask.layout is not torch.strided:
        kind = "a nested one" if mask.is_nested else f"layout {mask.layout}"
        raise ValueError(f"mask must be a dense (strided) tensor, got {kind}")
    if mask.dtype is not torch.bool and mask.dtype not in _INTEGERS and mask.dtype not in _FLOATS:
        raise TypeError(
            f"mask must be bool, integers, float16, bfloat16, float32 or float64, got {mask.dtype}"
        )
    if mask.requires_grad:
        raise ValueError("mask must not require grad, got a tensor that does: pass mask.detach()")
    if mask.device != device:
        raise ValueError(f"mask must be on the activations' device, {device}, got {mask.device}")
    if (
        not is_compiling()
        and mask.is_cpu
        and mask.dtype.is_signed
        and not_raw(mask) is None
        and not is_functorch_wrapped(mask)
        and bool((mask < 0).any())
    ):
        raise ValueError(f"mask must not be negative, got weights down to {mask.min().item()}")
    return mask if is_compiling() else savable(mask)


def check_factor(weight: Tensor, device: torch.device | None = None) -> Tensor:
    """A weight that is a tensor, as one floating number.

    Args:
        weight: As a caller gives it.
        device: Where it must be; None: not known yet.

    Raises:
        TypeError: It is neither floating numbers nor integers.
        ValueError: It is not one number, requires grad, or is on another device.
    """
    if weight.dtype not in _FLOATS and weight.dtype not in _INTEGERS:
        raise TypeError(
            f"weight must be a number or a tensor of one floating number or integer, got {weight.dtype}"
        )
    if weight.is_nested or weight.layout is not torch.strided or weight.numel() != 1:
        got = "a nested one" if weight.is_nested else describe(weight)
        raise ValueError(f"weight must be a number or a tensor of one element, got {got}")
    if weight.requires_grad:
        raise ValueError(
            "weight must not require grad, got a tensor that does: multiply the loss by it, or pass weight.detach()"
        )
    if device is not None and weight.device != device:
        raise ValueError(
            f"weight must be a number or a tensor on the activations' device, {device}, got one on {weight.device}"
        )
    weight = weight if weight.dtype in _FLOATS else weight.double()
    return weight if is_compiling() else savable(weight)


def averageable(mask: Tensor) -> Tensor:
    """A mask in a dtype in which it can be averaged: fp64 stays, the rest is fp32."""
    return mask.to(torch.promote_types(mask.dtype, torch.float32))


def expanded(mask: Tensor, shape: Sequence[int], channel: int) -> Tensor:
    """A mask by :func:`check_mask` at every position of this shape, with 1 in the place of the channels."""
    return mask.expand([*shape[:channel], 1, *shape[channel + 1 :]])


def positions_of(mask: Tensor, mean: Tensor, target: Tensor, channel: int, layout: Layout) -> Tensor:
    """The weights of a mask as kernels read them: itself, or a copy, N / C numbers large.

    Args:
        mask: By :func:`check_mask`, or a result of this function.
        mean: As it is walked.
        target: Likewise; its dtype decides with mean's which type r is computed in.
        channel: The dimension of the channels.
        layout: Of both.

    Returns:
        As `Counts.positions`.
    """
    shape = mean.shape
    if mask.dim() == len(shape):
        mask = expanded(mask, shape, channel).squeeze(channel)
    x = as_weights(mask, torch.float64 in (mean.dtype, target.dtype))
    strides = position_strides(shape, channel, layout.dense)
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def as_weights(mask: Tensor, wide: bool) -> Tensor:
    """A mask in a dtype that kernels read: bool and uint8 as bytes, the rest as fp32, or fp64 where `wide`."""
    if mask.dtype in _BYTES:
        return mask.view(torch.uint8)
    return mask.to(torch.float64 if wide else torch.float32)
