"""Wide residual networks WRN-d-w (Zagoruyko and Komodakis, BMVC 2016; arXiv 1605.07146).

d = 6n + 4 is the depth, with n pre-activation blocks in each of three groups, and w multiplies the widths
16, 32, 64. The VID paper taps the stem and the ends of the three groups. Nothing depends on the image's size:
average pooling ends the network, so 32x32 and 8x8 images both do.
"""

from __future__ import annotations

import re
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from .base import FAMILIES, Size, TappedNetwork, initialise_convolutions


class Block(nn.Module):
    """BN-ReLU-conv3x3, BN-ReLU-conv3x3, plus the input (through a 1x1 convolution where shapes differ)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            if in_channels != out_channels or stride != 1
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        return out + shortcut


class WideResNet(TappedNetwork):
    """WRN-depth-width for images of any size: forward(images (B, in_channels, H, W)) -> logits (B,
    num_classes).

    Raises ValueError unless depth is 6n + 4 with n >= 1 and width is at least 1.
    """

    taps: ClassVar[tuple[str, ...]] = ("stem", "group1", "group2", "group3")
    penultimate: ClassVar[str] = "pool"

    def __init__(self, depth: int, width: int, *, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(
                f"wanted a WRN of depth 6n + 4 (10, 16, 22, 28, 40, ...) and width 1 or more, got {depth} and "
                f"{width}"
            )
        blocks = (depth - 4) // 6
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.group1 = self._group(blocks, channels[0], channels[1], stride=1)
        self.group2 = self._group(blocks, channels[1], channels[2], stride=2)
        self.group3 = self._group(blocks, channels[2], channels[3], stride=2)
        self.bn = nn.BatchNorm2d(channels[3])
        self.pool = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(channels[3], num_classes)
        initialise_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    @staticmethod
    def _group(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        first = Block(in_channels, out_channels, stride)
        return nn.Sequential(first, *(Block(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        features = self.group3(self.group2(self.group1(self.stem(images))))
        logits: Tensor = self.fc(self.pool(self.bn(features)))
        return logits


@FAMILIES.register("wrn")
def wrn(size: str, in_channels: int, num_classes: int, image_size: Size) -> WideResNet:
    """WRN from "depth-width", such as "16-2", for images of any size."""
    match = re.fullmatch(r"(\d+)-(\d+)", size)
    if match is None:
        raise ValueError(
            f"wanted a wide residual network as wrn-DEPTH-WIDTH, such as wrn-16-2, got 'wrn-{size}'"
        )
    return WideResNet(int(match[1]), int(match[2]), in_channels=in_channels, num_classes=num_classes)
