"""A table's rows: the methods, and the settings of each that the search chooses from."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..choices import Optimizer
from ..trainer import TrainOptions
from .runs import Term

Rate = tuple[Optimizer, float]


@dataclass(frozen=True)
class Setting:
    """One choice of what a row trains with."""

    optimizer: Optimizer
    lr: float
    terms: tuple[Term, ...] = ()
    task_weight: float = 1.0

    def options(self, base: TrainOptions) -> TrainOptions:
        return replace(base, optimizer=self.optimizer, lr=self.lr)

    def at_rate_of(self, other: Setting) -> Setting:
        """This one with the other's optimizer and learning rate."""
        return replace(self, optimizer=other.optimizer, lr=other.lr)

    def describe(self) -> dict[str, str]:
        """The setting as text, for a record."""
        return {
            "optimizer": self.optimizer,
            "lr": f"{self.lr:g}",
            "terms": "; ".join(map(str, self.terms)),
            "task_weight": f"{self.task_weight:g}",
        }


@dataclass(frozen=True)
class Arm:
    """One row of a table.

    settings: what the search chooses from. parts: the labels of the rows whose best settings this row combines;
    it has no settings of its own then. pretrained: whether the student starts from one trained on the source.
    """

    label: str
    settings: tuple[Setting, ...] = ()
    parts: tuple[str, ...] = ()
    pretrained: bool = False

    def candidates(
        self, best: Mapping[str, Setting], diverged: Mapping[str, Sequence[Setting]]
    ) -> tuple[Setting, ...]:
        """The settings to try, given the best of the rows before and those with which they diverged.

        A combination has the terms of its parts as they were found best, the smaller task weight, and each
        part's own optimizer and learning rate to choose from, but for those with which a part alone, with these
        terms, had diverged: what is unstable alone may only happen to be stable in the search.
        """
        if not self.parts:
            return self.settings
        parts = [best[label] for label in self.parts]
        terms = tuple(term for part in parts for term in part.terms)
        task = min(part.task_weight for part in parts)
        rates = [
            rate
            for rate in parts
            if not any(
                part.at_rate_of(rate) in diverged.get(label, ())
                for label, part in zip(self.parts, parts, strict=True)
            )
        ]
        combined = [replace(rate, terms=terms, task_weight=task) for rate in rates or parts]
        return tuple({(s.optimizer, s.lr): s for s in combined}.values())


def alone(label: str, rates: Iterable[Rate], **arm: Any) -> Arm:
    """The student on its labels."""
    return Arm(label, tuple(Setting(optimizer, lr) for optimizer, lr in rates), **arm)


def transfer(
    label: str,
    method: str,
    rates: Iterable[Rate],
    weights: Sequence[float],
    *,
    task_weight: float = 1.0,
    options: Mapping[str, Any] | None = None,
    taps: tuple[int, ...] | None = None,
) -> Arm:
    """One method at every rate and weight."""
    settings = tuple(
        Setting(optimizer, lr, (Term(method, weight, dict(options or {}), taps),), task_weight)
        for (optimizer, lr), weight in itertools.product(rates, weights)
    )
    return Arm(label, settings)


def combination(*parts: str) -> Arm:
    return Arm(" + ".join(parts), parts=parts)


def chosen(arms: Sequence[Arm], labels: Sequence[str] | None) -> tuple[Arm, ...]:
    """The arms with these labels, and those that they are combined of; all where labels is None.

    Raises ValueError for a label that is not there.
    """
    if labels is None:
        return tuple(arms)
    known = {arm.label: arm for arm in arms}
    for label in labels:
        if label not in known:
            raise ValueError(f"there is no row {label!r}; the rows are {', '.join(known)}")
    wanted = {part for label in labels for part in (label, *known[label].parts)}
    return tuple(arm for arm in arms if arm.label in wanted)
