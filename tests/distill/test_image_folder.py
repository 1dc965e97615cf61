"""Folders of image files: their layouts, what is made of an image, and files that are damaged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vidfast.distill.data import DataError, ImageData, load, samples_per_class
from vidfast.distill.data.image_folder import ImageFiles, decode

COLOURS = {"cat": (200, 30, 30), "ant": (30, 200, 30), "bee": (30, 30, 200)}


def write(path: Path, colour: Iterable[int], size: tuple[int, int] = (10, 10), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, tuple(colour)).save(path)


def write_classes(root: Path, counts: dict[str, int], suffix: str = "png") -> None:
    """Images of a class have its colour and differ by one step a number."""
    for name, count in counts.items():
        for i in range(count):
            write(root / name / f"{i:03}.{suffix}", (value + i for value in COLOURS[name]))


def paths(data: ImageData) -> dict[str, list[str]]:
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    return {name: sorted(part.paths) for name, part in parts.items()}


@pytest.fixture
def one_folder(tmp_path: Path) -> Path:
    write_classes(tmp_path, {"cat": 20, "ant": 10, "bee": 4})
    return tmp_path


def test_one_folder_is_split_the_same_way_every_time(one_folder: Path) -> None:
    data, again = load("folder-8", root=one_folder), load("folder-8", root=one_folder)
    assert data.class_names == ("ant", "bee", "cat")
    # A fifth to test, a tenth to validate, of every class; one at least.
    assert data.test.labels.bincount().tolist() == [2, 1, 4]
    assert data.validation.labels.bincount().tolist() == [1, 1, 2]
    assert data.train.labels.bincount().tolist() == [7, 2, 14]
    every = [path for part in paths(data).values() for path in part]
    assert sorted(every) == sorted(map(str, one_folder.rglob("*.png")))
    assert paths(again) == paths(data)
    assert (data.in_channels, data.image_size, data.num_classes) == (3, (8, 8), 3)


def test_images_come_with_their_class(one_folder: Path) -> None:
    data = load("folder-8", root=one_folder)
    for part in (data.train, data.validation, data.test):
        pixels = data.normalisation.pixels(part.inputs(range(len(part)))) * 255
        for image, label in zip(pixels.round(), part.labels.tolist(), strict=True):
            assert int(image.mean((1, 2)).argmax()) == {"ant": 1, "bee": 2, "cat": 0}[data.class_names[label]]


@pytest.mark.parametrize("validation", ["val", "validation", None])
def test_parts_in_folders(tmp_path: Path, validation: str | None) -> None:
    write_classes(tmp_path / "train", {"cat": 10, "ant": 5})
    write_classes(tmp_path / "test", {"cat": 3, "ant": 2})
    if validation:
        write_classes(tmp_path / validation, {"cat": 1, "ant": 2})
    # Neither is an image of a class.
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "cat" / "notes.txt").write_text("none")
    data = load("folder-8", root=str(tmp_path))
    assert data.test.labels.bincount().tolist() == [2, 3]
    assert data.validation.labels.bincount().tolist() == ([2, 1] if validation else [1, 1])
    assert data.train.labels.bincount().tolist() == ([5, 10] if validation else [4, 9])
    assert not set(paths(data)["train"]) & set(paths(data)["validation"])


def test_normalisation_is_of_the_training_part_alone(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"cat": 10, "ant": 10})
    write_classes(tmp_path / "val", {"cat": 1, "ant": 1})
    write(tmp_path / "test" / "cat" / "white.png", (255, 255, 255))
    write(tmp_path / "test" / "ant" / "white.png", (255, 255, 255))
    data = load("folder-8", root=tmp_path)
    inputs = data.train.inputs(range(20))
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    assert float(data.test.inputs([0]).min()) > 1


def test_the_middle_is_cut_out_and_scaled(tmp_path: Path) -> None:
    """Against a picture whose left, middle and right thirds are black, a gradient and white."""
    gradient = np.linspace(0, 255, 12).round().astype(np.uint8)
    middle = np.broadcast_to(gradient[:, None, None], (12, 12, 3))
    wide = np.concatenate([np.zeros((12, 12, 3), np.uint8), middle, np.full((12, 12, 3), 255, np.uint8)], 1)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "high.png")
    same, turned = decode([str(tmp_path / "wide.png"), str(tmp_path / "high.png")], 12)
    assert torch.equal(same, torch.from_numpy(middle.copy()).permute(2, 0, 1))
    assert torch.equal(turned, same.transpose(1, 2))
    (half,) = decode([str(tmp_path / "wide.png")], 6).float()
    expected = torch.from_numpy(gradient.copy()).float()
    # Antialiased: every new row holds two old ones and something of their neighbours.
    torch.testing.assert_close(half[0, 1:-1, 3], (expected[::2] + expected[1::2])[1:-1] / 2, atol=2, rtol=0)
    assert decode([], 6).shape == (0, 3, 6, 6)


def test_modes_of_images(tmp_path: Path) -> None:
    def made(name: str, image: Image.Image) -> tuple[int, int, int]:
        image.save(tmp_path / name)
        (pixels,) = decode([str(tmp_path / name)], 4)
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (3, 4, 4)
        assert len(pixels.flatten(1).unique(dim=1).T) == 1
        return tuple(pixels[:, 0, 0].tolist())

    size = (4, 4)
    assert made("colour.png", Image.new("RGB", size, (10, 20, 30))) == (10, 20, 30)
    assert made("grey.png", Image.new("L", size, 77)) == (77, 77, 77)
    assert made("grey.jpg", Image.new("L", size, 77)) == (77, 77, 77)
    assert made("black.png", Image.new("1", size, 0)) == (0, 0, 0)
    assert made("sixteen-bits.png", Image.new("I;16", size, 257 * 99)) == (99, 99, 99)
    # What is transparent becomes white, whatever colour lies hidden there.
    assert made("opaque.png", Image.new("RGBA", size, (10, 20, 30, 255))) == (10, 20, 30)
    assert made("clear.png", Image.new("RGBA", size, (10, 20, 30, 0))) == (255, 255, 255)
    assert made("half.png", Image.new("LA", size, (55, 128))) == (155, 155, 155)
    palette = Image.new("P", size, 1)
    palette.putpalette([0, 0, 0, 40, 50, 60])
    assert made("palette.png", palette) == (40, 50, 60)
    palette.info["transparency"] = 1
    assert made("palette-clear.png", palette) == (255, 255, 255)
    cmyk = Image.new("CMYK", size, (0, 255, 255, 0))
    assert made("cmyk.jpg", cmyk)[0] > 200 > 100 > made("cmyk.jpg", cmyk)[1]


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:8] = 255  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned a quarter clockwise
    Image.fromarray(picture).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    (pixels,) = decode([str(tmp_path / "turned.jpg")], 16).float()
    assert float(pixels[:, :, 9:].min()) > 240
    assert float(pixels[:, :, :7].max()) < 15


def test_files_are_decoded_only_when_asked_for(one_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    opened = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *a, **k: decoded.append(path) or opened(path, *a, **k))
    data = load("folder-8", root=one_folder)
    # The training part, for the statistics.
    assert sorted(decoded) == paths(data)["train"]
    decoded.clear()
    data.classes([2, 0]), samples_per_class(data.train, 2, 0), data.with_validation_in_train()
    assert decoded == []
    data.test.inputs([3])
    assert decoded == [data.test.paths[3]]


def test_batches_are_the_same_with_workers(one_folder: Path) -> None:
    data = load("folder-8", root=one_folder)
    alone, helped = (list(DataLoader(data.train, batch_size=9, num_workers=workers)) for workers in (0, 2))
    assert len(alone) == 3
    for (inputs, labels), (other_inputs, other_labels) in zip(alone, helped, strict=True):
        assert torch.equal(inputs, other_inputs)
        assert torch.equal(labels, other_labels)
    assert torch.equal(alone[0][0][4], data.train[4][0])


def test_augmentation_keeps_the_shape_and_brings_in_the_mean_colour(one_folder: Path) -> None:
    data = load("folder-16", root=one_folder)
    inputs = torch.full((200, 3, 16, 16), 5.0)
    augmented = data.augment(inputs, torch.Generator().manual_seed(0))
    assert augmented.shape == inputs.shape
    assert set(augmented.unique().tolist()) == {0.0, 5.0}
    # At most an eighth of a side goes out.
    assert torch.equal(augmented[:, :, 2:-2, 2:-2], inputs[:, :, 2:-2, 2:-2])


def test_classes_subsets_and_joins_keep_files_and_labels_together(one_folder: Path) -> None:
    data = load("folder-8", root=one_folder)
    two = data.classes([2, 0])
    assert two.class_names == ("cat", "ant")
    for part in (two.train, two.validation, two.test):
        assert {(Path(p).parent.name, int(n)) for p, n in zip(part.paths, part.labels, strict=True)} == {
            ("cat", 0), ("ant", 1),
        }  # fmt: skip
    five = samples_per_class(data.train, 5, 0, at_most=True)
    assert five.labels.bincount().tolist() == [5, 2, 5]
    with pytest.raises(ValueError, match="wanted 5 images a class, and class 1 has 2"):
        samples_per_class(data.train, 5, 0)
    whole = data.with_validation_in_train()
    assert sorted(whole.train.paths) == sorted([*data.train.paths, *data.validation.paths])
    assert whole.train.labels.bincount().tolist() == [8, 3, 16]


def test_names_tell_data_sets_apart(one_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Trained teachers are kept under them."""
    other = tmp_path_factory.mktemp("other")
    write_classes(other / one_folder.name, {"cat": 20, "ant": 10, "bee": 5})
    names = {
        load("folder-8", root=one_folder).name,
        load("folder-9", root=one_folder).name,
        load("folder-8", root=other / one_folder.name).name,
    }
    assert len(names) == 3
    before = load("folder-8", root=one_folder).name
    assert before == load("folder-8", root=one_folder).name
    write(one_folder / "cat" / "000.png", (1, 2, 3), size=(50, 60))
    assert load("folder-8", root=one_folder).name != before


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("cut.jpg", lambda data: data[: len(data) // 2]),
        ("cut.png", lambda data: data[: len(data) // 2]),
        ("empty.png", lambda data: b""),
        ("text.jpg", lambda data: b"this is no image"),
        ("noise.png", lambda data: data[:40] + bytes(range(200)) + data[240:]),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: object) -> None:
    file = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=f"{file}: damaged, or no image"):
        decode([str(file)], 8)


def test_a_damaged_file_is_named_from_a_worker_too(one_folder: Path) -> None:
    data = load("folder-8", root=one_folder)
    bad = Path(data.test.paths[1])
    bad.write_bytes(b"no longer an image")
    assert data.test[0][0].shape == (3, 8, 8)
    for workers in (0, 1):
        with pytest.raises(DataError, match=bad.name):
            # The one batch there is, so that no worker is left with another under way.
            list(DataLoader(data.test, batch_size=len(data.test), num_workers=workers))


def test_a_file_that_went_is_named(one_folder: Path) -> None:
    data = load("folder-8", root=one_folder)
    Path(data.test.paths[0]).unlink()
    with pytest.raises(DataError, match="FileNotFoundError"):
        data.test[0]


def test_other_layouts_are_refused_with_the_wanted_one(tmp_path: Path) -> None:
    def refused(message: str, root: Path | None, name: str = "folder-8") -> None:
        with pytest.raises(DataError, match=message):
            load(name, root=root)

    refused("needs a root.*train/<class>/", None)
    refused("does not exist.*train/<class>/", tmp_path / "nowhere")
    refused("1x1 or more", tmp_path, "folder-0")
    (tmp_path / "file").write_text("")
    refused("is no folder", tmp_path / "file")
    refused("each of two classes or more, got 0.*train/<class>/", tmp_path)
    write_classes(tmp_path / "one", {"cat": 5})
    refused("each of two classes or more, got 1", tmp_path / "one")
    write_classes(tmp_path / "few", {"cat": 5, "ant": 2})
    refused("ant: wanted 3 images or more.*it has 2", tmp_path / "few")
    write_classes(tmp_path / "empty", {"cat": 5, "ant": 5})
    (tmp_path / "empty" / "bee").mkdir()
    refused("bee: holds no image", tmp_path / "empty")
    write_classes(tmp_path / "no-test" / "train", {"cat": 5, "ant": 5})
    write_classes(tmp_path / "no-test" / "val", {"cat": 5, "ant": 5})
    refused("has train and no test", tmp_path / "no-test")
    write_classes(tmp_path / "more" / "train", {"cat": 5, "ant": 5})
    write_classes(tmp_path / "more" / "test", {"cat": 5, "bee": 5})
    refused("test: has classes that train has not: bee", tmp_path / "more")


def test_files_and_labels_must_fit(one_folder: Path) -> None:
    files = load("folder-8", root=one_folder).test
    with pytest.raises(ValueError, match="wanted a label a file, got 1 for 2"):
        ImageFiles(["a", "b"], torch.tensor([0]), 8, files.normalisation)
