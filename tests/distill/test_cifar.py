"""CIFAR-10 and CIFAR-100 from folders and archives in the official formats, and what is wrong with others."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar_files import BATCHES, FOLDERS, Parts, make_parts, python2_pickle, write_archive, write_folder

from vidfast.distill.data import DataError, ImageData, Images, load, samples_per_class
from vidfast.distill.data import cifar as cifar_module

Write = Callable[[Path, int, str, Parts], Path]


def pairs(images: Images) -> set[tuple[bytes, int]]:
    return {(i.numpy().tobytes(), int(label)) for i, label in zip(images.images, images.labels, strict=True)}


def written(parts: Parts, names: list[str]) -> set[tuple[bytes, int]]:
    return {
        (pixels.tobytes(), int(label))
        for name in names
        for pixels, label in zip(parts[name][0], parts[name][1], strict=True)
    }


@pytest.mark.parametrize("at_root", [False, True], ids=["in the root", "is the root"])
@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (write_folder, "binary"),
        (write_folder, "python"),
        (write_archive, "binary"),
        (write_archive, "python"),
    ],
)
@pytest.mark.parametrize("classes", [10, 100])
def test_every_image_comes_with_its_label(
    tmp_path: Path, classes: int, write: Write, kind: str, at_root: bool
) -> None:
    parts = make_parts(classes, each=2 if classes == 10 else 4)
    path = write(tmp_path, classes, kind, parts)
    data = load(f"cifar{classes}", root=path if at_root else tmp_path)
    *train, test = BATCHES[classes]
    assert pairs(data.test) == written(parts, [test])
    assert pairs(data.train) | pairs(data.validation) == written(parts, train)
    assert not pairs(data.train) & pairs(data.validation)
    # A tenth of every class, and one of it at least.
    assert data.validation.labels.bincount().tolist() == [1] * classes
    assert (data.num_classes, data.in_channels, data.image_size) == (classes, 3, (32, 32))


def test_the_validation_part_is_a_fixed_tenth(tmp_path: Path) -> None:
    parts = make_parts(10, each=4)
    write_folder(tmp_path, 10, "binary", parts)
    data, again = load("cifar10", root=tmp_path), load("cifar10", root=str(tmp_path))
    assert data.validation.labels.bincount().tolist() == [2] * 10
    assert data.train.labels.bincount().tolist() == [18] * 10
    assert torch.equal(data.validation.images, again.validation.images)
    assert samples_per_class(data.train, 5, 0).labels.bincount().tolist() == [5] * 10
    whole = data.with_validation_in_train()
    assert pairs(whole.train) == written(parts, BATCHES[10][:-1])


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    root = tmp_path_factory.mktemp("cifar")
    parts = make_parts(10, each=4)
    for name, (pixels, labels, coarse) in parts.items():
        # Planes of different brightness, and a test part unlike the training part.
        planes = pixels.reshape(-1, 3, 1024) // np.array([1, 2, 4])[:, None]
        if name == "test_batch":
            planes = planes // 8
        parts[name] = (planes.reshape(-1, 3072).astype(np.uint8), labels, coarse)
    write_folder(root, 10, "binary", parts)
    return load("cifar10", root=root)


def test_inputs_are_normalised_by_the_training_part_alone(cifar10: ImageData) -> None:
    inputs = cifar10.train.inputs(range(len(cifar10.train)))
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    assert float(cifar10.test.inputs(range(40)).mean()) < -1
    # A byte an element in memory.
    assert cifar10.train.images.dtype == torch.uint8
    # Red comes first: the brightest plane here.
    means = cifar10.train.images.float().mean((0, 2, 3)).tolist()
    assert means[0] > 1.8 * means[1] > 3 * means[2]


def test_augmentation_is_a_crop_of_four_pixels_and_a_flip(cifar10: ImageData) -> None:
    inputs = cifar10.train.inputs([0] * 300)
    augmented = cifar10.augment(inputs, torch.Generator().manual_seed(0))
    assert augmented.shape == inputs.shape
    pixels = cifar10.normalisation.pixels(augmented) * 255
    original = cifar10.train.images[0].float()
    padded = torch.nn.functional.pad(original, (4,) * 4)  # with black
    views = [v for rows in padded.unfold(1, 32, 1).unfold(2, 32, 1).unbind(1) for v in rows.unbind(1)]
    views += [view.flip(2) for view in views]
    exact = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(pixels.flatten(1), torch.stack(views).flatten(1), compute_mode=exact)
    assert float(distance.min(1).values.max()) < 0.5
    chosen = distance.argmin(1)
    assert len(chosen.unique()) > 100  # of 162
    assert 100 < int((chosen < 81).sum()) < 200


def test_without_a_root_or_files_the_layout_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs a root.*cifar-10-binary\.tar\.gz.*data_batch_1.*test_batch"):
        load("cifar10")
    with pytest.raises(DataError, match=r"cifar-100-python\.tar\.gz.*holds none"):
        load("cifar100", root=tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        load("cifar100", root=tmp_path / "nowhere")
    write_folder(tmp_path, 100, "binary", make_parts(100, each=1))
    with pytest.raises(DataError, match="holds none"):
        load("cifar10", root=tmp_path)


@pytest.mark.parametrize("kind", ["binary", "python"])
def test_a_missing_file_is_named(tmp_path: Path, kind: str) -> None:
    parts = make_parts(10, each=1)
    folder = write_folder(tmp_path / "folder", 10, kind, parts)
    name = "data_batch_3.bin" if kind == "binary" else "data_batch_3"
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{folder}: lacks {name}"):
        load("cifar10", root=tmp_path / "folder")
    del parts["data_batch_3"]
    archive = write_archive(tmp_path / "archive", 10, kind, parts)
    with pytest.raises(DataError, match=f"{archive.name}: lacks {FOLDERS[10, kind]}/{name}"):
        load("cifar10", root=tmp_path / "archive")


@pytest.mark.parametrize("cut", [0, 1, 3073 + 5])
def test_truncated_records_are_refused(tmp_path: Path, cut: int) -> None:
    file = write_folder(tmp_path, 10, "binary", make_parts(10, each=1)) / "data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=rf"data_batch_2.bin: truncated.*3073 bytes each, it has {cut} bytes"):
        load("cifar10", root=tmp_path)


def test_records_of_the_other_data_set_are_refused(tmp_path: Path) -> None:
    """CIFAR-10's records under CIFAR-100's names: 3073 bytes and not 3074."""
    folder = write_folder(tmp_path, 100, "binary", make_parts(100, each=1))
    (folder / "train.bin").write_bytes(b"\x01" * 3073 * 10)
    with pytest.raises(DataError, match=r"train.bin.*3074 bytes each, it has 30730"):
        load("cifar100", root=tmp_path)


def test_classes_out_of_range_are_refused(tmp_path: Path) -> None:
    file = write_folder(tmp_path, 10, "binary", make_parts(10, each=1)) / "test_batch.bin"
    file.write_bytes(b"\x0a" + file.read_bytes()[1:])
    with pytest.raises(DataError, match=r"test_batch.bin: wanted classes 0 to 9, got \d to 10"):
        load("cifar10", root=tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.98])
@pytest.mark.parametrize("kind", ["binary", "python"])
def test_a_truncated_archive_is_refused(tmp_path: Path, kind: str, keep: float) -> None:
    archive = write_archive(tmp_path, 10, kind, make_parts(10, each=1))
    data = archive.read_bytes()
    archive.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(DataError, match=f"{archive.name}: truncated, damaged or not"):
        load("cifar10", root=tmp_path)


def test_what_else_is_in_an_archive_is_left_alone(tmp_path: Path) -> None:
    """Members elsewhere, and links with a batch's name: nothing is written and nothing outside is read."""
    outside = tmp_path / "outside.bin"
    outside.write_bytes(b"\x00" * 3073)
    archive = tmp_path / "root" / "cifar-10-binary.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        climbing = tarfile.TarInfo("../climbed.bin")
        climbing.size = 4
        tar.addfile(climbing, io.BytesIO(b"evil"))
        link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(outside)
        tar.addfile(link)
    with pytest.raises(DataError, match=r"lacks .*test_batch\.bin"):
        load("cifar10", root=archive)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "cifar-10-binary.tar.gz", "outside.bin", "root",
    ]  # fmt: skip


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = make_parts(10, each=1)
    monkeypatch.setattr(cifar_module, "LARGEST", 1000)
    for write in (write_folder, write_archive):
        write(tmp_path / write.__name__, 10, "binary", parts)
        with pytest.raises(DataError, match="wanted at most 1000 bytes, it has 30730"):
            load("cifar10", root=tmp_path / write.__name__)


def test_too_few_images_for_a_validation_part_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, 100, "binary", make_parts(100, each=1))
    with pytest.raises(DataError, match="wanted images of class 0 for 2 parts"):
        load("cifar100", root=tmp_path)


PIXEL_ROWS = np.zeros((10, 3072), np.uint8)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({b"data": PIXEL_ROWS}, "wanted a dictionary with 'data' and 'labels'"),
        ({b"data": PIXEL_ROWS, b"fine_labels": [0] * 10}, "wanted a dictionary with 'data' and 'labels'"),
        ({b"data": PIXEL_ROWS[:, :3071], b"labels": [0] * 10}, r"shape \(images, 3072\), got \(10, 3071\)"),
        ({b"data": PIXEL_ROWS[:0], b"labels": []}, r"got \(0, 3072\)"),
        ({b"data": b"abc", b"labels": [0] * 10}, "got str"),
        ({b"data": PIXEL_ROWS, b"labels": [0] * 9}, "10 images and 9 labels"),
        ({b"data": PIXEL_ROWS, b"labels": [b"x"] * 10}, "list of whole numbers"),
        ({b"data": PIXEL_ROWS, b"labels": [10] * 10}, "classes 0 to 9"),
    ],
)
def test_wrong_contents_of_a_pickle(tmp_path: Path, entries: dict[bytes, object], message: str) -> None:
    folder = write_folder(tmp_path, 10, "python", make_parts(10, each=1))
    (folder / "data_batch_4").write_bytes(python2_pickle(entries))
    with pytest.raises(DataError, match=f"data_batch_4: .*{message}"):
        load("cifar10", root=tmp_path)
