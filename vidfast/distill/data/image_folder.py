"""A folder of image files, a folder a class: any data set of one's own, such as those of transfer learning.

    root/train/<class>/*.jpg, root/test/<class>/*.jpg and, if there is one, root/val or root/validation
    root/<class>/*.jpg

Where a part is missing it is drawn from the rest, stratified and always the same: a tenth of every class of
train for validation; of root/<class>, a fifth for the test and a tenth for validation. Classes are numbered
in the order of their names. Images are decoded by Pillow when they are asked for, so a data set may be larger
than memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .augment import in_turn, random_flip, random_shift
from .base import DATA_SETS, DataError, ImageData, LabelledImages, Normalisation
from .sampling import stratified_shares

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
TEST_SHARE = 0.2
VALIDATION_SHARE = 0.1
SPLIT_SEED = 20190
# How many training images, evenly spaced, the mean and the standard deviation are taken of.
STATISTICS_IMAGES = 512

LAYOUT = (
    "wanted train/<class>/ and test/<class>/ (and val/<class>/ if there is one) or <class>/ in it, with "
    f"images ({', '.join(suffix[1:] for suffix in SUFFIXES)}) in each"
)


class ImageFiles(LabelledImages):
    """Image files, decoded when they are asked for; inputs are (3, image_size, image_size).

    paths: of the files, one a label. normalisation: makes inputs of their pixels.
    """

    def __init__(
        self, paths: Sequence[str], labels: Tensor, image_size: int, normalisation: Normalisation
    ) -> None:
        if len(paths) != len(labels):
            raise ValueError(f"wanted a label a file, got {len(labels)} for {len(paths)}")
        self.paths, self.labels, self.normalisation = list(paths), labels, normalisation
        self.shape = (3, image_size, image_size)

    def inputs(self, indices: Sequence[int]) -> Tensor:
        return self.normalisation.inputs(decode([self.paths[int(i)] for i in indices], self.shape[1]))

    def subset(self, indices: Tensor, labels: Tensor | None = None) -> ImageFiles:
        paths = [self.paths[i] for i in indices.tolist()]
        chosen = self.labels[indices] if labels is None else labels
        return ImageFiles(paths, chosen, self.shape[1], self.normalisation)

    def joined(self, other: LabelledImages) -> ImageFiles:
        if not isinstance(other, ImageFiles):
            raise TypeError(f"wanted ImageFiles to join with ImageFiles, got {type(other).__name__}")
        labels = torch.cat([self.labels, other.labels])
        return ImageFiles([*self.paths, *other.paths], labels, self.shape[1], self.normalisation)


def decode(paths: Sequence[str], image_size: int) -> Tensor:
    """Image files as (N, 3, image_size, image_size) uint8: red, green, blue.

    The shorter side is resized to `image_size` (bilinear, antialiased) and the middle is cut out. Photographs
    are turned upright as their EXIF data say, grey images get three equal channels, and what is transparent
    becomes white. Raises DataError, naming the file, for one that is damaged or no image.
    """
    if not paths:
        return torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)
    images = []
    for path in paths:
        try:
            images.append(_decode(path, image_size))
        except Exception as error:  # what a decoder of damaged bytes may raise is not documented
            raise DataError(
                f"{path}: damaged, or no image that Pillow reads ({type(error).__name__}: {error})"
            ) from error
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _decode(path: str, size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        # A JPEG decoder can halve an image on the way, which is much faster for large photographs.
        file.draft("RGB", (size, size))
        image = _as_rgb(ImageOps.exif_transpose(file))
    width, height = image.size
    # The largest square in the middle; fractions of a pixel are the resampling filter's.
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def _as_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        solid = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, solid)
    return image.convert("RGB")


@DATA_SETS.register("folder")
def folder(root: Path | None = None, image_size: int = 224) -> ImageData:
    """The images under a folder, as (3, image_size, image_size) fp32; "folder-64" asks for 64x64.

    Inputs are normalised with the mean and the standard deviation of (at most 512 of) the training images;
    augmentation shifts by up to an eighth of the image, with the mean colour coming in, and mirrors. Needs
    Pillow. Raises DataError where the folder is laid out otherwise or a file is damaged; the latter mostly
    later, when that image's turn comes.
    """
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise DataError("the data set 'folder' needs Pillow: pip install 'vidfast[train]'") from None
    if root is None:
        raise DataError(f"folder needs a root (--root): a folder of images; {LAYOUT}")
    if image_size < 1:
        raise DataError(f"wanted images of 1x1 or more, got {image_size}x{image_size}")
    if not root.is_dir():
        raise DataError(f"{root}: {'is no folder' if root.exists() else 'does not exist'}; {LAYOUT}")
    listing = _Listing(root)
    classes, train, validation, test = _parts(listing)

    spaced = np.linspace(0, len(train[0]) - 1, min(len(train[0]), STATISTICS_IMAGES)).round().astype(int)
    normalisation = Normalisation.of(decode([train[0][i] for i in spaced], image_size))
    train_files, validation_files, test_files = (
        ImageFiles(paths, labels, image_size, normalisation) for paths, labels in (train, validation, test)
    )
    return ImageData(
        name=f"{root.resolve().name or 'folder'}-{image_size}-{listing.digest()}",
        num_classes=len(classes),
        train=train_files,
        validation=validation_files,
        test=test_files,
        # The mean colour is 0 after normalisation.
        augment=in_turn(random_shift(image_size // 8), random_flip()),
        normalisation=normalisation,
        class_names=tuple(classes),
    )


class _Listing:
    """The files of a folder of classes, remembered for a digest that tells data sets apart."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._seen = hashlib.sha256()

    def has(self, name: str) -> bool:
        return (self.root / name).is_dir()

    def classes(self, part: str = "") -> dict[str, list[str]]:
        """The paths of the images in every class's folder, both in the order of their names."""
        at = self.root / part
        found: dict[str, list[str]] = {}
        for name in sorted(e.name for e in os.scandir(at) if e.is_dir() and not e.name.startswith(".")):
            entries = sorted(os.scandir(at / name), key=lambda entry: entry.name)
            images = [e for e in entries if e.name.lower().endswith(SUFFIXES) and e.is_file()]
            if not images:
                raise DataError(f"{at / name}: holds no image; {LAYOUT}")
            found[name] = [entry.path for entry in images]
            for entry in images:
                self._seen.update(f"{part}/{name}/{entry.name} {entry.stat().st_size}\n".encode())
        if len(found) < 2:
            raise DataError(
                f"{at}: wanted a folder for each of two classes or more, got {len(found)}; {LAYOUT}"
            )
        return found

    def digest(self) -> str:
        """Of the names and sizes of the files in every part that was listed."""
        return self._seen.hexdigest()[:8]


Part = tuple[list[str], Tensor]


def _parts(listing: _Listing) -> tuple[list[str], Part, Part, Part]:
    """The classes' names, and the paths and labels of the three parts."""
    root = listing.root
    if not listing.has("train"):
        found = listing.classes()
        classes = list(found)
        everything = _labelled(found, classes)
        test, validation, train = _split(everything, classes, (TEST_SHARE, VALIDATION_SHARE), root)
        return classes, train, validation, test
    if not listing.has("test"):
        raise DataError(
            f"{root}: has train and no test, and reported numbers need images that nothing was chosen on; "
            "call val test if it is to be that, and a validation part is taken out of train"
        )
    found = listing.classes("train")
    classes = list(found)
    train = _labelled(found, classes)
    test = _known(listing, "test", classes)
    for name in ("val", "validation"):
        if listing.has(name):
            return classes, train, _known(listing, name, classes), test
    validation, train = _split(train, classes, (VALIDATION_SHARE,), root / "train")
    return classes, train, validation, test


def _known(listing: _Listing, part: str, classes: list[str]) -> Part:
    found = listing.classes(part)
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise DataError(f"{listing.root / part}: has classes that train has not: {', '.join(unknown[:5])}")
    return _labelled(found, classes)


def _labelled(found: dict[str, list[str]], classes: list[str]) -> Part:
    number = {name: i for i, name in enumerate(classes)}
    paths = [path for of_class in found.values() for path in of_class]
    labels = [number[name] for name, of_class in found.items() for _ in of_class]
    return paths, torch.tensor(labels)


def _split(part: Part, classes: list[str], shares: Sequence[float], where: Path) -> list[Part]:
    paths, labels = part
    few = [(name, int(n)) for name, n in zip(classes, labels.bincount(), strict=True) if n <= len(shares)]
    if few:
        name, count = few[0]
        raise DataError(
            f"{where / name}: wanted {len(shares) + 1} images or more, so that every part gets one, it has "
            f"{count}"
        )
    indices = [chosen.sort().values for chosen in stratified_shares(labels, shares, SPLIT_SEED)]
    return [([paths[i] for i in chosen.tolist()], labels[chosen]) for chosen in indices]
