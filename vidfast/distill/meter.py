"""What a run learns about its loss: the terms' means since the last row, and whether they stayed finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class NonFiniteLossError(FloatingPointError):
    """The loss became inf or nan; the text names the terms and the step."""


class Meter:
    """The mean of every term since the last row, and the first step at which one was not finite.

    Kept on the device, and in every process of its own part of the batch: looking at a number on the host is a
    synchronisation, so it is done now and then. `check`, `means` and `state` are called in all processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.names: list[str] = []
        self.sums = self.first_bad = torch.zeros(0)
        self.count = 0

    def add(self, terms: Mapping[str, Tensor], step: int, fresh: bool) -> None:
        """Count the terms of one part of a batch; fresh: with this part the batch is whole."""
        values = torch.stack([value.float() for value in terms.values()])
        if not self.names:
            self._begin(list(terms))
        self.sums += values
        self.first_bad.masked_fill_((self.first_bad < 0) & ~values.isfinite(), step)
        self.count += fresh

    def check(self) -> None:
        """Raises NonFiniteLossError, in every process, if a term of any of them was inf or nan."""
        found = self._gathered(self.first_bad).tolist()
        first = [min((at for at in of_term if at >= 0), default=-1) for of_term in zip(*found, strict=True)]
        bad = {name: at for name, at in zip(self.names, first, strict=True) if at >= 0}
        if bad:
            step = min(bad.values())
            terms = ", ".join(repr(name) for name, at in bad.items() if at == step)
            raise NonFiniteLossError(
                f"the loss is not finite: the term {terms} became inf or nan in step {step}; lower the "
                "learning rate or that term's weight"
            )

    def means(self) -> dict[str, Any]:
        """The loss and its terms, averaged over the steps since the last call and over the processes."""
        sums = self._gathered(self.sums).mean(0)
        means = dict(zip(self.names, (sums / max(self.count, 1)).tolist(), strict=True))
        self.sums.zero_()
        self.count = 0
        return {"loss": sum(means.values()), **{f"loss_{name}": value for name, value in means.items()}}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to end this row as this one will. sums: (processes, terms)."""
        return {"names": list(self.names), "sums": self._gathered(self.sums).cpu(), "count": self.count}

    def load(self, state: Mapping[str, Any]) -> None:
        """Raises KeyError, TypeError or ValueError for a state that is none."""
        sums, names, world = state["sums"], state["names"], self.accelerator.num_processes
        if not isinstance(sums, Tensor) or sums.ndim != 2 or sums.shape[1] != len(names):
            raise ValueError("the sums of the terms are not (processes, terms)")
        self._begin([str(name) for name in names])
        # Other processes than before: each takes an equal share, which `means` adds up to the same mean.
        own = sums[self.accelerator.process_index] if len(sums) == world else sums.mean(0)
        self.sums += own.to(self.sums)
        self.count = int(state["count"])

    def _begin(self, names: list[str]) -> None:
        self.names, device = names, self.accelerator.device
        self.sums = torch.zeros(len(names), device=device)
        self.first_bad = torch.full((len(names),), -1, dtype=torch.int64, device=device)

    def _gathered(self, values: Tensor) -> Tensor:
        """(processes, terms)"""
        if self.accelerator.num_processes == 1:
            return values[None]
        gathered: Tensor = self.accelerator.gather(values[None])
        return gathered
