"""The boundary to native code: what is read at an address is what was promised to be there.

What comes to a kernel by way of autograd may have been replaced by a saved-tensor hook: by an equal tensor with other
strides, or, where the hook breaks torch's contract, by another tensor altogether.
"""

from __future__ import annotations

import contextlib
from functools import lru_cache
from sys import getrefcount
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from vidfast._torch import (
    dispatch_modes,
    is_functional,
    is_jit_tracing,
    is_zero_tensor,
    saved_tensors_are_hooked,
)

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Their numbers in native code: csrc/gaussian_nll.h, DType.
NATIVE_DTYPE = {dtype: number for number, dtype in enumerate(DTYPES)}

NO_FORWARD_MODE = "vidfast's kernels have no forward-mode derivative: use backend='reference' for it"


def not_plain(*tensors: Tensor) -> str | None:
    """None if the values of each, a strided tensor, are in its memory, or the reason why not.

    Only plain strided tensors have an address at which their values are: a fake tensor's is 0, a subclass
    gives its own meaning to operations, a wrapped or lazily negated one holds other values than it shows.
    """
    for x in tensors:
        if type(x) not in PLAIN_TYPES:
            return f"{type(x).__module__}.{type(x).__qualname__} is a tensor subclass"
        if x.is_neg():
            return "a lazily negated tensor (is_neg) holds other values than it shows"
        if is_zero_tensor(x):
            return "a zero tensor without memory of its own (_is_zerotensor)"
        if is_functional(x):
            return "a functional tensor (torch.func.functionalize) holds its values in another one"
    return None


def not_raw(*tensors: Tensor) -> str | None:
    """None if every tensor's memory may be handed to native code now, or the reason why not."""
    reason = not_plain(*tensors)
    if reason is not None:
        return reason
    if dispatch_modes():
        return "a torch dispatch mode is active"
    if is_jit_tracing():
        return "torch.jit.trace records torch's operators, not what a kernel writes"
    return None


def address(x: Tensor | None) -> int:
    """Where x is in memory; 0 for what is absent."""
    return 0 if x is None else x.data_ptr()


def native_dtype(x: Tensor | None) -> int:
    """The number of x's dtype in native code; that of fp32, which is not read, for what is absent."""
    return 0 if x is None else NATIVE_DTYPE[x.dtype]


# The rows of a tensor that is absent: none, of no elements, none apart.
NO_ROWS = (0, 0, 0)


def vector(
    name: str, x: Tensor, count: int, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """`x` as `count` numbers side by side in memory: itself, or a copy where its strides are others.

    Args:
        name: What an error calls it.
        x: A tensor that :func:`not_plain` has nothing against.
        count: Its number of elements.
        device: Where it has to be.
        dtype: What it has to hold; None: any of the four that kernels read.

    Raises:
        RuntimeError: It is something else. Nothing was read.
    """
    fits = x.dtype in DTYPES if dtype is None else x.dtype is dtype
    if not fits or x.numel() != count or x.device != device:
        wanted = "floating" if dtype is None else str(dtype).removeprefix("torch.")
        raise RuntimeError(
            f"{name} must be {count} {wanted} numbers on {device}, got {describe(x)}; a saved-tensor hook "
            "must give back a tensor equal to the one it was given"
        )
    return x if x.is_contiguous() else x.contiguous()


# Of a saved tensor: its address, and what has to come back.
_Saved = tuple[int, torch.Size, torch.dtype]


def savable(x: Tensor) -> Tensor:
    """x, or a copy of one made under torch.inference_mode, which autograd saves for no backward."""
    return x.clone() if x.is_inference() else x


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Saves for backward, to be taken back by :func:`restored`."""
    ctx.save_for_backward(*tensors)
    saved_as = [None if x is None else (x.data_ptr(), x.shape, x.dtype) for x in tensors]
    ctx.saved_as = saved_as, saved_tensors_are_hooked()


def restored(ctx: Any, device: torch.device, large: int = 1) -> tuple[list[Tensor | None], bool]:
    """(what :func:`save` was given, whether the first `large` of it may be written over).

    Each tensor has the shape, dtype and device of what was saved, and memory of its own. Its strides may be others. It
    may be written over where no hook was around, it is where it was saved and nothing else refers to it.

    Raises:
        RuntimeError: A saved-tensor hook gave back something else.
    """
    found = list(ctx.saved_tensors)
    if is_compiling():  # compiled autograd traces this: there are no addresses, and no hooks
        return found, False
    saved_as, hooked = ctx.saved_as
    own = not hooked and all(
        _references(found, i) <= _unshared() for i in range(large) if found[i] is not None
    )
    for index, wanted in enumerate(saved_as):
        x = found[index]
        if x is None:
            continue
        address, shape, dtype = wanted
        try:
            if x.data_ptr() == address and x.dtype is dtype and x.shape == shape and not x.is_neg():
                continue
        except RuntimeError:  # it has no memory: a sparse one, say
            pass
        found[index] = _checked(x, wanted, device)
        own = False
    return found, own


def _references(found: list[Tensor | None], index: int = 0) -> int:
    """How many Python references there are to one of the tensors that autograd gave back."""
    return getrefcount(found[index])


class _Probe(torch.autograd.Function):
    """Saves a tensor that nothing else refers to, and counts what it comes back with: 2 or 3, by torch's version."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counted: list[int]) -> Tensor:
        ctx.save_for_backward(x.clone(), x.new_empty(0))
        ctx.counted = counted
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        found = list(ctx.saved_tensors)
        ctx.counted.append(_references(found))
        return grads[0], None


@lru_cache(maxsize=1)
def _unshared() -> int:
    """The references to a tensor that autograd saved and nothing else holds; 0 where they cannot be counted.

    Asked by the first backward pass and not on import: autograd's engine initialises CUDA where there is a GPU, and
    processes that are forked afterwards, as a data loader's, could not use it.
    """
    counted: list[int] = []

    def count() -> None:
        with contextlib.suppress(Exception):
            x = torch.zeros(1, dtype=torch.float32, device="cpu", requires_grad=True)
            _Probe.apply(x, counted).backward()  # type: ignore[no-untyped-call]

    # A thread of its own has none of this one's hooks, modes and default devices.
    thread = Thread(target=count)
    with contextlib.suppress(RuntimeError):  # there can be no more threads
        thread.start()
        thread.join()
    return counted[0] if counted else 0


def _checked(x: Tensor, wanted: _Saved, device: torch.device) -> Tensor:
    """A tensor that is not the one that was saved, if it is equal to it as far as can be seen."""
    _, shape, dtype = wanted
    alike = x.layout is torch.strided and (x.shape, x.dtype, x.device) == (shape, dtype, device)
    if alike and (x.is_neg() or is_zero_tensor(x)):
        x = x.resolve_neg().clone()
    if not alike or not_plain(x) is not None:
        raise RuntimeError(
            "a saved-tensor hook must give back a tensor equal to the one it was given, "
            f"{tuple(shape)} {dtype} on {device}, got {describe(x)}"
        )
    return x


def describe(x: Tensor) -> str:
    """Type, shape, dtype and device of x, for an error."""
    return f"{type(x).__name__} {tuple(x.shape)} {x.dtype} on {x.device}"
