"""The layers of a head: a stack of 1x1 convolutions or linear layers with ReLU between, as its weights and biases.

A 1x1 convolution is a matrix over the channels, applied at every position, and so is a linear layer over the last
dimension. What such a stack computes follows from its weights alone, so that it may be computed otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vidfast.layers import is_as_defined

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# By the number of spatial axes that they take.
_CONVOLUTIONS: dict[int, type[nn.Module]] = dict(enumerate(CONVOLUTIONS, 1))


class Stack(NamedTuple):
    """Its layers from the student to the teacher.

    Attributes:
        weights: (out, in) each, or (out, in, 1, ...).
        biases: (out,) each, or None.
        convolutions: Whether torch computes them as convolutions, whose precision has switches of its own.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    convolutions: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weights, and the biases that there are."""
        return (*self.weights, *(bias for bias in self.biases if bias is not None))

    def fits(self, students: int, targets: int) -> bool:
        """Whether it leads from so many channels to so many, each layer from what the one before it gives."""
        widths = [students, *(weight.shape[0] for weight in self.weights)]
        return (
            [weight.shape[1] for weight in self.weights] == widths[:-1]
            and widths[-1] == targets
            and all(
                b is None or b.shape == w.shape[:1] for w, b in zip(self.weights, self.biases, strict=True)
            )
        )


def stack_of(regressor: nn.Module, dims: int, channel_dim: int, as_maps: bool = False) -> Stack | str:
    """The stack that a module is, or why it is none.

    Args:
        regressor: One layer, or an nn.Sequential of layers and ReLUs in turn, by torch's own code.
        dims: The number of the student's dimensions.
        channel_dim: The dimension of its channels, not negative.
        as_maps: Whether nn.Conv2d are to be applied to features of any number of spatial axes.
    """
    parts = [*regressor] if type(regressor) is nn.Sequential else [regressor]
    if len(parts) % 2 == 0:
        return f"it has {len(parts)} parts, and not layers with ReLU between"
    kind = nn.Linear if type(parts[0]) is nn.Linear else nn.Conv2d if as_maps else _CONVOLUTIONS.get(dims - 2)
    if kind is None or channel_dim != (dims - 1 if kind is nn.Linear else 1):
        return f"{type(parts[0]).__name__} does not mix the channels alone, dimension {channel_dim} of {dims}"
    for place, part in enumerate(parts):
        wanted = nn.ReLU if place % 2 else kind
        if type(part) is not wanted:
            return f"its part {place} is {type(part).__name__}, not {wanted.__name__}"
        if wanted is kind and isinstance(part, CONVOLUTIONS) and not _is_pointwise(part):
            return f"its part {place} is a convolution of other than 1x1"
    if not is_as_defined(regressor):
        return "a part of it, or a function of torch's, is not as torch defines it"
    layers: list[nn.Module] = parts[::2]
    weights, biases = (tuple(getattr(layer, name) for layer in layers) for name in ("weight", "bias"))
    return Stack(weights, biases, kind is not nn.Linear)


def _is_pointwise(layer: nn.Module) -> bool:
    """Whether a convolution mixes channels alone, and gives as many positions as it takes."""
    assert isinstance(layer, CONVOLUTIONS)
    return (
        set(layer.kernel_size) == {1}
        and set(layer.stride) == {1}
        and layer.groups == 1
        and (layer.padding in ("valid", "same") or set(layer.padding) == {0})
        and set(layer.weight.shape[2:]) == {1}
    )


def apply(stack: Stack, student: Tensor, channel_dim: int) -> Tensor:
    """mu(s), layer by layer: what the stack is when nothing is computed together.

    Args:
        stack: That fits the student.
        student: Any shape.
        channel_dim: The dimension of its channels, not negative.
    """
    may_write = not torch.compiler.is_compiling()
    x = flat_positions(student, channel_dim) if stack.convolutions else student.movedim(channel_dim, -1)
    for index, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True)):
        if index:
            x = torch.relu_(x) if may_write else torch.relu(x)
        matrix = weight.flatten(1)
        x = F.conv1d(x, matrix.unsqueeze(2), bias) if stack.convolutions else F.linear(x, matrix, bias)
    if not stack.convolutions:
        return x.movedim(-1, channel_dim)
    shape = student.movedim(channel_dim, 1).shape
    return x.reshape(shape[0], x.shape[1], *shape[2:]).movedim(1, channel_dim)


def flat_positions(x: Tensor, channel_dim: int) -> Tensor:
    """x as (B, C, positions): any number of axes is positions, and a vector is one position."""
    x = x.movedim(channel_dim, 1)
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


def as_samples(student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both with every position as a sample, (B * positions, C, 1), where their channels are the fastest in memory.

    So tokens can be cut anywhere, and not between sequences alone. Elsewhere they come back as they are.

    Args:
        student: (B, C_s, positions).
        target: (B, C, positions).
    """
    rows = [x.transpose(1, 2) for x in (student, target)]
    if student.shape[2] == 1 or not all(x.is_contiguous() for x in rows):
        return student, target
    return rows[0].reshape(-1, student.shape[1], 1), rows[1].reshape(-1, target.shape[1], 1)
