"""How networks are named and built."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from ..registry import Registry

Size = tuple[int, int]


class TappedNetwork(nn.Module):
    """A classifier of images that names its layers of interest.

    taps: the layers that the papers pair, from input to output. penultimate: the layer whose output, (B,
    features), the classifier takes. Nothing behind any of them changes its output in place.
    """

    taps: ClassVar[tuple[str, ...]]
    penultimate: ClassVar[str]

    if TYPE_CHECKING:  # nn.Module's gives Any

        def __call__(self, images: Tensor) -> Tensor: ...


# From what follows the family's name, in_channels, num_classes, (height, width).
Family = Callable[[str, int, int, Size], TappedNetwork]
FAMILIES: Registry[Family] = Registry("network")


def build(name: str, *, in_channels: int, num_classes: int, image_size: Size = (32, 32)) -> TappedNetwork:
    """The network called `name`, such as "wrn-16-2", with fresh weights from torch's random state.

    It maps images (B, in_channels, *image_size) to logits (B, num_classes).

    Raises UnknownNameError for an unknown family; ValueError for a size that the family does not have, for
    images that are too small for it, and for numbers below 1.
    """
    height, width = image_size
    for what, number in {
        "in_channels": in_channels,
        "num_classes": num_classes,
        "image_size": min(height, width),
    }.items():
        if number < 1:
            raise ValueError(f"wanted {what} of 1 or more, got {number}")
    family, _, size = name.partition("-")
    return FAMILIES[family](size, in_channels, num_classes, (height, width))


def check_image_size(name: str, image_size: Size, stride: int, why: str) -> None:
    """Raises ValueError where an image is smaller than the network's whole stride."""
    if min(image_size) < stride:
        raise ValueError(
            f"wanted images of {stride}x{stride} or more for {name} ({why}), got {image_size[0]}x{image_size[1]}"
        )


def initialise_convolutions(network: nn.Module) -> None:
    """He et al.'s initialisation (ICCV 2015) by fan out of every convolution, as these families' authors have it."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
