"""By how much things count: a mask's weights, brought to each feature's positions, and the factors of losses.

A position is one place of a feature, all channels together: a pixel, a token, a sample.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from vidfast.arguments import ScalarReduction
from vidfast.pooling import averaged, match_masked, without_unselected
from vidfast.positions import averageable, check_mask_kind

# What a loss is multiplied by: a number, or a tensor of no dimensions on the device, which the host does not read.
Factor: TypeAlias = float | Tensor


def check_mask(mask: object, devices: Sequence[torch.device]) -> Tensor:
    """The mask, without a look at its shape, which every pair compares with its own features.

    devices: the inputs'.

    Raises TypeError for what is no tensor of weights, ValueError for one on another device, with a gradient, with
    negative weights (on the CPU), sparse, nested, or of no dimension.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"wanted mask as a Tensor or None, got {type(mask).__name__}")
    if mask.device not in devices:
        raise ValueError(
            f"wanted a mask on the inputs' device, {devices[0]}, got one on {mask.device}; pass "
            f"mask.to({str(devices[0])!r})"
        )
    mask = check_mask_kind(mask, mask.device)
    if mask.dim() == 0:
        raise ValueError(
            "wanted a mask (B, *positions), or (B,) with a weight for each sample, got "
            f"{tuple(mask.shape)}; give None where everything counts"
        )
    return mask


def check_scale(scale: object, devices: Sequence[torch.device]) -> Factor:
    """The scale as a float, or as a floating-point tensor of no dimensions.

    devices: the inputs'.

    Raises TypeError or ValueError for a tensor that is not one number on these devices, without gradient.
    """
    if not isinstance(scale, Tensor):
        if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
            raise TypeError(f"wanted scale as a number or a Tensor of one, got {type(scale).__name__}")
        return float(scale)
    if scale.numel() != 1 or scale.dtype is torch.bool or scale.is_complex():
        raise TypeError(
            f"wanted scale as a number or a Tensor of one real number, got {scale.dtype} {tuple(scale.shape)}"
        )
    if scale.requires_grad:
        raise ValueError("wanted a scale without gradient, got one that requires it; pass scale.detach()")
    if scale.device not in devices:
        raise ValueError(
            f"wanted a scale on the inputs' device, {devices[0]}, got one on {scale.device}, whose copy would be "
            "waited for; compute it there, or give a number"
        )
    return (scale if scale.is_floating_point() else scale.float()).reshape(())


def share_of(scale: Factor, mask: Tensor | None) -> Factor:
    """The scale, of a tensor 0 where the mask selects nothing: a share of nothing may be 0 / 0."""
    if mask is None or not isinstance(scale, Tensor):
        return scale
    return torch.where((mask != 0).any(), scale, torch.zeros_like(scale))


def times(loss: Tensor, factor: Factor) -> Tensor:
    """loss * factor. A factor that is a tensor makes 16 bits fp32, and fp32 never fp64."""
    if isinstance(factor, Tensor):
        factor = factor.to(loss.device, torch.promote_types(loss.dtype, torch.float32))
    return loss * factor


def fitted(mask: Tensor, feature: Tensor, channel_dim: int = 1) -> Tensor:
    """The mask at a feature's positions: of its number of dimensions, with 1 in the place of the channels.

    Any other size may be 1 too, for weights that are alike along it. A larger mask is averaged down; at a feature of
    one position, such as (B, C), a weight is the mean over all of its sample's.

    mask: (B, *spatial), (B, 1, *spatial), with 1 in the place of the feature's channels, or (B,); of tokens as many as
        the feature's, or a multiple. feature: (B, C, *spatial), or with its channels in `channel_dim`.

    Raises ValueError for a mask that cannot be brought to this size.
    """
    found = _at(mask, feature, channel_dim)
    if found is None:
        size = _size(feature, channel_dim)
        batch = feature.shape[0]
        wanted = ", ".join(map(str, (batch, *size)))
        raise ValueError(
            f"wanted a mask of this feature's size, ({wanted}), or larger along its positions, or ({batch},), got "
            f"{tuple(mask.shape)} for a feature {tuple(feature.shape)}; give one of the inputs' size or the feature's"
        )
    return found


def fitted_pair(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both features (B, C, *spatial) at the smaller size of the two along every axis, and the mask there, as `fitted`.

    Pooled values are weighted means (`vidfast.pooling.match_masked`).
    """
    axes = student.dim() - 2
    as_map = mask.dim() == axes + 1 or (mask.dim() == axes + 2 and mask.shape[1] == 1)
    if not as_map and 1 in (student.shape[2:].numel(), teacher.shape[2:].numel()):
        mask = samples(mask)[:, 0]  # of tokens, for features that have none
    return match_masked(student, teacher, mask.to(student.device))


def fed(student: Tensor, target: Tensor, mask: Tensor, channel_dim: int = 1) -> Tensor:
    """What goes into a regressor from the student's feature to a target with other positions.

    0 stands where the student's position has the weight 0, if the mask can be brought to its size. Where positions
    agree, what computes the loss does that itself.
    """
    if student.dim() == target.dim() and _size(student, channel_dim) == _size(target, channel_dim):
        return student
    own = _at(mask, student, channel_dim)
    if own is None:
        own = samples(mask.to(student.device)).reshape(-1, *[1] * (student.dim() - 1))
    return student.masked_fill(own == 0, 0)


def selected(
    student: Tensor, target: Tensor, mask: Tensor | None, channel_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Both features with 0 where the target's position has the weight 0: what is computed of NaN has no gradient of 0.

    mask: by `fitted` for the target; None changes nothing.
    """
    if mask is None:
        return student, target
    student = without_unselected(student, mask, channel_dim % student.dim())
    return student, target.masked_fill(mask == 0, 0)


def weighted(values: Tensor, mask: Tensor, reduction: ScalarReduction = "mean") -> Tensor:
    """sum w x, over the batch size ("batchmean") or over sum w ("mean"): a scalar, 0 where nothing is selected.

    values: x, (B, ...), finite, in fp32 or wider. mask: w, of as many dimensions, each of the same size or 1.
    """
    weights = mask.to(values.dtype)
    total = (values * weights).sum()
    if reduction == "sum":
        return total
    if reduction == "batchmean":
        return total / values.shape[0]
    return total / counted(mask, values.numel(), values.dtype)


def counted(mask: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """sum w over `numel` values, whose number is the mask's or a multiple of it: a scalar; 1 where it is 0."""
    count = mask.to(dtype).sum() * (numel // mask.numel())
    return torch.where(count == 0, torch.ones_like(count), count)


def samples(mask: Tensor) -> Tensor:
    """(B, 1): the mean weight of each sample's positions."""
    if mask.dim() == 1:
        return mask[:, None]
    return averageable(mask).flatten(1).mean(1, keepdim=True)


def tokens_of(mask: Tensor, length: int) -> Tensor | None:
    """(B, L): a mask that has a weight for each of this many tokens; None for any other mask."""
    if mask.dim() == 3 and 1 in mask.shape[1:]:
        mask = mask.flatten(1)
    return mask if mask.dim() == 2 and mask.shape[1] == length else None


def _size(feature: Tensor, channel_dim: int) -> Sequence[int]:
    """The sizes of a feature's axes but the batch and the channels."""
    channel = channel_dim % feature.dim()
    return [n for d, n in enumerate(feature.shape) if d not in (0, channel)]


def _at(mask: Tensor, feature: Tensor, channel_dim: int) -> Tensor | None:
    """As `fitted`; None where that cannot be."""
    size = _size(feature, channel_dim)
    axes = len(size)
    batch, channel = feature.shape[0], channel_dim % feature.dim()
    if mask.shape[0] != batch and not (mask.shape[0] == 1 and mask.dim() == axes + 2):
        return None
    mask = mask.to(feature.device).expand(batch, *mask.shape[1:])
    if mask.dim() == 1 or math.prod(size) == 1:
        return samples(mask).reshape(-1, *[1] * (axes + 1))
    if mask.dim() == axes + 1:
        mask = mask.unsqueeze(1)
    elif mask.dim() == axes + 2 and mask.shape[channel] == 1:
        mask = mask.movedim(channel, 1)
    elif mask.dim() != axes + 2 or mask.shape[1] != 1:
        return None
    # a token is none of an image's pixels: weights of other tokens than the feature's are a mistake
    if channel != 1 and any(m % n for m, n in zip(mask.shape[2:], size, strict=True) if m != 1):
        return None
    if not all(m == 1 or m >= n for m, n in zip(mask.shape[2:], size, strict=True)):
        return None
    return averaged(mask, size).movedim(1, channel)
