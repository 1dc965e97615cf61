"""The CUDA back end where it cannot run: it imports, says why, and `auto` goes on."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import vidfast
from vidfast import backends
from vidfast.backends.cuda import BACKEND, CudaBackend


def test_without_native_code_it_says_how_to_build() -> None:
    backend = CudaBackend(None, "built without CUDA")
    assert backend.unavailable() == "built without CUDA"
    assert backend.info() == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_named_and_passed_over() -> None:
    reason = BACKEND.unavailable()
    assert reason
    facts = vidfast.info()["backends"]
    assert isinstance(facts, dict)
    assert facts["cuda"] == {"available": False, "reason": reason}
    x = torch.zeros(2, 3)
    with pytest.raises(
        RuntimeError, match="backend='cuda' cannot run here: it takes tensors on a CUDA device"
    ):
        vidfast.gaussian_nll(x, x, x[0], backend="cuda")
    chosen = backends.choose("auto", x, x, x[0], None)
    assert chosen.name != "cuda"


def test_importing_touches_no_device() -> None:
    """No context is made by `import vidfast`: a process may fork, or choose its GPU, afterwards."""
    code = "import vidfast, torch, vidfast.backends.cuda; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)
