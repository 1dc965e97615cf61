"""VGG-9: the eight convolutions of VGG's configuration A and one linear layer.

Simonyan and Zisserman (ICLR 2015; arXiv 1409.1556), table 1, column A: 3x3 convolutions with 64, 128, 256,
256, 512, 512, 512, 512 channels and five 2x2 max pools. The VID paper's student VGG-9 taps the fourth and the
fifth max pool; it does not say more of the network, and its supplement is not available. Ours to choose were:
BatchNorm between every convolution and its ReLU (so the convolutions have no bias), and global average
pooling before the linear layer, which at 32x32 does nothing, as the fifth pool leaves 1x1 of the image.
"""

from __future__ import annotations

import re
from typing import ClassVar

from torch import Tensor, nn

from .base import FAMILIES, Size, TappedNetwork, check_image_size, initialise_convolutions

# Channels of the convolutions before each pool, in units of the width.
GROUPS = ((1,), (2,), (4, 4), (8, 8), (8, 8))


class VGG9(TappedNetwork):
    """VGG-9: forward(images (B, in_channels, H, W)) -> logits (B, num_classes).

    width: channels of the first convolution; the others have 2, 4 and 8 times as many. image_size: only to
    refuse images below 32x32, of which the pools leave nothing.

    Raises ValueError for these and for a width below 1.
    """

    taps: ClassVar[tuple[str, ...]] = ("pool4", "pool5")
    penultimate: ClassVar[str] = "pool"

    def __init__(
        self, *, width: int = 64, in_channels: int = 3, num_classes: int = 10, image_size: Size = (32, 32)
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"wanted a width of 1 or more, got {width}")
        check_image_size("vgg-9", image_size, stride=32, why="five max pools halve them")
        channels = in_channels
        for i, group in enumerate(GROUPS, start=1):
            layers: list[nn.Module] = []
            for times in group:
                layers += [
                    nn.Conv2d(channels, times * width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(times * width),
                    nn.ReLU(),
                ]
                channels = times * width
            self.add_module(f"group{i}", nn.Sequential(*layers))
            self.add_module(f"pool{i}", nn.MaxPool2d(2))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(channels, num_classes)
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        # In order of registration: group1, pool1, ..., group5, pool5, pool, fc.
        x = images
        for layer in self.children():
            x = layer(x)
        return x


@FAMILIES.register("vgg")
def vgg(size: str, in_channels: int, num_classes: int, image_size: Size) -> VGG9:
    """VGG from "9" or "9-wWIDTH", such as "9-w16"."""
    match = re.fullmatch(r"9(?:-w(\d+))?", size)
    if match is None:
        raise ValueError(f"wanted a VGG as vgg-9[-wWIDTH], such as vgg-9 or vgg-9-w16, got 'vgg-{size}'")
    return VGG9(
        width=int(match[1] or 64), in_channels=in_channels, num_classes=num_classes, image_size=image_size
    )
