"""`vidfast distill` with data and networks other than the defaults."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from cifar_files import make_parts, write_archive
from PIL import Image

from vidfast import cli

TINY = ["distill", "--steps=2", "--teacher-steps=2", "--samples-per-class=2", "--seeds=1", "--device=cpu"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    return code, capsys.readouterr().err


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDFAST_CACHE", str(tmp_path / "cache"))


def test_images_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("left", "right"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            pixels = random.integers(0, 256, (20, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    out, pair = tmp_path / "run", ("--teacher=resnet-18-imagenet-w8", "--student=vgg-9-w8")
    options = (*TINY, "--data=folder-32", "--root", tmp_path / "images", *pair, "--out", out)
    code, err = run(capsys, *options)
    assert code == 0, err
    with (out / "metrics.csv").open() as file:
        assert {row["arm"] for row in csv.DictReader(file)} == {"alone", "vid"}
    name = json.loads((out / "config.json").read_text())["data"]
    assert name.startswith("images-32-")
    assert next(path.name for path in (tmp_path / "cache").iterdir()).startswith(f"teacher-{name}-resnet")
    # Other images are another run.
    (tmp_path / "images" / "left" / "0.png").unlink()
    code, err = run(capsys, *options, "--resume")
    assert (code, "other options (data)" in err) == (2, True), err


def test_cifar_taught_to_a_perceptron_needs_matching_taps(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The archive is read; what does not fit is said before anything is trained."""
    archive = write_archive(tmp_path, 10, "binary", make_parts(10, each=2))
    code, err = run(
        capsys, *TINY, "--data=cifar10", "--root", archive, "--teacher=vgg-9-w4", "--student=mlp-8",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 2
    assert "as many tapped layers" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data=cifar10"], "cifar10 needs a root (--root)"),
        (["--data=cifar100", "--root=nowhere"], "nowhere: wanted cifar-100-binary.tar.gz"),
        (["--data=folder", "--root=nowhere"], "nowhere: does not exist"),
        (["--data=digits", "--root=nowhere"], "'digits' reads no files"),
        (["--data=cifar"], "unknown data set 'cifar': did you mean 'cifar10'"),
        (["--student=vgg-9"], "wanted images of 32x32 or more for vgg-9"),
    ],
)
def test_what_is_wrong_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], message: str
) -> None:
    code, err = run(capsys, *TINY, *options, "--out", tmp_path / "run")
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
