"""The free numbers of csrc/cuda/chunks.h: whatever a search sets them to, the results are right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import vidfast
from bench.gpu.tuning import GRID, TOGETHER, free_number, free_numbers, missing, named
from vidfast import backends
from vidfast.backends.cuda import CudaBackend

CHUNKS = Path(__file__).parents[2] / "csrc" / "cuda" / "chunks.h"
# Planes, pieces of planes, small planes in joined rows, many row chunks, logits; 17x19: planes or rows, by kPlane.
SHAPES = [(3, 5, 33, 33), (2, 2, 9001), (6, 24, 7, 7), (20011, 8), (33, 1000), (7, 3, 17, 19)]


@pytest.fixture(autouse=True)
def _as_cuda(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(backends._loaded, "cuda", CudaBackend(native, None, "cpu", lambda index: 0))
    before = native.cuda_free_numbers()
    yield
    assert native.cuda_free_numbers() == before, "every number is as it was"


def in_the_header() -> dict[str, int]:
    return {
        name: int(value)
        for name, value in re.findall(r"^VIDFAST_FREE (k\w+) = (\d+);", CHUNKS.read_text(), re.MULTILINE)
    }


def test_all_of_them_can_be_set_and_are_tried(native: ModuleType) -> None:
    assert native.cuda_free_numbers() == in_the_header()
    assert set(GRID) == set(in_the_header())
    for name, values in GRID.items():
        assert in_the_header()[name] not in values, f"{name}: the built value is measured as it is"
    assert missing(["cuda", "triton"]) is None
    assert "does not run" in str(missing(["triton"]))


@pytest.mark.parametrize(
    "values", [*({name: v} for name, values in GRID.items() for v in values), *TOGETHER], ids=named
)
def test_the_results_are_right_with_every_value(values: dict[str, int]) -> None:
    for number, shape in enumerate(SHAPES):
        torch.manual_seed(number)
        dtype = torch.bfloat16 if number % 2 else torch.float32
        mean, target = (torch.randn(shape).to(dtype) for _ in range(2))
        alpha = torch.randn(shape[1])

        def results(
            backend: str, mean: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor
        ) -> list[torch.Tensor]:
            m, a = mean.detach().requires_grad_(), alpha.detach().requires_grad_()
            loss = vidfast.gaussian_nll(m, target, a, backend=backend, reduction="sum")
            return [loss.detach(), *torch.autograd.grad(loss, (m, a))]

        wide = [x.double() for x in (mean, target, alpha)]
        want = results("reference", *wide)
        with free_numbers(values):
            got = results("cuda", mean, target, alpha)
            again = results("cuda", mean, target, alpha)
        for g, w in zip(got, want, strict=True):
            rounding = 8e-3 if g.dtype is torch.bfloat16 else 1e-5
            torch.testing.assert_close(g.double(), w, rtol=rounding, atol=1e-4 * float(w.abs().max()))
        assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))


def test_a_plan_made_before_is_not_kept() -> None:
    """The workspace's size is remembered by shape: it must be asked for anew under another number, and again behind."""
    numbers_of = backends.load("cuda")._workspace_length  # type: ignore[attr-defined]
    problem = ((64, 8, 4096, 8 * 4096, 8 * 4096), 0, 0)
    before = numbers_of(*problem)
    with free_number("kChunks", 1 << 20), free_number("kFewestVectors", 16):
        assert numbers_of(*problem) > before, "smaller chunks have more sums"
    assert numbers_of(*problem) == before


def fails_inside(native: ModuleType) -> None:
    with free_number("kPlane", 64):
        assert native.cuda_free_numbers()["kPlane"] == 64
        raise RuntimeError("inside")


def test_a_number_is_put_back_after_an_error(native: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="inside"):
        fails_inside(native)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("kShare", 0, "at least 1"), ("kNone", 1, "must be one of kPlane, .*got kNone")],
)
def test_what_cannot_be_set_is_an_error(native: ModuleType, name: str, value: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        native.cuda_set_free_number(name, value)
