"""Two features brought to one size, and a mask with them, by adaptive average pooling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vidfast.positions import averageable, check_mask_kind
from vidfast.reference import no_autocast

_POOL: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def match_spatial(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both features at the smaller size of the two along every spatial axis, by adaptive average pooling.

    (B, C, *spatial) each, with 0 to 3 spatial axes; only a side that is larger somewhere is pooled.

    Args:
        student: The student's feature.
        teacher: The teacher's feature.

    Raises:
        ValueError: The numbers of axes or the batch sizes differ.
    """
    size = _smaller(student, teacher)
    return _pooled(student, size), _pooled(teacher, size)


def match_masked(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`match_spatial` with a weight for each position: pooled values are weighted means.

    The mask is averaged down to the same size. What is pooled is not read where its weight is 0, and a mean over
    weights that are all 0 is 0.

    Args:
        student: The student's feature, (B, C_s, *spatial).
        teacher: The teacher's feature, (B, C, *spatial).
        mask: A weight of 0 or more for each position, as in :func:`vidfast.gaussian_nll`: (B, *spatial),
            (B, 1, *spatial) where any other size may be 1 too, or (B,). Its size is that of the result, or along each
            axis at least that of either feature, such as the size of the networks' input.

    Returns:
        Both features, and the mask as (B or 1, 1, *spatial), of sizes of the result or 1: as it came where it has that
        size already, else in fp32 (fp64 if it was).

    Raises:
        TypeError: The mask is no tensor, or of another dtype.
        ValueError: As :func:`match_spatial`, or the mask's shape, device or values do not fit.
    """
    size = _smaller(student, teacher)
    mask = check_mask_kind(mask, student.device)
    mask = _as_map(mask, student, teacher, size)
    return _masked(student, size, mask), _masked(teacher, size, mask), averaged(mask, size)


def averaged(mask: Tensor, size: Sequence[int]) -> Tensor:
    """A mask (B, 1, *spatial) averaged down to these sizes; a size of 1 stays.

    Args:
        mask: Its spatial sizes are 1 or at least those wanted.
        size: What is wanted.
    """
    wanted = [min(m, n) for m, n in zip(mask.shape[2:], size, strict=True)]
    if list(mask.shape[2:]) == wanted:
        return mask
    return _pooled(averageable(mask), wanted)


def without_unselected(student: Tensor, mask: Tensor, channel: int = 1) -> Tensor:
    """The feature with 0 where its position's weight is 0.

    Even where what comes out is not used, a layer's gradient is a product with what went in, and 0 times NaN is NaN.

    Args:
        student: What a regressor is fed with.
        mask: Of student's number of dimensions, with 1 in the place of the channels, by
            :func:`vidfast.positions.check_mask` for the regressor's output. Where that is larger than the student, a
            position goes if every one that it becomes does.
        channel: The dimension of student's channels, not negative.
    """
    if mask.dim() != student.dim():
        return student
    sizes = [n for d, n in enumerate(student.shape) if d != channel]
    given = [n for d, n in enumerate(mask.shape) if d != channel]
    if any(m not in (1, n) for m, n in zip(given, sizes, strict=True)):
        if (
            channel != 1
            or student.dim() - 2 not in _POOL
            or any(m < n for m, n in zip(given, sizes, strict=True))
        ):
            return student
        mask = averaged(mask, student.shape[2:])
    return student.masked_fill(mask == 0, 0)


def _smaller(student: Tensor, teacher: Tensor) -> list[int]:
    if student.dim() != teacher.dim() or student.dim() < 2 or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            "student and teacher features must be (B, C, *spatial) with one batch and number of axes, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    return [min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)]


def _pooled(x: Tensor, size: Sequence[int]) -> Tensor:
    if list(x.shape[2:]) == list(size):
        return x
    if len(size) not in _POOL:
        raise ValueError(f"features of different size can have 1 to 3 spatial axes, got {tuple(x.shape)}")
    out: Tensor = _POOL[len(size)](x, list(size))
    return out


def _masked(x: Tensor, size: list[int], mask: Tensor) -> Tensor:
    """x at this size, as weighted means where it is pooled."""
    if list(x.shape[2:]) == size:
        return x
    if any(m != 1 and m < n for m, n in zip(mask.shape[2:], x.shape[2:], strict=True)):
        return _pooled(x, size)  # the mask is of the pooled size
    with no_autocast(x):
        each = averaged(mask, x.shape[2:]).to(torch.promote_types(x.dtype, torch.float32))
        each = each.expand(-1, -1, *x.shape[2:])
        sums = _pooled(x.masked_fill(each == 0, 0) * each, size)
        whole = _pooled(each, size)
        return (sums / torch.where(whole != 0, whole, torch.ones_like(whole))).to(x.dtype)


def _as_map(mask: Tensor, student: Tensor, teacher: Tensor, size: list[int]) -> Tensor:
    """The mask with the features' number of dimensions."""
    batch, axes = student.shape[0], len(size)
    if mask.dim() == axes + 2 and mask.shape[1] == 1 and mask.shape[0] in (1, batch):
        found = mask
    elif mask.dim() == axes + 1 and mask.shape[0] == batch:
        found = mask.unsqueeze(1)
    elif mask.dim() == 1 and mask.shape[0] == batch:
        found = mask.reshape(-1, *[1] * (axes + 1))
    else:
        found = None
    larger = [max(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    fits = found is not None and (
        all(m in (1, n) for m, n in zip(found.shape[2:], size, strict=True))
        or all(m == 1 or m >= n for m, n in zip(found.shape[2:], larger, strict=True))
    )
    if not fits or found is None:
        raise ValueError(
            f"mask must be ({batch}, *spatial), ({batch}, 1, *spatial) or ({batch},), of size {tuple(size)} or of at "
            f"least {tuple(larger)}, for features {tuple(student.shape)} and {tuple(teacher.shape)}, got "
            f"{tuple(mask.shape)}"
        )
    return found
