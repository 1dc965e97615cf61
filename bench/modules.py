"""Whole modules on the clock: VIDLoss with its regressor, and full distillation training steps.

The loss is a part of what a user waits for. These suites keep everything else the same and exchange only the loss, so
that their differences are what vidfast saves end to end.
"""

from __future__ import annotations

import statistics
import time
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
from bench.providers import (
    COMPILE,
    DEFAULT,
    EAGER,
    Provider,
    eager_formula,
    row_name,
)
from bench.record import Measurable
from vidfast.distill import VID, Distiller
from vidfast.distill.models import build as network

COMPILED_DEFAULT = "vidfast compiled"
FAMILIES = {EAGER: "eager", COMPILE: "compile", DEFAULT: "vidfast", COMPILED_DEFAULT: "vidfast"}
Exact = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class EagerVIDLoss(nn.Module):
    """The VIDLoss of the public repositories: three 1x1 convolutions with ReLU between, and then the eager formula."""

    def __init__(self, case: Case, student_channels: int) -> None:
        super().__init__()
        import vidfast

        whole = vidfast.VIDLoss(
            student_channels, 2 * case.channels, case.channels, INIT_VARIANCE, EPS, inplace=False
        )
        self.regressor, self.log_scale = whole.regressor, whole.log_scale
        self.formula = eager_formula(case)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return self.formula(self.regressor(student), teacher, self.log_scale)


class ModuleContender:
    """A module's forward and backward to all of its parameters. `step` is made ready by whoever builds it.

    `outputs`, where given, are what a step left behind beside its loss: d student and d alpha, for the comparison with
    `exact`, the same numbers from fp64.
    """

    calls, replayed = 1, False

    def __init__(
        self,
        name: str,
        module: nn.Module,
        step: Callable[[], torch.Tensor],
        incoming: float,
        outputs: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None,
        exact: Callable[[], Exact] | None = None,
        watch: TermWatch | None = None,
    ) -> None:
        self.watch, self.steps = watch, list[list[tuple[Any, Any]]]()
        self.module, self.step, self.incoming = module, step, incoming
        self.outputs, self.exact = outputs, exact
        self.provider = Provider(name, FAMILIES.get(name, "floor"), eager_formula, compared=False)
        self.name = row_name(self.provider, incoming)

    def prepare(self) -> Call:
        self.module.zero_grad(set_to_none=True)
        step, incoming = self.step, self.incoming

        def run() -> object:
            loss = step()
            gradient = None if incoming == 1.0 else torch.full_like(loss, incoming)
            loss.backward(gradient)  # type: ignore[no-untyped-call]
            if self.watch is not None:
                self.steps.append(self.watch.intervals)
            return loss.detach()

        return run

    def finish(self) -> None:
        """Parameters get no update, so there is nothing to undo."""

    def part_seconds(self, samples: int) -> float | None:
        """The median of what the pairs took in the last `samples` steps."""
        if self.watch is None or not self.steps:
            return None
        return statistics.median(self.watch.seconds_of(step) for step in self.steps[-samples:])

    def traffic(self) -> traffic.Traffic | None:
        """Convolutions reuse what they read: a count of bytes would say nothing."""
        return None

    def errors(self) -> Errors | None:
        """Of the loss, of d student (as grad_mean) and d alpha, each over the largest of its exact values."""
        if self.outputs is None or self.exact is None:
            return None
        loss = self.prepare()()
        assert isinstance(loss, torch.Tensor)

        def against(found: torch.Tensor, exact: torch.Tensor, factor: float) -> float:
            wanted = factor * exact
            return float((found.double() - wanted).abs().max() / wanted.abs().max())

        student, alpha = self.outputs()
        exact_loss, exact_student, exact_alpha = self.exact()
        return Errors(
            against(loss, exact_loss, 1.0),
            against(student, exact_student, self.incoming),
            against(alpha, exact_alpha, self.incoming),
        )


class Built(Protocol):
    """Makes a module for a case; what comes back puts it on the clock at an incoming gradient."""

    def __call__(self, case: Case, pool: Pool) -> Callable[[float], ModuleContender]: ...


@dataclass(frozen=True)
class ModuleSuite:
    """A suite of whole modules: `builders` by the name of their row."""

    name: str
    cases: Callable[[str, bool, str], list[Case]]
    full: bool
    device: str
    builders: dict[str, Built]

    def list_cases(self) -> list[Case]:
        return self.cases(self.name, self.full, self.device)

    def names(self, case: Case) -> list[str]:
        rows = (name for name in self.builders if name not in case.skip)
        return [row_of(name, incoming) for name in rows for incoming in case.gradients]

    def contenders(
        self, case: Case, pool: Pool, names: list[str]
    ) -> Iterator[tuple[str, Measurable | Exception]]:
        for name, built in self.builders.items():
            wanted = [incoming for incoming in case.gradients if row_of(name, incoming) in names]
            if not wanted:
                continue
            try:
                made = built(case, pool)
            except Exception as failure:
                yield from ((row_of(name, incoming), failure) for incoming in wanted)
                continue
            for incoming in wanted:
                yield row_of(name, incoming), made(incoming)


def row_of(name: str, incoming: float) -> str:
    return row_name(Provider(name, "", eager_formula), incoming)


def student_of(case: Case) -> torch.Tensor:
    """The student's feature that goes with the case's tensor, the teacher's."""
    generator = torch.Generator().manual_seed(1)
    shape = (case.shape[0], int(str(case.extra["student_channels"])), *case.shape[2:])
    return torch.randn(shape, generator=generator).to(case.device, case.dtype)


def vid_loss_of(case: Case, name: str) -> nn.Module:
    """The module of a row. All have the same weights."""
    import vidfast

    torch.manual_seed(0)
    channels = int(str(case.extra["student_channels"]))
    if name in (EAGER, COMPILE):
        module: nn.Module = EagerVIDLoss(case, channels)
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
            student.grad = None
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

        return lambda incoming: ModuleContender(name, module, step, incoming, outputs, exact)

    return build


class TermWatch:
    """Seconds that the pairs of a term take in a step, regressors and losses, forward and backward, and by whose code.

    The difference between two whole steps would drown in their spread. Autograd runs the nodes made last first, so all
    that runs in backward between a pair's loss and its student feature is that pair's own. On a GPU the marks are
    events on the current stream, read only when the seconds are asked for.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.public_code = False
        self.intervals: list[tuple[Any, Any]] = []
        self.started: Any = None

    def begin_step(self) -> None:
        self.intervals = []

    def start(self) -> None:
        self.started = self._mark()

    def stop(self) -> None:
        self.intervals.append((self.started, self._mark()))

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds_of(self, intervals: Sequence[tuple[Any, Any]]) -> float:
        """The sum of a step's intervals; waits for the device."""
        if not self.on_gpu:
            return sum((stop - start for start, stop in intervals), 0.0)
        torch.cuda.synchronize()
        return sum((start.elapsed_time(stop) * 1e-3 for start, stop in intervals), 0.0)

    @property
    def seconds(self) -> float:
        """Of the last step."""
        return self.seconds_of(self.intervals)


class StopsInBackward(torch.autograd.Function):
    """The student's feature on its way into a pair: in backward its gradient is the pair's last result."""

    @staticmethod
    def forward(ctx: Any, feature: torch.Tensor, watch: TermWatch) -> torch.Tensor:
        ctx.watch = watch
        return feature.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.watch.stop()
        return grads[0], None


class StartsInBackward(torch.autograd.Function):
    """The loss on its way out."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, watch: TermWatch) -> torch.Tensor:
        ctx.watch = watch
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.watch.start()
        return grads[0], None


def watch_pairs(term: VID, device: str = "cpu") -> TermWatch:
    """Time every pair of the term, and let the watch say whether the public repositories' code runs or ours."""
    watch, ours = TermWatch(device), term.pair_loss

    def public(index: int, student: torch.Tensor, teacher: torch.Tensor, factor: float) -> torch.Tensor:
        case = Case("", tuple(teacher.shape), teacher.dtype, device=str(teacher.device))
        alpha = term.likelihoods[index].alpha
        assert isinstance(alpha, nn.Parameter)
        return factor * eager_formula(case)(term.regressors[index](student), teacher, alpha)

    def pair_loss(index: int, student: torch.Tensor, teacher: torch.Tensor, factor: float) -> torch.Tensor:
        student = StopsInBackward.apply(student, watch)  # type: ignore[no-untyped-call]
        watch.start()
        loss = (public if watch.public_code else ours)(index, student, teacher, factor)
        watch.stop()
        whole: torch.Tensor = StartsInBackward.apply(loss, watch)  # type: ignore[no-untyped-call]
        return whole

    term.pair_loss = pair_loss  # type: ignore[method-assign]
    return watch


@lru_cache(maxsize=1)
def distillation_of(case: Case) -> tuple[Callable[[], torch.Tensor], nn.Module, TermWatch]:
    """(step, module, watch). One for all rows: where a network's weights lie in memory is worth several percent."""
    torch.manual_seed(0)
    facts = case.extra
    side, classes = int(str(facts["side"])), int(str(facts["classes"]))
    teacher, student = (
        network(str(facts[role]), in_channels=3, num_classes=classes, image_size=(side, side)).to(case.device)
        for role in ("teacher", "student")
    )
    images = torch.randn(case.shape[0], 3, side, side, device=case.device)
    labels = torch.randint(0, classes, (case.shape[0],), device=case.device)
    term = VID(pairs={tap: tap for tap in student.taps}, regressor=str(facts["regressor"]), weight=1.0)
    distiller = Distiller(student, teacher, terms=[term], example=images[:2]).to(case.device).train()
    watch = watch_pairs(term, case.device)

    def step() -> torch.Tensor:
        watch.begin_step()
        loss: torch.Tensor = distiller(images, labels).loss
        return loss

    return step, distiller, watch


def training_step(name: str) -> Built:
    """Teacher, student, taps, regressors, losses and backward; no optimizer, which is the same for all."""

    def build(case: Case, pool: Pool) -> Callable[[float], ModuleContender]:
        del pool
        plain, distiller, watch = distillation_of(case)

        def step() -> torch.Tensor:
            watch.public_code = name == EAGER
            return plain()

        return lambda incoming: ModuleContender(name, distiller, step, incoming, watch=watch)

    return build


VID_LOSS = {name: vid_loss(name) for name in (EAGER, COMPILE, DEFAULT, COMPILED_DEFAULT)}
TRAINING_STEP = {name: training_step(name) for name in (EAGER, DEFAULT)}
