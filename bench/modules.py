"""Whole modules on the clock: VIDLoss, the head of a pair of layers, with its regressor. bench/training.py has steps.

The loss is a part of what a user waits for. These suites keep everything else the same and exchange only the loss, so
that their differences are what vidfast saves end to end.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import nn

from bench import traffic
from bench.accuracy import Errors
from bench.buffers import EPS, INIT_VARIANCE, Pool
from bench.cases import Case
from bench.clock import Call
from bench.graphs import GraphContender
from bench.providers import (
    COMPILE,
    DEFAULT,
    EAGER,
    Provider,
    eager_formula,
    row_name,
)
from bench.record import Measurable
from vidfast.report.results import COMPILED_DEFAULT, GRAPH

FAMILIES = {EAGER: "eager", COMPILE: "compile", DEFAULT: "vidfast", COMPILED_DEFAULT: "vidfast"}
Exact = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class EagerVIDLoss(nn.Module):
    """The VIDLoss of the public repositories: three 1x1 convolutions with ReLU between, and then the eager formula.

    Of rows of a matrix the layers are linear.
    """

    def __init__(self, case: Case, student_channels: int) -> None:
        super().__init__()
        import vidfast

        whole = vidfast.VIDLoss(
            student_channels, 2 * case.channels, case.channels, INIT_VARIANCE, EPS, inplace=False
        )
        self.log_scale = whole.log_scale
        self.regressor = linear_stack(whole.regressor) if case.channel_dim == -1 else whole.regressor
        self.formula = eager_formula(case)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return self.formula(self.regressor(student), teacher, self.log_scale)


class LinearHead(EagerVIDLoss):
    """The same by `vidfast.vid_head`, which takes the layers' weights."""

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        import vidfast

        weights = [layer.weight for layer in self.regressor.children() if isinstance(layer, nn.Linear)]
        return vidfast.vid_head(student, teacher, self.log_scale, weights, channel_dim=-1, eps=EPS)


def linear_stack(convolutions: nn.Module) -> nn.Sequential:
    """nn.Linear layers with the weights of the 1x1 convolutions."""
    layers: list[nn.Module] = []
    for layer in convolutions.children():
        if isinstance(layer, nn.Conv2d):
            linear = nn.Linear(layer.in_channels, layer.out_channels, bias=False)
            linear.weight = nn.Parameter(layer.weight.detach().flatten(1))
            layers.append(linear)
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


class Watch(Protocol):
    """Marks of a step's pairs, and what they come to in seconds."""

    @property
    def intervals(self) -> list[tuple[Any, Any]]: ...

    def seconds_of(self, intervals: Sequence[tuple[Any, Any]]) -> float: ...


class ModuleContender:
    """A module's forward and backward to all of its parameters. `step` is made ready by the caller.

    A call returns the loss and, where `outputs` are given, what the step left behind beside it: d student and d alpha,
    for the comparison with `exact`, the same numbers from fp64.

    Args:
        name: Of the row, without the incoming gradient.
        module: Whose gradients are cleared before every call.
        step: The forward, under the case's precision.
        incoming: The gradient that backward is called with.
        case: What is measured.
        pool: Its buffers: a graph holds a call for each slot.
        inputs: Leaves beside the parameters, whose gradients are cleared too.
        outputs: d student and d alpha after a step.
        exact: Loss, d student and d alpha in fp64 at g = 1.
        watch: The clock of a training step's pairs.
    """

    calls, replayed = 1, False

    def __init__(
        self,
        name: str,
        module: nn.Module,
        step: Callable[[], torch.Tensor],
        incoming: float,
        case: Case,
        pool: Pool,
        *,
        inputs: Sequence[torch.Tensor] = (),
        outputs: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None,
        exact: Callable[[], Exact] | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.watch, self.steps = watch, list[list[tuple[Any, Any]]]()
        self.module, self.step, self.incoming = module, step, incoming
        self.case, self.pool, self.inputs = case, pool, inputs
        self.outputs, self.exact = outputs, exact
        self.provider = Provider(name, FAMILIES.get(name, "floor"), eager_formula, compared=False)
        self.name = row_name(self.provider, incoming)

    def prepare(self) -> Call:
        self.module.zero_grad(set_to_none=True)
        self._clear_inputs()  # an earlier step's gradient would be freed on the clock of the memory
        step, incoming = self.step, self.incoming

        def run() -> object:
            self._clear_inputs()  # of the call before, in the same sample
            loss = step()
            gradient = None if incoming == 1.0 else torch.full_like(loss, incoming)
            loss.backward(gradient)  # type: ignore[no-untyped-call]
            if self.watch is not None:
                self.steps.append(self.watch.intervals)
            return loss.detach(), None if self.outputs is None else self.outputs()

        return run

    def _clear_inputs(self) -> None:
        for leaf in self.inputs:
            leaf.grad = None

    def finish(self) -> None:
        """Parameters get no update, so there is nothing to undo."""

    def undo(self) -> None:
        """Nor is any buffer written over."""

    def part_seconds(self, samples: int) -> float | None:
        """The median of what the pairs took in the last `samples` steps."""
        if self.watch is None or not self.steps:
            return None
        return statistics.median(self.watch.seconds_of(step) for step in self.steps[-samples:])

    def traffic(self) -> traffic.Traffic | None:
        """Convolutions reuse what they read: a count of bytes would say nothing."""
        return None

    def errors(self) -> Errors | None:
        """Those of one call; None where there is nothing to compare with."""
        return None if self.exact is None else self.errors_of(self.prepare()())

    def errors_of(self, result: Any) -> Errors | None:
        """Of the loss and d alpha over the largest exact value; of d student (as grad_mean) in the norm, over the norm.

        A ReLU whose input another precision rounds to the other side of 0 makes an error of some elements' own size:
        a largest error would be that of the rounding before it, in whatever code the rest is computed.
        """
        loss, left = result
        if left is None or self.exact is None:
            return None

        def against(found: torch.Tensor, exact: torch.Tensor, factor: float) -> float:
            wanted = factor * exact
            return float((found.double() - wanted).abs().max() / wanted.abs().max())

        student, alpha = left
        exact_loss, exact_student, exact_alpha = self.exact()
        return Errors(
            against(loss, exact_loss, 1.0),
            float((student.double() / self.incoming - exact_student).norm() / exact_student.norm()),
            against(alpha, exact_alpha, self.incoming),
        )


class Built(Protocol):
    """Makes a module for a case; what comes back puts it on the clock at an incoming gradient."""

    def __call__(self, case: Case, pool: Pool) -> Callable[[float], ModuleContender]: ...


@dataclass(frozen=True)
class ModuleSuite:
    """A suite of whole modules: `builders` by the name of their row.

    graphs: on a GPU every row is also captured in a CUDA graph, at the first incoming gradient: the device's time.
    """

    name: str
    cases: Callable[[str, bool, str], list[Case]]
    full: bool
    device: str
    builders: dict[str, Built]
    graphs: bool = False

    def list_cases(self) -> list[Case]:
        return self.cases(self.name, self.full, self.device)

    def names(self, case: Case) -> list[str]:
        rows = [name for name in self.builders if name not in case.skip]
        steps = [row_of(name, incoming) for name in rows for incoming in case.gradients]
        if not (self.graphs and case.on_gpu):
            return steps
        return [*steps, *(row_of(name, case.gradients[0], GRAPH) for name in rows)]

    def contenders(
        self, case: Case, pool: Pool, names: list[str]
    ) -> Iterator[tuple[str, Measurable | Exception]]:
        for name, built in self.builders.items():
            wanted = [
                (incoming, suffix)
                for suffix in ("", GRAPH)
                for incoming in case.gradients
                if row_of(name, incoming, suffix) in names
            ]
            if not wanted:
                continue
            try:
                made = built(case, pool)
            except Exception as failure:
                yield from ((row_of(name, *row), failure) for row in wanted)
                continue
            for incoming, suffix in wanted:
                row = row_of(name, incoming, suffix)
                try:
                    yield row, captured(made(incoming), row) if suffix else made(incoming)
                except Exception as failure:
                    yield row, failure


def captured(inner: ModuleContender, row: str) -> GraphContender:
    return GraphContender(inner, row, inner.provider.named(inner.provider.name + GRAPH))


def row_of(name: str, incoming: float, suffix: str = "") -> str:
    return row_name(Provider(name, "", eager_formula), incoming, suffix)


def student_of(case: Case) -> torch.Tensor:
    """The student's feature that goes with the case's tensor, the teacher's."""
    generator = torch.Generator().manual_seed(1)
    shape = list(case.shape)
    shape[case.channel_dim] = int(str(case.extra["student_channels"]))
    return torch.randn(shape, generator=generator).to(case.device, case.dtype)


def vid_loss_of(case: Case, name: str) -> nn.Module:
    """The module of a row. All have the same weights."""
    import vidfast

    torch.manual_seed(0)
    channels = int(str(case.extra["student_channels"]))
    if name in (EAGER, COMPILE):
        module: nn.Module = EagerVIDLoss(case, channels)
    elif case.channel_dim == -1:
        module = LinearHead(case, channels)
    else:
        module = vidfast.VIDLoss(channels, 2 * case.channels, case.channels, INIT_VARIANCE, EPS)
    return module.to(case.device, case.dtype)


@lru_cache(maxsize=1)
def exact_vid_loss(case: Case, target: torch.Tensor) -> Exact:
    """Loss, d student and d alpha of the case in fp64."""
    module = vid_loss_of(case, EAGER).double()
    student = student_of(case).double().requires_grad_()
    loss = module(student, target.double())
    loss.backward()
    assert student.grad is not None
    alpha = module.log_scale
    assert isinstance(alpha, nn.Parameter)
    assert alpha.grad is not None
    return loss.detach(), student.grad, alpha.grad


def vid_loss(name: str) -> Built:
    """VIDLoss of one layer pair: the gradient reaches the student's feature and the regressor."""

    def build(case: Case, pool: Pool) -> Callable[[float], ModuleContender]:
        module = vid_loss_of(case, name)
        student = student_of(case).requires_grad_()
        called: Any = module
        if name in (COMPILE, COMPILED_DEFAULT):
            called = torch.compile(module, dynamic=False, fullgraph=True)

        def step() -> torch.Tensor:
            # Compiled in its first call, with autocast active; backward runs outside of it, as in a training loop.
            with case.precision():
                loss: torch.Tensor = called(student, pool.take().target)
            return loss

        def outputs() -> tuple[torch.Tensor, torch.Tensor]:
            alpha = module.log_scale
            assert isinstance(alpha, nn.Parameter)
            assert student.grad is not None
            assert alpha.grad is not None
            return student.grad, alpha.grad

        def exact() -> Exact:
            return exact_vid_loss(case, pool.slots[0].target)

        return lambda incoming: ModuleContender(
            name, module, step, incoming, case, pool, inputs=[student], outputs=outputs, exact=exact
        )

    return build


VID_LOSS = {name: vid_loss(name) for name in (EAGER, COMPILE, DEFAULT, COMPILED_DEFAULT)}
