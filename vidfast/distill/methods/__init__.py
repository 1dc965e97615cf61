"""One file a method. Every file here is imported, so adding a method is adding a file."""

from __future__ import annotations

from ..registry import discover
from .base import METHODS, Activations, Batch, Method, ParameterGroup

discover(__name__, __path__)

__all__ = ["METHODS", "Activations", "Batch", "Method", "ParameterGroup"]
