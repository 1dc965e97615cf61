"""The checks of a GPU's first minute, on the CPU back end: right results pass, each kind of wrong one is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu import smoke
from bench.gpu.smoke import (
    BF16,
    F16,
    F32,
    F64,
    LAYOUTS,
    MASKS,
    PAIRS,
    STRATEGIES,
    Problem,
    check,
    mask_of,
    masked_problems,
    problems,
)
from vidfast import primitives

SHAPES = ((2, 3, 9, 9), (4, 24, 7, 7), (33, 10), (2, 5, 103))


def test_every_combination_is_there() -> None:
    found = problems(["cuda"], SHAPES)
    assert {p.strategy for p in found} == set(STRATEGIES)
    assert {p.layout for p in found} == set(LAYOUTS)
    assert {(p.mean_dtype, p.target_dtype) for p in found} == set(PAIRS)
    assert {dtype for pair in PAIRS for dtype in pair} == {F32, F64, BF16, F16}
    assert len(set(found)) == len(found)
    assert len({p.title for p in found}) == len(found)
    assert {p.shape for p in problems(["triton"], smoke.SHAPES)} == set(smoke.SHAPES[: smoke.TRITON_SHAPES])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_right_back_end_passes(shape: tuple[int, ...]) -> None:
    for problem in problems(["cpu"], [shape]):
        assert check(problem, "cpu") == {}, problem.title


def test_every_mask_is_there_in_planes_and_in_rows() -> None:
    for small in (False, True):
        for backend in ("cuda", "triton"):
            found = masked_problems([backend], small)
            assert len({p.title for p in found}) == len(found)
            assert {(p.mask, p.strategy) for p in found} == {(m, s) for m in MASKS for s in STRATEGIES}
            assert {len(p.shape) == 2 for p in found} == {True, False}
    assert not {p.title for p in masked_problems(["cuda"])} & {
        p.title for p in problems(["cuda"], smoke.SHAPES)
    }


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(2, 3, 9, 9), (33, 10), (2, 5, 103)], ids=str)
def test_a_right_back_end_passes_with_every_mask(shape: tuple[int, ...], mask: str) -> None:
    for pair in smoke.MASKED_PAIRS:
        for strategy in STRATEGIES:
            problem = Problem("cpu", shape, *pair, "contiguous", strategy, mask)
            assert check(problem, "cpu") == {}, problem.title
    drawn = mask_of(problem, "cpu")
    assert drawn.shape == (shape[0], *shape[2:])
    assert not drawn[0].any(), "a whole sample"
    assert bool((drawn != 0).any()) == (mask != "zeros")
    assert drawn.dtype == {"integers": torch.int64, "fractions": torch.float32}.get(mask, torch.bool)


def write_where_nothing_counts(results: list[Any], mask: Tensor) -> None:
    results[1].movedim(1, -1)[mask == 0] = 1e-6


@pytest.mark.parametrize("pair", [(F32, F32), (BF16, BF16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mask", MASKS)
def test_a_gradient_where_nothing_counts_is_noticed(
    mask: str, pair: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem("cpu", SHAPES[0], *pair, "contiguous", "one_pass", mask)
    weights = mask_of(problem, "cpu")
    wrong = spoiled("forward_grad", lambda results: write_where_nothing_counts(results, weights))
    monkeypatch.setattr(primitives, "forward_grad", wrong)
    assert f"d mean: {3 * int((weights == 0).sum())} of" in check(problem, "cpu").get("error", "nothing")


@pytest.mark.parametrize("mask", MASKS)
def test_a_back_end_that_forgets_the_mask_is_noticed(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = primitives.forward_grad

    def forgets(*arguments: Any) -> Any:
        *others, counts = arguments
        return original(*others, counts._replace(positions=None))

    monkeypatch.setattr(primitives, "forward_grad", forgets)
    problem = Problem("cpu", SHAPES[0], F32, F32, "contiguous", "one_pass", mask)
    said = check(problem, "cpu").get("error", "")
    if mask == "zeros":
        assert not said, "k is 0 there, which the totals say"
    else:
        assert "loss" in said
        assert "d mean" in said


def spoiled(primitive: str, spoil: Callable[[list[Any]], None]) -> Callable[..., Any]:
    """The primitive of the CPU back end with its results changed."""
    original = getattr(primitives, primitive)

    def run(*arguments: Any, **options: Any) -> Any:
        results = list(original(*arguments, **options))
        spoil(results)
        return tuple(results)

    return run


def at(index: int, change: Callable[[Tensor], None]) -> Callable[[list[Any]], None]:
    def spoil(results: list[Any]) -> None:
        if results[index] is not None:
            change(results[index])

    return spoil


def last_element(x: Tensor) -> Tensor:
    return x.view(-1)[-1:] if x.is_contiguous() else x[(-1,) * x.dim()].unsqueeze(0)


CHANGES: dict[str, tuple[str, str, Callable[[list[Any]], None], str]] = {
    "loss": ("one_pass", "forward_grad", at(0, lambda x: x.mul_(1 + 1e-4)), "loss"),
    "loss without gradients": ("forward", "forward", at(0, lambda x: x.add_(1.0)), "loss"),
    "a loss that is NaN": ("forward", "forward", at(0, lambda x: x.fill_(torch.nan)), "loss"),
    "one element of d mean": (
        "one_pass",
        "forward_grad",
        at(1, lambda x: last_element(x).mul_(1.05)),
        "d mean: 1 of",
    ),
    "an element that was not written": (
        "one_pass in place",
        "forward_grad",
        at(1, lambda x: last_element(x).fill_(torch.nan)),
        "d mean: 1 of",
    ),
    "one channel of d alpha": (
        "one_pass",
        "forward_grad",
        at(2, lambda x: x[-1:].mul_(1.01)),
        "d alpha: 1 of",
    ),
    "d mean in backward": ("two_pass", "backward", at(0, lambda x: x.mul_(1.05)), "d mean"),
    "d target": ("two_pass", "backward", at(1, lambda x: last_element(x).neg_()), "d target: 1 of"),
    "the scale": ("one_pass", "scale", at(0, lambda x: x.mul_(1.05)), "d mean"),
}


@pytest.mark.parametrize("pair", [(F32, F32), (BF16, BF16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("what", list(CHANGES))
def test_a_wrong_result_is_noticed(
    what: str, pair: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy, primitive, spoil, says = CHANGES[what]
    monkeypatch.setattr(primitives, primitive, spoiled(primitive, spoil))
    problem = Problem("cpu", SHAPES[0], *pair, "contiguous", strategy)
    assert says in check(problem, "cpu").get("error", "nothing was noticed")


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_the_bound_of_a_gradient_is_a_few_units_of_its_dtype(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times the bound is noticed in every dtype: no bound hides a wrong digit."""
    factor = 1 + 3 * smoke.UNITS[dtype] * torch.finfo(dtype).eps
    change = at(1, lambda x: x.copy_(x.double() * factor))
    monkeypatch.setattr(primitives, "forward_grad", spoiled("forward_grad", change))
    problem = Problem("cpu", SHAPES[0], dtype, dtype, "contiguous", "one_pass")
    assert "d mean" in check(problem, "cpu").get("error", "nothing was noticed")


@pytest.mark.parametrize("option", ["--few", "--smallest"])
def test_a_part_of_the_calls_has_every_strategy_layout_and_pair(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Problem] = []
    monkeypatch.setattr(smoke, "check", lambda problem, device: seen.append(problem) or {})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert smoke.main(["cuda", option]) == 0
    assert {p.strategy for p in seen} == set(STRATEGIES)
    assert {p.layout for p in seen} == set(LAYOUTS)
    assert {(p.mean_dtype, p.target_dtype) for p in seen} == set(PAIRS)
    assert {(p.mask, p.strategy) for p in seen} >= {(m, s) for m in MASKS for s in STRATEGIES}
    assert 50 < len(seen) < 280


def test_as_a_program_it_counts_and_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = smoke.check
    monkeypatch.setattr(smoke, "check", lambda problem, device: original(problem, "cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert smoke.main(["cpu", "--smallest"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1].endswith(" calls, 0 of them wrong")
    monkeypatch.setattr(smoke, "check", lambda problem, device: {"error": "d mean: all"})
    assert smoke.main(["cpu", "--smallest"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "cpu 2x2x33x33 float32/float32 contiguous one_pass: d mean: all"
