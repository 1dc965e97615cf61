"""Masks for the suite: weights of positions, and what is stored where they are 0."""

from __future__ import annotations

import math

import numpy as np
import torch
from oracle import position_weights
from problems import Case
from torch import Tensor

MASK_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip
# Layouts in which several elements share memory: what is stored for one of them is stored for others.
_SHARED = ("expanded_batch", "expanded_channel")


def positions(case: Case) -> tuple[int, ...]:
    channel = case.channel_dim % len(case.shape)
    return tuple(n for d, n in enumerate(case.shape) if d != channel)


def mask_for(
    case: Case,
    dtype: torch.dtype = torch.bool,
    share: float = 0.6,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(positions): about `share` of them not 0. Floats between 1/4 and 4, integers from 1 to 5; bool is True."""
    random = np.random.default_rng(seed + 77)
    shape = positions(case)
    chosen = random.uniform(size=shape) < share
    values = random.uniform(0.25, 4, size=shape)
    if dtype in (torch.bool, torch.uint8):
        values = np.ones(shape)
    elif not dtype.is_floating_point:
        values = random.integers(1, 6, size=shape)
    # of few bits, so that no dtype rounds it
    wide = torch.from_numpy(np.asarray(chosen * values)).to(
        torch.bfloat16 if dtype.is_floating_point else dtype
    )
    return wide.to(device, dtype)


def in_blocks(case: Case, seed: int = 0) -> Tensor:
    """(positions) bool: long stretches of memory with nothing in them, and an element alone here and there."""
    random = np.random.default_rng(seed)
    shape = positions(case)
    flat = np.zeros(math.prod(shape), dtype=bool)
    third = max(flat.size // 3, 1)
    flat[:third] = random.uniform(size=third) < 0.8
    flat[2 * third :: 997] = True
    return torch.from_numpy(flat.reshape(shape))


def spoil(x: Tensor, mask: Tensor, case: Case, layout: str, value: float = math.nan) -> None:
    """Stores what must not be used wherever the mask is 0, where the layout has such places."""
    if layout in _SHARED:
        return
    weights = torch.from_numpy(position_weights(mask, x.shape, case.channel_dim).copy()).to(x.device)
    x.masked_fill_(weights == 0, value)


def spoilt(
    case: Case, mask: Tensor, value: float = math.nan, **options: object
) -> tuple[Tensor, Tensor, Tensor]:
    """The case's tensors, with that value in mean and target where the mask is 0."""
    mean, target, alpha = case.tensors(**options)  # type: ignore[arg-type]
    spoil(mean, mask, case, case.mean_layout, value)
    spoil(target, mask, case, case.target_layout or case.mean_layout, value)
    return mean, target, alpha
