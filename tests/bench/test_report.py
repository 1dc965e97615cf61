"""`vidfast report`: pages, comparisons, the README's table, and files that are no results."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from stored_runs import Row, stored_row

from vidfast.report import main, readme
from vidfast.report.results import load

Store = Callable[..., Path]
NOISE = (1.0, 1.02, 0.98, 1.01, 0.99)


def samples(seconds: float) -> list[float]:
    return [seconds * factor for factor in NOISE]


def step(eager: float = 9e-3, compiled: float = 3e-3, ours: float = 1e-3, **facts: object) -> list[Row]:
    return [
        stored_row("copy", samples(5e-4)),
        stored_row("eager", samples(eager)),
        stored_row("torch.compile", samples(compiled)),
        stored_row("vidfast default", samples(ours), **facts),
        stored_row("vidfast cpu one_pass", samples(ours)),
        stored_row("vidfast cpu one_pass in place", samples(ours / 2)),
    ]


def page_of(folder: Path) -> str:
    return (folder / "report.md").read_text()


def test_a_page_has_machine_ratios_and_figures(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(store("run", step())), "--output", str(out)]) == 0
    text = page_of(out)
    for expected in (
        "Processor X, 2 logical cores",
        "0123456789ab",
        "2024-05-06 07:08:09",
        "alone on the machine",
    ):
        assert expected in text
    line = next(line for line in text.splitlines() if line.startswith("| 8x4x2x2 float32"))
    assert [cell.strip() for cell in line.split("|")][-5:-1] == ["9.00x", "3.00x", "18.0x", "6.00x"]
    assert "Nowhere, beyond the noise." in text
    html = (out / "report.html").read_text()
    assert html.count("<svg") == 4
    assert not re.search(r'(src|href)="?https?://', html), "a page that needs nothing else"
    for name in re.findall(r"\]\((.*?\.svg)\)", text):
        assert (out / name).read_text().startswith("<svg")


def test_the_same_results_give_the_same_files(store: Store, tmp_path: Path) -> None:
    path = store("run", step())
    pages = []
    for name in ("first", "second"):
        assert main([str(path), "--output", str(tmp_path / name)]) == 0
        pages.append((tmp_path / name / "report.html").read_text())
    assert pages[0] == pages[1]


def test_where_vidfast_is_slower_the_page_says_so(store: Store, tmp_path: Path) -> None:
    assert main([str(store("run", step(compiled=5e-4))), "--output", str(tmp_path)]) == 0
    assert "- loss step, 8x4x2x2 float32, g = 1: 2.00 times the time of torch.compile" in page_of(tmp_path)


def test_a_difference_within_the_spread_is_printed_as_a_tie(store: Store, tmp_path: Path) -> None:
    rows = [
        stored_row("eager", [1.0, 1.2, 0.9, 1.1]),
        stored_row("vidfast cpu one_pass", [1.1, 1.0, 1.1, 1.0]),
    ]
    assert main([str(store("run", rows)), "--output", str(tmp_path)]) == 0
    line = next(line for line in page_of(tmp_path).splitlines() if line.startswith("| 8x4x2x2 float32"))
    assert "| tie |" in line


def test_a_contended_case_is_marked(store: Store, tmp_path: Path) -> None:
    rows = [stored_row("eager", samples(1.0), contended=True), stored_row("copy", samples(1.0), case="other")]
    assert main([str(store("run", rows)), "--output", str(tmp_path)]) == 0
    assert "1 of 2 cases beside others" in page_of(tmp_path)
    assert "| 8x4x2x2 float32 (busy machine) |" in page_of(tmp_path)


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"meant_cold": True, "cold": False}, "8x4x2x2 float32 (warm cache)"),
        (
            {"meant_cold": True, "cold": False, "contended": True},
            "8x4x2x2 float32 (busy machine, warm cache)",
        ),
        ({"meant_cold": True}, "8x4x2x2 float32"),
        ({"meant_cold": False, "cold": False}, "8x4x2x2 float32"),
        ({"cold": False}, "8x4x2x2 float32"),  # a run of before the mark
    ],
)
def test_a_case_whose_inputs_the_cache_may_hold_is_marked(
    store: Store, tmp_path: Path, facts: dict[str, bool], name: str
) -> None:
    assert (
        main([str(store("run", [stored_row("eager", samples(1.0), **facts)])), "--output", str(tmp_path)])
        == 0
    )
    assert f"| {name} |" in page_of(tmp_path)


def test_comparing_runs_marks_what_changed_beyond_noise(store: Store, tmp_path: Path) -> None:
    before, after = store("before", step()), store("after", step(compiled=3.01e-3, ours=2e-3))
    assert main([str(after), "--compare", str(before), "--output", str(tmp_path)]) == 0
    text = page_of(tmp_path)
    assert "6 rows are in both" in text
    changed = re.findall(r"\| ([^|]*?) g=1 \| .*?\| (\d+% \w+) \|", text)
    assert changed == [
        ("vidfast default", "100% slower"),
        ("vidfast cpu one_pass", "100% slower"),
        ("vidfast cpu one_pass in place", "100% slower"),
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "no JSON"),
        ("[]", "wanted a pytest-benchmark JSON file"),
        ('{"benchmarks": [], "machine_info": {}}', "holds no benchmark"),
        ('{"benchmarks": [{"fullname": "t"}], "machine_info": {}}', "not stored by vidfast's bench"),
    ],
)
def test_a_file_that_is_no_result_is_one_line(
    text: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    assert main([str(path), "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_a_missing_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(b"\x1f\x8b\xff\xfe"), "got something that is no text"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    make: Callable[[Path], object], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "all.json"
    make(path)
    assert main([str(path), "--output", str(tmp_path / "page")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vidfast report: {path}: ")
    assert complaint in error
    assert error.count("\n") == 1


def test_check_alone_is_wrong_use(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store("run", step())
    monkeypatch.chdir(tmp_path)
    assert main([str(path), "--check"]) == 2
    assert "--check goes with --readme FILE" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_a_file_without_markers_is_named(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "PAGE.md"
    page.write_text("no markers")
    assert main([str(store("run", step())), "--readme", str(page)]) == 2
    assert f"{page}: wanted the markers" in capsys.readouterr().err
    assert page.read_text() == "no markers"


def test_readme_table_is_written_between_the_markers_and_checked(store: Store, tmp_path: Path) -> None:
    path = store("run", step())
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    assert main([str(path), "--readme", str(page), "--check"]) == 1
    assert "old" in page.read_text(), "--check writes nothing"
    assert main([str(path), "--readme", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| 8x4x2x2 float32 | 9.00 ms | 3.00 ms | 1.00 ms | 500 us | 18.0x | 6.00x | 50% |" in text
    assert "GPU figures are pending" in text
    assert main([str(path), "--readme", str(page), "--check"]) == 0
    other = store("other", step(ours=2e-3))
    assert main([str(other), "--readme", str(page), "--check"]) == 1


def test_readme_names_the_gpu_instead_of_calling_it_pending(store: Store) -> None:
    run = load(store("gpu", step(), gpu={"name": "GPU Y", "memory_bytes": 1 << 34, "capability": "9.0"}))
    assert "**GPU Y**" in readme.block([run])
    assert "pending" not in readme.block([run])


def test_readme_has_the_latest_steps_of_a_gpu_and_no_older_ones(store: Store) -> None:
    gpu = {"name": "GPU Y", "memory_bytes": 1 << 34, "capability": "9.0"}
    older, newer, other = (
        replace(load(store(name, step(), gpu={**gpu, "name": device})), date=f"2026-01-01T{hour}:00:00")
        for name, device, hour in (("older", "GPU Y", 10), ("newer", "GPU Y", 11), ("other", "GPU Z", 12))
    )
    for runs in ([older, newer, other], [other, newer, older]):
        block = readme.block(runs)
        assert block.count("**GPU Y**") == block.count("**GPU Z**") == 1
    assert readme.superseded(older, [older, newer, other])
    assert not readme.superseded(newer, [older, newer, other])
    tuned = replace(newer, rows=[])
    assert not readme.superseded(older, [older, tuned]), "a run without steps stands for none"


def test_readme_says_what_sleeping_threads_cost_instead_of_a_second_table(store: Store) -> None:
    spinning = load(store("spinning", step(ours=1e-3)))
    stored = store("sleeping", step(ours=1.5e-3))
    text = stored.read_text().replace(
        '"torch_threads": 2', '"environment": {"OMP_WAIT_POLICY": "PASSIVE"}, "torch_threads": 2'
    )
    stored.write_text(text)
    block = readme.block([spinning, load(stored)])
    assert "take 1.50 to 1.50 times as long (median 1.50, 1 shapes)" in block
    assert block.count("| eager |") == 1
    assert readme.block([load(stored)]).count("| eager |") == 1, "alone it gets its table"


def test_a_training_step_shows_what_of_it_the_losses_take(store: Store, tmp_path: Path) -> None:
    rows = [
        stored_row("eager", samples(2.0), suite="training step", pair_seconds=0.5),
        stored_row("vidfast default", samples(1.6), suite="training step", pair_seconds=0.016),
    ]
    assert main([str(store("run", rows)), "--output", str(tmp_path)]) == 0
    lines = [line for line in page_of(tmp_path).splitlines() if line.startswith("| 8x4x2x2 float32 |")]
    assert [[cell.strip() for cell in line.split("|")][6:9] for line in lines] == [
        ["500 ms", "25.0%", ""],
        ["16.0 ms", "1.0%", "1.25x"],
    ]


@pytest.mark.parametrize(
    "text", ["no markers", readme.BEGIN, f"{readme.END}{readme.BEGIN}", readme.BEGIN * 2 + readme.END]
)
def test_a_readme_without_its_markers_is_an_error(text: str, store: Store) -> None:
    with pytest.raises(ValueError, match="once each"):
        readme.insert(text, [load(store("run", step()))])
