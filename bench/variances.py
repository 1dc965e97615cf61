"""One variance an element on the clock: torch's GaussianNLLLoss, beta-NLL and a softplus of the network's output.

A user without a kernel has torch's loss, whose check of `var` waits for a GPU and ends a compiled graph, or gives
torch.compile the formula without the check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bench import traffic
from bench.accuracy import CHUNK_ELEMENTS, Errors
from bench.buffers import Pool, Slot
from bench.cases import RESNET_GROUP1, Case
from bench.clock import Call
from bench.graphs import GraphContender
from bench.providers import COPY, Produce, Provider, row_name
from bench.record import Measurable
from bench.suites import Built, built, copy_of
from vidfast.report.results import COMPILE, DEFAULT, GRAPH, IN_PLACE, TORCH_LOSS, VARIANCES

LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

CLAMP_EPS, EPS, BETA = 1e-6, 1e-3, 0.5
GAUSSIAN, BETA_NLL, SOFTPLUS = "GaussianNLLLoss", "beta-NLL", "softplus"
# What a loss and its gradients read and write at g = 1: mean, target and raw; d mean and d raw.
PASSES = 5
# Ratios of 1.2 are asked for: that wants more samples than a factor of eight.
FEWEST_SAMPLES = 7
SHAPES: tuple[tuple[int, ...], ...] = ((128, 64, 32, 32), (64, 256, 14, 14), RESNET_GROUP1, (32 * 197, 768))


def variance_case(shape: tuple[int, ...], dtype: torch.dtype, loss: str, device: str) -> Case:
    return Case(
        VARIANCES,
        shape,
        dtype,
        channel_dim=-1 if len(shape) == 2 else 1,
        device=device,
        gradients=(1.0,),
        fewest=FEWEST_SAMPLES,
        note=loss,
        extra={"loss": loss},
    )


def variance_cases(suite: str, full: bool, device: str) -> list[Case]:
    """Torch's loss on every shape in fp32 and bf16; in full beta-NLL and softplus too."""
    del suite
    dtypes = torch.float32, torch.bfloat16
    shapes = SHAPES if full else SHAPES[:1]
    losses = (GAUSSIAN, BETA_NLL, SOFTPLUS) if full else (GAUSSIAN, SOFTPLUS)
    return [
        variance_case(shape, dtype, loss, device) for loss in losses for shape in shapes for dtype in dtypes
    ]


def small_variance_cases(suite: str, full: bool, device: str) -> list[Case]:
    """In sizes for an emulated device."""
    del suite, full
    return [variance_case((6, 5, 7, 3), torch.float32, GAUSSIAN, device)]


def gaussian(variance: torch.Tensor, mean: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1/2 (log v + r^2 / v) of every element."""
    return 0.5 * (torch.log(variance) + (mean - target) ** 2 / variance)


def formula(loss: str) -> LossFunction:
    """The loss in plain PyTorch, without a check."""

    def of_torch(mean: torch.Tensor, target: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
        variance = raw + (raw.clamp(min=CLAMP_EPS) - raw).detach()  # the clamp is not differentiated
        return gaussian(variance, mean, target).mean()

    def of_beta(mean: torch.Tensor, target: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
        variance = F.softplus(raw) + EPS
        return (gaussian(variance, mean, target) * variance.detach() ** BETA).mean()

    def of_softplus(mean: torch.Tensor, target: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
        return gaussian(F.softplus(raw) + EPS, mean, target).mean()

    return {GAUSSIAN: of_torch, BETA_NLL: of_beta, SOFTPLUS: of_softplus}[loss]


def eager(case: Case) -> LossFunction:
    """What a user has today: torch's module, or the formula."""
    loss = str(case.extra["loss"])
    return nn.GaussianNLLLoss(eps=CLAMP_EPS) if loss == GAUSSIAN else formula(loss)


def compiled(case: Case) -> LossFunction:
    found: LossFunction = torch.compile(formula(str(case.extra["loss"])), dynamic=False, fullgraph=True)
    return found


def ours(inplace: bool) -> Callable[[Case], LossFunction]:
    def build(case: Case) -> LossFunction:
        import vidfast

        loss = str(case.extra["loss"])
        if loss == GAUSSIAN and not inplace:
            return vidfast.GaussianNLLLoss(eps=CLAMP_EPS)
        options: dict[str, dict[str, Any]] = {
            GAUSSIAN: {"transform": "identity", "eps": CLAMP_EPS},
            BETA_NLL: {"eps": EPS, "beta": BETA},
            SOFTPLUS: {"eps": EPS},
        }
        return vidfast.HeteroscedasticNLL(inplace=inplace, strategy="one_pass", **options[loss])

    return build


PROVIDERS = (
    Provider(TORCH_LOSS, "eager", eager, compared=False),
    Provider(COMPILE, "compile", compiled, compared=False),
    Provider(DEFAULT, "vidfast", ours(inplace=False), compared=False),
    Provider(IN_PLACE, "vidfast", ours(inplace=True), writes_mean=True, compared=False),
)


class Raws:
    """What the variances are made of: a tensor beside each slot of a pool, all with the same values."""

    def __init__(self, case: Case, pool: Pool) -> None:
        generator = torch.Generator(device=case.device).manual_seed(2)
        raw = pool.draw(case, generator)
        self.pristine = raw.abs() + 0.1 if case.extra["loss"] == GAUSSIAN else raw
        self.of_slot = {id(slot): self.pristine.clone() for slot in pool.slots}

    def of(self, slot: Slot) -> torch.Tensor:
        return self.of_slot[id(slot)]


class VarianceContender:
    """Forward, and the gradients of mean and raw, which are outputs of a network."""

    calls, replayed, incoming = 1, False, 1.0

    def __init__(
        self, provider: Provider, case: Case, pool: Pool, raws: Raws, function: LossFunction
    ) -> None:
        self.name = row_name(provider, self.incoming)
        self.provider, self.case, self.pool, self.raws, self.function = provider, case, pool, raws, function
        self.used: list[Slot] = []

    def prepare(self) -> Call:
        slot, function = self.pool.take(), self.function
        if self.provider.writes_mean:
            self.used.append(slot)
        anchor = self.pool.alpha.detach().requires_grad_()
        mean, raw = (Produce.apply(anchor, x) for x in (slot.mean, self.raws.of(slot)))  # type: ignore[no-untyped-call]

        def step() -> object:
            loss = function(mean, slot.target, raw)
            return loss.detach(), torch.autograd.grad(loss, (mean, raw))

        return step

    def finish(self) -> None:
        for slot in self.used:
            self.pool.restore(slot)
            self.raws.of(slot).copy_(self.raws.pristine)
        self.used.clear()

    def undo(self) -> None:
        self.used = list(self.pool.slots) if self.provider.writes_mean else []
        self.finish()

    def traffic(self) -> traffic.Traffic | None:
        """The bytes that no pass can avoid; those of other code are not counted."""
        if self.provider.family != "vidfast":
            return None
        return traffic.Traffic(PASSES * self.case.nbytes, "algorithm")

    def part_seconds(self, samples: int) -> float | None:
        """The loss is all of it."""
        return None

    def errors(self) -> Errors | None:
        """Those of one call."""
        found = self.errors_of(self.prepare()())
        self.finish()
        return found

    def errors_of(self, result: Any) -> Errors | None:
        """Each over the largest exact value: loss, d/d mean, and d/d raw (as grad_alpha)."""
        loss, (of_mean, of_raw) = result
        function, count = formula(str(self.case.extra["loss"])), self.case.elements
        whole, error, size = 0.0, [0.0, 0.0], [0.0, 0.0]
        rows = max(CHUNK_ELEMENTS // max(count // self.case.shape[0], 1), 1)
        target = self.pool.slots[0].target
        for at in range(0, self.case.shape[0], rows):
            part = slice(at, at + rows)
            mean, raw = (x[part].double().requires_grad_() for x in (self.pool.pristine, self.raws.pristine))
            each = function(mean, target[part].double(), raw) * (mean.numel() / count)
            whole += float(each.detach())
            for i, (exact, found) in enumerate(
                zip(torch.autograd.grad(each, (mean, raw)), (of_mean, of_raw), strict=True)
            ):
                error[i] = max(error[i], float((found[part].double() - exact).abs().max()))
                size[i] = max(size[i], float(exact.abs().max()))
        return Errors(abs(float(loss) - whole) / abs(whole), error[0] / size[0], error[1] / size[1])


@dataclass(frozen=True)
class VarianceSuite:
    """Who computes such a loss, beside the copy."""

    name: str
    cases: Callable[[str, bool, str], list[Case]]
    full: bool
    device: str

    def list_cases(self) -> list[Case]:
        return self.cases(self.name, self.full, self.device)

    def names(self, case: Case) -> list[str]:
        steps = [row_name(provider, 1.0) for provider in PROVIDERS]
        graphs = [row_name(p, 1.0, GRAPH) for p in PROVIDERS if case.on_gpu and p.name != TORCH_LOSS]
        return [COPY, *steps, *graphs]

    def contenders(self, case: Case, pool: Pool, names: list[str]) -> Built:
        raws = Raws(case, pool)
        if COPY in names:
            yield built(COPY, lambda: copy_of(case, pool))
        for provider in PROVIDERS:
            rows = {suffix: row_name(provider, 1.0, suffix) for suffix in ("", GRAPH)}
            if not any(row in names for row in rows.values()):
                continue
            function = provider.build(case)

            def step(provider: Provider = provider, function: LossFunction = function) -> VarianceContender:
                return VarianceContender(provider, case, pool, raws, function)

            def graph(provider: Provider = provider, row: str = rows[GRAPH]) -> Measurable:
                return GraphContender(step(provider), row, provider.named(provider.name + GRAPH))

            if rows[""] in names:
                yield built(rows[""], step)
            if rows[GRAPH] in names:
                yield built(rows[GRAPH], graph)


def variance_suite(full: bool, device: str) -> VarianceSuite:
    return VarianceSuite(VARIANCES, variance_cases, full, device)
