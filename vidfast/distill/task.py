"""The loss on the labels: over what it is a mean, so that the parts of a batch count by that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .weighting import Factor, times

TaskLoss = Callable[[Tensor, Tensor], Tensor]
# labels -> a number, or a scalar tensor.
Count = Callable[[Tensor], "Tensor | float"]

# The label that torch's losses ignore unless told otherwise.
IGNORED = -100


def count_of(task_loss: TaskLoss) -> Count | None:
    """What one of torch's losses on class numbers divides by, as a function of the labels; None for other losses.

    Known are `cross_entropy` and `nll_loss` of torch.nn.functional, with `functools.partial` or without, and their
    modules, if they reduce by the mean: the number of labels that are not ignored, or the sum of their classes'
    weights.
    """
    options = _options(task_loss)
    if options is None or options.get("reduction") != "mean":
        return None
    ignored: int = options["ignore_index"]
    weight: Tensor | None = options["weight"]

    def count(labels: Tensor) -> Tensor | float:
        if labels.is_floating_point():  # probabilities of the classes, (B, C, ...)
            return labels.numel() / max(1, labels.shape[min(1, labels.dim() - 1)])
        labels = labels.long()  # of bytes, -100 is 156
        counts = labels != ignored
        if weight is None:
            return counts.sum()
        classes = labels.where(counts, torch.zeros_like(labels))
        weights = weight.to(labels.device)[classes]
        return weights.where(counts, torch.zeros_like(weights)).sum()

    return count


def on_device(value: Tensor | float, device: torch.device) -> Tensor:
    """The tensor, or a number as a scalar that is made on the device: for a copy from the host, the host would wait."""
    if isinstance(value, Tensor):
        return value.to(device)
    return torch.full((), value, dtype=torch.float32, device=device)


def mean_loss(
    task_loss: TaskLoss, count: Count | None, logits: Tensor, labels: Tensor, factor: Factor
) -> Tensor:
    """`factor` times the loss on the labels; 0 with zero gradients, and not 0 / 0, where nothing counts.

    count: (labels) -> what the loss divides by, or None if that is not known. A scalar on the device is not looked at
        on the host. factor: a number or a scalar tensor.

    Raises ValueError for a loss, a count or a factor that is no scalar.
    """
    if isinstance(factor, Tensor) and factor.dim():
        raise ValueError(f"wanted task_scale as a number or a scalar Tensor, got {tuple(factor.shape)}")
    divisor = None if count is None else on_device(count(labels), logits.device)
    if divisor is not None and divisor.dim():
        raise ValueError(
            f"wanted a task_count that gives one number for all labels, got {tuple(divisor.shape)}; take the sum"
        )
    counts = None if divisor is None else divisor > 0
    # What flows back from 0 / 0 is NaN, unless all labels are ignored by torch's own losses, which then look at none.
    options = _options(task_loss)
    if counts is not None and (options is None or options["weight"] is not None):
        logits = _Guarded.apply(logits, counts)  # type: ignore[no-untyped-call]
    loss = task_loss(logits, labels)
    if loss.dim():
        raise ValueError(
            f"wanted a task_loss that gives a scalar, got {tuple(loss.shape)} (reduction='none'?)"
        )
    if counts is None:
        return times(loss, factor)
    if isinstance(factor, Tensor):  # a share of nothing
        factor = torch.where(counts, factor.to(logits.device), torch.zeros_like(factor, device=logits.device))
    return times(torch.where(counts, loss, torch.zeros_like(loss)), factor)


class _Guarded(torch.autograd.Function):
    """The logits, with zero gradients where nothing counts."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, counts: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (counts,) = ctx.saved_tensors
        return torch.where(counts, gradient, torch.zeros_like(gradient)), None


def ignored_label(task_loss: TaskLoss) -> int:
    """The label that the loss leaves out: its `ignore_index`, an attribute or of `functools.partial`; else -100."""
    keywords = task_loss.keywords if isinstance(task_loss, partial) else {}
    found = keywords.get("ignore_index", getattr(task_loss, "ignore_index", IGNORED))
    return found if isinstance(found, int) else IGNORED


def knows_its_classes(task_loss: TaskLoss) -> bool:
    """Whether the loss is one of torch's on class numbers, for which dimension 1 of the logits holds the classes."""
    return _options(task_loss) is not None


_OPTIONS: dict[str, Any] = {"weight": None, "ignore_index": IGNORED, "reduction": "mean"}


def _options(task_loss: TaskLoss) -> dict[str, Any] | None:
    """Weight, ignore_index and reduction of one of torch's losses on class numbers; None for any other loss."""
    for kind in (nn.CrossEntropyLoss, nn.NLLLoss):
        if isinstance(task_loss, kind):
            own = type(task_loss).forward is kind.forward
            return {name: getattr(task_loss, name) for name in _OPTIONS} if own else None
    given: dict[str, Any] = {}
    function: object = task_loss
    if isinstance(task_loss, partial):
        function, given = task_loss.func, task_loss.keywords
        if task_loss.args or "size_average" in given or "reduce" in given:
            return None
    if function is not nn.functional.cross_entropy and function is not nn.functional.nll_loss:
        return None
    return {name: given.get(name, default) for name, default in _OPTIONS.items()}
