"""A regressor, the module that predicts the teacher's feature, and its loss: one policy for all callers.

A regressor may be any module. Whether its output and its hidden activations may be written over, whether it is computed
together with its loss, and in which memory format it is fed, is decided here, from what :mod:`vidfast.layers` knows of
it at the moment of the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vidfast.arguments import BackendName, Call, Reduction, number_of
from vidfast.head.stack import Stack, stack_of
from vidfast.head.way import head_nll, note
from vidfast.layers import is_pointwise, is_watched, own_rectifiers, owns_its_output
from vidfast.nll import GaussianNLL, gaussian_nll
from vidfast.pooling import without_unselected
from vidfast.positions import weights_of
from vidfast.raw import PLAIN_TYPES

# From this size of its widest activation on, a stack of 1x1 convolutions is faster in channels_last on the CPU: oneDNN
# need not reorder it, and reordering takes fresh memory (docs/kernel-notes.md, "Regressors").
_LARGE_ACTIVATION = 16 << 20


def regressed_nll(
    regressor: nn.Module,
    student: Tensor,
    target: Tensor,
    alpha: Tensor | None,
    *,
    channel_dim: int = 1,
    eps: float = 1e-5,
    reduction: Reduction = "mean",
    weight: float | Tensor = 1.0,
    inplace: bool = True,
    backend: BackendName = "auto",
    as_maps: bool = False,
    likelihood: GaussianNLL | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """-log q(target | student) of equation 5 (Ahn et al., CVPR 2019), whose mean the regressor predicts.

    Regressor and loss are computed together where that is faster and nothing sees them apart
    (:mod:`vidfast.head`), else one after the other.

    Args:
        regressor: From `student` to target's shape.
        student: What it takes.
        target: The teacher's feature, without gradient.
        alpha: (C,), as in :func:`vidfast.gaussian_nll`; None where there is a likelihood, which has its own.
        channel_dim: Where target's channels are.
        eps: The smallest variance.
        reduction: Of the loss.
        weight: A factor of the loss, a number or a tensor as in :func:`vidfast.gaussian_nll`.
        inplace: Whether anything may be written over: the regressor's output by the gradient, its hidden activations
            by its ReLUs. What something else could see is left alone.
        backend: For the loss.
        as_maps: Whether a regressor of 1x1 nn.Conv2d gets features of other than two spatial axes as maps.
        likelihood: The module to call for the loss, with its hooks; its eps, reduction and backend stand for those
            above. None: the loss is computed from the arguments alone.
        mask: A weight for each of target's positions, as in :func:`vidfast.gaussian_nll`. Where it is 0, 0 stands for
            the student's values too.

    Returns:
        A scalar, fp64 if the mean or the target is, else fp32.

    Raises:
        TypeError: The regressor gives no tensor.
        ValueError: It gives another shape than target's.
    """
    if likelihood is not None:
        eps, reduction, backend = likelihood.eps, likelihood.reduction, likelihood.backend
    weights = weights_of(mask, weight, target, channel_dim % max(target.dim(), 1))
    if not inplace:
        note("inplace=False")
    else:
        channel = channel_dim % max(student.dim(), 1)
        stack = _head_of(regressor, likelihood, student, channel, as_maps)
        if stack is not None:
            call = Call(
                channel, eps, reduction,
                weight=number_of(weight), inplace=True, backend=backend, masked=mask is not None,
            )  # fmt: skip
            loss = head_nll(stack, student, target, _alpha(alpha, likelihood), call, weights)
            if loss is not None:
                return loss
    mask = None if weights is None else weights.mask
    if mask is not None:
        student = without_unselected(student, mask, channel_dim % student.dim())
    if as_maps and student.dim() != 4 and is_pointwise(regressor):
        if mask is not None:
            mask = _as_map(mask.expand(-1, -1, *target.shape[2:]))
        student, target = _as_map(student), _as_map(target)
    mean = regress(regressor, lay_out_for(regressor, student), target.shape, inplace=inplace)
    # Over the regressor's own last output, which nothing else reads: no N-sized allocation.
    inplace = inplace and owns_its_output(regressor)
    if likelihood is not None:
        return _called(likelihood, mean, target, mask, weight, inplace)
    return gaussian_nll(
        mean,
        target,
        _alpha(alpha, likelihood),
        channel_dim=channel_dim,
        eps=eps,
        reduction=reduction,
        weight=weight,
        inplace=inplace,
        backend=backend,
        mask=mask,
    )


def _head_of(
    regressor: nn.Module, likelihood: GaussianNLL | None, student: Tensor, channel: int, as_maps: bool
) -> Stack | None:
    """The regressor's layers where nothing sees them and the loss apart, or None."""
    name = type(regressor).__name__
    if is_watched(regressor):
        note(f"a hook or a mode of torch's sees a part of {name}")
        return None
    if likelihood is not None and not _is_plain(likelihood):
        note(f"{type(likelihood).__name__} has a hook, a method or options of its own")
        return None
    stack = stack_of(regressor, student.dim(), channel, as_maps)
    if isinstance(stack, str):
        note(f"of {name} {stack}")
        return None
    return stack


def _alpha(alpha: Tensor | None, likelihood: GaussianNLL | None) -> Tensor:
    """The one that is there. That of a likelihood is read where it is used alone: reading it may compute it."""
    if alpha is not None:
        return alpha
    assert likelihood is not None, "either alpha or a likelihood must be given"
    return likelihood.alpha


def _as_map(x: Tensor) -> Tensor:
    """(B, C, *spatial) as (B, C, positions, 1)."""
    return x.flatten(2).unsqueeze(-1) if x.dim() > 2 else x[:, :, None, None]


def _is_plain(likelihood: nn.Module) -> bool:
    """Whether the module computes what :func:`regressed_nll` was asked for, and no hook waits for it to be called."""
    return (
        type(likelihood) is GaussianNLL
        and "forward" not in likelihood.__dict__
        and not likelihood.full
        and likelihood.strategy != "two_pass"
        and not is_watched(likelihood)
    )


def _called(
    likelihood: GaussianNLL,
    mean: Tensor,
    target: Tensor,
    mask: Tensor | None,
    weight: float | Tensor,
    inplace: bool,
) -> Tensor:
    """What resuming compares of a module does not depend on whether it was called: both are for this call alone."""
    before = likelihood.weight, likelihood.inplace
    likelihood.weight, likelihood.inplace = weight, inplace
    try:
        # one of the user's own may take no mask
        loss: Tensor = likelihood(mean, target) if mask is None else likelihood(mean, target, mask)
    finally:
        likelihood.weight, likelihood.inplace = before
    return loss


def regress(regressor: nn.Module, student: Tensor, shape: Sequence[int], inplace: bool = True) -> Tensor:
    """mu(s), of `shape`.

    Args:
        regressor: Called with `student`.
        student: (B, ...), what the regressor takes.
        shape: What it has to give.
        inplace: ReLUs write over their inputs where nothing can tell (:func:`vidfast.layers.own_rectifiers`).

    Raises:
        ValueError: The regressor gives another shape.
        TypeError: It gives no tensor.
    """
    # A compiler finds out by itself what it may write over.
    may = inplace and not torch.compiler.is_compiling() and type(student) in PLAIN_TYPES
    places = own_rectifiers(regressor) if may else []
    mean: object
    if places:
        mean = student
        assert isinstance(regressor, nn.Sequential)
        # by place: a ReLU may stand in several, and keeps its own `inplace`
        for place, layer in enumerate(regressor):
            mean = torch.relu_(mean) if place in places else layer(mean)
    else:
        mean = regressor(student)
    if not isinstance(mean, Tensor):
        raise TypeError(f"wanted a regressor that returns a Tensor, got {type(mean).__name__}")
    if list(mean.shape) != list(shape):  # as dynamo of torch 2.6 can trace it
        raise ValueError(f"the regressor gives {tuple(mean.shape)}, wanted {tuple(shape)}")
    return mean


def lay_out_for(regressor: nn.Module, student: Tensor) -> Tensor:
    """`student` in the memory format in which the regressor runs faster; its values are the same.

    That is channels_last for large fp32 maps on the CPU and a plain stack of 1x1 convolutions; anything else is handed
    back as it came. The gradient arrives in the format that the regressor was given; autograd accepts any.

    Args:
        regressor: What will be applied to it; its widest convolution decides.
        student: (B, C, H, W), or any other tensor, which is handed back.
    """
    if student.dim() != 4 or not student.is_cpu or student.dtype != torch.float32:
        return student
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return student
    if type(regressor) is not nn.Sequential or not all(
        type(part) is nn.ReLU or (type(part) is nn.Conv2d and part.kernel_size == (1, 1))
        for part in regressor
    ):
        return student
    widths = [part.out_channels for part in regressor if isinstance(part, nn.Conv2d)]
    positions = student.shape[0] * student.shape[2] * student.shape[3]
    if len(widths) < 2 or 4 * positions * max(widths) < _LARGE_ACTIVATION:
        return student
    return student.contiguous(memory_format=torch.channels_last)
