"""One variance an element on the clock: every row computes the same loss, and the report says what it gains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from stored_runs import stored_row

from bench.buffers import Pool
from bench.cases import Case
from bench.interleave import Budget
from bench.record import measure
from bench.variances import (
    BETA_NLL,
    GAUSSIAN,
    PROVIDERS,
    SOFTPLUS,
    Raws,
    VarianceContender,
    small_variance_cases,
    variance_case,
    variance_cases,
    variance_suite,
)
from vidfast.report import readme, variances
from vidfast.report.results import COMPILE, COPY, DEFAULT, IN_PLACE, TORCH_LOSS, VARIANCES, load

NOISE = (1.0, 1.02, 0.98, 1.01, 0.99, 1.015, 0.985)


def small(loss: str, dtype: torch.dtype = torch.float32) -> Case:
    return replace(variance_case((6, 5, 7, 3), dtype, loss, "cpu"), cold=False, fewest=0)


def test_cases_are_those_of_the_papers_shapes() -> None:
    short, full = (variance_cases(VARIANCES, full, "cpu") for full in (False, True))
    assert len({case.key for case in full}) == len(full) == 24
    assert {case.shape for case in short} < {case.shape for case in full}
    assert {case.dtype for case in short} == {torch.float32, torch.bfloat16}
    assert small_variance_cases(VARIANCES, True, "cpu")[0].elements < 1000


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda p: p.name)
@pytest.mark.parametrize("loss", [GAUSSIAN, BETA_NLL, SOFTPLUS])
def test_every_row_computes_the_loss(loss: str, provider: Any) -> None:
    case = small(loss)
    pool = Pool(case, slots=2)
    raws = Raws(case, pool)
    contender = VarianceContender(provider, case, pool, raws, provider.build(case))
    for _ in range(3):  # in place it finds its inputs as they were
        errors = contender.errors()
        assert errors is not None
        assert errors.loss < 1e-5
        assert errors.grad_mean is not None
        assert errors.grad_alpha is not None
        assert max(errors.grad_mean, errors.grad_alpha) < 1e-5
    assert all(torch.equal(raws.of(slot), raws.pristine) for slot in pool.slots)
    moved = contender.traffic()
    assert (moved is None) == (provider.family != "vidfast")
    assert moved is None or moved.nbytes == 5 * case.nbytes


def test_a_wrong_gradient_shows() -> None:
    case = small(SOFTPLUS)
    pool = Pool(case, slots=1)
    raws = Raws(case, pool)
    contender = VarianceContender(PROVIDERS[2], case, pool, raws, PROVIDERS[2].build(case))
    loss, (of_mean, of_raw) = contender.prepare()()  # type: ignore[misc]
    errors = contender.errors_of((1.01 * loss, (of_mean, 1.1 * of_raw)))
    assert errors is not None
    assert errors.loss == pytest.approx(0.01, rel=0.1)
    assert errors.grad_mean is not None
    assert errors.grad_mean < 1e-5
    assert errors.grad_alpha == pytest.approx(0.1, rel=0.1)


def test_a_case_is_measured_whole() -> None:
    case, suite = small(GAUSSIAN, torch.bfloat16), variance_suite(False, "cpu")
    rows = measure(case, suite, suite.names(case), Budget(0.0, fewest=1, most=1, warm_ups=1))
    assert set(rows) == {COPY, *(f"{p.name} g=1" for p in PROVIDERS)}
    for name, row in rows.items():
        assert row.failure is None, name
        assert row.info is not None
        assert (row.info["bytes"] is not None) == (name == COPY or name.startswith("vidfast"))


def stored(case: str, milliseconds: dict[str, float], **facts: object) -> list[Any]:
    families = {TORCH_LOSS: "eager", COMPILE: "compile", COPY: "copy"}
    return [
        stored_row(
            name, [1e-3 * value * factor for factor in NOISE], suite=VARIANCES, case=case,
            family=families.get(name, "vidfast"), **facts,
        )
        for name, value in milliseconds.items()
    ]  # fmt: skip


def test_the_report_says_what_is_gained_and_where_it_is_lost(store: Any) -> None:
    rows = [
        *stored(
            "first", {TORCH_LOSS: 100.0, COMPILE: 20.0, DEFAULT: 10.0, IN_PLACE: 8.0}, share_of_copy=0.93
        ),
        *stored("second", {TORCH_LOSS: 100.0, COMPILE: 20.0, DEFAULT: 30.0, IN_PLACE: 8.0}),
    ]
    run = load(store("run", rows))
    text = "\n".join(variances.blocks(run))
    first = next(line for line in text.splitlines() if line.startswith("| first"))
    assert "10.0x / 12.5x" in first
    assert "2.00x / 2.50x" in first
    assert "93% / 93%" in first
    assert "second, vidfast default: 1.50 times the time of torch.compile" in text
    assert all(part in readme.block([run]) for part in variances.blocks(run))
    assert not variances.shortfalls(run), "the default's are in tables.shortfalls"
    assert any("One variance an element" in str(section) for section in variances.sections(run))
