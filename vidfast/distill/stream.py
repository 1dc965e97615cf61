"""The order of the training images, and a random state for every step, as functions of the seed alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from numpy.random import SeedSequence
from torch.utils.data import Sampler


class StreamBatches(Sampler[list[int]]):
    """The batches of steps start+1 ... steps, of an endless stream of permutations chopped into equal
    batches.

    No batch is short and every image comes equally often; a batch may end one permutation and begin the next.
    Of every batch, process `rank` of `world` gets its part.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        steps: int,
        seed: int,
        *,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if size < 1:
            raise ValueError("wanted at least one training image, got none")
        self.size, self.batch_size = size, min(batch_size, size)
        self.steps, self.seed, self.start, self.rank, self.world = steps, seed, start, rank, world
        if self.batch_size < world:
            raise ValueError(
                f"wanted a batch of at least one image a process, got {self.batch_size} for {world}"
            )

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, [0]
        for step in range(self.start, self.steps):
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = torch.randperm(
                        self.size, generator=generator_for(self.seed, "order", epoch)
                    ).tolist()
                batch.append(order[position % self.size])
            yield batch[self.rank :: self.world]


def seed_for(seed: int, purpose: str, step: int, rank: int = 0) -> int:
    """One seed for each of these, well apart: torch's CPU generator looks at the lower 32 bits alone."""
    mixed = SeedSequence((seed, *purpose.encode(), step, rank))
    return int(mixed.generate_state(1)[0])


def generator_for(seed: int, purpose: str, step: int, rank: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed_for(seed, purpose, step, rank))
