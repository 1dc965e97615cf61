"""Negative variances, which torch.nn.GaussianNLLLoss refuses: found by the pass itself, where its loss is NaN."""

from __future__ import annotations

from torch import Tensor

from vidfast.heteroscedastic.arguments import HeteroscedasticCall

MESSAGE = "var has negative entry/entries: variances must be 0 or more"


def check_no_negative(call: HeteroscedasticCall, raw: Tensor, loss: Tensor) -> None:
    """Checks on the CPU, where nothing has to be waited for, that a loss is not NaN because of a negative variance.

    Args:
        call: Whose `negative_is_nan` says whether such a variance makes the loss NaN.
        raw: Its variances.
        loss: Its result.

    Raises:
        ValueError: It is.
    """
    if call.negative_is_nan and loss.is_cpu and bool(loss.isnan()) and bool((raw < 0).any()):
        raise ValueError(MESSAGE)
