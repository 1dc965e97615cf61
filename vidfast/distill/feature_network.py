"""Networks whose features come out of forward(x, is_feat=True), as networks whose features are layers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .inputs import call
from .modes import eval_mode
from .places import describe
from .stream import kept_random_state


class FeatureNetwork(nn.Module):
    """A network that returns its features when it is asked to, with a layer for each of them, "feat.0", "feat.1", ...

        student = FeatureNetwork(resnet8x4(num_classes=100), example=images)
        distiller = Distiller(student, FeatureNetwork(resnet32x4(), example=images), [VID({"feat.1": "feat.1"})], ...)

    The networks of RepDistiller and of what came after it are so: `forward(x, is_feat=True)` returns a list of features
    and the logits, of which some are no module's output. Here forward returns the logits alone, and the features pass
    through layers that change nothing.

    network: what is wrapped; the attribute `network` is it, with the keys of its checkpoints as they were.
    example: one batch of inputs, a tensor, a tuple or a mapping: the network runs once on it, in eval mode and without
        gradients, to count its features. count: their number, in place of example.
    options: what the network is called with besides `is_feat=True`, such as `preact=True`.

    Raises TypeError for what is no network, has no is_feat or returns something else, ValueError unless there is one of
    example and count, a count of 1 or more.
    """

    def __init__(
        self, network: nn.Module, *, example: Any = None, count: int | None = None, **options: Any
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"wanted an nn.Module, got {type(network).__name__}")
        if not _takes(network.forward, "is_feat"):
            raise TypeError(
                f"wanted a network with forward(x, is_feat=True), got {type(network).__name__}, whose forward has no "
                "is_feat; elements of what a network returns can be tapped by name, such as '[1][feats][0]'"
            )
        if (example is None) == (count is None):
            raise ValueError(
                "wanted example=, one batch of inputs, or count=, the number of features, one of the two"
            )
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"wanted count as a whole number of 1 or more, got {count!r}")
        self.network, self.options = network, options
        if count is None:
            with eval_mode(network), torch.no_grad(), kept_random_state([]):
                count = len(self._split(call(partial(network, is_feat=True, **options), example))[0])
        self.feat = nn.ModuleList(nn.Identity() for _ in range(count))

    if TYPE_CHECKING:  # nn.Module's gives Any

        def __call__(self, *inputs: Any, **named: Any) -> Tensor: ...

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """The logits; every feature passes through its layer.

        Raises ValueError for another number of features than there are layers, TypeError where the network returns
        something else than features and logits.
        """
        features, logits = self._split(self.network(*inputs, is_feat=True, **self.options, **named))
        if len(features) != len(self.feat):
            raise ValueError(
                f"wanted {len(self.feat)} features from {type(self.network).__name__}, as there are layers, got "
                f"{len(features)}; give count="
            )
        for layer, feature in zip(self.feat, features, strict=True):
            layer(feature)
        return logits

    def _split(self, output: Any) -> tuple[Sequence[Tensor], Tensor]:
        """Features and logits, in either order; features by name are in the order of the mapping."""
        if isinstance(output, (tuple, list)) and len(output) == 2:
            parts = [list(part.values()) if isinstance(part, Mapping) else part for part in output]
            for features, logits in (parts, parts[::-1]):
                listed = isinstance(features, (tuple, list)) and bool(features)
                if isinstance(logits, Tensor) and listed and all(isinstance(x, Tensor) for x in features):
                    return features, logits
        raise TypeError(
            f"wanted a list of features and the logits from {type(self.network).__name__}(..., is_feat=True), got "
            f"{describe(output)}; elements of what a network returns can be tapped by name, such as '[1][feats][0]'"
        )


def _takes(function: Any, name: str) -> bool:
    """Whether a function has a parameter of this name, or any by name. True where that cannot be told."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return True
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
