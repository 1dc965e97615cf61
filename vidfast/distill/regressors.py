"""Mean functions mu(s): what predicts a teacher's activation from a student's.

A regressor is a function `(student_shape, teacher_shape) -> nn.Module`, both shapes as tensors have them
(batch first). Those of the VID paper (Ahn et al., CVPR 2019, section 3) have names:

    linear   one 1x1 convolution                                             (its ResNet-34 -> VGG-9)
    conv2    two 1x1 convolutions, hidden width half the output's            (its ResNet-34 -> ResNet-18)
    conv3    three 1x1 convolutions, hidden width twice the output's         (its CIFAR experiments)

ReLU stands between the convolutions, and there is no bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from vidfast.vid import is_watched

from .registry import Registry

Regressor = Callable[[Sequence[int], Sequence[int]], nn.Module]

REGRESSORS: Registry[Regressor] = Registry("regressor")

_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}


def pointwise(in_channels: int, out_channels: int, spatial_dims: int, *, bias: bool = False) -> nn.Module:
    """One 1x1 convolution over 1, 2 or 3 spatial dimensions; over none, a linear layer."""
    if spatial_dims == 0:
        return nn.Linear(in_channels, out_channels, bias=bias)
    if spatial_dims not in _CONVOLUTIONS:
        raise ValueError(f"wanted features with 0 to 3 spatial dimensions, got {spatial_dims}")
    return _CONVOLUTIONS[spatial_dims](in_channels, out_channels, kernel_size=1, bias=bias)


@dataclass(frozen=True)
class PointwiseStack:
    """A stack of `depth` 1x1 convolutions without bias, ReLU between.

    width: the hidden layers' width as a multiple of the teacher's channels.
    channel_dim: 1 for (B, C, ...) features, vectors (B, C) included; -1 for channels last, as a
        transformer's (B, L, D), where the stack is of linear layers.
    """

    depth: int = 3
    width: float = 2.0
    channel_dim: int = 1

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"wanted a depth of 1 or more, got {self.depth}")
        if self.width <= 0:
            raise ValueError(f"wanted a width above 0, got {self.width}")
        if self.channel_dim not in (1, -1):
            raise ValueError(f"wanted channel_dim 1 or -1, got {self.channel_dim}")

    def __call__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> nn.Sequential:
        """Build the stack for features of these shapes, batch first.

        Raises ValueError if anything but the channels differs: a 1x1 convolution cannot mend that.
        """
        student_shape, teacher_shape = tuple(student_shape), tuple(teacher_shape)
        if len(student_shape) < 2 or len(student_shape) != len(teacher_shape):
            raise ValueError(
                "wanted student and teacher features of the same number of dimensions, at least (batch, "
                "channels), "
                f"got {student_shape} and {teacher_shape}"
            )
        dim = self.channel_dim % len(student_shape)
        places = tuple(n for i, n in enumerate(student_shape) if i not in (0, dim))
        wanted = tuple(n for i, n in enumerate(teacher_shape) if i not in (0, dim))
        if places != wanted:
            raise ValueError(
                f"student features {student_shape} and teacher features {teacher_shape} differ in more than "
                "their "
                "channels; pair layers of the same resolution, or give a regressor that changes it"
            )
        spatial_dims = len(places) if self.channel_dim == 1 else 0
        hidden = max(1, round(self.width * teacher_shape[dim]))
        widths = [student_shape[dim], *[hidden] * (self.depth - 1), teacher_shape[dim]]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [pointwise(fan_in, fan_out, spatial_dims), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


REGRESSORS.register("linear")(PointwiseStack(depth=1))
REGRESSORS.register("conv2")(PointwiseStack(depth=2, width=0.5))
REGRESSORS.register("conv3")(PointwiseStack(depth=3, width=2.0))


def resolve(regressor: str | Regressor, channel_dim: int = 1) -> Regressor:
    """A regressor by name or as given; a named one is laid out for `channel_dim`."""
    if not isinstance(regressor, str):
        return regressor
    found = REGRESSORS[regressor]
    if isinstance(found, PointwiseStack) and found.channel_dim != channel_dim:
        return PointwiseStack(found.depth, found.width, channel_dim)
    return found


def owns_its_output(module: nn.Module) -> bool:
    """Whether a regressor ends in a convolution or linear layer: nobody else reads that output afterwards."""
    if is_watched(module):
        return False
    last = module
    # Exact types: what a subclass does with its output is its own affair.
    while type(last) is nn.Sequential and len(last):
        last = last[-1]
    return type(last) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
