"""A network small enough to test with, and the layers that two of them pair."""

from __future__ import annotations

from torch import Tensor, nn

PAIRS = {"first": "first", "second": "second"}


class SmallNet(nn.Module):
    """Two convolutions with BatchNorm and a classifier; layers `first`, `second` and `fc`."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2), nn.BatchNorm2d(2 * width), nn.ReLU()
        )
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(2 * width, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.second(self.first(images)).mean((2, 3))
        logits: Tensor = self.fc(self.drop(features))
        return logits
