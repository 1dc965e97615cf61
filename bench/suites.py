"""The suites: which contenders a case has, and how they are built. Each test file of this folder runs one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from bench import kernels
from bench.buffers import Pool
from bench.cases import Case
from bench.providers import (
    COPY,
    CopyContender,
    ForwardContender,
    LossFunction,
    Provider,
    ReplayContender,
    StepContender,
    baselines,
    row_name,
    save_and_return,
    vidfast_providers,
)
from bench.record import Measurable

SAVE_AND_RETURN = "autograd.Function that saves and returns"
# Without a gradient every strategy is the same two reads: the default and one a back end speak for all.
FORWARD_ROWS = ("auto", "one_pass")
Built = Iterator[tuple[str, "Measurable | Exception"]]


def built(name: str, build: Callable[[], Measurable]) -> tuple[str, Measurable | Exception]:
    """A contender, or what kept it from being built: the other rows of the case go on."""
    try:
        return name, build()
    except Exception as failure:
        return name, failure


def providers_of(case: Case, full: bool) -> list[Provider]:
    everyone = [*baselines(case.device), *vidfast_providers(case.device, full)]
    return [provider for provider in everyone if provider.name not in case.skip]


@dataclass(frozen=True)
class StepSuite:
    """Forward and backward of the loss, at every incoming gradient of the case."""

    name: str
    cases: Callable[[str, bool, str], list[Case]]
    full: bool
    device: str
    floor: bool = False

    def list_cases(self) -> list[Case]:
        return self.cases(self.name, self.full, self.device)

    def providers(self, case: Case) -> list[Provider]:
        floor = [Provider(SAVE_AND_RETURN, "floor", save_and_return, compared=False)] if self.floor else []
        return [*floor, *providers_of(case, self.full)]

    def names(self, case: Case) -> list[str]:
        steps = [
            row_name(provider, incoming) for provider in self.providers(case) for incoming in case.gradients
        ]
        if torch.device(case.device).type == "cuda":
            steps += [
                row_name(provider, incoming, " graph")
                for provider in self.providers(case)
                if provider.family == "vidfast"
                for incoming in case.gradients
            ]
        return [COPY, *steps] if not self.floor else steps

    def contenders(self, case: Case, pool: Pool, names: list[str]) -> Built:
        if COPY in names:
            yield built(COPY, lambda: CopyContender(case, pool))
        for provider in self.providers(case):
            yield from self.of_provider(provider, case, pool, names)

    def of_provider(self, provider: Provider, case: Case, pool: Pool, names: list[str]) -> Built:
        wanted = [incoming for incoming in case.gradients if row_name(provider, incoming) in names]
        replayed = [
            incoming for incoming in case.gradients if row_name(provider, incoming, " graph") in names
        ]
        if not wanted and not replayed:
            return
        # One build serves every incoming gradient: torch.compile compiles once a case.
        function = provider.build(case)

        def step(incoming: float, function: LossFunction = function) -> StepContender:
            return StepContender(provider, case, pool, function, incoming)

        for incoming in wanted:
            yield built(row_name(provider, incoming), lambda incoming=incoming: step(incoming))  # type: ignore[misc]
        for incoming in replayed:
            yield built(
                row_name(provider, incoming, " graph"),
                lambda incoming=incoming: ReplayContender(step(incoming)),  # type: ignore[misc]
            )


@dataclass(frozen=True)
class ForwardSuite:
    """The loss alone, without gradients. In place means nothing here."""

    name: str
    cases: Callable[[str, bool, str], list[Case]]
    full: bool
    device: str

    def list_cases(self) -> list[Case]:
        return self.cases(self.name, self.full, self.device)

    def providers(self, case: Case) -> list[Provider]:
        return [
            p for p in providers_of(case, self.full) if p.family != "vidfast" or p.strategy in FORWARD_ROWS
        ]

    def names(self, case: Case) -> list[str]:
        return [COPY, *(provider.name for provider in self.providers(case))]

    def contenders(self, case: Case, pool: Pool, names: list[str]) -> Built:
        if COPY in names:
            yield built(COPY, lambda: CopyContender(case, pool))
        for provider in self.providers(case):
            if provider.name in names:
                yield built(
                    provider.name,
                    lambda provider=provider: ForwardContender(provider, case, pool, provider.build(case)),  # type: ignore[misc]
                )


@dataclass(frozen=True)
class KernelSuite:
    """The CPU kernels alone against the copy."""

    name: str
    cases: Callable[[str, bool, str], list[Case]]
    full: bool
    device: str

    def list_cases(self) -> list[Case]:
        return (
            self.cases(self.name, self.full, self.device) if torch.device(self.device).type == "cpu" else []
        )

    def names(self, case: Case) -> list[str]:
        return [COPY, *kernels.PASSES_OF]

    def contenders(self, case: Case, pool: Pool, names: list[str]) -> Built:
        if COPY in names:
            yield built(COPY, lambda: CopyContender(case, pool))
        for name in kernels.PASSES_OF:
            if name in names:
                yield built(name, lambda name=name: kernels.KernelContender(name, case, pool))  # type: ignore[misc]


@dataclass(frozen=True)
class ScalingSuite(StepSuite):
    """The loss step of the providers that the curves compare; on the CPU without torch.compile, seconds a point."""

    def providers(self, case: Case) -> list[Provider]:
        families = {"eager", "vidfast"}
        if torch.device(case.device).type == "cuda":
            families.add("compile")
        return [p for p in providers_of(case, full=False) if p.family in families and p.strategy != "auto"]
