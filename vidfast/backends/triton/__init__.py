"""The Triton back end: `launch` launches what `plan` cuts, the programs are in `kernels`."""

from vidfast.backends.triton.launch import BACKEND as BACKEND
from vidfast.backends.triton.launch import TritonBackend as TritonBackend
