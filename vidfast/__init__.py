"""vidfast: fused kernels for Variational Information Distillation (Ahn et al., CVPR 2019)."""

from vidfast import functional
from vidfast._version import __version__
from vidfast.dispatch import info
from vidfast.head.call import vid_head
from vidfast.heteroscedastic.call import HeteroscedasticNLL, heteroscedastic_nll, variance_of
from vidfast.heteroscedastic.torch_loss import GaussianNLLLoss
from vidfast.memory import empty_cache
from vidfast.nll import GaussianNLL, gaussian_nll, log_likelihood_map
from vidfast.vid import VIDLoss

__all__ = [
    "GaussianNLL",
    "GaussianNLLLoss",
    "HeteroscedasticNLL",
    "VIDLoss",
    "__version__",
    "empty_cache",
    "functional",
    "gaussian_nll",
    "heteroscedastic_nll",
    "info",
    "log_likelihood_map",
    "variance_of",
    "vid_head",
]
