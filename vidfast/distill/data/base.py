"""What a data set is here, M-per-class subsets of it, and augmentation of a whole batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..registry import Registry

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images (N, C, H, W) and class numbers (N,) in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.ndim != 4 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"wanted images (N, C, H, W) and labels (N,), got {tuple(images.shape)}, "
                f"{tuple(labels.shape)}"
            )
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def subset(self, indices: Tensor) -> Images:
        return Images(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class ImageData:
    """A data set in three parts that share no image.

    train: what teachers learn from, and what the M labelled images a class are drawn from. validation: for
    choosing hyperparameters. test: for the reported numbers and nothing else.
    augment: what training applies to a batch of images, or None.
    """

    name: str
    num_classes: int
    train: Images
    validation: Images
    test: Images
    augment: Augmentation | None = None

    @property
    def in_channels(self) -> int:
        return int(self.train.images.shape[1])


DATA_SETS: Registry[Callable[[], ImageData]] = Registry("data set")


def samples_per_class(images: Images, count: int, seed: int) -> Images:
    """`count` images of every class, drawn by `seed`. Raises ValueError if a class has fewer."""
    if count < 1:
        raise ValueError(f"wanted 1 or more images a class, got {count}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    labels = images.labels[order]
    chosen: list[Tensor] = []
    for label in sorted(set(labels.tolist())):
        of_class = order[labels == label]
        if len(of_class) < count:
            raise ValueError(f"wanted {count} images a class, and class {label} has {len(of_class)}")
        chosen.append(of_class[:count])
    return images.subset(torch.cat(chosen))


def random_shift(pixels: int, fill: float = 0.0) -> Augmentation:
    """Shift every image by up to `pixels` in each direction, each by its own amount; `fill` comes in."""

    def shift(images: Tensor, generator: torch.Generator) -> Tensor:
        batch, _, height, width = images.shape
        padded = torch.nn.functional.pad(images, (pixels,) * 4, value=fill)
        by = torch.randint(0, 2 * pixels + 1, (2, batch, 1), generator=generator).to(images.device)
        rows = (by[0] + torch.arange(height, device=images.device))[:, None, :, None]
        columns = (by[1] + torch.arange(width, device=images.device))[:, None, None, :]
        which = torch.arange(batch, device=images.device)[:, None, None, None]
        channels = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
        return padded[which, channels, rows, columns]

    return shift


def stratified_parts(labels: Tensor, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Split the indices of `labels` into parts with `sizes` images of every class, and the rest."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts: list[list[Tensor]] = [[] for _ in range(len(sizes) + 1)]
    for label in sorted(set(labels.tolist())):
        of_class = order[labels[order] == label]
        cuts = torch.tensor_split(of_class, torch.tensor(sizes).cumsum(0))
        for part, cut in zip(parts, cuts, strict=True):
            part.append(cut)
    return [torch.cat(part) for part in parts]
