"""What a run learns about its loss: the terms' means since the last row, and whether they stayed finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .processes import Processes


class NonFiniteLossError(FloatingPointError):
    """The loss became inf or nan; the text names the terms and the step, and says why and what to do.

    step: the first such step, 0 where it is not known. terms: the names of the terms.
    """

    def __init__(self, text: str, step: int = 0, terms: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.step, self.terms = step, tuple(terms)

    def because(self, cause: str) -> NonFiniteLossError:
        """The same error with what is the matter in place of the usual advice."""
        return NonFiniteLossError(f"{str(self).partition(';')[0]}; {cause}", self.step, self.terms)


class Meter:
    """The mean of every term since the last row, and the first step at which one was not finite.

    Kept on the device, and in every process of its own part of the batch: looking at a number on the host is a
    synchronisation, so it is done now and then. `check`, `means` and `state` are called in all processes.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
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
        found = self.processes.gather(self.first_bad).tolist()
        first = [min((at for at in of_term if at >= 0), default=-1) for of_term in zip(*found, strict=True)]
        bad = {name: at for name, at in zip(self.names, first, strict=True) if at >= 0}
        if bad:
            step = min(bad.values())
            terms = [name for name, at in bad.items() if at == step]
            raise NonFiniteLossError(
                f"the loss is not finite: the term {', '.join(map(repr, terms))} became inf or nan in step {step}; "
                "lower the learning rate or that term's weight",
                step,
                terms,
            )

    def means(self) -> dict[str, Any]:
        """The loss and its terms, averaged over the steps since the last call and over the processes."""
        sums = self.processes.gather(self.sums).mean(0)
        means = dict(zip(self.names, (sums / max(self.count, 1)).tolist(), strict=True))
        self.sums.zero_()
        self.count = 0
        return {"loss": sum(means.values()), **{f"loss_{name}": value for name, value in means.items()}}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to end this row as this one will. sums: (processes, terms)."""
        return {
            "names": list(self.names),
            "sums": self.processes.gather(self.sums).cpu(),
            "count": self.count,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Raises KeyError, TypeError or ValueError for a state that is none."""
        sums, names, world = state["sums"], state["names"], self.processes.count
        if not isinstance(sums, Tensor) or sums.ndim != 2 or sums.shape[1] != len(names):
            raise ValueError("the sums of the terms are not (processes, terms)")
        self._begin([str(name) for name in names])
        # Other processes than before: each takes an equal share, which `means` adds up to the same mean.
        own = sums[self.processes.index] if len(sums) == world else sums.mean(0)
        self.sums += own.to(self.sums)
        self.count = int(state["count"])

    def _begin(self, names: list[str]) -> None:
        self.names, device = names, self.processes.device
        self.sums = torch.zeros(len(names), device=device)
        self.first_bad = torch.full((len(names),), -1, dtype=torch.int64, device=device)
