"""MLP-h: the perceptrons of the VID paper's section 3.3 (table 4).

Five hidden layers of h units: a linear layer, three bottleneck layers and a linear layer, each followed by a
ReLU. A bottleneck is two linear layers of h x h/4 and h/4 x h with no non-linearity between them. A linear
layer on the fifth gives the logits. The paper pairs its first four hidden layers with a convolutional
teacher's groups.

Ours to choose: what a tap gives is the hidden layer's activation after its ReLU, h units that are 0 or more
(the tapped module holds the ReLU, so nothing changes its output afterwards); there is no BatchNorm; weights
start as He et al. have it (ICCV 2015) by fan in.
"""

from __future__ import annotations

import re
from math import prod
from typing import ClassVar, Literal

from torch import Tensor, nn

from .base import FAMILIES, Size, TappedNetwork


class MLP(TappedNetwork):
    """MLP-hidden: forward(images (B, in_channels, *image_size)) -> logits (B, num_classes).

    Raises ValueError unless hidden is a positive multiple of 4, and in forward for images of another shape.
    """

    taps: ClassVar[tuple[str, ...]] = ("fc1", "fc2", "fc3", "fc4")
    penultimate: ClassVar[str] = "fc5"

    def __init__(
        self, hidden: int, *, in_channels: int = 3, num_classes: int = 10, image_size: Size = (32, 32)
    ) -> None:
        super().__init__()
        if hidden < 4 or hidden % 4:
            raise ValueError(
                f"wanted a multiple of 4 hidden units (bottlenecks have a quarter), got {hidden}"
            )
        self.input_shape = (in_channels, *image_size)
        self.fc1 = nn.Sequential(nn.Linear(prod(self.input_shape), hidden), nn.ReLU())
        self.fc2 = self._bottleneck(hidden)
        self.fc3 = self._bottleneck(hidden)
        self.fc4 = self._bottleneck(hidden)
        self.fc5 = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU())
        self.fc = nn.Linear(hidden, num_classes)
        self._initialise()

    @staticmethod
    def _bottleneck(hidden: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(hidden, hidden // 4), nn.Linear(hidden // 4, hidden), nn.ReLU())

    def _initialise(self) -> None:
        for layer in (self.fc1, self.fc2, self.fc3, self.fc4, self.fc5, self.fc):
            linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
            for linear in linears:
                # The last before a ReLU, which halves the variance; a bottleneck's first half feeds none.
                before_relu = linear is linears[-1] and layer is not self.fc
                nonlinearity: Literal["relu", "linear"] = "relu" if before_relu else "linear"
                nn.init.kaiming_normal_(linear.weight, mode="fan_in", nonlinearity=nonlinearity)
                nn.init.zeros_(linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self.input_shape:
            raise ValueError(
                f"wanted images (B, {', '.join(map(str, self.input_shape))}), which this perceptron was built "
                f"for, got {tuple(images.shape)}"
            )
        x = images.flatten(1)
        for layer in (self.fc1, self.fc2, self.fc3, self.fc4, self.fc5, self.fc):
            x = layer(x)
        return x


@FAMILIES.register("mlp")
def mlp(size: str, in_channels: int, num_classes: int, image_size: Size) -> MLP:
    """MLP from "hidden", such as "1024"."""
    match = re.fullmatch(r"\d+", size)
    if match is None:
        raise ValueError(f"wanted a perceptron as mlp-HIDDEN, such as mlp-1024, got 'mlp-{size}'")
    return MLP(int(size), in_channels=in_channels, num_classes=num_classes, image_size=image_size)
