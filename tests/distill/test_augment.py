"""Augmentation of batches: every image its own draw, whole images, all from the generator that is given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vidfast.distill.data import in_turn, random_flip, random_shift


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shift_moves_each_image_whole_by_its_own_amount() -> None:
    images = torch.zeros(64, 2, 5, 5)
    images[:, :, 2, 2] = torch.tensor([1.0, 2.0])
    shifted = random_shift(1, fill=0.0)(images, seeded())
    assert shifted.shape == images.shape
    where: list[Tensor] = [channel.nonzero()[:, 1:] for channel in shifted.unbind(1)]
    assert torch.equal(*where)
    assert len({tuple(place.tolist()) for place in where[0]}) == 9
    assert int((where[0] - 2).abs().max()) == 1
    filled = random_shift(2, fill=-7.0)(torch.zeros(8, 1, 4, 4), seeded())
    assert set(filled.unique().tolist()) == {0.0, -7.0}


def test_shift_fills_every_channel_with_its_own_value() -> None:
    shifted = random_shift(3, fill=(-1.0, -2.0))(torch.zeros(32, 2, 4, 6), seeded())
    assert [set(channel.unique().tolist()) for channel in shifted.unbind(1)] == [{0.0, -1.0}, {0.0, -2.0}]
    with pytest.raises(ValueError, match="0 pixels or more"):
        random_shift(-1)


def test_a_shift_of_no_pixels_changes_nothing() -> None:
    images = torch.randn(3, 2, 4, 4)
    assert torch.equal(random_shift(0)(images, seeded()), images)


def test_flip_mirrors_about_half_of_the_images() -> None:
    images = torch.randn(400, 2, 3, 5)
    flipped = random_flip()(images, seeded())
    mirrored = (flipped == images.flip(3)).all(3).all(2).all(1)
    kept = (flipped == images).all(3).all(2).all(1)
    assert torch.equal(mirrored, ~kept)
    assert 150 < int(mirrored.sum()) < 250


def test_augmentation_follows_from_the_generator_alone() -> None:
    images = torch.randn(16, 1, 6, 6)
    augment = in_turn(random_shift(2), random_flip())
    before = torch.get_rng_state()
    first, again, other = (augment(images, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    # One after the other, from one generator.
    generator = seeded()
    assert torch.equal(random_flip()(random_shift(2)(images, generator), generator), first)
