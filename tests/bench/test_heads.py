"""What a report says of heads, a pair's regressor and loss: times, memory, precisions, and where they do not lead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from stored_runs import Row, stored_row

from vidfast.report import heads, main, readme
from vidfast.report.results import HEAD, TRAINING, load

Store = Callable[..., Path]
NOISE = (1.0, 1.02, 0.98, 1.01, 0.99)
NAMES = ("eager", "torch.compile", "vidfast default", "vidfast compiled")
CASE = "8x4x2x2 float32 from 2"
IN_BF16 = f"{CASE} autocast bfloat16"


def head_rows(
    milliseconds: Sequence[float],
    kilobytes: Sequence[float] = (100, 60, 15, 25),
    case: str = CASE,
    suffix: str = "",
    **facts: object,
) -> list[Row]:
    """A row for each of NAMES. A graph has no peak."""
    if suffix:
        facts |= {"graph": True}
    return [
        stored_row(
            name + suffix,
            [1e-3 * value * factor for factor in NOISE],
            suite=HEAD,
            case=case,
            family={"eager": "eager", "torch.compile": "compile"}.get(name, "vidfast"),
            gb_per_s=None,
            bytes=None,
            peak_extra_bytes=None if suffix else 1e3 * peak,
            **facts,
        )
        for name, value, peak in zip(NAMES, milliseconds, kilobytes, strict=True)
    ]


def cells(text: str, case: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {case} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_readme_has_heads_first_with_times_memory_and_gains(store: Store) -> None:
    bare = [stored_row("eager", [9e-3] * 5), stored_row("vidfast cpu one_pass in place", [1e-3] * 5)]
    rows = [*bare, *head_rows((8, 4, 2, 5)), *head_rows((6, 2, 4, 1), case=IN_BF16, autocast="bfloat16")]
    block = readme.block([load(store("run", rows))])
    assert cells(block, CASE)[1:] == [
        *("8.00 ms, 100 kB", "4.00 ms, 60.0 kB", "2.00 ms, 15.0 kB", "5.00 ms, 25.0 kB"),
        *("2.00x", "0.80x", "15% / 25%"),
    ]
    assert cells(block, IN_BF16)[5:7] == ["0.50x", "2.00x"]
    assert block.index(IN_BF16) < block.index("The loss alone") < block.index("| 8x4x2x2 float32 |")


def test_a_run_of_heads_alone_has_no_empty_table(store: Store) -> None:
    block = readme.block([load(store("run", head_rows((8, 4, 2, 5))))])
    assert "The loss alone" not in block
    assert "in place vs eager" not in block


def test_the_readme_says_where_heads_do_not_lead(store: Store) -> None:
    rows = [*head_rows((8, 4, 2, 5)), *head_rows((6, 2, 4, 2.5), case=IN_BF16, autocast="bfloat16")]
    text = heads.sentences(load(store("run", rows)))
    assert text.startswith(
        "Slower than torch.compile beyond the noise: vidfast in 1 of 2 cases (2.00 times the time); "
        "vidfast compiled in 2 of 2 cases (1.25 times the time)."
    )
    assert (
        "Peak extra memory under 20% of eager's: vidfast in 2 of 2 cases; vidfast compiled in 0 of 2" in text
    )
    assert "beyond the noise: nowhere." in heads.sentences(load(store("led", head_rows((8, 4, 2, 4)))))


@pytest.mark.parametrize(
    ("autocast", "simd", "said"),
    [
        ("bfloat16", ["avx2"], True),
        ("bfloat16", ["avx2", "avx512_bf16"], False),
        ("bfloat16", ["amx_bf16"], False),
        (None, ["avx2"], False),
    ],
)
def test_a_processor_without_bf16_products_is_named(
    autocast: str | None, simd: list[str], said: bool, store: Store
) -> None:
    run = load(store("run", head_rows((8, 4, 2, 2), autocast=autocast)))
    run.machine["cpu"]["simd"] = simd
    assert ("no instructions for products in bf16" in heads.sentences(run)) == said


def test_a_run_of_before_autocast_and_one_without_heads_are_read(store: Store) -> None:
    run = load(store("old", head_rows((8, 4, 2, 5))))
    assert {row.autocast for row in run.rows} == {None}
    assert "8.00 ms, 100 kB" in readme.block([run])
    assert heads.blocks(load(store("none", [stored_row("eager", [1.0] * 5)]))) == []
    without = [row for row in head_rows((8, 4, 2, 5)) if "compile" not in row["fullname"]]
    assert cells(heads.blocks(load(store("some", without)))[0], CASE)[2] == ""


def test_fp16_is_shown_at_the_scalers_factor(store: Store) -> None:
    case = f"{CASE} autocast float16"
    rows = head_rows((8, 4, 2, 5), case=case, autocast="float16", incoming_gradient=65536.0)
    assert cells(heads.blocks(load(store("run", rows)))[0], case)[5] == "2.00x"


def test_graphs_are_held_against_graphs(store: Store, tmp_path: Path) -> None:
    """On the host torch.compile is slower than ours, on the device alone faster."""
    gpu = {"name": "GPU Y", "memory_bytes": 1 << 34, "capability": "9.0"}
    rows = [*head_rows((8, 4, 2, 3)), *head_rows((4, 0.5, 1, 0.25), suffix=" graph")]
    path = store("gpu", rows, gpu=gpu)
    steps, graphs, text = heads.blocks(load(path))
    assert cells(steps, CASE)[5:7] == ["2.00x", "1.33x"]
    assert cells(graphs, CASE)[1:] == ["4.00 ms", "500 us", "1.00 ms", "250 us", "0.50x", "2.00x"]
    assert "vidfast, on the device alone, in 1 of 1 cases (2.00 times the time)" in text
    assert steps in readme.block([load(path)])
    assert main([str(path), "--output", str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    assert f"- VIDLoss, {CASE}, vidfast default graph, g = 1: 2.00 times the time of torch.compile" in page
    line = next(line for line in page.splitlines() if line.startswith(f"| {CASE} | vidfast default graph |"))
    assert [cell.strip() for cell in line.split("|")][6:8] == ["4.00x", "0.50x"]


def test_only_the_latest_heads_of_a_gpu_are_in_the_readme(store: Store) -> None:
    """A run of heads alone does not stand for an older one with steps."""
    gpu = {"name": "GPU Y", "memory_bytes": 1 << 34, "capability": "9.0"}
    older, newer, steps = (load(store(name, head_rows((8, 4, 2, 3)), gpu=gpu)) for name in ("a", "b", "c"))
    object.__setattr__(newer, "date", "2025-01-01")
    object.__setattr__(steps, "rows", [stored_row_of_a_step(store)])
    assert readme.superseded(older, [older, newer])
    assert not readme.superseded(newer, [older, newer])
    assert not readme.superseded(steps, [steps, newer])


def stored_row_of_a_step(store: Store) -> object:
    return load(store("step", [stored_row("eager", [1.0] * 5)])).rows[0]


def test_the_page_says_what_of_eagers_memory_a_head_takes(store: Store, tmp_path: Path) -> None:
    path = store("run", head_rows((8, 4, 2, 5)))
    assert main([str(path), "--output", str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    assert cells(page, CASE)[7:9] == ["100 kB", ""]
    ours = next(line for line in page.splitlines() if line.startswith(f"| {CASE} | vidfast default |"))
    assert [cell.strip() for cell in ours.split("|")][8:10] == ["15.0 kB", "15%"]
    assert (
        f"- VIDLoss, {CASE}, vidfast compiled, g = 1: 25% of eager's peak extra memory (aim: under 20%)"
        in page
    )
    assert f"- VIDLoss, {CASE}, vidfast compiled, g = 1: 1.25 times the time of torch.compile" in page
    assert f"{CASE}, g = 1:" not in page, "the default leads in both"


def test_a_compiled_training_step_has_no_pairs_of_its_own(store: Store, tmp_path: Path) -> None:
    rows = [
        stored_row("eager", [2.0] * 5, suite=TRAINING, pair_seconds=0.5),
        stored_row("torch.compile", [1.0] * 5, suite=TRAINING, pair_seconds=None),
        stored_row("vidfast compiled", [1.5] * 5, suite=TRAINING, pair_seconds=None),
    ]
    assert main([str(store("run", rows)), "--output", str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    line = next(line for line in page.splitlines() if "| vidfast compiled |" in line)
    assert [cell.strip() for cell in line.split("|")][6:10] == ["", "", "1.33x", "0.67x"]
    assert "- training step, 8x4x2x2 float32, vidfast compiled, g = 1: 1.50 times the time" in page


def test_a_readme_has_the_latest_heads_of_a_processor(store: Store) -> None:
    older = replace(load(store("older", head_rows((30, 20, 10, 10)))), date="2026-01-01T10:00:00")
    newer = replace(load(store("newer", head_rows((60, 40, 20, 20)))), date="2026-01-01T11:00:00")
    for runs in ([older, newer], [newer, older]):
        block = readme.block(runs)
        assert "60.0 ms" in block
        assert "30.0 ms" not in block
    assert "30.0 ms" in readme.block([older])
