"""What the report says of a run on a GPU: lines that were cut, aims, which back end is faster, and the documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from stored_runs import Row, stored_row

from bench.lines import Lines
from vidfast.report import device, main, plots, readme, tables
from vidfast.report.results import Run, load

NOISE = (1.0, 1.02, 0.98, 1.01, 0.99)
LARGE, MIDDLE, SMALL = 200_000_000, 50_000_000, 1_000_000


def samples(seconds: float) -> list[float]:
    return [seconds * factor for factor in NOISE]


def kernel(provider: str, seconds: float, share: float, nbytes: int = LARGE, **facts: object) -> Row:
    return stored_row(
        provider,
        samples(seconds),
        suite="kernel alone",
        case=f"case of {nbytes}",
        pass_bytes=nbytes,
        share_of_copy=share,
        graph=True,
        peak_extra_bytes=None,
        **facts,
    )


def kernels(cuda: float = 0.95, triton: float = 0.85, nbytes: int = LARGE) -> list[Row]:
    rows = [kernel("copy", 1e-4, 1.0, nbytes, family="copy")]
    for name, share in (("cuda", cuda), ("triton", triton)):
        rows += [kernel(f"{name} {p}", 1.5e-4 / share, share, nbytes) for p in device.ONE_PASS]
    return rows


HEAD = {
    "kind": "machine",
    "machine_info": {
        "cpu": {"brand_raw": "Processor X"},
        "python_version": "3.12",
        "vidfast": {
            "torch": "2.11.0",
            "gpu": {"name": "GPU Y", "memory_bytes": 1 << 36, "capability": "9.0", "cuda": "13.0"},
            "vidfast": {"vidfast": "0.1.0", "backends": {"triton": {"triton": "3.6.0"}}},
        },
    },
    "commit_info": {"id": "0123456789abcdef", "dirty": False},
    "datetime": "2030-01-02T03:04:05",
}
CHECK = {"kind": "check", "backend": "cuda", "calls": 7, "wanted": 9, "wrong": 0, "errors": []}


def store(path: Path, rows: Sequence[Row] = (), others: Sequence[dict[str, Any]] = ()) -> Path:
    lines = [HEAD, *({"kind": "row", **row} for row in rows), *others]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run_of(tmp_path: Path, rows: Sequence[Row], others: Sequence[dict[str, Any]] = ()) -> Run:
    return load(store(tmp_path / "gpu-y.jsonl", rows, others))


def test_a_line_that_was_cut_off_is_left_away(tmp_path: Path) -> None:
    path = store(tmp_path / "run.jsonl", kernels())
    whole = load(path)
    path.write_text(path.read_text()[:-40])
    assert len(load(path).rows) == len(whole.rows) - 1
    assert whole.device == "GPU Y"
    assert whole.date.startswith("2030-01-02")


def test_a_run_without_its_head_is_read(tmp_path: Path) -> None:
    """Cut off before its stage `machine`, or that failed."""
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps({"kind": "row", **row}) + "\n" for row in kernels()))
    assert main([str(path), "--output", str(tmp_path / "page")]) == 0
    assert "a GPU that was not described" in (tmp_path / "page" / "report.md").read_text()


@pytest.mark.parametrize("left", [["cuda backward"], ["copy"], ["triton forward_grad"], ["cuda scale g=1"]])
def test_a_case_of_which_little_is_left_is_still_shown(left: list[str], tmp_path: Path) -> None:
    """Rows may have failed: the copy's, or all of a back end."""
    rows = [*kernels(), kernel("cuda backward", 1e-4, 0.5), kernel("cuda scale g=1", 1e-6, 0.5)]
    few = [
        {**row, "extra_info": {**row["extra_info"], "case": "few"}} for row in rows if row["fullname"] in left
    ]
    path = store(tmp_path / "run.jsonl", [*rows, *few])
    assert main([str(path), "--output", str(tmp_path / "page")]) == 0
    run = load(path)
    assert readme.block([run])
    assert device.notes([run])
    assert len(few) == 1


def test_what_is_written_after_a_torn_line_is_read(tmp_path: Path) -> None:
    """A stage that was killed while it wrote; the runner goes on writing to the same file."""
    path = store(tmp_path / "run.jsonl", kernels())
    path.write_text(path.read_text()[:-40])
    Lines(path).write("stage", stage="rates", verdict="cut off", seconds=1.0, code=-9, last_line="")
    run = load(path)
    assert len(run.rows) == len(kernels()) - 1
    assert [line["stage"] for line in run.stages] == ["rates"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "must have lines of JSON (bench/lines.py), got none"),
        (json.dumps(HEAD) + "\n" + json.dumps(HEAD) + "\n", "must be one run, got 2 lines of kind 'machine'"),
        ("{}\n", "line 1 must be an object with a 'kind'"),
        ("[1]\n", "line 1 must be an object with a 'kind'"),
        (json.dumps(HEAD) + "\nnonsense\n" + json.dumps(CHECK) + "\n", "line 2 must be an object"),
        (json.dumps(HEAD) + '\n{"kind": "row", "name": "x"}\n', "x was not stored by vidfast's bench"),
    ],
)
def test_lines_that_are_no_result_are_one_line(
    text: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(text)
    assert main([str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_aims_are_by_size_and_can_be_missed(tmp_path: Path) -> None:
    rows = [*kernels(0.91, 0.89), *kernels(0.81, 0.79, MIDDLE), *kernels(0.2, 0.1, SMALL)]
    run = run_of(tmp_path, rows)
    found = {(aim.by, aim.what, aim.wanted): aim.met for aim in device.aims(run)}
    for size, wanted in ((LARGE, "90%"), (MIDDLE, "80%")):
        for primitive in device.ONE_PASS:
            assert found.pop(("cuda", f"case of {size}: {primitive}", f"{wanted} of the copy"))
            assert not found.pop(("triton", f"case of {size}: {primitive}", f"{wanted} of the copy"))
    assert not found, "no aim for a small tensor"
    assert device.aims_met(run) == "Aims met: cuda 4 of 4, triton 0 of 4."


def test_aims_are_of_cold_kernels_and_of_steps_that_nothing_multiplies(tmp_path: Path) -> None:
    seconds = {"eager": 7e-3, "torch.compile": 1.7e-3, "vidfast default": 1e-3}
    rows = [
        stored_row(name, samples(s), pass_bytes=LARGE, incoming_gradient=0.37) for name, s in seconds.items()
    ]
    hot = [{**row, "extra_info": {**row["extra_info"], "cold": False}} for row in kernels()]
    run = run_of(tmp_path, [*rows, *hot])
    assert device.aims(run) == []
    assert device.aims_met(run) == ""


def test_graphs_are_no_steps_and_no_shortfalls_of_the_host(tmp_path: Path) -> None:
    floor = "autograd.Function that saves and returns"
    rows = [stored_row("vidfast cuda one_pass", samples(1e-3))]
    rows += [stored_row("vidfast cuda one_pass graph", samples(9e-4), graph=True)]
    for name, seconds in (
        (floor, 1e-5),
        ("vidfast cuda one_pass", 1e-3),
        ("vidfast cuda one_pass graph", 2e-3),
    ):
        rows.append(stored_row(name, samples(seconds), suite="overhead", graph="graph" in name))
    run = run_of(tmp_path, [*rows, *kernels(0.3, 0.3)])
    assert tables.strategies(run) == ["vidfast cuda one_pass"]
    assert [cells[0] for cells in tables.overhead(run, "8x4x2x2 float32").rows] == [
        floor,
        "vidfast cuda one_pass",
    ]
    listed = tables.shortfalls(run)
    assert len(listed) == 1, listed
    assert listed[0].startswith("overhead, vidfast cuda one_pass, g = 1: 100 times the floor")


def test_the_plot_has_a_bar_for_the_aim_of_each_size(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    rows = [*kernels(), *kernels(nbytes=MIDDLE), *kernels(nbytes=SMALL)]
    seen: list[Any] = []

    class Kept:
        """pyplot, whose figures are looked at before they are closed."""

        def subplots(self, **options: Any) -> Any:
            figure, axes = plt.subplots(**options)
            seen.append(axes)
            return figure, axes

        def close(self, figure: Any) -> None:
            """Afterwards."""

    assert plots.device_kernels(run_of(tmp_path, rows), Kept()) is not None
    drawn = seen[0].get_lines()
    bars = [tuple(line.get_xdata()) for line in drawn if line.get_color() == plots.COLOURS["torch.compile"]]
    assert bars == [(90.0, 90.0), (80.0, 80.0)]
    shares = {line.get_label(): list(line.get_xdata()) for line in drawn}
    assert shares["cuda forward_grad"] == pytest.approx([95, 95, 95])
    plt.close("all")


@pytest.mark.parametrize(("ours", "met"), [(1e-3, [True, True]), (2e-3, [False, False])])
def test_aims_of_steps_are_against_eager_and_compile(ours: float, met: list[bool], tmp_path: Path) -> None:
    seconds = {"eager": 7e-3, "torch.compile": 1.7e-3, "vidfast default": ours}
    rows = [stored_row(name, samples(s), pass_bytes=LARGE) for name, s in seconds.items()]
    found = device.aims(run_of(tmp_path, rows))
    assert [aim.wanted for aim in found] == ["6.00x", "1.60x"]
    assert [aim.met for aim in found] == met
    assert {aim.by for aim in found} == {"steps"}


@pytest.mark.parametrize(("cuda", "triton", "first"), [(0.9, 0.8, "cuda"), (0.8, 0.9, "triton")])
def test_which_back_end_is_the_faster(cuda: float, triton: float, first: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, [*kernels(cuda, triton), *kernels(cuda, triton, MIDDLE)])
    assert device.backends(run) == ["cuda", "triton"]
    assert device.faster(run, "cuda", "triton") == pytest.approx(cuda / triton)
    assert device.order(run)[0] == first
    assert device.compared(run).startswith("One pass on the device alone: cuda ")
    alone = run_of(tmp_path, [row for row in kernels() if "triton" not in row["fullname"]])
    assert device.order(alone) == ["cuda"]
    assert device.compared(alone) == ""


@pytest.mark.parametrize(("cuda", "triton", "first"), [(1e-3, 2e-3, "cuda"), (2e-3, 1e-3, "triton")])
def test_whole_steps_decide_the_order(cuda: float, triton: float, first: str, tmp_path: Path) -> None:
    seconds = {"cuda": cuda, "triton": triton}
    steps = [
        stored_row(f"vidfast {name} one_pass", samples(s), suite=suite, pass_bytes=LARGE)
        for suite in ("loss step", "overhead")
        for name, s in seconds.items()
    ]
    kernels_say = kernels(0.8, 0.9) if first == "cuda" else kernels(0.9, 0.8)
    run = run_of(tmp_path, [*kernels_say, *steps])
    assert device.faster_steps(run, "cuda", "triton") == pytest.approx(triton / cuda)
    assert device.order(run)[0] == first
    assert (
        f"whole steps, the host included: cuda {triton / cuda:.2f} times as fast as triton."
        in device.compared(run)
    )
    assert device.faster_steps(run_of(tmp_path, kernels()), "cuda", "triton") is None


def test_tuning_shows_what_differs_beyond_the_spread(tmp_path: Path) -> None:
    def row(provider: str, seconds: float) -> Row:
        return stored_row(provider, samples(seconds), suite="tuning", graph=True)

    rows = [row("copy", 1e-4), row("as built", 1e-4), row("kShare=4", 2e-4), row("kShare=16", 1e-4)]
    rows += [row("kPlane=256", 8e-5), row("kBlocks=512", 1e-4)]
    table = device.tuning(run_of(tmp_path, rows))
    assert list(table.header) == ["case", "as built", "kShare", "kPlane", "kBlocks"]
    assert [list(cells) for cells in table.rows] == [
        ["8x4x2x2 float32", "100 us", "4: -50%", "256: +25%", "tie"]
    ]


def test_a_value_is_taken_only_if_it_is_slower_nowhere(tmp_path: Path) -> None:
    def rows_of(case: str, **seconds: float) -> list[Row]:
        return [
            stored_row(provider, samples(s), suite="tuning", case=case, graph=True)
            for provider, s in {"as built": 1e-4, **seconds}.items()
        ]

    rows = rows_of("a", **{"k=1": 8e-5, "k=2": 7e-5, "k=3": 1e-4})
    rows += rows_of("b", **{"k=1": 9e-5, "k=2": 1.1e-4, "k=3": 1e-4})
    found = {cells[0]: list(cells[1:]) for cells in device.tuning_over_all(run_of(tmp_path, rows)).rows}
    assert found == {
        "k=1": ["+17.9%", "+11.1%", "0", "take"],
        "k=2": ["+14.0%", "-9.1%", "1", "keep as built"],
        "k=3": ["+0.0%", "+0.0%", "0", "keep as built"],
    }


def test_the_page_says_how_to_read_the_tuning(tmp_path: Path) -> None:
    rows = [
        stored_row(n, samples(s), suite="tuning", graph=True) for n, s in (("as built", 1e-4), ("k=1", 8e-5))
    ]
    path = store(tmp_path / "gpu-y.jsonl", rows)
    assert main([str(path), "--output", str(tmp_path / "page")]) == 0
    text = (tmp_path / "page" / "report.md").read_text()
    assert device.TUNING_TEXT in text
    assert "| k=1 | +25.0% | +25.0% | 0 | take |" in text


def test_a_page_shows_what_went_wrong(tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [
        {**CHECK, "wrong": 1, "errors": [{"problem": "cuda 2x3", "error": "d mean: 5 of 6"}]},
        {"kind": "failure", "suite": "loss step", "case": "c", "row": "r", "error": "RuntimeError: no"},
        {"kind": "left_out", "suite": "tuning", "case": "the last"},
        {
            "kind": "stage",
            "stage": "rates",
            "verdict": "cut off",
            "seconds": 9.0,
            "code": 130,
            "last_line": "cut",
        },
    ]
    path = store(tmp_path / "gpu-y.jsonl", kernels(), others)
    assert main([str(path), "--output", str(tmp_path / "page")]) == 0
    text = (tmp_path / "page" / "report.md").read_text()
    for expected in (
        "- cuda 2x3: d mean: 5 of 6",
        "- loss step, c, r: RuntimeError: no",
        "- tuning, the last",
        "| rates | cut off | 9 | cut |",
        "| triton | case of 200000000: forward_grad | 90% of the copy | 85% | missed |",
        "cuda 1.12 times as fast as triton",
    ):
        assert expected in text
    svg = (tmp_path / "page" / "gpu-y-kernels.svg").read_text()
    assert svg.startswith("<svg")


def test_a_run_without_a_row_is_still_a_page(tmp_path: Path) -> None:
    """Cut off before anything was measured: what was checked is told."""
    path = store(tmp_path / "gpu-y.jsonl", [], [CHECK])
    assert main([str(path), "--output", str(tmp_path / "page")]) == 0
    assert "GPU Y" in (tmp_path / "page" / "report.md").read_text()
    assert "cuda: 7 of 9 calls, 0 wrong" in readme.block([load(path)])


def test_the_readme_has_device_time_and_whole_steps(tmp_path: Path) -> None:
    steps = {"eager": 9e-3, "torch.compile": 3e-3, "vidfast default": 1e-3, "vidfast default graph": 8e-4}
    rows = [*kernels(), *(stored_row(n, samples(s), graph="graph" in n) for n, s in steps.items())]
    text = readme.block([run_of(tmp_path, rows, [CHECK])])
    assert "**GPU Y**, torch 2.11.0, Triton 3.6.0, CUDA 13.0, 2030-01-02." in text
    assert "| case of 200000000 | 200 MB |" in text
    assert "158 us (95%)" in text
    assert "| 8x4x2x2 float32 | 9.00 ms | 3.00 ms | 1.00 ms | 800 us | 9.00x | 3.00x |" in text
    assert "pending" not in text


def test_the_notes_are_written_between_their_markers(tmp_path: Path) -> None:
    page = tmp_path / "notes.md"
    page.write_text(f"before\n{readme.NOTES_BEGIN}\nold\n{readme.NOTES_END}\nafter\n")
    cpu = tmp_path / "cpu.json"
    machine = {"machine_info": {"cpu": {}}, "benchmarks": [stored_row("eager", samples(1.0))]}
    cpu.write_text(json.dumps(machine))
    assert main([str(cpu), "--readme", str(page)]) == 0
    assert "No run on a GPU is stored" in page.read_text()
    gpu = store(tmp_path / "gpu-y.jsonl", kernels(0.85))
    assert main([str(cpu), str(gpu), "--readme", str(page), "--check"]) == 1
    assert main([str(cpu), str(gpu), "--readme", str(page)]) == 0
    text = page.read_text()
    assert "`bench/results/gpu-y.jsonl`" in text
    assert "Aims met: cuda 0 of 2, triton 0 of 2." in text
    assert "- missed, cuda: case of 200000000: forward_grad: 85%, aim 90% of the copy" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_each_back_end_has_a_table_of_its_own_numbers(tmp_path: Path) -> None:
    rows = [
        stored_row(provider, samples(seconds), suite=suite, graph=True)
        for suite, number, changed in (("tuning", "kShare=4", 8e-5), ("tuning triton", "ahead=0", 2e-4))
        for provider, seconds in (("as built", 1e-4), (number, changed))
    ]
    run = run_of(tmp_path, rows)
    notes = device.notes([run])
    cuda, triton = notes.split("Triton: one pass in place")
    for text, own, other, gain in (
        (cuda, "kShare", "ahead", "+25.0%"),
        (triton, "ahead", "kShare", "-50.0%"),
    ):
        assert f"| {own}=" in text
        assert gain in text
        assert other not in text
    titles = [section.title for section in device.sections(run)]
    assert [f"Free numbers of the {name} back end" for name in ("CUDA", "Triton")] == titles[-2:]


@pytest.mark.parametrize("suite", ["tuning", "tuning triton"])
def test_a_run_that_only_tuned_is_for_the_kernel_notes(tmp_path: Path, suite: str) -> None:
    rows = [
        stored_row(provider, samples(1e-4), suite=suite, graph=True) for provider in ("as built", "kShare=4")
    ]
    run = run_of(tmp_path, rows)
    assert device.only_tuned(run)
    assert "GPU Y" not in readme.block([run])
    assert "pending" not in readme.block([run])
    notes = device.notes([run])
    assert "free numbers alone: **GPU Y**" in notes
    assert "kShare=4" in notes
    assert not device.only_tuned(run_of(tmp_path, [*rows, *kernels()]))
