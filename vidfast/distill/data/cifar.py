"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the official archives, packed or unpacked. No download.

The formats are those of https://www.cs.toronto.edu/~kriz/cifar.html. Under the root, or as the root itself,
the first of these that is there is read; archives are read in memory and never unpacked:

    cifar-10-batches-bin/{data_batch_1.bin, ..., data_batch_5.bin, test_batch.bin}     cifar-10-binary.tar.gz
    cifar-10-batches-py/{data_batch_1, ..., data_batch_5, test_batch}                  cifar-10-python.tar.gz
    cifar-100-binary/{train.bin, test.bin}                                             cifar-100-binary.tar.gz
    cifar-100-python/{train, test}                                                     cifar-100-python.tar.gz

Images stay uint8 in memory and are normalised batch by batch, with the mean and the standard deviation of
the training part. A tenth of every class's training images, always the same ones, is the validation part.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .augment import in_turn, random_flip, random_shift
from .base import DATA_SETS, DataError, ImageData, Images, Normalisation
from .pickled import load_arrays
from .sampling import stratified_shares

VALIDATION_SHARE = 0.1
SPLIT_SEED = 20190
PIXELS = 3 * 32 * 32  # red, green and blue planes, each by rows
LARGEST = 2**30  # bytes of one file: the official ones have 153 MB or less


@dataclass(frozen=True)
class Layout:
    """How one of the two data sets lies on disk.

    binary: folder, archive. pickled: the same. train, test: names of files, without .bin. label_bytes: before
    the pixels of a record, the last of which is the class. labels: the pickle's entry with the classes.
    """

    name: str
    num_classes: int
    binary: tuple[str, str]
    pickled: tuple[str, str]
    train: tuple[str, ...]
    test: str
    label_bytes: int
    labels: str

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.train, self.test)

    @property
    def wanted(self) -> str:
        """What a root may hold, for an error message."""
        files = ", ".join(self.names)
        return (
            f"{self.binary[1]} or {self.pickled[1]}, or one of them unpacked: {self.binary[0]} or "
            f"{self.pickled[0]} with the files {files} (with .bin in the first)"
        )


CIFAR10 = Layout(
    name="cifar10",
    num_classes=10,
    binary=("cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
    pickled=("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test="test_batch",
    label_bytes=1,
    labels="labels",
)
CIFAR100 = Layout(
    name="cifar100",
    num_classes=100,
    binary=("cifar-100-binary", "cifar-100-binary.tar.gz"),
    pickled=("cifar-100-python", "cifar-100-python.tar.gz"),
    train=("train",),
    test="test",
    label_bytes=2,  # the coarse class comes first
    labels="fine_labels",
)


@DATA_SETS.register("cifar10")
def cifar10(root: Path | None = None) -> ImageData:
    """CIFAR-10: 60000 colour images of ten classes; see the module. Items are (3, 32, 32) fp32.

    Raises DataError where the files are missing, truncated, or not what they should be.
    """
    return _load(CIFAR10, root)


@DATA_SETS.register("cifar100")
def cifar100(root: Path | None = None) -> ImageData:
    """CIFAR-100 with its hundred fine classes; else as `cifar10`."""
    return _load(CIFAR100, root)


def _load(layout: Layout, root: Path | None) -> ImageData:
    if root is None:
        raise DataError(f"{layout.name} needs a root (--root): the folder that holds {layout.wanted}")
    files, binary = _files(layout, root)
    read = _from_records if binary else _from_pickle
    parts = {name: read(layout, source, data) for name, (source, data) in files.items()}
    files.clear()
    images = torch.cat([parts[name][0] for name in layout.train])
    labels = torch.cat([parts[name][1] for name in layout.train])
    test_images, test_labels = parts.pop(layout.test)
    parts.clear()
    try:
        validation, train = stratified_shares(labels, (VALIDATION_SHARE,), SPLIT_SEED)
    except ValueError as error:
        raise DataError(f"{root}: {error}") from None
    # In the order of the files, so that reading a batch is not slower than it must be.
    validation, train = validation.sort().values, train.sort().values
    normalisation = Normalisation.of(images[train])
    return ImageData(
        name=layout.name,
        num_classes=layout.num_classes,
        train=Images(images[train], labels[train], normalisation),
        validation=Images(images[validation], labels[validation], normalisation),
        test=Images(test_images, test_labels, normalisation),
        augment=in_turn(random_shift(4, fill=normalisation.black), random_flip()),
        normalisation=normalisation,
    )


Files = dict[str, tuple[str, bytes]]


def _files(layout: Layout, root: Path) -> tuple[Files, bool]:
    """The bytes of every file of the layout, with its name for messages, and whether they are binary records."""
    for (folder, archive), binary in ((layout.binary, True), (layout.pickled, False)):
        suffix = ".bin" if binary else ""
        at = root if root.name == folder else root / folder
        if at.is_dir():
            return _from_folder(layout, at, suffix), binary
        packed = root if root.name == archive else root / archive
        if packed.is_file():
            return _from_archive(layout, packed, folder, suffix), binary
    there = "it does not exist" if not root.exists() else "it holds none of them"
    raise DataError(f"{root}: wanted {layout.wanted}; {there}")


def _from_folder(layout: Layout, folder: Path, suffix: str) -> Files:
    missing = [name + suffix for name in layout.names if not (folder / (name + suffix)).is_file()]
    if missing:
        raise DataError(f"{folder}: lacks {', '.join(missing)}; wanted {layout.wanted}")
    files: Files = {}
    for name in layout.names:
        path = folder / (name + suffix)
        _check_size(str(path), path.stat().st_size)
        files[name] = (str(path), path.read_bytes())
    return files


def _from_archive(layout: Layout, archive: Path, folder: str, suffix: str) -> Files:
    wanted = {f"{folder}/{name}{suffix}": name for name in layout.names}
    found: Files = {}
    try:
        # As a stream, in one pass; nothing is written, so a member's path cannot lead anywhere.
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                inside = str(PurePosixPath(member.name))  # "./x" as "x"
                if inside not in wanted or not member.isfile():
                    continue
                where = f"{archive}, {inside}"
                _check_size(where, member.size)
                stream = tar.extractfile(member)
                assert stream is not None  # as it is a file
                found[wanted[inside]] = (where, stream.read())
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{archive}: truncated, damaged or not a .tar.gz archive ({error})") from error
    missing = [inside for inside, name in wanted.items() if name not in found]
    if missing:
        raise DataError(f"{archive}: lacks {', '.join(missing)}")
    return found


def _check_size(where: str, size: int) -> None:
    if size > LARGEST:
        raise DataError(f"{where}: wanted at most {LARGEST} bytes, it has {size}")


def _from_records(layout: Layout, where: str, data: bytes) -> tuple[Tensor, Tensor]:
    record = layout.label_bytes + PIXELS
    if not data or len(data) % record:
        raise DataError(
            f"{where}: truncated or not {layout.name}: wanted records of {record} bytes each, it has "
            f"{len(data)} bytes"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    return _checked(layout, where, records[:, layout.label_bytes :], records[:, layout.label_bytes - 1])


def _from_pickle(layout: Layout, where: str, data: bytes) -> tuple[Tensor, Tensor]:
    batch = load_arrays(data, where)
    if not isinstance(batch, Mapping) or "data" not in batch or layout.labels not in batch:
        raise DataError(f"{where}: wanted a dictionary with 'data' and {layout.labels!r}")
    pixels, labels = batch["data"], batch[layout.labels]
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != PIXELS or not len(pixels):
        shape = tuple(pixels.shape) if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise DataError(f"{where}: wanted data of shape (images, {PIXELS}), got {shape}")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{where}: wanted {layout.labels!r} as a list of whole numbers")
    if len(labels) != len(pixels):
        raise DataError(f"{where}: has {len(pixels)} images and {len(labels)} labels")
    return _checked(layout, where, pixels, np.array(labels))


def _checked(
    layout: Layout, where: str, pixels: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]
) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64, of tensors' own memory."""
    if labels.min() < 0 or labels.max() >= layout.num_classes:
        raise DataError(
            f"{where}: wanted classes 0 to {layout.num_classes - 1}, got {labels.min()} to {labels.max()}"
        )
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy())
    return images, torch.from_numpy(labels.astype(np.int64))
