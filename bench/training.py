"""Full distillation training steps on the clock, and what of them the pairs of layers take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from bench.buffers import Pool
from bench.cases import Case
from bench.modules import Built, ModuleContender
from bench.providers import COMPILE, DEFAULT, EAGER, eager_formula
from vidfast.distill import VID, Distiller
from vidfast.distill.models import build as network
from vidfast.report.results import COMPILED_DEFAULT

PairLoss = Callable[[int, torch.Tensor, torch.Tensor, float], torch.Tensor]


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


def public_pair_loss(term: VID) -> PairLoss:
    """What the public repositories compute for a pair: the term's regressor, and the eager formula."""

    # By the number of axes, made here: a compiler need not trace how.
    formulas = {axes: eager_formula(Case("", (1,) * axes)) for axes in range(2, 6)}

    def public(index: int, student: torch.Tensor, teacher: torch.Tensor, factor: float) -> torch.Tensor:
        alpha = term.likelihoods[index].alpha
        assert isinstance(alpha, nn.Parameter)
        return factor * formulas[teacher.dim()](term.regressors[index](student), teacher, alpha)

    return public


def watched(term: VID, watch: TermWatch) -> PairLoss:
    """Every pair of the term is timed; the watch says whether the public repositories' code runs or ours."""
    ours, public = term.pair_loss, public_pair_loss(term)

    def pair_loss(index: int, student: torch.Tensor, teacher: torch.Tensor, factor: float) -> torch.Tensor:
        student = StopsInBackward.apply(student, watch)  # type: ignore[no-untyped-call]
        watch.start()
        loss = (public if watch.public_code else ours)(index, student, teacher, factor)
        watch.stop()
        whole: torch.Tensor = StartsInBackward.apply(loss, watch)  # type: ignore[no-untyped-call]
        return whole

    return pair_loss


class Distillation:
    """One teacher, student and term for all rows of a case, and how a row has their pairs computed.

    One for all, since where a network's weights are stored is worth several percent.
    """

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        facts = case.extra
        side, classes = int(str(facts["side"])), int(str(facts["classes"]))
        teacher, student = (
            network(str(facts[role]), in_channels=3, num_classes=classes, image_size=(side, side)).to(
                case.device
            )
            for role in ("teacher", "student")
        )
        self.case = case
        self.images = torch.randn(case.shape[0], 3, side, side, device=case.device)
        self.labels = torch.randint(0, classes, (case.shape[0],), device=case.device)
        self.term = VID(
            pairs={tap: tap for tap in student.taps}, regressor=str(facts["regressor"]), weight=1.0
        )
        distiller = Distiller(student, teacher.eval(), terms=[self.term], example=self.images[:2])
        self.distiller = distiller.to(case.device).train()
        self.watch = TermWatch(case.device)
        self.losses = {True: watched(self.term, self.watch), False: public_pair_loss(self.term)}

    def step(self, name: str) -> Callable[[], torch.Tensor]:
        """The forward of a row. Eager rows have their pairs timed; a compiled graph has no place for a clock.

        Where two rows are compiled, the compiler tells them apart by the pair loss in place.
        """
        compiled = name in (COMPILE, COMPILED_DEFAULT)
        called: Any = self.distiller
        if compiled:
            called = torch.compile(self.distiller, dynamic=False, fullgraph=True)

        def step() -> torch.Tensor:
            self._compute_pairs_for(name)
            with self.case.precision():
                loss: torch.Tensor = called(self.images, self.labels).loss
            return loss

        return step

    def _compute_pairs_for(self, name: str) -> None:
        self.term.__dict__.pop("pair_loss", None)
        if name != COMPILED_DEFAULT:
            self.term.__dict__["pair_loss"] = self.losses[name != COMPILE]
        self.watch.public_code = name == EAGER
        self.watch.begin_step()


distillation_of = lru_cache(maxsize=1)(Distillation)


def training_step(name: str) -> Built:
    """Teacher, student, taps, regressors, losses and backward; no optimizer, which is the same for all."""

    def build(case: Case, pool: Pool) -> Callable[[float], ModuleContender]:
        whole = distillation_of(case)
        step = whole.step(name)
        watch = None if name in (COMPILE, COMPILED_DEFAULT) else whole.watch
        return lambda incoming: ModuleContender(
            name, whole.distiller, step, incoming, case, pool, watch=watch
        )

    return build


TRAINING_STEP = {name: training_step(name) for name in (EAGER, COMPILE, DEFAULT, COMPILED_DEFAULT)}
