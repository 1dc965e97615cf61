"""What computes in fp32 under autocast does so in a compiled graph too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vidfast.reference import no_autocast


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gram(x: Tensor) -> Tensor:
    """A matrix product, as NST's and ITRD's: autocast would make it bf16."""
    with no_autocast(x):
        return x @ x.T


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_matrix_product_stays_in_fp32(backend: str) -> None:
    x = torch.randn(17, 33)
    compiled = torch.compile(gram, fullgraph=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = compiled(x)
        assert (x @ x.T).dtype is torch.bfloat16, "autocast is on"
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, x @ x.T, rtol=1e-5, atol=1e-5)


def test_it_leaves_autocast_as_it_was() -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return gram(x), x @ x.T

    x = torch.randn(5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        inside, behind = torch.compile(both, fullgraph=True, backend="aot_eager")(x)
    assert (inside.dtype, behind.dtype) == (torch.float32, torch.bfloat16)
