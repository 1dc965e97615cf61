"""Who is measured, and the contenders that put them on the clock.

A provider is a function (mean, target, alpha) -> loss for one case. The eager formula is written as the public
repositories of distillation methods write it: softplus as log(1 + exp), the variance broadcast, the mean of
0.5 * (log v + r^2 / v) over everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench import masks, traffic
from bench.backends import runnable
from bench.buffers import EPS, Pool, Slot
from bench.cases import Case
from bench.clock import Call

LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

EAGER, TORCH_LOSS, COMPILE, MAX_AUTOTUNE, REFERENCE, COPY = (
    "eager",
    "torch.nn.GaussianNLLLoss",
    "torch.compile",
    "torch.compile max-autotune",
    "reference",
    "copy",
)
DEFAULT = "vidfast default"
STRATEGIES = ("two_pass", "one_pass", "one_pass in place")
# With a mask the bytes of these are counted, at g = 1.
MASKED_STRATEGIES = STRATEGIES[1:]


@dataclass(frozen=True)
class Provider:
    """One implementation of the loss. `strategy` is a key of traffic.PASSES, or None where bytes must be counted."""

    name: str
    family: str
    build: Callable[[Case], LossFunction]
    strategy: str | None = None
    writes_mean: bool = False
    # Whether its loss and gradients can be held against the oracle's.
    compared: bool = True
    # Of a case with a mask: computes as if it had none.
    ignores_mask: bool = False

    def named(self, name: str) -> Provider:
        return replace(self, name=name)


def eager_formula(case: Case) -> LossFunction:
    def loss(mean: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        variance = case.per_channel(torch.log(1.0 + torch.exp(alpha)) + EPS)
        return torch.mean(0.5 * (torch.log(variance) + (target - mean) ** 2 / variance))

    return loss


def torch_loss(case: Case) -> LossFunction:
    module = torch.nn.GaussianNLLLoss(eps=EPS)

    def loss(mean: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        variance = case.per_channel(torch.nn.functional.softplus(alpha) + EPS).expand_as(mean)
        result: torch.Tensor = module(mean, target, variance)
        return result

    return loss


def compiled(mode: str | None) -> Callable[[Case], LossFunction]:
    def build(case: Case) -> LossFunction:
        loss: LossFunction = torch.compile(eager_formula(case), dynamic=False, fullgraph=True, mode=mode)
        return loss

    return build


def vidfast_loss(
    backend: str, strategy: str, inplace: bool, masked: bool = False
) -> Callable[[Case], LossFunction]:
    def build(case: Case) -> LossFunction:
        from vidfast import gaussian_nll

        options: dict[str, Any] = {"strategy": strategy, "backend": backend}
        if masked:
            options["mask"] = masks.of_case(case)

        def loss(mean: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = gaussian_nll(
                mean,
                target,
                alpha,
                channel_dim=case.channel_dim,
                eps=EPS,
                inplace=inplace,
                **options,
            )
            return result

        return loss

    return build


class SaveAndReturn(torch.autograd.Function):
    """The floor of any custom loss in Python: saves mean and alpha, and hands them back as the gradients."""

    @staticmethod
    def forward(ctx: Any, mean: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(mean, alpha)
        return torch.zeros((), dtype=torch.float32, device=mean.device)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        mean, alpha = ctx.saved_tensors
        return mean, None, alpha


def save_and_return(case: Case) -> LossFunction:
    del case

    def loss(mean: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = SaveAndReturn.apply(mean, target, alpha)  # type: ignore[no-untyped-call]
        return result

    return loss


class Produce(torch.autograd.Function):
    """Makes a buffer the output of a graph node, as a regressor's last layer would: a mean that is not a leaf."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        return None, None


class StepContender:
    """Forward and backward: `loss = f(mean, target, alpha)`, then the gradients of mean and alpha.

    The gradients are asked of autograd for exactly these two, so that neither a producer's backward nor an
    accumulation into `.grad` is on the clock. They are released on the clock, as a training step would.
    """

    calls, replayed = 1, False

    def __init__(
        self, provider: Provider, case: Case, pool: Pool, function: LossFunction, incoming: float
    ) -> None:
        self.name = row_name(provider, incoming)
        self.provider, self.case, self.pool, self.function, self.incoming = (
            provider,
            case,
            pool,
            function,
            incoming,
        )
        self.gradient: torch.Tensor | None = None
        self.used: list[Slot] = []

    def inputs(self, slot: Slot) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and alpha as a step finds them. Their nodes are made here and now, on the current stream: a graph under
        capture must not meet a node that another stream has made."""
        anchor = self.pool.alpha.detach().requires_grad_()
        mean: torch.Tensor = Produce.apply(anchor, slot.mean)  # type: ignore[no-untyped-call]
        return mean, self.pool.alpha.detach().requires_grad_()

    def prepare(self) -> Call:
        slot = self.pool.take()
        if self.provider.writes_mean:
            self.used.append(slot)
        mean, alpha = self.inputs(slot)
        target, function = slot.target, self.function
        if self.incoming != 1.0 and self.gradient is None:
            loss = function(mean, target, alpha)
            self.gradient = torch.full_like(loss.detach(), self.incoming)
            mean, alpha = self.inputs(slot)
            if self.provider.writes_mean:
                self.pool.restore(slot)
        gradient = self.gradient

        def step() -> object:
            loss = function(mean, target, alpha)
            return loss.detach(), torch.autograd.grad(loss, (mean, alpha), gradient)

        return step

    def finish(self) -> None:
        for slot in self.used:
            self.pool.restore(slot)
        self.used.clear()

    def undo(self) -> None:
        if self.provider.writes_mean:
            self.pool.restore_all()
        self.used.clear()

    def traffic(self) -> traffic.Traffic:
        return traffic_of(self.provider, self.incoming, self.case, self.prepare)


class ForwardContender:
    """The loss alone, without gradients: evaluation."""

    incoming, calls, replayed = 1.0, 1, False

    def __init__(self, provider: Provider, case: Case, pool: Pool, function: LossFunction) -> None:
        self.name = provider.name
        self.provider, self.case, self.pool, self.function = provider, case, pool, function

    def prepare(self) -> Call:
        slot = self.pool.take()
        target, alpha, function, mean = slot.target, self.pool.alpha, self.function, slot.mean

        def forward() -> object:
            with torch.no_grad():
                return function(mean, target, alpha), None

        return forward

    def finish(self) -> None:
        """Nothing was written."""

    def traffic(self) -> traffic.Traffic:
        forward_only = Provider(self.provider.name, self.provider.family, self.provider.build, "forward")
        known = self.provider.strategy is not None or self.provider.family == "compile"
        return traffic_of(forward_only if known else self.provider, 1.0, self.case, self.prepare)


class CopyContender:
    """`mean.copy_(target)`: the rate that memory gives, on the very buffers that the others use."""

    name, incoming, calls, replayed = COPY, 1.0, 1, False
    provider = Provider(COPY, "copy", eager_formula, "copy", compared=False)

    def __init__(self, case: Case, pool: Pool) -> None:
        self.case, self.pool = case, pool
        self.used: list[Slot] = []

    def prepare(self) -> Call:
        slot = self.pool.take()
        self.used.append(slot)
        destination, source = slot.mean, slot.target
        return lambda: destination.copy_(source)

    def finish(self) -> None:
        for slot in self.used:
            self.pool.restore(slot)
        self.used.clear()

    def undo(self) -> None:
        self.pool.restore_all()
        self.used.clear()

    def traffic(self) -> traffic.Traffic:
        return traffic.of_strategy("copy", True, self.case.nbytes)


def row_name(provider: Provider, incoming: float, suffix: str = "") -> str:
    return f"{provider.name}{suffix} g={incoming:g}"


def traffic_of(
    provider: Provider, incoming: float, case: Case, prepare: Callable[[], Call]
) -> traffic.Traffic:
    if provider.strategy is not None:
        strategy = provider.strategy
        if case.mask is not None and not provider.ignores_mask:
            assert strategy in MASKED_STRATEGIES
            assert incoming == 1.0
            return traffic.Traffic(masks.nbytes_of_a_pass(case), "algorithm")
        if strategy == "auto":
            strategy = "two_pass" if case.dtype is torch.float16 else "one_pass"
        return traffic.of_strategy(strategy, incoming == 1.0, case.nbytes)
    if provider.family == "compile":
        # Generated code cannot be counted: what a forward and a backward fused as far as they go would move.
        return traffic.Traffic(traffic.PASSES["two_pass"][0] * case.nbytes, "assumed")
    return traffic.of_operators(prepare())


def baselines(device: str, full: bool) -> list[Provider]:
    """What people run today. A search of Inductor's (max-autotune) takes many seconds a case: in the full selection."""
    providers = [
        Provider(EAGER, "eager", eager_formula),
        Provider(TORCH_LOSS, "torch", torch_loss),
        Provider(COMPILE, "compile", compiled(None)),
    ]
    if full and torch.device(device).type == "cuda":
        providers.append(Provider(MAX_AUTOTUNE, "compile", compiled("max-autotune-no-cudagraphs")))
    return providers


def vidfast_providers(device: str, full: bool) -> list[Provider]:
    """What a user gets unasked, then every back end and strategy that this machine can run, and the reference.

    The default repeats one of the others: two rows of the same code, measured apart, show what a tie looks like.
    """
    providers = [Provider(DEFAULT, "vidfast", vidfast_loss("auto", "auto", False), "auto")]
    providers += [
        Provider(
            f"vidfast {backend} {strategy}",
            "vidfast",
            vidfast_loss(backend, strategy.split()[0], strategy.endswith("in place")),
            strategy,
            writes_mean=strategy.endswith("in place"),
        )
        for backend in runnable(device)
        for strategy in STRATEGIES
    ]
    if full:
        providers.append(Provider(REFERENCE, "reference", vidfast_loss("reference", "auto", False)))
    return providers
