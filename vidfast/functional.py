"""The losses as functions, where torch keeps its own: `torch.nn.functional` has the functions of its modules."""

from vidfast.head.call import vid_head
from vidfast.heteroscedastic.call import heteroscedastic_nll, variance_of
from vidfast.heteroscedastic.torch_loss import gaussian_nll_loss
from vidfast.nll import gaussian_nll, log_likelihood_map

__all__ = [
    "gaussian_nll",
    "gaussian_nll_loss",
    "heteroscedastic_nll",
    "log_likelihood_map",
    "variance_of",
    "vid_head",
]
