"""How networks are named and built."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import nn

from ..registry import Registry


class TappedNetwork(nn.Module):
    """A classifier that names its layers of interest.

    taps: the layers that the papers pair, from input to output. penultimate: the classifier's input.
    """

    taps: ClassVar[tuple[str, ...]]
    penultimate: ClassVar[str]


Family = Callable[[str, int, int], TappedNetwork]
FAMILIES: Registry[Family] = Registry("network")


def build(name: str, *, in_channels: int, num_classes: int) -> TappedNetwork:
    """The network called `name`, such as "wrn-16-2", with fresh weights from torch's random state.

    Raises UnknownNameError for an unknown family, ValueError for a size that the family does not have.
    """
    family, _, size = name.partition("-")
    return FAMILIES[family](size, in_channels, num_classes)
