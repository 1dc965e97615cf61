"""What a report says of masks: times, ratios to what people do today, and what a mask costs over none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from stored_runs import Row, stored_row

from vidfast.report import main, masks, readme
from vidfast.report.results import HEAD, MASKS, STEP, Run, load

Store = Callable[..., Path]
NOISE = (1.0, 1.02, 0.98, 1.01, 0.99, 1.015, 0.985)
PLANES, ROWS = "4x2x9x9 float32 10% ignored", "32x12 bfloat16 channel_dim=-1 40% padding"
GPU = {"name": "GPU Y", "memory_bytes": 1 << 34, "capability": "9.0"}
BASELINES = {"indexing": "eager", "torch.compile": "compile"}


def mask_rows(
    baselines: Sequence[float],
    ours: Sequence[float],
    case: str = PLANES,
    backend: str = "cpu",
    suffix: str = "",
    **facts: object,
) -> list[Row]:
    """Milliseconds of indexing and torch.compile; of one pass without and with the mask, then of both in place."""
    names = [
        f"vidfast {backend} {s}{e}"
        for s in ("one_pass", "one_pass in place")
        for e in (" without a mask", "")
    ]
    facts |= {"walk": "planes" if case == PLANES else "rows", "mask": "some"}
    facts |= {"graph": True, "peak_extra_bytes": None} if suffix else {}
    given = [*zip(BASELINES, baselines, strict=False), *zip(names, ours, strict=True)]
    return [
        stored_row(
            name + suffix,
            [1e-3 * value * factor for factor in NOISE],
            suite=MASKS,
            case=case,
            family=BASELINES.get(name, "vidfast"),
            **facts,
        )
        for name, value in given
        if not (suffix and name == "indexing")
    ]


def lines(text: str, case: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith(f"| {case} |")
    ]


def test_the_readme_has_times_and_ratios_behind_the_bare_loss(store: Store) -> None:
    bare = [stored_row("eager", [9e-3] * 5), stored_row("vidfast cpu one_pass in place", [1e-3] * 5)]
    rows = [*mask_rows((20, 8), (2, 2.2, 1.6, 1.6)), *mask_rows((30, 9), (4, 3, 2, 1), case=ROWS), *bare]
    block = readme.block([load(store("run", rows))])
    (cells,) = lines(block, PLANES)
    assert cells[1:] == [
        *("20.0 ms", "8.00 ms", "2.00 ms", "2.20 ms", "1.60 ms", "1.60 ms"),
        *("9.09x / 12.5x", "3.64x / 5.00x", "1.10 / 1.00 (tie)"),
    ]
    (cells,) = lines(block, ROWS)
    assert cells[-3:] == ["10.0x / 30.0x", "3.00x / 9.00x", "0.75 / 0.50"]
    assert block.index("| 8x4x2x2 float32 |") < block.index(PLANES)
    assert (
        "planes at most 1.15 in 2 of 2, rows at most 1.05 in 2 of 2. Slower beyond the noise: nowhere."
        in block
    )


def test_a_run_without_masks_says_nothing_of_them(store: Store, tmp_path: Path) -> None:
    path = store("run", [stored_row("eager", [1e-3] * 5)])
    assert masks.blocks(load(path)) == []
    assert "mask" not in readme.block([load(path)])
    assert main([str(path), "--output", str(tmp_path)]) == 0
    assert "Masks" not in (tmp_path / "report.md").read_text()


def test_a_run_of_masks_alone_has_no_other_table(store: Store) -> None:
    block = readme.block([load(store("run", mask_rows((20, 8), (2, 2, 1, 1))))])
    assert "in place vs eager" not in block
    assert PLANES in block


def test_rows_that_are_missing_leave_their_cells_empty(store: Store) -> None:
    rows = mask_rows((20, 8), (2, 2.2, 1.6, 1.6))
    some = [
        row for row in rows if row["fullname"] not in ("torch.compile", "vidfast cpu one_pass without a mask")
    ]
    (cells,) = lines(masks.blocks(load(store("some", some)))[0], PLANES)
    assert cells[1:] == [
        "20.0 ms",
        "",
        "",
        "2.20 ms",
        "1.60 ms",
        "1.60 ms",
        "9.09x / 12.5x",
        "",
        "1.00 (tie)",
    ]


def test_back_ends_have_lines_of_their_own_and_graphs_a_table(store: Store) -> None:
    rows = [*mask_rows((20, 8), (2, 2, 1, 1), backend="cuda"), *mask_rows((), (3, 3, 2, 2), backend="triton")]
    rows += mask_rows((20, 4), (0.5, 1, 0.25, 0.5), backend="cuda", suffix=" graph")
    path = store("gpu", rows, gpu=GPU)
    steps, graphs, text = masks.blocks(load(path))
    assert [cells[1] for cells in lines(steps, PLANES)] == ["cuda", "triton"]
    (cells,) = lines(graphs, PLANES)
    assert cells[1:] == [
        *("cuda", "4.00 ms", "500 us", "1.00 ms", "250 us", "500 us", "4.00x / 8.00x", "2.00 / 2.00")
    ]
    assert "planes at most 1.15 in 4 of 6." in text
    assert steps in readme.block([load(path)])
    assert "as a CUDA graph" in readme.block([load(path)])


@pytest.mark.parametrize(
    ("case", "with_mask", "dear"), [(PLANES, 2.2, 0), (ROWS, 2.2, 2), (PLANES, 2.6, 2), (ROWS, 2.08, 0)]
)
def test_a_mask_that_costs_too_much_is_listed(
    case: str, with_mask: float, dear: int, store: Store, tmp_path: Path
) -> None:
    """1.15 for planes and 1.05 for rows; what the noise may be is not listed."""
    path = store("run", mask_rows((20, 8), (2, with_mask, 2, with_mask), case=case))
    assert main([str(path), "--output", str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    assert page.count("times the time without the mask (aim:") == dear
    assert f"in {2 - dear} of 2." in page
    assert ("Nowhere, beyond the noise." in page) == (dear == 0)


def test_what_is_faster_today_is_listed(store: Store, tmp_path: Path) -> None:
    path = store("run", mask_rows((1, 3), (2, 2, 2, 4)))
    assert main([str(path), "--output", str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    assert f"- masks, {PLANES}, vidfast cpu one_pass: 2.00 times the time of indexing" in page
    assert f"- masks, {PLANES}, vidfast cpu one_pass in place: 1.33 times the time of torch.compile" in page
    assert (
        "Slower beyond the noise: than indexing in 2 rows (2.00 to 4.00 times the time); "
        "than torch.compile in 1 rows (1.33 times the time)." in page
    )
    assert f"#### masks: {PLANES}" in page, "every row is there"
    assert page.count("### Masks") == 1


def dated(run: Run, date: str, suites: Sequence[str]) -> Run:
    return replace(run, date=date, rows=[row for row in run.rows if row.suite in suites])


def test_the_latest_masks_of_a_machine_are_in_the_readme(store: Store) -> None:
    step = stored_row("vidfast cpu one_pass in place", [1e-3] * 5)
    head = stored_row("vidfast default", [1e-3] * 5, suite=HEAD)
    whole = load(store("run", [*mask_rows((20, 8), (2, 2, 1, 1)), step, head], gpu=GPU))
    everything, bare, heads = (MASKS, STEP, HEAD), (STEP,), (HEAD,)
    old = {suites: dated(whole, "2025-01-01", suites) for suites in (everything, (MASKS,), bare)}
    new = {suites: dated(whole, "2025-01-02", suites) for suites in (everything, (MASKS,), bare, heads)}

    def superseded(before: tuple[str, ...], after: tuple[str, ...]) -> bool:
        return readme.superseded(old[before], [old[before], new[after]])

    assert superseded(everything, everything)
    assert superseded((MASKS,), everything)
    assert superseded((MASKS,), (MASKS,))
    assert superseded(bare, everything)
    assert not superseded(everything, bare), "the only one with masks"
    assert not superseded((MASKS,), bare)
    assert not superseded((MASKS,), heads)
    assert not superseded(bare, (MASKS,))


def test_of_two_runs_on_a_processor_the_later_masks_are_shown(store: Store) -> None:
    older = replace(load(store("older", mask_rows((20, 8), (2, 2, 1, 1)))), date="2026-01-01T10:00:00")
    newer = replace(load(store("newer", mask_rows((40, 8), (2, 2, 1, 1)))), date="2026-01-01T11:00:00")
    for runs in ([older, newer], [newer, older]):
        block = readme.block(runs)
        assert "40.0 ms" in block
        assert "20.0 ms" not in block
