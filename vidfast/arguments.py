"""What a call may be given, checked before anything is launched or written."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin as _Lazy  # type: ignore[attr-defined]

REDUCTIONS = ("mean", "sum", "batchmean", "none")
STRATEGIES = ("auto", "one_pass", "two_pass")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_FLOATS = frozenset(DTYPES)


def check_tensors(mean: Tensor, target: Tensor, alpha: Tensor, channel_dim: int) -> int:
    """The channel dimension, not negative.

    :raises TypeError: something is not a tensor, or has a dtype that is not fp16, bf16, fp32 or fp64.
    :raises ValueError: shapes or devices differ, alpha does not fit, or a tensor is empty, sparse or meta.
    """
    if type(channel_dim) is not int or not isinstance(mean, Tensor) or isinstance(mean, _Lazy):
        _complain(mean, target, alpha, channel_dim)
    shape = mean.shape
    channel = channel_dim if channel_dim >= 0 else channel_dim + len(shape)
    # One line decides the common case; `_complain` finds the words for the others.
    if (
        isinstance(target, Tensor)
        and isinstance(alpha, Tensor)
        and shape == target.shape
        and 0 <= channel < len(shape)
        and alpha.shape == shape[channel : channel + 1]
        and mean.dtype in _FLOATS
        and target.dtype in _FLOATS
        and alpha.dtype in _FLOATS
        and mean.device == target.device == alpha.device
        and mean.layout is target.layout is alpha.layout is torch.strided
        and not mean.is_meta
        and mean.numel() > 0
    ):
        return channel
    _complain(mean, target, alpha, channel_dim)
    raise AssertionError("check_tensors refused what _complain accepts")


def _complain(mean: object, target: object, alpha: object, channel_dim: object) -> None:
    tensors = {"mean": mean, "target": target, "alpha": alpha}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    for name, x in tensors.items():
        assert isinstance(x, Tensor)
        if isinstance(x, _Lazy):
            raise ValueError(f"{name} is not initialised yet: run its lazy module once first")
        if x.layout is not torch.strided:
            raise ValueError(f"{name} must be a dense (strided) tensor, got layout {x.layout}")
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
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
    if alpha.shape != (channels,):
        raise ValueError(
            f"alpha must have shape ({channels},), one number for each of the {channels} channels in dimension "
            f"{channel_dim} of {tuple(mean.shape)}, got {tuple(alpha.shape)}"
        )
    if mean.numel() == 0:
        raise ValueError(f"mean and target must not be empty, got shape {tuple(mean.shape)}")
    if not mean.device == target.device == alpha.device:
        raise ValueError(
            "mean, target and alpha must be on one device, got "
            f"{mean.device}, {target.device} and {alpha.device}"
        )
    if mean.is_meta:
        raise ValueError("mean, target and alpha must hold values, got tensors on the meta device")


def check_channel_dim(channel_dim: object) -> int:
    """:raises TypeError: it is not an int."""
    if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
        raise TypeError(f"channel_dim must be an int, got {type(channel_dim).__name__}")
    return channel_dim


def check_options(
    eps: float,
    reduction: str = "mean",
    weight: float = 1.0,
    strategy: str = "auto",
    full: bool = False,
    inplace: bool = False,
) -> None:
    """:raises ValueError: eps is not positive and finite, weight not finite, or a name is unknown.
    :raises TypeError: eps or weight is not a number, or full or inplace not a bool.
    """
    if type(full) is not bool or type(inplace) is not bool:
        name, value = ("inplace", inplace) if type(full) is bool else ("full", full)
        raise TypeError(f"{name} must be True or False, got {value!r}")
    _check_number("eps", eps)
    _check_number("weight", weight)
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")
    if not -math.inf < weight < math.inf:  # torch.compile traces this, and not math.isfinite
        raise ValueError(f"weight must be finite, got {weight}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")


def _check_number(name: str, value: object) -> None:
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def inverse_softplus(value: float) -> float:
    """x with softplus(x) = value, as value + log(-expm1(-value)): finite for every positive value."""
    return value + math.log(-math.expm1(-value))


def check_initial_variance(name: str, init_var: float, eps: float) -> float:
    """alpha at which softplus(alpha) + eps is `init_var`, an argument called `name`.

    :raises TypeError: init_var is not a number.
    :raises ValueError: init_var is not finite or not above eps.
    """
    _check_number(name, init_var)
    if not eps < init_var < math.inf:
        raise ValueError(f"{name}, the initial variance, must be finite and above eps={eps}, got {init_var}")
    return inverse_softplus(init_var - eps)


def check_inplace(mean: Tensor, target: Tensor, walked_mean: Tensor) -> None:
    """:raises RuntimeError: writing d/d mean over mean would destroy what somebody else holds."""
    base = mean._base if mean._is_view() else mean
    if base is not None and base.is_leaf and base.requires_grad:
        what = "mean" if base is mean else "the tensor that mean is a view of"
        raise RuntimeError(
            f"inplace=True would overwrite {what}, a leaf that requires grad: pass inplace=False"
        )
    if walked_mean is not mean or any(
        s == 0 and n > 1 for s, n in zip(mean.stride(), mean.shape, strict=True)
    ):
        raise RuntimeError(
            f"inplace=True needs a mean whose memory is dense, got shape {tuple(mean.shape)} with strides "
            f"{mean.stride()}: pass inplace=False"
        )
    begin, end = _extent(mean)
    target_begin, target_end = _extent(target)
    if begin < target_end and target_begin < end:
        raise RuntimeError(
            "inplace=True would overwrite target, which shares memory with mean: pass inplace=False"
        )


def _extent(x: Tensor) -> tuple[int, int]:
    begin = x.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return begin, begin + (last + 1) * x.element_size()
