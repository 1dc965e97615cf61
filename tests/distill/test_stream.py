"""The order of the images: fair, the same for a seed whoever loads them, and cut for processes."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from training_runs import QUICK, assert_same, made, train

from vidfast.distill.data import Images
from vidfast.distill.stream import StreamBatches, seed_for
from vidfast.distill.trainer import Trainer


def test_every_image_comes_equally_often_and_no_batch_is_short() -> None:
    batches = list(StreamBatches(10, 4, 15, seed=0))
    assert len(batches) == 15
    assert {len(batch) for batch in batches} == {4}
    counts = torch.tensor(batches).flatten().bincount()
    assert counts.tolist() == [6] * 10
    assert [len(b) for b in StreamBatches(3, 64, 2, seed=0)] == [3, 3]


def test_seeds_differ_where_torch_looks() -> None:
    """Its CPU generator takes the lower 32 bits of a seed."""
    seeds = {
        seed_for(seed, purpose, step, rank) & 0xFFFFFFFF
        for seed in range(10)
        for purpose in ("order", "augment")
        for step in range(20)
        for rank in range(3)
    }
    assert len(seeds) == 10 * 2 * 20 * 3


def test_batches_from_a_start_and_for_processes_are_parts_of_the_same_stream() -> None:
    whole = list(StreamBatches(10, 4, 15, seed=5))
    assert list(StreamBatches(10, 4, 15, seed=5, start=6)) == whole[6:]
    parts = [list(StreamBatches(10, 4, 15, seed=5, rank=rank, world=3)) for rank in range(3)]
    for i, batch in enumerate(whole):
        assert sorted(index for part in parts for index in part[i]) == sorted(batch)
    with pytest.raises(ValueError, match="one image a process"):
        StreamBatches(10, 2, 15, seed=5, rank=0, world=3)
    with pytest.raises(ValueError, match="at least one training image"):
        StreamBatches(0, 2, 15, seed=5)


def test_workers_do_not_change_what_is_learned(small_data: Images) -> None:
    assert_same(train(small_data)[1], train(small_data, replace(QUICK, workers=1))[1])


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """A data set that draws random numbers from every generator when it is read."""

    def __init__(self, images: Images, source: str) -> None:
        self.images, self.source = images, source

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = {"random": random.random, "numpy": np.random.rand, "torch": lambda: float(torch.rand(()))}
        image, label = self.images[index]
        return image + drawn[self.source](), label


@pytest.mark.parametrize("source", ["random", "numpy", "torch"])
def test_what_a_data_set_draws_follows_from_the_seed(small_data: Images, source: str) -> None:
    def trained(**options: Any) -> list[dict[str, Any]]:
        data = Noisy(small_data, source)
        options = {"eval_every": 1, **options}
        trainer = Trainer(made(small_data), data, replace(QUICK, **options), progress=False)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        history = trainer.fit()
        assert states == (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        )
        return history

    first = trained()
    for generator in (random.random, np.random.rand, lambda: torch.rand(())):
        generator()
    assert trained() == first
    assert trained(workers=2) == first
    assert trained(seed=1) != first
    # Every image of every batch has its own draw.
    still = Trainer(made(small_data), small_data, replace(QUICK, eval_every=1), progress=False).fit()
    assert still[0]["loss"] != first[0]["loss"]
