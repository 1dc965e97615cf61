"""What a network is given, a tensor, a tuple of positional or a mapping of keyword arguments, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .places import Key, NoSuchElementError, describe, element_of, parse


def call(network: Callable[..., Any], inputs: Any) -> Any:
    """What the network returns for these inputs."""
    if isinstance(inputs, Mapping):
        return network(**inputs)
    if isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence):
        return network(*inputs)
    return network(inputs)


def tensors_of(inputs: Any) -> list[Tensor]:
    """The tensors among a network's inputs: itself, or those of a tuple, list or mapping, and of what is in these."""
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    return [t for part in inputs for t in tensors_of(part)] if isinstance(inputs, (tuple, list)) else []


def image_size(inputs: Any) -> tuple[int, ...] | None:
    """The (height, width) of the first input that is a batch of images, (B, C, H, W) or (B, H, W, 1, 3 or 4)."""
    for x in tensors_of(inputs):
        if x.dim() == 4 and x.is_floating_point():
            last = x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4)
            return tuple(x.shape[1:3] if last else x.shape[2:])
    return None


def devices_of(inputs: Any, network: nn.Module) -> list[torch.device]:
    """Where the tensors among the inputs are, or where there are none, the network's first parameter; the CPU else."""
    placed = tensors_of(inputs) or list(islice(network.parameters(), 1))
    return [tensor.device for tensor in placed] or [torch.device("cpu")]


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """The same inputs with floating-point tensors in another type."""
    if isinstance(inputs, Mapping):
        return {name: cast(value, dtype) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        parts = [cast(value, dtype) for value in inputs]
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else type(inputs)(parts)
    return inputs.to(dtype) if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs


Picker = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Element:
    """Picks one element of what a network returns, such as "[0]" or "[1][logits]"."""

    name: str
    keys: tuple[Key, ...] = ()

    def __post_init__(self) -> None:
        place = parse(self.name, ())
        if place.layer or place.is_input or not place.keys:
            raise ValueError(
                "wanted logits as a function, or the name of an element of what the network returns, such as '[0]' or "
                f"'[logits]', got {self.name!r}"
            )
        object.__setattr__(self, "keys", place.keys)

    def __call__(self, output: Any) -> Any:
        try:
            return element_of(output, self.keys)
        except NoSuchElementError as error:
            raise TypeError(
                f"logits={self.name!r}: what the network returned {error}; give a pair, such as logits=({self.name!r}, "
                "None), where student and teacher differ"
            ) from None


def pickers(logits: object) -> tuple[Picker, Picker]:
    """How the student's and the teacher's logits are found, from one function or name, or from a pair of them.

    Raises TypeError for anything else, ValueError for a name that is none of an element's.
    """
    pair = logits if isinstance(logits, tuple) else (logits, logits)
    if len(pair) != 2:
        raise TypeError(
            f"wanted logits as one function, or a pair (student's, teacher's), got a tuple of {len(pair)}"
        )
    student, teacher = (
        logits_of if pick is None else Element(pick) if isinstance(pick, str) else pick for pick in pair
    )
    for pick in (student, teacher):
        if not callable(pick):
            raise TypeError(
                "wanted logits as a function of what a network returns, the name of an element such as '[0]', or a "
                f"pair of these for student and teacher, got {type(pick).__name__}"
            )
    return student, teacher


def picked(pick: Picker, output: Any, role: str, kind: str) -> Tensor:
    """The logits in what a network, of a class `kind`, returned. Raises TypeError where that is no Tensor."""
    try:
        found = pick(output)
    except TypeError as error:
        raise TypeError(f"the logits of the {role} ({kind}): {error}") from error
    if not isinstance(found, Tensor):
        raise TypeError(
            f"wanted logits= to find one Tensor in what the {role} returns, {describe(output)}, got {describe(found)}"
        )
    return found


def logits_of(output: Any) -> Tensor:
    """The logits in what a network returned: the tensor itself, or an attribute or key called "logits"."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"wanted a network that returns its logits as a Tensor or under the name 'logits', got "
            f"{describe(output)}; give Distiller(..., logits=function) to pick them, or the name of an element, such "
            "as logits='[0]', or a pair (student's, teacher's)"
        )
    return found
