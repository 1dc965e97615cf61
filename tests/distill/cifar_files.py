"""Small CIFAR archives in the exact formats of the official ones, byte by byte."""

from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

PIXELS = 3072

BATCHES = {
    10: [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
    100: ["train", "test"],
}
FOLDERS = {
    (10, "binary"): "cifar-10-batches-bin",
    (10, "python"): "cifar-10-batches-py",
    (100, "binary"): "cifar-100-binary",
    (100, "python"): "cifar-100-python",
}

# name -> pixels (N, 3072), fine labels (N,), coarse labels (N,)
Parts = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


def make_parts(classes: int, each: int = 4, seed: int = 0) -> Parts:
    """`each` images of every class in every file, in random order."""
    random = np.random.default_rng(seed)
    parts: Parts = {}
    for name in BATCHES[classes]:
        labels = random.permutation(np.repeat(np.arange(classes), each))
        pixels = random.integers(0, 256, (len(labels), PIXELS), dtype=np.uint8)
        parts[name] = (pixels, labels, labels // 5)
    return parts


def short_string(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text


def integer(value: int) -> bytes:
    return b"K" + bytes([value]) if value < 256 else b"J" + struct.pack("<i", value)


def python2_pickle(entries: dict[bytes, Any]) -> bytes:
    """As Python 2's cPickle with protocol 2 wrote the official files: str, lists of int and uint8 arrays."""
    out = [b"\x80\x02}("]
    for key, value in entries.items():
        out.append(short_string(key))
        if isinstance(value, bytes):
            out.append(short_string(value))
        elif isinstance(value, list):
            items = [short_string(item) if isinstance(item, bytes) else integer(item) for item in value]
            out.append(b"](" + b"".join(items) + b"e")
        else:
            rows, columns = value.shape
            # The bytes lie by columns in the official files' arrays or by rows, as the flag before them says.
            by_columns = value.flags.f_contiguous
            raw = value.tobytes("F" if by_columns else "C")
            out.append(
                b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
                b"(K\x01" + integer(rows) + integer(columns) + b"\x86"
                b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
                + (b"\x88" if by_columns else b"\x89")
                + b"T" + struct.pack("<i", len(raw)) + raw + b"tb"
            )  # fmt: skip
    return b"".join([*out, b"u."])


def files_of(classes: int, kind: str, parts: Parts) -> dict[str, bytes]:
    """File names and contents, with the files beside the batches that the official folders hold."""
    files: dict[str, bytes] = {}
    for name, (pixels, fine, coarse) in parts.items():
        if kind == "binary":
            labels = [fine] if classes == 10 else [coarse, fine]
            records = np.concatenate([np.stack(labels, 1).astype(np.uint8), pixels], axis=1)
            files[f"{name}.bin"] = records.tobytes()
            continue
        entries: dict[bytes, Any] = {b"batch_label": b"batch of 5", b"data": pixels}
        if classes == 10:
            entries[b"labels"] = fine.tolist()
        else:
            entries |= {b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist()}
        entries[b"filenames"] = [b"a_s_%06d.png" % i for i in range(len(pixels))]
        files[name] = python2_pickle(entries)
    files["readme.html"] = b"<html></html>"
    return files


def write_folder(root: Path, classes: int, kind: str, parts: Parts) -> Path:
    folder = root / FOLDERS[classes, kind]
    folder.mkdir(parents=True)
    for name, data in files_of(classes, kind, parts).items():
        (folder / name).write_bytes(data)
    return folder


def write_archive(root: Path, classes: int, kind: str, parts: Parts) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"cifar-{classes}-{kind}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files_of(classes, kind, parts).items():
            member = tarfile.TarInfo(f"{FOLDERS[classes, kind]}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path
