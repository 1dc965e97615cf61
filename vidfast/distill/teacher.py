"""The frozen network of a Distiller: in the type that was asked for, and where it belongs."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vidfast._torch import version_of

_QUANTISED = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized")


def in_dtype(teacher: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The teacher with floating-point weights of one type: itself if they are, else a copy, and the caller's stays.

    Raises ValueError for a teacher whose weights another library keeps, or that cannot be copied.
    """
    others = [t for t in _tensors(teacher) if t.is_floating_point() and t.dtype != dtype]
    if not others:
        return teacher
    keeper = (
        "quantised" if _is_quantised(teacher) else "offloaded by Accelerate" if is_dispatched(teacher) else ""
    )
    if keeper:
        raise ValueError(
            f"teacher_dtype={dtype} cannot convert this teacher, whose weights are {keeper}: load it in that type, or "
            "leave teacher_dtype out"
        )
    # Converted ones in place of copies: no weight is held twice in the type that it had.
    memo: dict[int, object] = {
        id(t): _converted(t, dtype) for t in others if type(t) in (Tensor, nn.Parameter)
    }
    try:
        found = copy.deepcopy(teacher, memo)
    except Exception as error:
        raise ValueError(
            f"teacher_dtype={dtype} converts a copy of the teacher ({type(teacher).__name__}), and copying it failed "
            f"with {type(error).__name__}: {error}; convert it yourself, with teacher.to({dtype}), first"
        ) from error
    # Not the class's own `to`, which may refuse: what is left are weights of unusual kinds, as in TorchScript.
    # Complex numbers stay as they are.
    found._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)  # type: ignore[no-untyped-call]
    return found


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    found = tensor.detach().to(dtype)
    return nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


class Followed:
    """A teacher's weights, which its copy in another type follows: they may be loaded or trained after it was made.

    The weights are not kept alive; a copy of this object follows nothing.
    """

    def __init__(self, original: nn.Module, found: nn.Module) -> None:
        self.pairs: list[tuple[weakref.ref[Tensor], Tensor]] = []
        self.versions: list[int] = []
        originals, copies = _tensors(original), _tensors(found)
        if original is not found and [t.shape for t in originals] == [t.shape for t in copies]:
            self.pairs = [(weakref.ref(a), b) for a, b in zip(originals, copies, strict=True)]
            self.versions = self._now()

    def follow(self) -> None:
        """Copy the weights again if one has changed since."""
        now = self._now()
        if now != self.versions:
            # All of them: BatchNorm's statistics change without a new version, and its count of batches with one.
            with torch.no_grad():
                for original, found in self.pairs:
                    tensor = original()
                    if tensor is not None:
                        found.copy_(tensor)
            self.versions = now

    def _now(self) -> list[int]:
        tensors = (original() for original, _ in self.pairs)
        return [-1 if t is None or t.is_inference() else version_of(t) for t in tensors]

    def __reduce__(self) -> tuple[Any, ...]:
        return Followed, (nn.Identity(), nn.Identity())


def move(teacher: nn.Module, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None) -> None:
    """What `.to()`, `.cuda()`, `.half()` and the like do, for a teacher that another library has not placed.

    dtype: not None where the teacher's type is fixed: then it follows to devices and layouts alone.
    """
    if is_dispatched(teacher) or _is_quantised(teacher):
        return

    def keeps_dtype(tensor: Tensor) -> Tensor:
        found = change(tensor)
        if found.dtype == tensor.dtype:
            return found
        return torch.empty_like(found, dtype=tensor.dtype).copy_(tensor)

    teacher._apply(change if dtype is None else keeps_dtype)  # type: ignore[no-untyped-call]


def weights_of(network: nn.Module) -> Mapping[str, Any]:
    """The network's state_dict, also where Accelerate keeps it in files or in memory until a layer runs."""
    if not is_dispatched(network):
        return network.state_dict()
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    found: Mapping[str, Any] = get_state_dict_offloaded_model(network)
    return found


def is_dispatched(network: nn.Module) -> bool:
    """Whether Accelerate has placed the layers, on several devices or on none, and brings weights and inputs along."""
    return any(hasattr(module, "_hf_hook") for module in network.modules())


def _is_quantised(network: nn.Module) -> bool:
    """Whether it is one of transformers' quantised networks, which stay on their device and in their type."""
    return any(getattr(module, name, False) is True for module in network.modules() for name in _QUANTISED)
