"""A Distiller whose loss on a batch is the mean of its images' losses, so that the batch may be cut anywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidfast.distill import VID, Distiller
from vidfast.distill.data import Images


class PlainNet(nn.Module):
    """As SmallNet, without BatchNorm and dropout; layers `first`, `second` and `fc`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1, stride=2), nn.ReLU())
        self.fc = nn.Linear(2 * width, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.second(self.first(images)).mean((2, 3)))
        return logits


def plain_distiller(images: Images, **vid: Any) -> Distiller:
    torch.manual_seed(3)
    student, teacher = PlainNet(4), PlainNet(6)
    pairs = {"first": "first", "second": "second"}
    return Distiller(student, teacher, [VID(pairs, **vid)], example=images.images[:2])


def plain_data(count: int = 30) -> Images:
    """Three classes that differ in their mean."""
    generator = torch.Generator().manual_seed(11)
    labels = torch.arange(count) % 3
    images = torch.randn(count, 1, 8, 8, generator=generator)
    return Images(images + labels[:, None, None, None] - 1.0, labels)
