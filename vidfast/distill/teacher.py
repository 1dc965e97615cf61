"""The frozen network of a Distiller: in the type that was asked for, where it belongs, and apart from the student."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vidfast._torch import BATCH_NORM

_QUANTISED = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized")


def in_dtype(teacher: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The teacher with floating-point weights of one type: itself if they are, else a copy, and the caller's stays.

    Only the weights of another type are held twice.

    Raises ValueError for a teacher whose weights another library keeps, or that cannot be copied.
    """
    tensors = [*teacher.parameters(), *teacher.buffers()]
    others = [t for t in tensors if t.is_floating_point() and t.dtype != dtype]
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
    converted: dict[int, object] = {
        id(t): _converted(t, dtype) for t in others if type(t) in (Tensor, nn.Parameter)
    }
    try:
        found = copy.deepcopy(teacher, converted)
    except Exception as error:
        raise ValueError(
            f"teacher_dtype={dtype} converts a copy of the teacher ({type(teacher).__name__}), and copying it failed "
            f"with {type(error).__name__}: {error}; convert it yourself, with teacher.to({dtype}), first"
        ) from error
    # Not the class's own `to`, which may refuse: what is left are weights of unusual kinds, as in TorchScript.
    return nn.Module.to(found, dtype)


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    found = tensor.detach().to(dtype)
    return nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found


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


@dataclass
class Shared:
    """What student and teacher share: allowed as long as no training changes it.

    parameters, norms: (name in the teacher, parameter or layer with running statistics).
    """

    parameters: list[tuple[str, nn.Parameter]]
    norms: list[tuple[str, nn.Module]]

    @classmethod
    def between(cls, student: nn.Module, teacher: nn.Module) -> Shared:
        """Raises ValueError if they share a parameter that is trained."""
        own, modules = {id(p) for p in student.parameters()}, {id(m) for m in student.modules()}
        shared = cls(
            [(name, p) for name, p in teacher.named_parameters() if id(p) in own],
            [(name, m) for name, m in teacher.named_modules() if id(m) in modules and _has_statistics(m)],
        )
        for name, parameter in shared.parameters:
            if parameter.requires_grad:
                raise ValueError(
                    f"student and teacher share the parameter {name!r}, which is trained (requires_grad is True), and "
                    "the teacher must not change: freeze it with requires_grad_(False), or give "
                    "copy.deepcopy(network) as the teacher"
                )
        return shared

    def check(self) -> None:
        """Raises RuntimeError if the next step would change what is shared."""
        for name, parameter in self.parameters:
            if parameter.requires_grad:
                raise RuntimeError(
                    f"student and teacher share the parameter {name!r}, and it requires a gradient since: the teacher "
                    "would change; keep it frozen, or make a Distiller with a copy as the teacher"
                )
        for name, norm in self.norms:
            if norm.training:
                raise RuntimeError(
                    f"student and teacher share the layer {name!r} ({type(norm).__name__}), and it is in training "
                    "mode: its running statistics, and with them the teacher, would change; put it into eval mode "
                    "after train(), or give the teacher a copy"
                )


def _has_statistics(module: nn.Module) -> bool:
    norms = (BATCH_NORM, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    return isinstance(module, norms) and module.running_mean is not None
