"""The ways to make a call and differentiate it, the same for gaussian_nll and VIDLoss."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
from guarded import Memory, Plan
from results import results_in
from saved_hooks import MAY_REFUSE, hook_function, saved_through
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Leaves = dict[str, Tensor]


class Refused(Exception):
    """The library raised an error that is as good as a right result here."""


class RandomCall(ABC):
    """One case with its tensors. Each has a letter; case.wanted and case.asked are made of these letters."""

    checkpointed: tuple[str, ...]  # the tensors that a checkpoint is given
    repeatable = True  # bitwise, whatever thread it runs in

    def __init__(self, case: Any) -> None:
        self.case = case
        self.rng = Random(case.seed + 1)
        self.memory = Memory(case.sentinel)

    @abstractmethod
    def leaves(self) -> Leaves:
        """The tensors, of which those in case.wanted require grad."""

    @abstractmethod
    def run(self, x: Leaves) -> Tensor:
        """The call itself. Raises Refused where the library may refuse, and did."""

    @abstractmethod
    def for_inference(self, x: Leaves) -> Leaves:
        """The same, but that those without gradient are inference tensors."""

    @abstractmethod
    def twin(self) -> RandomCall:
        """The same call with other numbers."""

    @abstractmethod
    def others(self) -> list[RandomCall]:
        """Calls to run at the same time."""

    @abstractmethod
    def check(self, loss: Tensor, grads: Leaves, g: float) -> None:
        """Asserts values, dtypes and shapes of one loss and its gradients."""

    @abstractmethod
    def g(self, value: float | None = None) -> float:
        """The incoming gradient as it arrives, rounded to the loss's dtype; case.g if no value is given."""

    def may_save(self, error: RuntimeError) -> bool:
        """Whether torch is right to refuse to save an inference tensor."""
        return False

    def loss(self, x: Leaves) -> Tensor:
        """Forward, within the case's hook."""
        with saved_through(self.case.hook, self.rng, self.memory):
            if self.case.path in ("checkpoint", "reentrant checkpoint"):
                reentrant = self.case.path.startswith("reentrant")
                names = self.checkpointed
                out: Tensor = checkpoint(
                    lambda *given: self.run({**x, **dict(zip(names, given, strict=True))}),
                    *(x[name] for name in names),
                    use_reentrant=reentrant,
                )
            else:
                out = self.run(x)
        hook_function(self.case.hook, out, self.rng, self.memory)
        return out

    def incoming(
        self, loss: Tensor, g: float, of: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """What torch.autograd.grad is given, so that the loss gets g in the way that the case says."""
        if self.case.incoming == "product":
            return (g * loss).sum(), of, None
        arrives = torch.full_like(loss.detach(), g)
        if self.case.incoming == "slice":
            arrives = self.memory.copy(
                "g", arrives, Plan(tuple(loss.shape), arrives.stride(), 3), writable=False
            )
        elif self.case.incoming == "negated":
            arrives = torch._neg_view(-arrives)
        return loss, of, arrives

    def grad(self, loss: Tensor, x: Leaves, g: float, **options: Any) -> Leaves:
        """Gradients of what the case asks for."""
        asked = self.case.asked
        found = torch.autograd.grad(*self.incoming(loss, g, [x[k] for k in asked]), **options)
        return dict(zip(asked, found, strict=True))


def _by_grad(call: RandomCall) -> None:
    x = call.leaves()
    loss = call.loss(x)
    call.check(loss, call.grad(loss, x, call.g()), call.g())


def _by_create_graph(call: RandomCall) -> None:
    x = call.leaves()
    loss = call.loss(x)
    grads = call.grad(loss, x, call.g(), create_graph=True)
    call.check(loss, {k: grad.detach() for k, grad in grads.items()}, call.g())


def _by_backward(call: RandomCall) -> None:
    x = call.leaves()
    loss = call.loss(x)
    outer, _, arrives = call.incoming(loss, call.g(), [])
    outer.backward(arrives)
    grads = {k: x[k].grad for k in call.case.wanted}
    assert None not in grads.values(), "an input that requires grad got none"
    call.check(loss, {k: grad for k, grad in grads.items() if grad is not None}, call.g())


def _twice(call: RandomCall) -> None:
    x = call.leaves()
    loss = call.loss(x)
    first = call.grad(loss, x, call.g(), retain_graph=True)
    kept = {k: grad.clone() for k, grad in first.items()}
    other = call.g(-0.5 if call.case.g else 2.0)
    call.check(loss, call.grad(loss, x, other), other)
    for k, grad in first.items():
        torch.testing.assert_close(grad, kept[k], rtol=0, atol=0, equal_nan=True)
    call.check(loss, first, call.g())


def _two_at_once(call: RandomCall) -> None:
    """Two losses whose graphs are alive together, each with results of its own."""
    calls = (call, call.twin())
    leaves = [each.leaves() for each in calls]
    losses = [each.loss(x) for each, x in zip(calls, leaves, strict=True)]
    grads = [
        each.grad(*given, each.g())
        for each, given in zip(calls, zip(losses, leaves, strict=True), strict=True)
    ]
    for each, loss, found in zip(calls, losses, grads, strict=True):
        each.check(loss, found, each.g())
    calls[1].memory.check()


def _without_gradient(call: RandomCall) -> None:
    with torch.no_grad() if call.case.path == "no_grad" else torch.inference_mode():
        loss = call.run(call.leaves())
    assert not loss.requires_grad
    call.check(loss, {}, call.g())


def _inference_inputs(call: RandomCall) -> None:
    x = call.for_inference(call.leaves())
    try:
        loss = call.loss(x)
    except RuntimeError as error:
        if call.may_save(error):
            raise Refused from error
        raise
    call.check(loss, call.grad(loss, x, call.g()), call.g())


def _in_threads(functions: list[Callable[[], None]]) -> None:
    """All at once; the first error is raised here."""
    start, errors = threading.Barrier(len(functions)), []

    def run(function: Callable[[], None]) -> None:
        start.wait()
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(f,)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _same_in_threads(call: RandomCall) -> None:
    """The same tensors from three threads, bitwise the same results where they are repeatable."""
    found: list[list[Tensor]] = []

    def once() -> None:
        x = call.leaves()
        loss = call.loss(x)
        grads = call.grad(loss, x, call.g())
        call.check(loss, grads, call.g())
        found.append([loss.detach(), *grads.values()])

    once()
    _in_threads([once] * 3)
    for same in zip(*found, strict=True) if call.repeatable else ():
        for other in same:
            torch.testing.assert_close(other, same[0], rtol=0, atol=0, equal_nan=True)


def _others_in_threads(call: RandomCall) -> None:
    others = call.others()
    _in_threads([lambda: _by_grad(call), *(lambda c=c: _allowing(c, _by_grad) for c in others)])
    for other in others:
        other.memory.check()


PATHS: dict[str, Callable[[RandomCall], None]] = {
    "grad": _by_grad,
    "backward": _by_backward,
    "twice": _twice,
    "two at once": _two_at_once,
    "create_graph": _by_create_graph,
    "checkpoint": _by_backward,
    "reentrant checkpoint": _by_backward,
    "same in threads": _same_in_threads,
    "others in threads": _others_in_threads,
    "no_grad": _without_gradient,
    "inference_mode": _without_gradient,
    "inference inputs": _inference_inputs,
}


def _allowing(call: RandomCall, function: Callable[[RandomCall], None]) -> None:
    try:
        function(call)
    except Refused:
        pass
    except RuntimeError:
        if call.case.hook not in MAY_REFUSE:
            raise


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_call(call: RandomCall) -> None:
    """Raises AssertionError, or what the library raised, if anything at all is wrong with this call."""
    with _threads(call.case.threads), results_in(call.case.outputs, call.memory):
        _allowing(call, PATHS[call.case.path])
    call.memory.check()
