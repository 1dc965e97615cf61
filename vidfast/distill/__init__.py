"""Distillation of any two networks: taps, methods, one Distiller; a trainer and the papers' experiments.

This much needs torch alone. `vidfast.distill.trainer`, `.data`, `.plots` and `.experiments` need the packages
of `pip install 'vidfast[train]'`.
"""

from .distiller import Distiller, Losses
from .feature_network import FeatureNetwork
from .hooks import TapError
from .methods import METHODS, Activations, Batch, Method, ParameterGroup
from .methods.attention import AT
from .methods.fitnet import FitNet
from .methods.infomax import Infomax
from .methods.itrd import ITRD
from .methods.kd import KD
from .methods.lwf import LwF
from .methods.mimkd import MIMKD
from .methods.nst import NST
from .methods.pairs import PairedMethod
from .methods.vid import VID
from .methods.vid_lp import VIDLP
from .methods.vid_variants import HeteroscedasticVID, MixtureVID, StudentTVID
from .registry import UnknownNameError
from .regressors import REGRESSORS, ConvBNReLU, PointwiseStack, TransposedStack, UpsampledStack
from .taps import Taps
from .tokens import TokenGrid, TokenSequence

__all__ = [
    "AT",
    "ITRD",
    "KD",
    "METHODS",
    "MIMKD",
    "NST",
    "REGRESSORS",
    "VID",
    "VIDLP",
    "Activations",
    "Batch",
    "ConvBNReLU",
    "Distiller",
    "FeatureNetwork",
    "FitNet",
    "HeteroscedasticVID",
    "Infomax",
    "Losses",
    "LwF",
    "Method",
    "MixtureVID",
    "PairedMethod",
    "ParameterGroup",
    "PointwiseStack",
    "StudentTVID",
    "TapError",
    "Taps",
    "TokenGrid",
    "TokenSequence",
    "TransposedStack",
    "UnknownNameError",
    "UpsampledStack",
]
