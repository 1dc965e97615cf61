"""What a layer's class tells about its features: where their channels are, and which tokens are no patches.

Known classes: torch's convolutions, poolings, transformer and recurrent layers, torchvision's and timm's vision
transformers, and the layers of transformers. For any other layer the caller gives channel_dim. Other libraries are
recognised by the names of their modules, and never imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from vidfast._torch import BATCH_NORM, CONVOLUTION

from .places import Place


@dataclass(frozen=True)
class Kind:
    """What is told of a layer's features; None where it is not.

    tokens: the channels' dimension, 1 or -1, of features of three dimensions.
    maps: that of features of four or more.
    inside: of a layer of a library whose networks have maps of both kinds, where nothing is told, the layers in it.
    batch_dim: the samples' dimension, 0 or 1.
    prefix: how many tokens come before those of the patches, such as a class token and registers.
    grid: (height, width) in patches.
    """

    tokens: int | None = None
    maps: int | None = None
    inside: Inside | None = None
    batch_dim: int = 0
    prefix: int | None = None
    grid: tuple[int, int] | None = None

    def may_be_last(self, shape: Sequence[int]) -> bool:
        """Whether a map of four dimensions, of which nothing is told, looks as if its channels were last."""
        if self.inside is None:
            return False
        if self.inside.linear and self.inside.convolution:
            return shape[1] not in self.inside.sizes or shape[3] in self.inside.sizes
        if self.inside.convolution:
            return False
        return self.inside.linear or shape[1] == shape[2] != shape[3]


@dataclass(frozen=True)
class Inside:
    """What is in a layer: convolutions and the like, linear layers and the like, and the sizes of their weights."""

    convolution: bool
    linear: bool
    sizes: frozenset[int]


UNKNOWN = Kind()

_OF_AXES = ("InstanceNorm", "MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool")
# Their channels are in dimension 1, whatever the number of dimensions.
_CHANNELS_FIRST = (
    CONVOLUTION,
    BATCH_NORM,
    *(getattr(nn, f"{name}{axes}d") for name in _OF_AXES for axes in (1, 2, 3)),
    *(nn.GroupNorm, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.Unfold),
)
# Exactly these: subclasses, such as timm's LayerNorm2d, may turn their inputs. Of three dimensions they tell nothing:
# what is in the last one may be tokens, as in an MLP-Mixer.
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding)
_TRANSFORMER = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.MultiheadAttention,
)
# Networks of transformers that have their batch second in some layers.
_BATCH_SECOND = ("xlnet", "fsmt", "mask2former")
# What the outputs of transformers call (B, L, D) features.
_HIDDEN = ("last_hidden_state", "hidden_states", "encoder_last_hidden_state", "logits")


def kind_of(path: Sequence[nn.Module], place: Place) -> Kind:
    """What the classes on the way from the network to a layer tell.

    path: the modules, the network first and the layer last. place: which element is meant; of most kinds the first
        element alone is a feature.
    """
    if isinstance(path[-1], _CHANNELS_FIRST):
        return Kind(tokens=1, maps=1)
    found = _told(path, place)
    mixed = any(_is_of(module, name) for module in path for name in ("timm", "torchvision", "transformers"))
    return replace(found, inside=_inside(path)) if found.maps is None and mixed else found


def _inside(path: Sequence[nn.Module]) -> Inside:
    # Of a layer without weights, such as an activation, what is around it, but the network, which has a classifier.
    weighty = (m for m in reversed(path[1:]) if next(m.parameters(), None) is not None)
    layer = next(weighty, path[-1])
    parts = [m for m in layer.modules() if next(m.parameters(recurse=False), None) is not None]
    first = [isinstance(m, _CHANNELS_FIRST) or type(m).__name__.endswith("2d") for m in parts]
    sizes = {n for m in parts for p in m.parameters(recurse=False) for n in p.shape[:2]}
    return Inside(any(first), not all(first), frozenset(sizes))


def _told(path: Sequence[nn.Module], place: Place) -> Kind:
    layer = path[-1]
    first = place.keys in ((), (0,))
    if isinstance(layer, nn.RNNBase):
        return Kind(tokens=-1, batch_dim=0 if layer.batch_first else 1) if first else UNKNOWN
    for module in reversed(path):
        if isinstance(module, _TRANSFORMER):
            return _of_transformer(module) if first else UNKNOWN
        if _is_of(module, "torchvision.models.vision_transformer"):
            return Kind(tokens=-1, prefix=1) if first else UNKNOWN
        if _is_of(module, "timm") and isinstance(getattr(module, "num_prefix_tokens", None), int):
            return _of_timm(module) if first else UNKNOWN
    if any(_is_of(module, "transformers") for module in path):
        named = bool(place.keys) and place.keys[0] in _HIDDEN
        # In the layers around a 1-D convolution, such as those of speech networks, channels may be in dimension 1.
        around = any(isinstance(part, nn.Conv1d) for module in path[-2:] for part in module.modules())
        elsewhere = not named and any(
            _is_of(module, f"transformers.models.{name}") for module in path for name in _BATCH_SECOND
        )
        if (first or named) and not around and not elsewhere:
            return Kind(tokens=-1, maps=-1 if type(layer) in _CHANNELS_LAST else None)
        return UNKNOWN
    return Kind(maps=-1) if _maps_are_last(path, place) else UNKNOWN


def _of_transformer(module: nn.Module) -> Kind:
    attention: Any = next((m for m in module.modules() if isinstance(m, nn.MultiheadAttention)), None)
    if attention is None:
        return UNKNOWN
    return Kind(tokens=-1, batch_dim=0 if attention.batch_first else 1)


def _of_timm(network: nn.Module) -> Kind:
    grid: Any = getattr(getattr(network, "patch_embed", None), "grid_size", None)
    prefix: Any = getattr(network, "num_prefix_tokens", None)
    fits = isinstance(grid, (tuple, list)) and len(grid) == 2
    return Kind(tokens=-1, prefix=prefix, grid=(int(grid[0]), int(grid[1])) if fits else None)


def _maps_are_last(path: Sequence[nn.Module], place: Place) -> bool:
    """Whether maps are (B, H, W, C): of a linear layer or LayerNorm, and in networks such as Swin behind their stem."""
    layer = path[-1]
    while isinstance(layer, nn.Sequential) and len(layer):
        layer = layer[0 if place.is_input else -1]
    if type(layer) in _CHANNELS_LAST:
        return True
    if isinstance(layer, (*_CHANNELS_FIRST, nn.LayerNorm)):
        return False
    if _is_of(layer, "torchvision.models.swin_transformer"):
        # the network itself is called with images
        return not place.is_input or not any(isinstance(part, nn.Conv2d) for part in layer.modules())
    formats = [str(getattr(module, "output_fmt", "")) if _is_of(module, "timm") else "" for module in path]
    if formats[-1]:
        return formats[-1].endswith("NHWC") and not place.is_input
    # A stem turns images into such maps.
    names = place.layer.split(".")
    in_stem = any(name in ("patch_embed", "stem") for name in (names if place.is_input else names[:-1]))
    return any(name.endswith("NHWC") for name in formats) and not in_stem


def _is_of(module: nn.Module, package: str) -> bool:
    """Whether the module's class, or one that it is derived from, is of this package."""
    return any(f"{kind.__module__}.".startswith(f"{package}.") for kind in type(module).__mro__)
