"""The suites: which contenders a case has, and how they are built. Each test file of this folder runs one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench import device_kernels, kernels
from bench.backends import runnable
from bench.buffers import Pool
from bench.cases import Case
from bench.device_kernels import DeviceKernel
from bench.graphs import GraphContender
from bench.providers import (
    COPY,
    CopyContender,
    ForwardContender,
    LossFunction,
    Provider,
    StepContender,
    baselines,
    row_name,
    save_and_return,
    vidfast_providers,
)
from bench.record import Measurable
from vidfast.report.results import GRAPH

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


def copy_of(case: Case, pool: Pool) -> Measurable:
    """The copy on the case's buffers; on a GPU in a graph, since a small copy takes less than its launch."""
    copy = CopyContender(case, pool)
    return GraphContender(copy, COPY) if case.on_gpu else copy


def providers_of(case: Case, full: bool) -> list[Provider]:
    everyone = [*baselines(case.device, full), *vidfast_providers(case.device, full)]
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

    def captured(self, provider: Provider) -> bool:
        """Whether on a GPU its steps are also rows as CUDA graphs."""
        return provider.family == "vidfast"

    def names(self, case: Case) -> list[str]:
        steps = [
            row_name(provider, incoming) for provider in self.providers(case) for incoming in case.gradients
        ]
        if case.on_gpu:
            steps += [
                row_name(provider, incoming, GRAPH)
                for provider in self.providers(case)
                if self.captured(provider)
                for incoming in case.gradients
            ]
        return [COPY, *steps] if not self.floor else steps

    def contenders(self, case: Case, pool: Pool, names: list[str]) -> Built:
        if COPY in names:
            yield built(COPY, lambda: copy_of(case, pool))
        for provider in self.providers(case):
            yield from self.of_provider(provider, case, pool, names)

    def of_provider(self, provider: Provider, case: Case, pool: Pool, names: list[str]) -> Built:
        wanted = [incoming for incoming in case.gradients if row_name(provider, incoming) in names]
        replayed = [incoming for incoming in case.gradients if row_name(provider, incoming, GRAPH) in names]
        if not wanted and not replayed:
            return
        # One build serves every incoming gradient: torch.compile compiles once a case.
        function = provider.build(case)

        def step(incoming: float, function: LossFunction = function) -> StepContender:
            return StepContender(provider, case, pool, function, incoming)

        for incoming in wanted:
            yield built(row_name(provider, incoming), lambda incoming=incoming: step(incoming))  # type: ignore[misc]
        for incoming in replayed:
            name = row_name(provider, incoming, GRAPH)
            captured = provider.named(provider.name + GRAPH)
            yield built(
                name,
                lambda incoming=incoming, name=name, captured=captured: GraphContender(  # type: ignore[misc]
                    step(incoming), name, captured
                ),
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
            yield built(COPY, lambda: copy_of(case, pool))
        for provider in self.providers(case):
            if provider.name in names:
                yield built(
                    provider.name,
                    lambda provider=provider: ForwardContender(provider, case, pool, provider.build(case)),  # type: ignore[misc]
                )


@dataclass(frozen=True)
class KernelSuite:
    """The kernels alone against the copy: the native calls on the CPU, every GPU back end's primitives in graphs."""

    name: str
    cases: Callable[[str, bool, str], list[Case]]
    full: bool
    device: str

    def list_cases(self) -> list[Case]:
        return self.cases(self.name, self.full, self.device)

    def names(self, case: Case) -> list[str]:
        if not case.on_gpu:
            return [COPY, *kernels.PASSES_OF]
        rows = [
            f"{backend} {primitive}"
            for backend in runnable(case.device)
            for primitive in device_kernels.PRIMITIVES
        ]
        return [COPY, *rows]

    def contenders(self, case: Case, pool: Pool, names: list[str]) -> Built:
        if COPY in names:
            yield built(COPY, lambda: copy_of(case, pool))
        for name in names:
            if name != COPY:
                yield built(name, lambda name=name: self.of_name(name, case, pool))  # type: ignore[misc]

    def of_name(self, name: str, case: Case, pool: Pool) -> Measurable:
        if not case.on_gpu:
            return kernels.KernelContender(name, case, pool)
        backend, primitive = name.split(" ", 1)
        return GraphContender(DeviceKernel(backend, primitive, case, pool), name)


@dataclass(frozen=True)
class ScalingSuite(StepSuite):
    """The loss step of the providers that the curves compare; on the CPU without torch.compile, seconds a point."""

    def providers(self, case: Case) -> list[Provider]:
        families = {"eager", "vidfast"}
        if case.on_gpu:
            families.add("compile")
        return [p for p in providers_of(case, full=False) if p.family in families and p.strategy != "auto"]
