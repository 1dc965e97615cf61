"""Residual networks ResNet-18 and ResNet-34 (He et al., CVPR 2016; arXiv 1512.03385).

A stem, four groups of basic blocks with 64, 128, 256 and 512 channels, global average pooling and one linear
layer. The stem for images like ImageNet's is theirs: a 7x7 convolution of stride 2 and a 3x3 max pool of
stride 2. The stem for images like CIFAR's, a 3x3 convolution of stride 1 and no pool, is the one in common
use for small images. The VID paper taps the outputs of the third and fourth groups.
"""

from __future__ import annotations

import re
from typing import ClassVar

from torch import Tensor, nn

from .base import FAMILIES, Size, TappedNetwork, check_image_size, initialise_convolutions

# Basic blocks in each group, by depth (table 1 of the paper).
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
STEMS = ("cifar", "imagenet")


class BasicBlock(nn.Module):
    """conv3x3-BN-ReLU-conv3x3-BN, plus the input (through a 1x1 convolution and BN where shapes differ), ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = (
            nn.Sequential(
                # Every stride-th pixel first, which is what a 1x1 convolution with that stride takes: oneDNN's own
                # writes past its workspace in backward, channels-last and with few channels (torch 2.13, CPU).
                nn.AvgPool2d(1, stride),
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            )
            if in_channels != out_channels or stride != 1
            else nn.Identity()
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))
        return out


class ResNet(TappedNetwork):
    """ResNet-depth: forward(images (B, in_channels, H, W)) -> logits (B, num_classes).

    depth: 18 or 34. stem: "cifar" (whole stride 8) or "imagenet" (whole stride 32). width: channels of the
    first group; the others have 2, 4 and 8 times as many. image_size: only to refuse images that are smaller
    than the whole stride; with others the weights are the same.

    Raises ValueError for another depth or stem, a width below 1 or such images.
    """

    taps: ClassVar[tuple[str, ...]] = ("group3", "group4")
    penultimate: ClassVar[str] = "pool"

    def __init__(
        self,
        depth: int,
        *,
        stem: str = "cifar",
        width: int = 64,
        in_channels: int = 3,
        num_classes: int = 10,
        image_size: Size = (32, 32),
    ) -> None:
        super().__init__()
        if depth not in BLOCKS or stem not in STEMS or width < 1:
            raise ValueError(
                f"wanted a ResNet of depth {' or '.join(map(str, BLOCKS))} with the stem {' or '.join(STEMS)} "
                f"and width 1 or more, got {depth}, {stem!r} and {width}"
            )
        check_image_size(
            f"resnet-{depth}{'-imagenet' if stem == 'imagenet' else ''}",
            image_size,
            stride=32 if stem == "imagenet" else 8,
            why="at the fourth group 1x1 is left of them",
        )
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
            if stem == "imagenet"
            else nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        if stem == "imagenet":
            self.stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        first, second, third, fourth = BLOCKS[depth]
        self.group1 = self._group(first, width, width, stride=1)
        self.group2 = self._group(second, width, 2 * width, stride=2)
        self.group3 = self._group(third, 2 * width, 4 * width, stride=2)
        self.group4 = self._group(fourth, 4 * width, 8 * width, stride=2)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(8 * width, num_classes)
        initialise_convolutions(self)

    @staticmethod
    def _group(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        features = self.group4(self.group3(self.group2(self.group1(self.stem(images)))))
        logits: Tensor = self.fc(self.pool(features))
        return logits


@FAMILIES.register("resnet")
def resnet(size: str, in_channels: int, num_classes: int, image_size: Size) -> ResNet:
    """ResNet from "depth", "depth-imagenet" and either with "-wWIDTH", such as "34-imagenet-w16"."""
    match = re.fullmatch(r"(\d+)(-imagenet)?(?:-w(\d+))?", size)
    if match is None:
        raise ValueError(
            "wanted a residual network as resnet-DEPTH[-imagenet][-wWIDTH], such as resnet-34-imagenet-w16, "
            f"got 'resnet-{size}'"
        )
    return ResNet(
        int(match[1]),
        stem="imagenet" if match[2] else "cifar",
        width=int(match[3] or 64),
        in_channels=in_channels,
        num_classes=num_classes,
        image_size=image_size,
    )
