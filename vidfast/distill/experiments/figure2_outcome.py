"""What figure 2's trainings measured: the readings of both students and of q without one, and the gap between them."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..trainer import Row
from .likelihood import Reading

VID, ALONE = "vid", "no transfer"
LABELS = {VID: "VID training", ALONE: "no transfer, q alone optimised"}
MARGINAL = "q without a student"


@dataclass
class Outcome:
    """What was measured.

    shown: the test images that are drawn. readings: by arm, seed and step, one for each pair of layers. marginal: by
    seed, of q without a student. accuracies: of the students, by arm and seed, in percent.
    """

    teacher_accuracy: float
    shown: list[int]
    readings: dict[str, dict[int, dict[int, list[Reading]]]] = field(default_factory=dict)
    marginal: dict[int, list[Reading]] = field(default_factory=dict)
    accuracies: dict[str, dict[int, float]] = field(default_factory=dict)

    def add(self, arm: str, seed: int, stages: dict[int, list[Reading]], accuracy: float) -> None:
        self.readings.setdefault(arm, {})[seed] = stages
        self.accuracies.setdefault(arm, {})[seed] = accuracy

    @property
    def seeds(self) -> list[int]:
        return list(self.marginal)

    @property
    def steps(self) -> list[int]:
        return list(self.readings[VID][self.seeds[0]])

    def of(self, arm: str, pair: int, step: int) -> list[Reading]:
        """A pair's readings of all seeds."""
        return [self.readings[arm][seed][step][pair] for seed in self.seeds]

    def of_marginal(self, pair: int) -> list[Reading]:
        return [self.marginal[seed][pair] for seed in self.seeds]

    def gaps(self, pair: int) -> list[float]:
        """VID's log-likelihood above the other's at the end, in nats per position, by seed."""
        last = self.steps[-1]
        both = zip(self.of(VID, pair, last), self.of(ALONE, pair, last), strict=True)
        return [vid.nats - alone.nats for vid, alone in both]

    def rows(self) -> list[Row]:
        """Every reading, for log_likelihood.csv. The step of q without a student is empty."""
        found = [
            (arm, seed, step, reading)
            for arm, by_seed in self.readings.items()
            for seed, by_step in by_seed.items()
            for step, readings in by_step.items()
            for reading in readings
        ]
        every: list[tuple[str, int, int | None, Reading]] = [
            *found,
            *(
                (MARGINAL, seed, None, reading)
                for seed, readings in self.marginal.items()
                for reading in readings
            ),
        ]
        return [
            {
                "student": arm,
                "seed": seed,
                "step": step,
                "pair": reading.pair,
                "channels": reading.channels,
                "height": reading.height,
                "width": reading.width,
                "nats_per_position": reading.nats,
                "nats_per_element": reading.per_element,
                "nats_per_position_background": reading.background,
                "nats_per_position_foreground": reading.foreground,
                "correlation_with_magnitude": reading.magnitude,
            }
            for arm, seed, step, reading in every
        ]
