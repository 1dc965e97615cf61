"""What a data set is here: three parts of labelled images, by name."""

from __future__ import annotations

import hashlib
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..registry import Registry
from .augment import Augmentation


class DataError(ValueError):
    """A data set that is not there or not what was wanted; the text names the file and says why."""


@dataclass(frozen=True)
class Normalisation:
    """Pixels in [0, 1] to inputs of mean 0 and standard deviation 1. mean, std: (C,) fp32, one a channel."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, images: Tensor) -> Normalisation:
        """The statistics of the pixels of images (N, C, H, W), uint8 or floating point in [0, 1].

        A channel that is constant gets a standard deviation of 1.
        """
        # In pieces: a data set of uint8 images would be eight times as large in fp64.
        count, total, squares = (
            0,
            torch.zeros(images.shape[1]).double(),
            torch.zeros(images.shape[1]).double(),
        )
        for piece in torch.split(images, 1024):
            pixels = as_pixels(piece).double()
            count += pixels.numel() // pixels.shape[1]
            total += pixels.sum((0, 2, 3))
            squares += pixels.square().sum((0, 2, 3))
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        std = torch.where(variance > 1e-12, variance.sqrt(), torch.ones_like(variance))
        return cls(mean.float(), std.float())

    def inputs(self, images: Tensor) -> Tensor:
        """Images (..., C, H, W), uint8 or fp32 in [0, 1], as a network's inputs in fp32."""
        return (as_pixels(images) - self.mean[:, None, None]) / self.std[:, None, None]

    def pixels(self, inputs: Tensor) -> Tensor:
        """A network's inputs (..., C, H, W) as pixels in [0, 1] again, for showing them."""
        mean, std = (value.to(inputs.device)[:, None, None] for value in (self.mean, self.std))
        return (inputs * std + mean).clamp(0, 1)

    @property
    def black(self) -> tuple[float, ...]:
        """What a pixel of 0 becomes, by channel."""
        return tuple((-self.mean / self.std).tolist())


def as_pixels(images: Tensor) -> Tensor:
    """uint8 images as fp32 in [0, 1]; others as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


class LabelledImages(Dataset[tuple[Tensor, Tensor]], ABC):
    """Images of one shape and their class numbers; an item is (input (C, H, W) fp32, label, an int64 scalar).

    Nothing here is random, so what an index gives is the same in every process and worker.

    labels: (N,) int64. shape: (C, H, W) of every input.
    """

    labels: Tensor
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def inputs(self, indices: Sequence[int]) -> Tensor:
        """The network's inputs (len(indices), C, H, W), fp32. Raises DataError for a file that is damaged."""

    @abstractmethod
    def subset(self, indices: Tensor, labels: Tensor | None = None) -> LabelledImages:
        """These images, with other labels if they are given."""

    @abstractmethod
    def joined(self, other: LabelledImages) -> LabelledImages:
        """These images and the other's, which come from the same source."""

    def example(self, count: int = 2) -> Tensor:
        """The inputs of the first `count` images, or of all if there are fewer."""
        return self.inputs(range(min(count, len(self))))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs([index])[0], self.labels[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        # A DataLoader's whole batch at once.
        return list(zip(self.inputs(indices), self.labels[indices], strict=True))


class Images(LabelledImages):
    """Images (N, C, H, W) and class numbers (N,) in memory.

    Floating-point images are the network's inputs as they are. uint8 images, a quarter of the memory, are
    made into inputs by `normalisation` when they are asked for, and need one.
    """

    def __init__(self, images: Tensor, labels: Tensor, normalisation: Normalisation | None = None) -> None:
        if images.ndim != 4 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"wanted images (N, C, H, W) and labels (N,), got {tuple(images.shape)}, "
                f"{tuple(labels.shape)}"
            )
        if (images.dtype == torch.uint8) != (normalisation is not None):
            raise ValueError(
                f"wanted a normalisation with uint8 images and with no others, got {images.dtype} and "
                f"{'one' if normalisation is not None else 'none'}"
            )
        self.images, self.labels, self.normalisation = images, labels, normalisation
        channels, height, width = images.shape[1:]
        self.shape = (channels, height, width)

    def inputs(self, indices: Sequence[int]) -> Tensor:
        images = self.images[torch.as_tensor(indices)]
        return images if self.normalisation is None else self.normalisation.inputs(images)

    def subset(self, indices: Tensor, labels: Tensor | None = None) -> Images:
        chosen = self.labels[indices] if labels is None else labels
        return Images(self.images[indices], chosen, self.normalisation)

    def joined(self, other: LabelledImages) -> Images:
        if not isinstance(other, Images):
            raise TypeError(f"wanted Images to join with Images, got {type(other).__name__}")
        images = torch.cat([self.images, other.images])
        return Images(images, torch.cat([self.labels, other.labels]), self.normalisation)


@dataclass(frozen=True)
class ImageData:
    """A data set in three parts that share no image.

    train: what teachers learn from, and what the M labelled images a class are drawn from. validation: for
    choosing hyperparameters. test: for the reported numbers and nothing else.
    augment: what training applies to a batch of inputs, or None. normalisation: what made inputs of pixels
    in [0, 1], or None; for showing images. class_names: by class number, or empty.

    `name` follows from all that the images are, because trained teachers are kept under it.
    """

    name: str
    num_classes: int
    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    augment: Augmentation | None = None
    normalisation: Normalisation | None = None
    class_names: tuple[str, ...] = ()

    @property
    def in_channels(self) -> int:
        return self.train.shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        return self.train.shape[1:]

    def classes(self, labels: Sequence[int]) -> ImageData:
        """The images of these classes alone, renumbered 0, 1, ... in the order given, in all three parts.

        Raises ValueError for a class that is not there, is named twice, or for none at all.
        """
        labels = list(labels)
        unknown = [label for label in labels if not 0 <= label < self.num_classes]
        if unknown or not labels or len(set(labels)) < len(labels):
            raise ValueError(f"wanted different classes out of 0 to {self.num_classes - 1}, got {labels}")
        new = torch.full((self.num_classes,), -1)
        new[labels] = torch.arange(len(labels))

        def of(part: LabelledImages) -> LabelledImages:
            renumbered = new[part.labels]
            kept = (renumbered >= 0).nonzero()[:, 0]
            return part.subset(kept, renumbered[kept])

        return replace(
            self,
            name=f"{self.name}-classes-{_short(labels)}",
            num_classes=len(labels),
            train=of(self.train),
            validation=of(self.validation),
            test=of(self.test),
            class_names=tuple(self.class_names[label] for label in labels) if self.class_names else (),
        )

    def with_validation_in_train(self) -> ImageData:
        """The same with the validation images among the training images as well, for final runs on everything.

        The validation part stays as it is and says nothing from then on: all of it was trained on.
        """
        train = self.train.joined(self.validation)
        return replace(self, name=f"{self.name}-with-validation", train=train)


def _short(numbers: Sequence[int]) -> str:
    """Numbers as a part of a file name: runs as 0to4, and a digest where that is still long."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = "-".join(str(first) if first == last else f"{first}to{last}" for first, last in runs)
    return text if len(text) <= 40 else hashlib.sha256(text.encode()).hexdigest()[:12]


DataSet = Callable[..., ImageData]
# Each is called with the folder that the user gave, or None.
DATA_SETS: Registry[DataSet] = Registry("data set")


def load(name: str, *, root: str | Path | None = None) -> ImageData:
    """The data set called `name`; root is where its files are, for those that have files.

    A data set whose images are made to one size takes it as the last part of its name: "folder-64".

    Raises UnknownNameError for an unknown name, DataError for files that are missing, damaged or laid out
    otherwise.
    """
    path = None if root is None else Path(root)
    sized = re.fullmatch(r"(.+)-(\d+)", name)
    if name not in DATA_SETS and sized is not None and sized[1] in DATA_SETS:
        data_set = DATA_SETS[sized[1]]
        if "image_size" in inspect.signature(data_set).parameters:
            return data_set(path, image_size=int(sized[2]))
    return DATA_SETS[name](path)


def no_root(name: str, root: Path | None) -> None:
    """Raises DataError where a folder was given to a data set that has no files."""
    if root is not None:
        raise DataError(f"the data set {name!r} reads no files: wanted no root, got {root}")
