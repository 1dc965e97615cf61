"""What a network is given: a tensor, a tuple of positional arguments, or a mapping of keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def call(network: nn.Module, inputs: Any) -> Any:
    """What the network returns for these inputs."""
    if isinstance(inputs, Mapping):
        return network(**inputs)
    if isinstance(inputs, (tuple, list)):
        return network(*inputs)
    return network(inputs)


def tensors_of(inputs: Any) -> list[Tensor]:
    """The tensors among a network's inputs: itself, or those of a tuple, list or mapping."""
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    return [t for t in (inputs if isinstance(inputs, (tuple, list)) else [inputs]) if isinstance(t, Tensor)]


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """The same inputs with floating-point tensors in another type."""
    if isinstance(inputs, Mapping):
        return {name: cast(value, dtype) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return [cast(value, dtype) for value in inputs]
    return inputs.to(dtype) if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs
