"""Input tensors in rotation, so that a call finds its inputs in memory and not in the cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bench.cases import Case
from bench.machine import free_memory, last_level_cache

# The set of buffers in rotation is this many times the last-level cache.
CACHE_MULTIPLE = 4
MOST_SLOTS = 4096
# They take at most this share of the memory that is free: results and other processes need the rest.
MOST_MEMORY = 0.25
# On a GPU a graph holds one call a slot: few slots would leave it too short to time.
FEWEST_SLOTS_OF_A_GRAPH = 4
# Calls in one sample of a small case: each needs buffers of its own where it runs in place.
HOT_SLOTS = 32
INIT_VARIANCE = 5.0
EPS = 1e-5


@dataclass(frozen=True)
class Slot:
    """One set of inputs. Every slot of a pool holds the same values at different addresses."""

    mean: torch.Tensor
    target: torch.Tensor


class Pool:
    """The slots of a case, their pristine values and the channel parameter."""

    def __init__(self, case: Case, seed: int = 0, slots: int | None = None) -> None:
        generator = torch.Generator(device=case.device).manual_seed(seed)
        mean, target = (self.draw(case, generator) for _ in range(2))
        spread = torch.randn(case.channels, generator=generator, device=case.device)
        variance = INIT_VARIANCE - EPS
        self.pristine = mean
        self.alpha = (0.25 * spread + variance + math.log(-math.expm1(-variance))).requires_grad_()
        pair = 2 * case.nbytes
        wanted = math.ceil(CACHE_MULTIPLE * last_level_cache(case.device) / pair) if case.cold else HOT_SLOTS
        fewest = FEWEST_SLOTS_OF_A_GRAPH if case.on_gpu else 1
        most = MOST_SLOTS if case.on_gpu else min(MOST_SLOTS, max(1, int(MOST_MEMORY * free_memory() / pair)))
        count = slots or max(min(wanted, most), fewest)
        self.slots = [Slot(mean.clone(), target.clone()) for _ in range(count)]
        # A real out-of-cache case says so: too few slots would be a warm measurement under a cold name.
        self.cold = case.cold and count * pair >= 2 * last_level_cache(case.device)
        self._next = 0

    @staticmethod
    def draw(case: Case, generator: torch.Generator) -> torch.Tensor:
        values = torch.randn(case.shape, generator=generator, device=case.device).to(case.dtype)
        if case.layout == "channels_last":
            return values.contiguous(memory_format=torch.channels_last)
        return values

    def take(self) -> Slot:
        slot = self.slots[self._next % len(self.slots)]
        self._next += 1
        return slot

    def restore(self, slot: Slot) -> None:
        """Put the mean back after a call that wrote over it."""
        slot.mean.copy_(self.pristine)

    def restore_all(self) -> None:
        """Put the mean of every slot back."""
        for slot in self.slots:
            self.restore(slot)
