"""Data sets by name. Every file here is imported, so adding a data set is adding a file."""

from __future__ import annotations

from ..registry import discover
from .augment import Augmentation, in_turn, random_flip, random_shift
from .base import DATA_SETS, DataError, ImageData, Images, LabelledImages, Normalisation, load
from .sampling import hold_out, samples_per_class

discover(__name__, __path__)

__all__ = [
    "DATA_SETS",
    "Augmentation",
    "DataError",
    "ImageData",
    "Images",
    "LabelledImages",
    "Normalisation",
    "hold_out",
    "in_turn",
    "load",
    "random_flip",
    "random_shift",
    "samples_per_class",
]
