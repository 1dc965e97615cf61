"""Mean functions mu(s): what predicts a teacher's activation from a student's.

A regressor is a function `(student_shape, teacher_shape) -> nn.Module`, both shapes as tensors have them
(batch first). Those of the VID paper (Ahn et al., CVPR 2019, section 3) have names:

    linear      one 1x1 convolution                                          (its ResNet-34 -> VGG-9)
    conv2       two 1x1 convolutions, hidden width half the output's         (its ResNet-34 -> ResNet-18)
    conv3       three 1x1 convolutions, hidden width twice the output's      (its CIFAR experiments)
    transposed  transposed convolutions from a vector to a map               (its WRN-40-2 -> MLP)

and one that is not the paper's, for targets of a higher resolution than the student's map:

    upsampled   two 1x1 convolutions, then linear interpolation              (ours; Infomax's default)

ReLU stands between the 1x1 convolutions and nothing between the transposed ones. There is no bias.

FitNet's, as distillation repositories share it, is

    conv_bn_relu  one convolution that changes the size, with bias, then BatchNorm and ReLU
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import nn

from .registry import Registry

Regressor = Callable[[Sequence[int], Sequence[int]], nn.Module]

REGRESSORS: Registry[Regressor] = Registry("regressor")

_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}
_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
_TRANSPOSED: dict[int, type[nn.ConvTranspose1d] | type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
_BATCH_NORMS: dict[int, type[nn.BatchNorm1d] | type[nn.BatchNorm2d] | type[nn.BatchNorm3d]] = {
    0: nn.BatchNorm1d,
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}


def pointwise(in_channels: int, out_channels: int, spatial_dims: int, *, bias: bool = False) -> nn.Module:
    """One 1x1 convolution over 1, 2 or 3 spatial dimensions; over none, a linear layer."""
    if spatial_dims == 0:
        return nn.Linear(in_channels, out_channels, bias=bias)
    if spatial_dims not in _CONVOLUTIONS:
        raise ValueError(f"wanted features with 0 to 3 spatial dimensions, got {spatial_dims}")
    return _CONVOLUTIONS[spatial_dims](in_channels, out_channels, kernel_size=1, bias=bias)


def _check_sizes(width: float, depth: int = 1) -> None:
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f"wanted an int as depth, got {type(depth).__name__}")
    if depth < 1:
        raise ValueError(f"wanted a depth of 1 or more, got {depth}")
    if not 0 < width < math.inf:
        raise ValueError(f"wanted a finite width above 0, got {width}")


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
        _check_sizes(self.width, self.depth)
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
                f"channels), got {student_shape} and {teacher_shape}"
            )
        dim = self.channel_dim % len(student_shape)
        places = tuple(n for i, n in enumerate(student_shape) if i not in (0, dim))
        wanted = tuple(n for i, n in enumerate(teacher_shape) if i not in (0, dim))
        if places != wanted:
            raise ValueError(
                f"student features {student_shape} and teacher features {teacher_shape} differ in more than their "
                "channels; pair layers of the same resolution, or give a regressor that changes it"
            )
        spatial_dims = len(places) if self.channel_dim == 1 else 0
        hidden = max(1, round(self.width * teacher_shape[dim]))
        widths = [student_shape[dim], *[hidden] * (self.depth - 1), teacher_shape[dim]]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [pointwise(fan_in, fan_out, spatial_dims), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class TransposedStack:
    """Transposed convolutions from a vector to a map, as for the MLP students of the VID paper (section 3.3).

    One of kernel 4, stride 1, padding 0 makes 4x4 of 1x1; each one of kernel 4, stride 2, padding 1 after it
    doubles that, until the size is the teacher's. No non-linearity and no bias.

    width: the hidden channels as a multiple of the teacher's. The paper does not give it; 1 is ours.
    """

    width: float = 1.0

    def __post_init__(self) -> None:
        _check_sizes(self.width)

    def __call__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> nn.Sequential:
        """Build the stack: (B, h) or (B, h, 1, 1) in, the teacher's (B, C, H, W) out.

        Raises ValueError unless the student's feature is one of these and H = W = 4 * 2**n.
        """
        student_shape, teacher_shape = tuple(student_shape), tuple(teacher_shape)
        if len(student_shape) != 2 and (len(student_shape) != 4 or student_shape[2:] != (1, 1)):
            raise ValueError(
                f"wanted student features (batch, h) or (batch, h, 1, 1) for transposed convolutions, got "
                f"{student_shape}"
            )
        if len(teacher_shape) != 4:
            raise ValueError(f"wanted a teacher's map (batch, C, H, W), got {teacher_shape}")
        height, width = teacher_shape[2:]
        doublings = (height // 4).bit_length() - 1
        if height != width or doublings < 0 or height != 4 << doublings:
            raise ValueError(
                f"transposed convolutions 4x4 reach the sizes 4, 8, 16, ... with height = width, got a "
                f"teacher's map {teacher_shape}"
            )
        hidden = max(1, round(self.width * teacher_shape[1]))
        widths = [student_shape[1], *[hidden] * doublings, teacher_shape[1]]
        layers: list[nn.Module] = []
        if len(student_shape) == 2:
            layers.append(nn.Unflatten(1, (student_shape[1], 1, 1)))
        for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
            stride, padding = (1, 0) if i == 0 else (2, 1)
            layers.append(nn.ConvTranspose2d(fan_in, fan_out, 4, stride, padding, bias=False))
        return nn.Sequential(*layers)


@dataclass(frozen=True)
class UpsampledStack:
    """1x1 convolutions at the student's resolution, then linear interpolation to the teacher's.

    Ours, for targets of a higher resolution such as the input itself. The last convolution comes first because
    it commutes with the interpolation, which then runs over the teacher's channels alone.

    depth: how many 1x1 convolutions, ReLU between. width: the hidden channels as a multiple of the student's.
    """

    depth: int = 2
    width: float = 1.0

    def __post_init__(self) -> None:
        _check_sizes(self.width, self.depth)

    def __call__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> nn.Sequential:
        """Build the stack for maps (B, C, *spatial) of 1 to 3 spatial axes.

        Raises ValueError for vectors, and where the student's map is larger than the teacher's somewhere.
        """
        student_shape, teacher_shape = tuple(student_shape), tuple(teacher_shape)
        spatial_dims = len(student_shape) - 2
        if spatial_dims not in _INTERPOLATION or len(student_shape) != len(teacher_shape):
            raise ValueError(
                "wanted maps of 1 to 3 spatial axes, as many on both sides, got "
                f"{student_shape} and {teacher_shape}; for vectors there is regressor='transposed'"
            )
        size = teacher_shape[2:]
        if any(s > t for s, t in zip(student_shape[2:], size, strict=True)):
            raise ValueError(
                f"wanted a student's map no larger than {size} along any axis, got {student_shape}"
            )
        hidden = max(1, round(self.width * student_shape[1]))
        widths = [student_shape[1], *[hidden] * (self.depth - 1), teacher_shape[1]]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [pointwise(fan_in, fan_out, spatial_dims), nn.ReLU()]
        layers.pop()
        if student_shape[2:] != size:
            layers.append(nn.Upsample(size, mode=_INTERPOLATION[spatial_dims], align_corners=False))
        return nn.Sequential(*layers)


@dataclass(frozen=True)
class ConvBNReLU:
    """One convolution with bias that changes the size, then BatchNorm and ReLU: FitNet's regressor in public code.

    Each axis of size s becomes the teacher's t by what fits first:

        s = t           kernel 1
        t = ceil(s / 2) kernel 3, stride 2, padding 1
        s > t           kernel 1 + s - t, no padding
        t = 2 s         transposed: kernel 4, stride 2, padding 1; the other axes are then doubled or kept

    so that square maps get the layer that public code gives them, but for an odd s with t = (s + 1) / 2, where that
    has a kernel of 1 + s - t; it decides by the height alone. Vectors get a linear layer.

    BatchNorm takes its statistics from the batch in training: of two values a channel or more, masked ones included.

    relu: whether ReLU follows. Without it negative targets, such as activations before a ReLU, can be reached.
    """

    relu: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.relu, bool):
            raise TypeError(f"wanted relu as True or False, got {self.relu!r}")

    def __call__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> nn.Sequential:
        """Build the layers, `conv`, `bn` and `relu`, for features (B, C, *spatial) of 0 to 3 spatial axes.

        Raises ValueError for another number of axes, and for sizes that no such convolution makes of the student's.
        """
        student_shape, teacher_shape = tuple(student_shape), tuple(teacher_shape)
        axes = len(student_shape) - 2
        if axes not in _BATCH_NORMS or len(student_shape) != len(teacher_shape):
            raise ValueError(
                "wanted features (batch, channels, ...) of 0 to 3 spatial axes, as many on both sides, got "
                f"{student_shape} and {teacher_shape}"
            )
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv=self._convolution(student_shape, teacher_shape)
        )
        layers["bn"] = _BATCH_NORMS[axes](teacher_shape[1])
        if self.relu:
            layers["relu"] = nn.ReLU()
        return nn.Sequential(layers)

    @staticmethod
    def _convolution(student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> nn.Module:
        channels, axes = (student_shape[1], teacher_shape[1]), len(student_shape) - 2
        sizes = list(zip(student_shape[2:], teacher_shape[2:], strict=True))
        if axes == 0:
            return nn.Linear(*channels)
        kinds: Mapping[int, Callable[..., nn.Module]]
        if all(s >= t for s, t in sizes):
            kinds = _CONVOLUTIONS
            fitted = [(3, 2, 1) if s > t == (s + 1) // 2 else (1 + s - t, 1, 0) for s, t in sizes]
        elif all(t in (s, 2 * s) for s, t in sizes):
            kinds = _TRANSPOSED
            fitted = [(4, 2, 1) if t > s else (1, 1, 0) for s, t in sizes]
        else:
            raise ValueError(
                "one convolution makes maps no larger than the student's along every axis, or twice its size along "
                f"some and its own along the others, got a student's map {student_shape} and a teacher's "
                f"{teacher_shape}; pair layers nearer in resolution, or take regressor='upsampled'"
            )
        kernel, stride, padding = zip(*fitted, strict=True)
        return kinds[axes](*channels, kernel, stride, padding)


REGRESSORS.register("linear")(PointwiseStack(depth=1))
REGRESSORS.register("conv2")(PointwiseStack(depth=2, width=0.5))
REGRESSORS.register("conv3")(PointwiseStack(depth=3, width=2.0))
REGRESSORS.register("transposed")(TransposedStack())
REGRESSORS.register("upsampled")(UpsampledStack())
REGRESSORS.register("conv_bn_relu")(ConvBNReLU())


def resolve(regressor: str | Regressor, channel_dim: int = 1) -> Regressor:
    """A regressor by name or as given; a stack of 1x1 convolutions is laid out for `channel_dim`.

    Raises UnknownNameError for an unknown name, TypeError for what is neither a name nor a function, ValueError
    for a channel_dim that is neither 1 nor -1.
    """
    if channel_dim not in (1, -1):
        raise ValueError(f"wanted channel_dim 1 or -1, got {channel_dim}")
    if isinstance(regressor, nn.Module) or not (isinstance(regressor, str) or callable(regressor)):
        raise TypeError(
            "wanted the name of a regressor or a function (student_shape, teacher_shape) -> nn.Module, got "
            f"{'the module ' if isinstance(regressor, nn.Module) else ''}{type(regressor).__name__}; every "
            "pair of layers needs one of its own, so give a function that makes it"
        )
    found = REGRESSORS[regressor] if isinstance(regressor, str) else regressor
    if isinstance(found, PointwiseStack) and found.channel_dim != channel_dim:
        return replace(found, channel_dim=channel_dim)
    return found


def laid_out(regressor: Regressor, channel_dim: int) -> Regressor:
    """The regressor for features with channels in this dimension, 1 or -1: of linear layers or of convolutions."""
    if isinstance(regressor, PointwiseStack) and regressor.channel_dim != channel_dim:
        return replace(regressor, channel_dim=channel_dim)
    return regressor


def keeps_resolution(regressor: Regressor) -> bool:
    """Whether the maps of a pair must be of one size before it: a stack of 1x1 convolutions cannot change that."""
    return isinstance(regressor, PointwiseStack)


def takes_last(regressor: Regressor) -> bool:
    """Whether it takes two features with channels last: a stack of 1x1 convolutions, and a function of the caller's."""
    return not isinstance(regressor, (TransposedStack, UpsampledStack, ConvBNReLU))


def make(regressor: Regressor, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> nn.Module:
    """What the function `regressor` makes for these shapes. Raises TypeError if that is no module."""
    made = regressor(student_shape, teacher_shape)
    if not isinstance(made, nn.Module):
        raise TypeError(f"wanted a regressor function that returns an nn.Module, got {type(made).__name__}")
    return made
