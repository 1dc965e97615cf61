"""Stratified splits and M-per-class subsets, each a function of its seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import LabelledImages


def samples_per_class(
    images: LabelledImages, count: int | None, seed: int, *, at_most: bool = False
) -> LabelledImages:
    """`count` images of every class, drawn by `seed`; a larger count adds to a smaller one's. None: all images.

    at_most: take all images of a class that has fewer, which is a ValueError otherwise. Raises ValueError
    for a count below 1.
    """
    if count is None:
        return images
    if count < 1:
        raise ValueError(f"wanted 1 or more images a class, got {count}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    labels = images.labels[order]
    chosen: list[Tensor] = []
    for label in sorted(set(labels.tolist())):
        of_class = order[labels == label]
        if len(of_class) < count and not at_most:
            raise ValueError(f"wanted {count} images a class, and class {label} has {len(of_class)}")
        chosen.append(of_class[:count])
    return images.subset(torch.cat(chosen))


def hold_out(images: LabelledImages, share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """The rest, and a share of every class held out: the VID paper validates on 0.2 of the labelled images.

    Of every class at least one image is held out and at least one stays. Raises ValueError for a share that
    is not between 0 and 1 and for a class with a single image.
    """
    held, rest = stratified_shares(images.labels, (share,), seed)
    return images.subset(rest), images.subset(held)


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


def stratified_shares(labels: Tensor, shares: Sequence[float], seed: int) -> list[Tensor]:
    """Split the indices of `labels` into parts with `shares` of every class, and the rest.

    Numbers of images are rounded, and every part gets at least one of every class. Raises ValueError where a
    class has too few images for that, and unless the shares are above 0 and sum to less than 1.
    """
    if min(shares) <= 0 or sum(shares) >= 1:
        raise ValueError(f"wanted shares above 0 that sum to less than 1, got {tuple(shares)}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts: list[list[Tensor]] = [[] for _ in range(len(shares) + 1)]
    for label in sorted(set(labels.tolist())):
        of_class = order[labels[order] == label]
        sizes = [max(1, round(share * len(of_class))) for share in shares]
        if sum(sizes) >= len(of_class):
            raise ValueError(
                f"wanted images of class {label} for {len(sizes) + 1} parts (shares {tuple(shares)} and the "
                f"rest), it has {len(of_class)}"
            )
        for part, cut in zip(parts, torch.split(of_class, [*sizes, len(of_class) - sum(sizes)]), strict=True):
            part.append(cut)
    return [torch.cat(part) for part in parts]
