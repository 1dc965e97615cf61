"""Whole modules on the clock: VIDLoss with its regressor, and a full distillation training step.

The loss is a part of what a user waits for. These suites keep everything else the same and exchange only the loss, so
that their differences are what vidfast saves end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from bench import traffic
from bench.buffers import EPS, INIT_VARIANCE, Pool
from bench.cases import Case
from bench.clock import Call
from bench.providers import COMPILE, DEFAULT, EAGER, LossFunction, Provider, eager_formula, save_and_return
from bench.record import Measurable

FREE_LOSS = "free loss"
# A training step: the teacher, the student, the layers tapped in both, the images' side.
CIFAR_STEP = ("wrn-40-2", "wrn-16-1", ("stem", "group1", "group2", "group3"), 32)


class EagerVIDLoss(nn.Module):
    """The regressor of `vidfast.VIDLoss`, and then the eager formula."""

    def __init__(self, case: Case, student_channels: int) -> None:
        super().__init__()
        import vidfast

        whole = vidfast.VIDLoss(student_channels, 2 * case.channels, case.channels, INIT_VARIANCE, EPS)
        self.regressor, self.log_scale = whole.regressor, whole.log_scale
        self.formula = eager_formula(case)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return self.formula(self.regressor(student), teacher, self.log_scale)


class ModuleContender:
    """A module's forward and backward to all of its parameters. `step` is made ready by whoever builds it."""

    incoming = 1.0

    def __init__(self, name: str, module: nn.Module, step: Callable[[], torch.Tensor]) -> None:
        self.name, self.module, self.step = name, module, step
        family = {EAGER: "eager", COMPILE: "compile", DEFAULT: "vidfast"}.get(name, "floor")
        self.provider = Provider(name, family, eager_formula, compared=False)

    def prepare(self) -> Call:
        self.module.zero_grad(set_to_none=True)
        step = self.step

        def run() -> object:
            loss = step()
            loss.backward()  # type: ignore[no-untyped-call]
            return None

        return run

    def finish(self) -> None:
        """Parameters get no update, so there is nothing to undo."""

    def traffic(self) -> traffic.Traffic | None:
        """Convolutions reuse what they read: a count of bytes would say nothing."""
        return None


class Built(Protocol):
    def __call__(self, case: Case, pool: Pool) -> ModuleContender: ...


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
        return [name for name in self.builders if name not in case.skip]

    def contenders(
        self, case: Case, pool: Pool, names: list[str]
    ) -> Iterator[tuple[str, Measurable | Exception]]:
        for name in names:
            try:
                yield name, self.builders[name](case, pool)
            except Exception as failure:
                yield name, failure


def vid_loss(name: str) -> Built:
    """VIDLoss of one layer pair: the gradient reaches the student's feature and the regressor."""

    def build(case: Case, pool: Pool) -> ModuleContender:
        import vidfast

        torch.manual_seed(0)
        channels = int(str(case.extra["student_channels"]))
        shape = (case.shape[0], channels, *case.shape[2:])
        student = torch.randn(shape, device=case.device).to(case.dtype).requires_grad_()
        module: nn.Module = EagerVIDLoss(case, channels)
        if name == DEFAULT:
            module = vidfast.VIDLoss(channels, 2 * case.channels, case.channels, INIT_VARIANCE, EPS)
        module = module.to(case.device, case.dtype)
        called: Any = module
        if name == COMPILE:
            torch.compiler.reset()
            called = torch.compile(module, dynamic=False, fullgraph=True)

        def step() -> torch.Tensor:
            student.grad = None
            loss: torch.Tensor = called(student, pool.take().target)
            return loss

        return ModuleContender(name, module, step)

    return build


def exchange_losses(distiller: nn.Module, formula: Callable[[Case], LossFunction]) -> None:
    """Put another loss in the place of every GaussianNLL of a Distiller, with the same alpha."""
    import vidfast

    for module in distiller.modules():
        if isinstance(module, vidfast.GaussianNLL):

            def forward(mean: torch.Tensor, target: torch.Tensor, own: Any = module) -> torch.Tensor:
                case = Case("", tuple(mean.shape), mean.dtype, device=str(mean.device))
                loss: torch.Tensor = own.weight * formula(case)(mean, target, own.alpha)
                return loss

            module.forward = forward  # type: ignore[method-assign]


def training_step(name: str) -> Built:
    """Teacher, student, taps, regressors, losses and backward; no optimizer, which is the same for all."""

    def build(case: Case, pool: Pool) -> ModuleContender:
        from vidfast.distill.distiller import Distiller
        from vidfast.distill.methods.vid import VID
        from vidfast.distill.models.wrn import wrn

        torch.manual_seed(0)
        teacher_name, student_name, taps, side = CIFAR_STEP
        teacher, student = (wrn(size.removeprefix("wrn-"), 3, 10) for size in (teacher_name, student_name))
        images = torch.randn(case.shape[0], 3, side, side, device=case.device)
        labels = torch.randint(0, 10, (case.shape[0],), device=case.device)
        terms = [VID(pairs={tap: tap for tap in taps}, weight=1.0)]
        distiller = Distiller(student, teacher, terms=terms, example=images[:2]).to(case.device).train()
        if name != DEFAULT:
            exchange_losses(distiller, eager_formula if name == EAGER else save_and_return)

        def step() -> torch.Tensor:
            loss: torch.Tensor = distiller(images, labels).loss
            return loss

        return ModuleContender(name, distiller, step)

    return build


VID_LOSS = {name: vid_loss(name) for name in (EAGER, COMPILE, DEFAULT)}
TRAINING_STEP = {name: training_step(name) for name in (FREE_LOSS, EAGER, DEFAULT)}
