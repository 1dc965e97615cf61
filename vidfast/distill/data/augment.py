"""Augmentation of a whole batch at a time, with what is random drawn from the generator that is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Inputs (B, C, H, W) and a generator on the CPU -> inputs of that shape.
Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def random_shift(pixels: int, fill: float | Sequence[float] = 0.0) -> Augmentation:
    """Shift every image by up to `pixels` in each direction, each by its own amount.

    `fill` comes in: one number, or one for each channel. It is the usual random crop out of an image padded
    by `pixels`.
    """
    if pixels < 0:
        raise ValueError(f"wanted a shift of 0 pixels or more, got {pixels}")

    def shift(images: Tensor, generator: torch.Generator) -> Tensor:
        batch, channels, height, width = images.shape
        by = torch.randint(0, 2 * pixels + 1, (2, batch, 1), generator=generator).to(images.device)
        value = torch.as_tensor(fill, dtype=images.dtype, device=images.device)
        padded = (
            value.reshape(-1, 1, 1)
            .expand(channels, 1, 1)
            .repeat(batch, 1, height + 2 * pixels, width + 2 * pixels)
        )
        padded[:, :, pixels : pixels + height, pixels : pixels + width] = images
        rows = (by[0] + torch.arange(height, device=images.device))[:, None, :, None]
        columns = (by[1] + torch.arange(width, device=images.device))[:, None, None, :]
        which = torch.arange(batch, device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[None, :, None, None]
        return padded[which, channel, rows, columns]

    return shift


def random_flip() -> Augmentation:
    """Mirror every image left to right with probability one half."""

    def flip(images: Tensor, generator: torch.Generator) -> Tensor:
        mirrored = torch.randint(0, 2, (len(images), 1, 1, 1), generator=generator).to(images.device)
        return torch.where(mirrored.bool(), images.flip(3), images)

    return flip


def in_turn(*augmentations: Augmentation) -> Augmentation:
    """One augmentation after the other, all from the same generator."""

    def apply(images: Tensor, generator: torch.Generator) -> Tensor:
        for augmentation in augmentations:
            images = augmentation(images, generator)
        return images

    return apply
