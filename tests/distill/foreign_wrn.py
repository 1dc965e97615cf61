"""A wide residual network with the names that other repositories give its parts, for 32x32 images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ForeignBlock(nn.Module):
    """The shortcut's name is an argument; without one, nothing is stored under it."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.named = shortcut if in_channels != channels else ""
        if self.named:
            self.add_module(self.named, nn.Conv2d(in_channels, channels, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.bn1(x))
        residual = self.conv2(torch.relu(self.bn2(self.conv1(active))))
        y: Tensor = residual + (getattr(self, self.named)(active) if self.named else x)
        return y


class ForeignGroup(nn.Module):
    def __init__(self, blocks: int, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        sizes = [(in_channels, channels, stride)] + [(channels, channels, 1)] * (blocks - 1)
        self.layer = nn.Sequential(*(ForeignBlock(*size, shortcut) for size in sizes))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class ForeignWRN(nn.Module):
    """group, shortcut: "block" and "convShortcut" in RepDistiller, "layer" and "conv_shortcut" in xfer.

    forward(x, is_feat=True) gives ([stem, groups, pooled], logits), as RepDistiller's.
    """

    def __init__(
        self, depth: int, width: int, classes: int, group: str = "block", shortcut: str = "convShortcut"
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        channels, self.groups = [16, 16 * width, 32 * width, 64 * width], [f"{group}{n}" for n in (1, 2, 3)]
        for n, name in enumerate(self.groups):
            made = ForeignGroup((depth - 4) // 6, channels[n], channels[n + 1], 1 if n == 0 else 2, shortcut)
            self.add_module(name, made)
        self.bn1 = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], classes)

    def forward(self, x: Tensor, is_feat: bool = False) -> Any:
        features = [self.conv1(x)]
        for name in self.groups:
            features.append(getattr(self, name)(features[-1]))
        pooled = nn.functional.avg_pool2d(torch.relu(self.bn1(features[-1])), 8).flatten(1)
        logits = self.fc(pooled)
        return ([*features, pooled], logits) if is_feat else logits


def randomised(network: nn.Module) -> nn.Module:
    """With random weights and running statistics, so that no two tensors could be exchanged unnoticed."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif tensor.is_floating_point():
                tensor.normal_(0.0, 0.2)
    return network
