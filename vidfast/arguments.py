"""What a call may be given, checked before anything is launched or written."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Literal, NamedTuple, SupportsIndex, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin as _Lazy  # type: ignore[attr-defined]

from vidfast.positions import Weights, check_factor, weights_of
from vidfast.raw import DTYPES

ScalarReduction: TypeAlias = Literal["mean", "sum", "batchmean"]
Reduction: TypeAlias = Literal["mean", "sum", "batchmean", "none"]
Strategy: TypeAlias = Literal["auto", "one_pass", "two_pass"]
BackendName: TypeAlias = Literal["auto", "reference", "cuda", "triton", "cpu"]

REDUCTIONS: tuple[str, ...] = get_args(Reduction)
SCALAR_REDUCTIONS: tuple[str, ...] = get_args(ScalarReduction)
STRATEGIES: tuple[str, ...] = get_args(Strategy)

_FLOATS = frozenset(DTYPES)


class Call(NamedTuple):
    """What was asked for, checked: everything about a call but its tensors.

    Attributes:
        channel: The dimension of the channels, not negative.
        eps: The smallest variance.
        reduction: One of REDUCTIONS.
        full: Whether 1/2 log(2 pi) is added for each element.
        weight: A factor of the loss.
        inplace: Whether d/d mean may be written over mean.
        strategy: One of STRATEGIES.
        backend: "auto", "reference" or the name of a back end.
        k: The factor of the sum over all elements: weight / N for "mean", weight for "sum", weight / B for "batchmean"
            (0 where that divisor is 0). 0 for "none", and where a shape is traced: an operator makes its own. With a
            mask it is weight for "mean", still to be divided by C times what the mask sums to.
        masked: Whether positions have weights.
    """

    channel: int
    eps: float
    reduction: str = "mean"
    full: bool = False
    weight: float = 1.0
    inplace: bool = False
    strategy: str = "auto"
    backend: str = "auto"
    k: float = 0.0
    masked: bool = False

    @property
    def divides(self) -> bool:
        """Whether k is still to be divided by C times what the mask sums to."""
        return self.masked and self.reduction == "mean"


def check_call(
    mean: Tensor,
    target: Tensor,
    alpha: Tensor,
    channel_dim: SupportsIndex,
    eps: float,
    reduction: str,
    full: bool,
    weight: float | Tensor,
    inplace: bool,
    strategy: str,
    backend: str,
    mask: Tensor | None = None,
) -> tuple[Tensor, Call, Weights | None]:
    """(alpha as (C,), all but tensors, weights that are tensors) of a call of :func:`vidfast.gaussian_nll`.

    The arguments are that function's.

    Raises:
        TypeError, ValueError: An argument is not as it must be.
    """
    channel, alpha = check_tensors(mean, target, alpha, channel_dim)
    weights = weights_of(mask, weight, mean, channel)
    eps, weight = check_options(eps, reduction, number_of(weight), strategy, full, inplace)
    if reduction == "batchmean" and channel == 0:
        raise ValueError(
            "reduction='batchmean' needs a batch in dimension 0, but channel_dim=0 is the channels"
        )
    if strategy == "one_pass" and torch.is_grad_enabled() and target.requires_grad:
        raise ValueError(
            "strategy='one_pass' has no gradient for target, which requires grad: use 'two_pass' or detach it"
        )
    # A Python number made from a traced shape would be another graph for every batch size: an operator makes its own.
    counted = reduction != "none" and type(mean.numel()) is int and not torch.compiler.is_compiling()
    masked = mask is not None
    k = loss_factor(mean.shape, reduction, weight, masked) if counted else 0.0
    return alpha, Call(channel, eps, reduction, full, weight, inplace, strategy, backend, k, masked), weights


def in_one_pass(strategy: str, mean_needs: bool, target_needs: bool, dtype: torch.dtype) -> bool:
    """Whether a call makes d/d mean in forward: the one rule, for eager calls and for compiled graphs.

    "auto" does not where target needs a gradient too, and not in fp16, which a loss scaler's factor must reach before
    the gradient is rounded.

    Args:
        strategy: One of STRATEGIES.
        mean_needs: Whether mean requires grad.
        target_needs: Whether target does.
        dtype: Of mean.
    """
    if not (mean_needs and torch.is_grad_enabled()):
        return False
    return strategy == "one_pass" or (strategy == "auto" and not target_needs and dtype is not torch.float16)


def loss_factor(shape: Sequence[int], reduction: str, weight: float, masked: bool = False) -> float:
    """k of :class:`Call`, for tensors of this shape.

    Args:
        shape: Of mean and target.
        reduction: One of SCALAR_REDUCTIONS.
        weight: The factor of the loss.
        masked: Whether there is a mask. "mean" is then still to be divided by C times its sum.

    Raises:
        ValueError: It is none of those.
    """
    if reduction == "sum" or (reduction == "mean" and masked):
        return weight
    if reduction == "mean":
        count = math.prod(shape)
    elif reduction == "batchmean":
        count = shape[0]
    else:
        raise ValueError(f"reduction must be one of {SCALAR_REDUCTIONS}, got {reduction!r}")
    return weight / count if count else 0.0


def check_tensors(
    mean: Tensor, target: Tensor, alpha: Tensor, channel_dim: SupportsIndex
) -> tuple[int, Tensor]:
    """(the channel dimension, not negative; alpha as (C,)).

    Args:
        mean: Any shape but a scalar's; nothing is broadcast.
        target: mean's shape.
        alpha: (C,), or with sizes of 1 in the place of every other dimension, as (1, C, 1, 1).
        channel_dim: Of mean and target.

    Raises:
        TypeError: Something is not a tensor, or has a dtype that is not fp16, bf16, fp32 or fp64.
        ValueError: Shapes or devices differ, alpha does not fit, or a tensor is sparse, nested or meta.
    """
    if (
        type(channel_dim) is not int
        or not isinstance(mean, Tensor)
        or isinstance(mean, _Lazy)
        or mean.is_nested
    ):
        channel_dim = _complain(mean, target, alpha, channel_dim)
    shape = mean.shape
    channel = channel_dim if channel_dim >= 0 else channel_dim + len(shape)
    # One line decides the common case; `_complain` finds the words for the others.
    if (
        isinstance(target, Tensor)
        and isinstance(alpha, Tensor)
        and not target.is_nested
        and not alpha.is_nested
        and shape == target.shape
        and 0 <= channel < len(shape)
        and alpha.shape == shape[channel : channel + 1]
        and mean.dtype in _FLOATS
        and target.dtype in _FLOATS
        and alpha.dtype in _FLOATS
        and mean.layout is target.layout is alpha.layout is torch.strided
        and (
            (mean.is_cpu and target.is_cpu and alpha.is_cpu)
            or (mean.device == target.device == alpha.device and not mean.is_meta)
        )
    ):
        return channel, alpha
    _complain(mean, target, alpha, channel_dim)
    return channel, alpha.reshape(-1)  # what is left is (1, C, 1, 1)


def _complain(mean: object, target: object, alpha: object, channel_dim: object) -> int:
    """Raises what is wrong with these; `channel_dim` as an int, if nothing is."""
    check_dense(mean=mean, target=target, alpha=alpha)
    channel_dim = check_channel_dim(channel_dim)
    assert isinstance(mean, Tensor) and isinstance(target, Tensor) and isinstance(alpha, Tensor)  # noqa: PT018
    if mean.shape != target.shape:
        raise ValueError(
            "mean and target must have the same shape (nothing is broadcast), got "
            f"{tuple(mean.shape)} and {tuple(target.shape)}"
        )
    if not -mean.dim() <= channel_dim < mean.dim():
        raise ValueError(
            f"channel_dim={channel_dim} is out of range for a tensor of shape {tuple(mean.shape)}"
        )
    channels = mean.shape[channel_dim]
    if alpha.shape != (channels,) and not _is_broadcast(alpha, mean, channel_dim):
        hint = "; one variance for all of them is alpha.expand(C)" if alpha.numel() == 1 else ""
        raise ValueError(
            f"alpha must have shape ({channels},), one number for each of the {channels} channels in dimension "
            f"{channel_dim} of {tuple(mean.shape)}, got {tuple(alpha.shape)}{hint}"
        )
    if not mean.device == target.device == alpha.device:
        raise ValueError(
            "mean, target and alpha must be on one device, got "
            f"{mean.device}, {target.device} and {alpha.device}"
        )
    if mean.is_meta:
        raise ValueError("mean, target and alpha must hold values, got tensors on the meta device")
    return channel_dim


def check_dense(**tensors: object) -> None:
    """Checks that each argument, by its name, is a dense floating tensor.

    Raises:
        TypeError: One is no tensor, or has a dtype that is not fp16, bf16, fp32 or fp64.
        ValueError: One is sparse, nested or not initialised yet.
    """
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    for name, x in tensors.items():
        assert isinstance(x, Tensor)
        if isinstance(x, _Lazy):
            raise ValueError(f"{name} is not initialised yet: run its lazy module once first")
        if x.is_nested:
            raise ValueError(f"{name} must be a dense tensor, got a nested one: use its values()")
        if x.layout is not torch.strided:
            raise ValueError(f"{name} must be a dense (strided) tensor, got layout {x.layout}")
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def _is_broadcast(alpha: Tensor, mean: Tensor, channel_dim: SupportsIndex) -> bool:
    """Whether alpha is one number a channel in a shape that lines up with mean's by broadcasting's rule."""
    wanted = [1] * mean.dim()
    wanted[channel_dim] = mean.shape[channel_dim]
    return alpha.dim() > 1 and [1] * (mean.dim() - alpha.dim()) + list(alpha.shape) == wanted


def check_channel_dim(channel_dim: object) -> int:
    """`channel_dim` as an int; numpy's integers are taken.

    Raises:
        TypeError: It is no integer.
    """
    return _integer("channel_dim", channel_dim)


def check_size(name: str, value: object) -> int:
    """`value`, an argument called `name`, as an int of at least 1; numpy's integers are taken.

    Raises:
        TypeError: It is no integer.
        ValueError: It is below 1.
    """
    size = _integer(name, value)
    if size < 1:
        raise ValueError(f"{name} must be a positive int, at least 1, got {size}")
    return size


def _integer(name: str, value: object) -> int:
    if type(value) is int:
        return value
    if not isinstance(value, bool | Tensor):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def check_options(
    eps: float,
    reduction: str = "mean",
    weight: float = 1.0,
    strategy: str = "auto",
    full: bool = False,
    inplace: bool = False,
) -> tuple[float, float]:
    """(eps, weight) as Python's floats; numpy's numbers are taken.

    Raises:
        TypeError: eps or weight is not a number, or full or inplace not a bool.
        ValueError: eps is not positive and finite, weight not finite, or a name is unknown.
    """
    if type(full) is not bool or type(inplace) is not bool:
        name, value = ("inplace", inplace) if type(full) is bool else ("full", full)
        raise TypeError(f"{name} must be True or False, got {value!r}")
    eps, weight = as_number("eps", eps), check_weight(weight)
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    return eps, weight


def as_weight(weight: float | Tensor) -> float | Tensor:
    """`weight` as Python's float, or as a tensor of one number on any device.

    Raises:
        TypeError: It is something else.
        ValueError: The number is not finite, or the tensor not one number without gradient.
    """
    if not isinstance(weight, Tensor):
        return check_weight(weight)
    check_factor(weight)
    return weight  # itself: what is written into it later counts


def number_of(weight: float | Tensor) -> float:
    """The part of `weight` that is known on the host: itself, or 1 where it is a tensor."""
    return 1.0 if isinstance(weight, Tensor) else weight


def check_weight(weight: float) -> float:
    """`weight` as Python's float.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not finite.
    """
    weight = as_number("weight", weight)
    if not -math.inf < weight < math.inf:  # torch.compile traces this, and not math.isfinite
        raise ValueError(f"weight must be finite, got {weight}")
    return weight


def as_number(name: str, value: object) -> float:
    """`value`, an argument called `name`, as Python's float; numpy's numbers are taken.

    Raises:
        TypeError: It is no number.
        ValueError: It is beyond the range of a float.
    """
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got a number beyond the range of a float") from None


def inverse_softplus(value: float) -> float:
    """x with softplus(x) = value, as value + log(-expm1(-value)): finite for every positive value."""
    return value + math.log(-math.expm1(-value))


def check_initial_variance(name: str, init_var: float, eps: float) -> float:
    """`init_var`, an argument called `name`, as a float that softplus(alpha) + eps can be.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not finite or not above eps.
    """
    init_var = as_number(name, init_var)
    if not eps < init_var < math.inf:
        raise ValueError(f"{name}, the initial variance, must be finite and above eps={eps}, got {init_var}")
    return init_var
