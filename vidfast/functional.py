"""The losses as functions, where torch keeps its own: `torch.nn.functional` has the functions of its modules."""

from vidfast.head.call import vid_head
from vidfast.nll import gaussian_nll, log_likelihood_map

__all__ = ["gaussian_nll", "log_likelihood_map", "vid_head"]
