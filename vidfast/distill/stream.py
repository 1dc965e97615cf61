"""The order of the training images, and every random state, as functions of the seed and the step alone."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.random import SeedSequence
from torch.utils.data import Dataset, Sampler

from .data.base import LabelledImages


class StepIndices(list[int]):
    """One process's part of a step's batch: indices into the data, of the images `rank::world` of the batch."""

    step: int
    size: int
    rank: int
    world: int


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
                        self.size, generator=generator_for(self.seed, "order", epoch), device="cpu"
                    ).tolist()
                batch.append(order[position % self.size])
            part = StepIndices(batch[self.rank :: self.world])
            part.step, part.size, part.rank, part.world = step + 1, self.batch_size, self.rank, self.world
            yield part


class SeededItems(Dataset[Any]):
    """A data set whose items are each read in a random state that follows from the seed, the step and the
    image's place in the whole batch: whatever __getitem__ draws with random, numpy or torch is the same in
    any worker, in any process and after a resumption.
    """

    def __init__(self, data: Dataset[Any], seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, index: int) -> Any:
        return self.data[index]

    def __getitems__(self, indices: StepIndices) -> list[Any]:
        mixed = SeedSequence((self.seed, *b"item", indices.step)).generate_state(indices.size)
        items = []
        for index, seed in zip(indices, mixed[indices.rank :: indices.world].tolist(), strict=True):
            seed_everything(seed)
            items.append(self.data[index])
        return items


def seed_for(seed: int, purpose: str, step: int, rank: int = 0) -> int:
    """One seed for each of these, well apart: torch's CPU generator looks at the lower 32 bits alone."""
    mixed = SeedSequence((seed, *purpose.encode(), step, rank))
    return int(mixed.generate_state(1)[0])


def generator_for(seed: int, purpose: str, step: int, rank: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed_for(seed, purpose, step, rank))


def seed_everything(seed: int) -> None:
    """Seed the generators of random, numpy and torch (of every device), with 32 bits."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def kept_random_state(devices: Iterable[int] | None = None) -> Iterator[None]:
    """Restore the random state of random, numpy and torch after the block.

    devices: the CUDA devices whose state is kept; None for all.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if devices is None else devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def draws_nothing(data: Dataset[Any]) -> bool:
    """Whether reading an item is known to draw no random numbers, so that no seeding is needed."""
    of_class = isinstance(data, LabelledImages) and type(data).__getitem__ is LabelledImages.__getitem__
    return of_class or type(data) is torch.utils.data.TensorDataset
