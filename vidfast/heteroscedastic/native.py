"""A problem of this family as native code takes it: addresses, strides and numbers, in the order of csrc/bindings.h."""

from __future__ import annotations

from torch import Tensor

from vidfast.heteroscedastic.arguments import HeteroscedasticCall
from vidfast.heteroscedastic.layout import Rows
from vidfast.positions import Counts, native_counts
from vidfast.raw import NATIVE_DTYPE


def native_problem(
    mean: Tensor, target: Tensor, raw: Tensor, rows: Rows, call: HeteroscedasticCall, counts: Counts | None
) -> tuple[object, ...]:
    """What describes the problem; see `vidfast.backends.base.Backend.heteroscedastic_forward`."""
    return (
        mean.data_ptr(), rows.mean_stride, NATIVE_DTYPE[mean.dtype],
        target.data_ptr(), rows.target_stride, NATIVE_DTYPE[target.dtype],
        raw.data_ptr(), rows.raw_stride, NATIVE_DTYPE[raw.dtype],
        rows.outer, rows.row, call.transform, call.eps, call.beta, call.k, call.full, call.negative_is_nan,
        rows.channels, rows.inner, *native_counts(counts),
    )  # fmt: skip
