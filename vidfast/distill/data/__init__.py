"""Data sets by name. Every file here is imported, so adding a data set is adding a file."""

from __future__ import annotations

from ..registry import discover
from .base import DATA_SETS, Augmentation, ImageData, Images, random_shift, samples_per_class

discover(__name__, __path__)

__all__ = [
    "DATA_SETS",
    "Augmentation",
    "ImageData",
    "Images",
    "random_shift",
    "samples_per_class",
]
