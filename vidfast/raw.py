"""The boundary to native code: what is read at an address is what was promised to lie there.

Whatever comes to a kernel by way of autograd has been in other hands: a saved-tensor hook may give back an equal tensor
that lies otherwise in memory, and one that breaks torch's contract another tensor altogether.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidfast._torch import is_functional

PLAIN = (Tensor, torch.nn.Parameter)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def not_plain(x: Tensor) -> str | None:
    """None if x's values lie in its memory, or the reason why not.

    Only plain strided tensors have an address at which their values lie: a fake tensor's is 0, a subclass
    gives its own meaning to operations, a wrapped or lazily negated one holds other values than it shows.
    """
    if type(x) not in PLAIN:
        return f"{type(x).__module__}.{type(x).__qualname__} is a tensor subclass"
    if x.layout is not torch.strided:
        return f"a tensor of layout {x.layout} has no memory in which every value lies"
    if x.is_neg():
        return "a lazily negated tensor (is_neg) holds other values than it shows"
    if x._is_zerotensor():
        return "a zero tensor without memory of its own (_is_zerotensor)"
    if is_functional(x):
        return "a functional tensor (torch.func.functionalize) holds its values in another one"
    return None


def vector(
    name: str, x: Tensor, count: int, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """`x` as `count` numbers side by side in memory: itself, or a copy where it lies otherwise.

    Args:
        name: What an error calls it.
        x: A tensor that :func:`not_plain` has nothing against.
        count: Its number of elements.
        device: Where it has to be.
        dtype: What it has to hold; None: any of the four that kernels read.

    Raises:
        RuntimeError: It is something else. Nothing was read.
    """
    if x.dtype not in (DTYPES if dtype is None else (dtype,)) or x.numel() != count or x.device != device:
        wanted = "floating" if dtype is None else str(dtype).removeprefix("torch.")
        raise RuntimeError(
            f"{name} must be {count} {wanted} numbers on {device}, got {_what(x)}; if a saved-tensor hook made it, it "
            "must give back what it was given"
        )
    return x if x.is_contiguous() else x.contiguous()


class _Saved(NamedTuple):
    """What was saved, as it has to come back, and where it lay."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    address: int


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Saves for backward, to be taken back by :func:`restored`.

    A tensor made under torch.inference_mode cannot be saved: a copy of it is.
    """
    kept = [x.clone() if x is not None and x.is_inference() else x for x in tensors]
    ctx.save_for_backward(*kept)
    ctx.saved_as = [None if x is None else _Saved(x.shape, x.dtype, x.device, x.data_ptr()) for x in kept]


def restored(ctx: Any) -> list[Tensor | None]:
    """What :func:`save` was given, equal in value, shape, dtype and device. Its strides may be others.

    Raises:
        RuntimeError: A saved-tensor hook gave back something else, or something without memory of its own.
    """
    found: list[Tensor | None] = []
    for x, wanted in zip(ctx.saved_tensors, ctx.saved_as, strict=True):
        if x is not None:
            if x.is_neg() or x._is_zerotensor():
                x = x.resolve_neg().clone()
            # in this order: what has another layout need not have strides
            if (x.shape, x.dtype, x.device) != wanted[:3] or not_plain(x) is not None:
                raise RuntimeError(
                    "a saved-tensor hook must give back a tensor equal to the one it was given, "
                    f"{tuple(wanted.shape)} {wanted.dtype} on {wanted.device}, got {_what(x)}"
                )
        found.append(x)
    return found


def is_own(ctx: Any, index: int, x: Tensor | None) -> bool:
    """Whether the tensor saved as number `index` came back as it was: in our memory, not in a hook's."""
    return x is not None and x.data_ptr() == ctx.saved_as[index].address


def _what(x: Tensor) -> str:
    return f"{type(x).__name__} {tuple(x.shape)} {x.dtype} on {x.device}"
