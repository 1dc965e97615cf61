"""Atomic writes, and checkpoints that are read without running code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from vidfast.distill.files import (
    CheckpointError,
    load_checkpoint,
    replacing,
    save_checkpoint,
    write_csv,
    write_text,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_have_the_usual_permissions(tmp_path: Path) -> None:
    ordinary, ours = tmp_path / "ordinary", tmp_path / "ours"
    ordinary.write_text("")
    write_text(ours, "")
    assert os.stat(ours).st_mode == os.stat(ordinary).st_mode


def test_csv_has_the_union_of_columns(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"step": 1, "a": 0.5}, {"step": 2, "b": "x,y"}])
    assert (tmp_path / "a.csv").read_text() == 'step,a,b\n1,0.5,\n2,,"x,y"\n'


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"w": torch.arange(3.0), "rows": [{"step": 1, "x": 0.5}], "none": None})
    state = load_checkpoint(path, ("w", "rows"))
    assert torch.equal(state["w"], torch.arange(3.0))
    assert state["rows"] == [{"step": 1, "x": 0.5}]


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(Path(os.environ["PAYLOAD_FOLDER"]) / "code-ran"),)


def damaged(path: Path, how: str) -> None:
    save_checkpoint(path, {"w": torch.arange(1000.0), "other": 1})
    whole = path.read_bytes()
    middle = len(whole) // 2
    contents = {
        "empty": b"",
        "cut": whole[:middle],
        "text": b"this is not a checkpoint\n",
        "zeros": bytes(len(whole)),
        "pickle": pickle.dumps({"w": 1}),
        "payload": pickle.dumps(Payload()),
    }
    path.write_bytes(contents[how])


@pytest.mark.parametrize("how", ["empty", "cut", "text", "zeros", "payload"])
def test_a_damaged_checkpoint_is_one_line_naming_the_file(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAYLOAD_FOLDER", str(tmp_path))
    path = tmp_path / "c.pt"
    damaged(path, how)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, ("w",))
    assert str(caught.value).startswith(f"{path}: damaged")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "code-ran").exists()


def test_checkpoints_that_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch's own format as well."""
    monkeypatch.setenv("PAYLOAD_FOLDER", str(tmp_path))
    torch.save({"w": Payload()}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "code-ran").exists()


def test_missing_and_foreign_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="this is a folder"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path / "c.pt", {"a": 1})
    with pytest.raises(CheckpointError, match="lacks 'b', 'c'"):
        load_checkpoint(tmp_path / "c.pt", ("a", "b", "c"))
    torch.save(torch.zeros(3), tmp_path / "t.pt")
    with pytest.raises(CheckpointError, match="lacks 'a'"):
        load_checkpoint(tmp_path / "t.pt", ("a",))
