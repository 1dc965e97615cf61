"""Distillation of any two networks: taps, methods, one Distiller; a trainer and the papers' experiments.

This much needs torch alone. `vidfast.distill.trainer`, `.data`, `.plots` and `.experiments` need the packages
of `pip install 'vidfast[train]'`.
"""

from .distiller import Distiller, Losses
from .methods import METHODS, Activations, Batch, Method, ParameterGroup
from .methods.vid import VID
from .registry import UnknownNameError
from .regressors import REGRESSORS, PointwiseStack
from .taps import TapError, Taps

__all__ = [
    "METHODS",
    "REGRESSORS",
    "VID",
    "Activations",
    "Batch",
    "Distiller",
    "Losses",
    "Method",
    "ParameterGroup",
    "PointwiseStack",
    "TapError",
    "Taps",
    "UnknownNameError",
]
