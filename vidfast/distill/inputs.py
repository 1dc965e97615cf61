"""What a network is given, a tensor, a tuple of positional or a mapping of keyword arguments, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


def call(network: nn.Module, inputs: Any) -> Any:
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


def logits_of(output: Any) -> Tensor:
    """The logits in what a network returned: the tensor itself, or an attribute or key called "logits"."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"wanted a network that returns its logits as a Tensor or under the name 'logits', got "
            f"{type(output).__name__}; give Distiller(..., logits=function) to pick them"
        )
    return found
