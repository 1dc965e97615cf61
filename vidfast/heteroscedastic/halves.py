"""mean and raw as the two halves of one tensor, `y.chunk(2, 1)`, and its gradient as one tensor.

The usual network gives both as one output. autograd would put the two gradients together by copying both; here the
kernel writes them side by side, and the whole goes to y directly, past the split. That is right as long as nothing else
wants to see the halves' own gradients, which is looked for in backward: a hook, retain_grad, `autograd.grad` of a half.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.compiler import is_compiling

from vidfast._torch import base_of, has_hooks, reaches_all_leaves
from vidfast.heteroscedastic.layout import Rows, is_dense
from vidfast.memory import empty_dense

# What takes a part out of a tensor, of which autograd keeps nothing but where it is.
_PARTS = ("SplitBackward0", "SplitWithSizesBackward0", "SliceBackward0", "SelectBackward0", "UnbindBackward0")


class Halves(NamedTuple):
    """Where mean and raw are in the tensor that they are the halves of.

    Attributes:
        whole: That tensor.
        shape: Of each.
        strides: Of each.
        mean_at: The first element of mean, counted from that of the whole.
        raw_at: Likewise of raw.
    """

    whole: Tensor
    shape: torch.Size
    strides: tuple[int, ...]
    mean_at: int
    raw_at: int

    def empty_whole(self) -> Tensor:
        """Uninitialised memory like the whole's."""
        whole = self.whole
        return empty_dense(whole, None if whole.is_contiguous() else whole.stride(), whole.dtype)

    def parts(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """The halves of a tensor that is stored as the whole is."""
        at = whole.storage_offset()
        mean, raw = (whole.as_strided(self.shape, self.strides, at + n) for n in (self.mean_at, self.raw_at))
        return mean, raw


def halves_of(mean: Tensor, raw: Tensor, rows: Rows) -> Halves | None:
    """How mean and raw are the halves of one tensor whose gradient may be written as one, or None where they are not.

    Args:
        mean: Of a call.
        raw: Of the call.
        rows: Of both.
    """
    whole = base_of(mean)
    if whole is None or not (mean.requires_grad and raw.requires_grad) or base_of(raw) is not whole:
        return None
    row, stride = rows.row, rows.mean_stride
    if (
        mean.stride() != raw.stride()
        or rows.copies_mean
        or whole.numel() != 2 * mean.numel()
        or (rows.outer > 1 and stride != 2 * row)
        or not is_dense(whole)
    ):
        return None
    first = whole.storage_offset()
    mean_at, raw_at = mean.storage_offset() - first, raw.storage_offset() - first
    if {mean_at, raw_at} != {0, row} or not (_is_part(mean, whole) and _is_part(raw, whole)):
        return None
    return Halves(whole, mean.shape, mean.stride(), int(mean_at), int(raw_at))


def _is_part(part: Tensor, whole: Tensor) -> bool:
    """Whether autograd has nothing but the taking of a part between the two, and nothing watches its gradient."""
    node = part.grad_fn
    if node is None or node.name() not in _PARTS or is_watched(part):
        return False
    before, number = node.next_functions[0]
    if whole.grad_fn is not None:
        return before is whole.grad_fn and number == whole.output_nr
    return getattr(before, "variable", None) is whole


def is_watched(x: Tensor) -> bool:
    """Whether x has a hook or retains its gradient."""
    return x.retains_grad or has_hooks(x)


class Routes:
    """Which way gradients take in backward: to the whole at once, or to each half.

    Args:
        mean: Of the call; kept alive by nothing here.
        raw: Likewise.
    """

    def __init__(self, mean: Tensor, raw: Tensor) -> None:
        self.parts = ref(mean), ref(raw)

    def to_whole(self, marker_node: Any) -> bool:
        """Whether the whole's gradient is all that is asked for.

        Args:
            marker_node: Where the gradient of the call's marker would go.
        """
        if is_compiling():
            return False
        for part in (x() for x in self.parts):
            if part is not None and is_watched(part):
                return False
        return reaches_all_leaves(marker_node)
