"""The papers' networks, by name. Every file here is imported, so adding a network is adding a file.

A family is registered under its first word ("wrn") and builds a network from the rest of the name ("16-2").
Every network has `taps`, the names of the layers that the papers pair, and `penultimate`, the layer whose
output is the features before the classifier.
"""

from __future__ import annotations

from ..registry import discover
from .base import FAMILIES, TappedNetwork, build
from .foreign import renamed_wrn

discover(__name__, __path__)

__all__ = ["FAMILIES", "TappedNetwork", "build", "renamed_wrn"]
