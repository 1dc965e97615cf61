"""Masks on the clock: what is drawn, what is counted, and that every row computes the masked loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import masks
from bench.accuracy import Oracle
from bench.buffers import EPS, Pool
from bench.cases import Case
from bench.gpu import measuring
from bench.interleave import Budget
from bench.masked import (
    PIXELS,
    TOKENS,
    indexed_formula,
    masked_case,
    masked_cases,
    masked_formula,
    masked_suite,
    small_masked_cases,
)
from bench.masks import IGNORED, LINE, PADDING, SECTOR, Mask, nbytes_of_a_pass, of_case
from bench.providers import StepContender
from bench.record import measure
from vidfast import gaussian_nll

SHORT = replace(TOKENS, sequence=16)


def small(shape: tuple[int, ...], mask: Mask, dtype: torch.dtype = torch.float32, last: bool = False) -> Case:
    return replace(masked_case("masks", shape, dtype, mask, "cpu", last), cold=False, fewest=0)


SMALL = [
    small((64, 5), SHORT),
    small((64, 5), replace(SHORT, dtype=torch.int64)),
    small((64, 5), replace(SHORT, dtype=torch.float32)),
    small((2, 5, 9, 7), PIXELS),
    small((2, 5, 9, 7), replace(PIXELS, dtype=torch.float32), last=True),
]
BY_TITLE = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.title)


# ---- what is drawn


@pytest.mark.parametrize("case", masked_cases("masks", True, "cpu"), ids=lambda case: case.title)
def test_a_mask_leaves_out_its_share_and_is_the_same_every_time(case: Case) -> None:
    mask = of_case(case)
    assert case.mask is not None
    assert mask.dtype is case.mask.dtype
    assert mask.numel() == case.elements // case.channels
    assert abs(float((mask == 0).double().mean()) - case.mask.share) < 1e-4
    of_case.cache_clear()
    assert torch.equal(of_case(case), mask)
    if mask.dtype.is_floating_point:
        counts = mask[mask != 0]
        assert 0 < float(counts.min()) < 0.1 < 0.9 < float(counts.max()) <= 1


def test_the_cases_are_the_issues_and_have_names_of_their_own() -> None:
    short, full = (masked_cases("masks", full, "cpu") for full in (False, True))
    assert [(case.shape, case.dtype, case.channel_dim) for case in short] == [
        ((32 * 512, 768), torch.bfloat16, -1),
        ((4, 256, 129, 129), torch.bfloat16, 1),
        ((4, 256, 129, 129), torch.float32, 1),
    ]
    assert full[:3] == short
    assert len({case.key for case in full}) == len(full)
    assert {case.mask.dtype for case in full if case.mask} == {torch.bool, torch.int64, torch.float32}
    assert any(case.layout == "channels_last" for case in full)
    assert {case.extra["walk"] for case in small_masked_cases("masks", True, "cpu")} == {"rows", "planes"}


@pytest.mark.parametrize("sequences", [1, 2, 7, 32])
def test_padding_is_the_end_of_every_sequence(sequences: int) -> None:
    counts = of_case(small((sequences * 512, 3), TOKENS)).view(sequences, 512)
    lengths = counts.sum(1)
    assert torch.equal(counts, torch.arange(512) < lengths[:, None])
    assert int(lengths.sum()) in (int(0.6 * 512 * sequences), round(0.6 * 512 * sequences))
    assert 0.2 * 512 <= int(lengths.min()) <= int(lengths.max()) <= 512
    if sequences == 32:
        assert len(lengths.unique()) > 20, "lengths of their own"


def test_ignored_pixels_are_discs_and_single_ones() -> None:
    counts = of_case(small((4, 2, 129, 129), PIXELS))
    ignored = (~counts).float()
    assert torch.equal(ignored.sum((1, 2)), torch.full((4,), float(round(0.1 * 129 * 129))))
    around = torch.nn.functional.avg_pool2d(ignored[:, None], 3, 1, 1, divisor_override=1)[:, 0] - ignored
    alone = float(((ignored == 1) & (around <= 1)).sum() / ignored.sum())
    inside = float(((ignored == 1) & (around == 8)).sum() / ignored.sum())
    assert 0.05 < alone < 0.15
    assert inside > 0.5
    assert not torch.equal(counts[0], counts[1])


# ---- what is counted


@pytest.mark.parametrize("last", [False, True])
def test_bytes_are_those_of_lines_in_which_anything_counts(
    last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(1, 2, 4, 16) in fp32: a line is a row of a plane, or eight pixels with their channels."""
    case = small((1, 2, 4, 16), PIXELS, last=last)
    mask = torch.ones(1, 4, 16, dtype=torch.bool)
    mask[0, 1] = False
    mask[0, 2, :9] = False
    monkeypatch.setattr(masks, "of_case", lambda case: mask)
    lines = 2 * 3 if not last else 8 - 2 - 1
    assert nbytes_of_a_pass.__wrapped__(case) == 2 * lines * LINE + case.nbytes + mask.nbytes


def test_bytes_of_a_gpu_are_by_sectors_and_converted_masks_are_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = small((32, 24), SHORT, torch.bfloat16)  # a row is a line less a sector
    mask = (torch.arange(32) % 2).to(torch.int64)
    monkeypatch.setattr(masks, "of_case", lambda case: mask)
    count = nbytes_of_a_pass.__wrapped__
    written = case.nbytes + 8 * 32 + 2 * 4 * 32
    assert count(case) == 2 * case.nbytes + written, "every line has something of the next row"
    monkeypatch.setattr(Case, "on_gpu", property(lambda self: True))
    assert SECTOR == 32
    assert count(case) == 2 * 16 * 2 * SECTOR + written, "two sectors of each odd row"


# ---- what is computed


@BY_TITLE
@pytest.mark.parametrize("nan", [False, True], ids=["", "NaN"])
def test_the_oracle_and_both_formulas_are_the_masked_reference(case: Case, nan: bool) -> None:
    pool = Pool(case, slots=1)
    mean, target = (x.double() for x in (pool.slots[0].mean, pool.slots[0].target))
    alpha = pool.alpha.detach().double()
    mask = of_case(case)
    where = (mask != 0).unsqueeze(case.channel_dim)
    given = torch.where(where, mean, torch.nan) if nan else mean

    def step(formula: object, mean: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaf, a = mean.clone().requires_grad_(), alpha.clone().requires_grad_()
        loss = formula(leaf, target, a)  # type: ignore[operator]
        return loss.detach(), *torch.autograd.grad(loss, (leaf, a))

    def reference(mean: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        options = {"channel_dim": case.channel_dim, "eps": EPS, "backend": "reference"}
        return gaussian_nll(mean, target, alpha, mask=mask, **options)  # type: ignore[arg-type]

    loss, grad_mean, grad_alpha = step(reference, mean)
    oracle = Oracle(case, mean, target, alpha, EPS, mask)
    errors = oracle.errors(loss, (grad_mean, grad_alpha))
    assert max(errors.loss, errors.grad_mean or 0.0, errors.grad_alpha or 0.0) < 1e-12
    bound = 1e-6 if mask.dtype.is_floating_point else 1e-12  # fp32 weights, and so their sum
    for formula in (indexed_formula, masked_formula):
        found = step(formula(case), given)
        for x, wanted in zip(found, (loss, grad_mean, grad_alpha), strict=True):
            torch.testing.assert_close(x, wanted, rtol=bound, atol=1e-14)


@BY_TITLE
def test_every_row_is_measured_and_right(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those without the mask are held against the loss without it."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    suite = masked_suite(False, "cpu")
    names = suite.names(case)
    assert names == [
        "copy",
        "indexing g=1",
        "torch.compile g=1",
        "vidfast cpu one_pass without a mask g=1",
        "vidfast cpu one_pass g=1",
        "vidfast cpu one_pass in place without a mask g=1",
        "vidfast cpu one_pass in place g=1",
    ]
    rows = measure(case, suite, names, Budget(0.0, fewest=2, most=2))
    for name, row in rows.items():
        assert row.failure is None, f"{name}: {row.failure}"
        assert row.info is not None
        assert row.info["mask"] == case.extra["mask"]
        errors = row.info.get("error") or {}
        assert all(error < 2e-6 for error in errors.values()), name
        assert bool(errors) == (name != "copy")
        if name.startswith("vidfast"):
            counted = 3 * case.nbytes if "without" in name else nbytes_of_a_pass(case)
            assert row.info["bytes"] == counted, name


def test_a_row_that_forgets_the_mask_has_its_error_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr("bench.masked.vidfast_loss", forgetful)
    suite, case = masked_suite(False, "cpu"), SMALL[0]
    rows = measure(case, suite, suite.names(case), Budget(0.0, fewest=2, most=2))
    info = rows["vidfast cpu one_pass g=1"].info
    assert info is not None
    assert info["error"]["grad_mean"] > 0.1


def forgetful(backend: str, strategy: str, inplace: bool, masked: bool = False) -> object:
    from bench.providers import vidfast_loss

    return vidfast_loss(backend, strategy, inplace)


def test_on_a_gpu_all_but_indexing_are_graphs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.masked.runnable", lambda device: ["cuda", "triton"])
    (case, *_) = masked_cases("masks", False, "cuda")
    names = masked_suite(False, "cuda").names(case)
    graphs = [name for name in names if name.endswith(" graph g=1")]
    assert len(graphs) == 1 + 2 * 4
    assert len(names) == 1 + 2 + 2 * 4 + len(graphs)
    assert not any("indexing" in name for name in graphs)


@pytest.mark.parametrize("small", [False, True])
def test_the_stage_of_a_gpu_compiles_side_by_side_and_measures_every_case(
    small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before that nothing asks the device: processes that are forked later could not use it."""
    compiled: list[str] = []
    chosen: list[Case] = []

    def asked(device: str) -> list[str]:
        raise AssertionError("the device was asked")

    def note(job: object, pairs: list[tuple[object, Case]], seconds: float) -> int:
        chosen.extend(case for _, case in pairs)
        return 0

    monkeypatch.setattr("bench.masked.runnable", asked)
    monkeypatch.setattr(measuring, "compile_all", lambda job, calls: compiled.extend(calls))
    monkeypatch.setattr(measuring, "measured", note)
    assert measuring.masks(SimpleNamespace(small=small)) == 0  # type: ignore[arg-type]
    cases = small_masked_cases if small else masked_cases
    assert chosen == cases("masks", True, "cuda")
    assert len(compiled) == 3 * len(chosen)


def test_what_is_compiled_ahead_are_rows_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Callable[[], object]] = {}
    ran: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(measuring, "compile_all", lambda job, made: calls.update(made))
    monkeypatch.setattr(StepContender, "prepare", lambda self: lambda: ran.append(self.provider.name))
    monkeypatch.setattr("bench.masked.runnable", lambda device: ["cuda", "triton"])
    suite, case = masked_suite(True, "cpu"), SMALL[0]
    measuring.warm_masks(SimpleNamespace(), suite, [case])  # type: ignore[arg-type]
    for call in calls.values():
        call()
    assert ran == ["torch.compile", "vidfast triton one_pass", "vidfast triton one_pass without a mask"]
    assert {f"{name} g=1" for name in ran} <= set(suite.names(case))


@pytest.mark.parametrize("kind", [PADDING, IGNORED])
def test_a_title_says_what_does_not_count(kind: str) -> None:
    assert Mask(kind, 0.25).title == f"25% {kind}"
    assert Mask(kind, 0.25, torch.int64).title == f"25% {kind} int64 mask"
