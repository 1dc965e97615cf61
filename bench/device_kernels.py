"""A GPU back end's primitives alone, without autograd: what `bench/graphs.py` captures for the kernel suite.

The rows of a whole step measure Python wherever a kernel takes less than the 70 to 100 us of the host's part; these
are the device's own time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench import traffic
from bench.buffers import EPS, Pool, Slot
from bench.cases import SCALER_FACTOR, WEIGHTED, Case
from bench.clock import Call
from bench.providers import Provider, eager_formula
from vidfast import backends, primitives
from vidfast.arguments import Call as LossCall

FORWARD, FORWARD_GRAD, IN_PLACE = "forward", "forward_grad", "forward_grad in place"
BACKWARD, SCALE_BY_ONE, SCALE = "backward", "scale g=1", f"scale g={WEIGHTED:g}"
# Primitive -> how many passes it makes: a key of traffic.PASSES.
PRIMITIVES = {
    FORWARD: "forward",
    FORWARD_GRAD: "one_pass",
    IN_PLACE: "one_pass in place",
    BACKWARD: "backward",
    SCALE_BY_ONE: "scale",
    SCALE: "scale",
}


class DeviceKernel:
    """One primitive of a back end (`vidfast.backends.Backend`) at reduction "mean", slot by slot.

    fp16 has a loss scaler's factor as its incoming gradient. forward_grad comes before that factor, so that its fp16
    gradient, about 1/N, is zero: there it is timed but not compared.

    Args:
        backend: Its name in `vidfast.backends`.
        primitive: A key of PRIMITIVES.
        case: Shape, dtype and layout of mean and target.
        pool: The slots. `scale` has a gradient of its own for each instead.
    """

    calls, replayed = 1, False

    def __init__(self, backend: str, primitive: str, case: Case, pool: Pool) -> None:
        self.name = f"{backend} {primitive}"
        self.case, self.pool, self.primitive = case, pool, primitive
        half = case.dtype is torch.float16
        writes_mean, ahead = primitive == IN_PLACE, primitive in (FORWARD_GRAD, IN_PLACE)
        self.provider = Provider(
            self.name,
            "kernel",
            eager_formula,
            PRIMITIVES[primitive],
            writes_mean,
            compared=not (half and ahead),
        )
        self.backend = backends.load(backend)
        self.factor = SCALER_FACTOR if half and not ahead else 1.0
        self.incoming = self.factor * (WEIGHTED if primitive == SCALE else 1.0)
        self.channel = case.channel_dim % len(case.shape)
        self.gradients: list[torch.Tensor] = []
        self.turn = 0
        self.call = self._build()

    def _build(self) -> Callable[[Slot], object]:
        """slot -> (loss, gradients). What a primitive is given by an earlier one is made here, once."""
        backend, alpha = self.backend, self.pool.alpha.detach()
        call = LossCall(self.channel, EPS, inplace=self.primitive == IN_PLACE, k=1.0 / self.case.elements)
        first = self.pool.slots[0]

        def forward_grad(slot: Slot) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
            loss, grad_mean, grad_alpha = primitives.forward_grad(
                backend, slot.mean, slot.target, alpha, call
            )
            return loss, (grad_mean, grad_alpha)

        if self.primitive == FORWARD:
            return lambda slot: (
                primitives.forward(backend, slot.mean, slot.target, alpha, call)[0],
                None,
            )
        if self.primitive in (FORWARD_GRAD, IN_PLACE):
            return forward_grad

        loss, sum_sq = primitives.forward(backend, first.mean, first.target, alpha, call)
        g = torch.full((), self.factor, dtype=loss.dtype, device=self.case.device)

        def backward(slot: Slot) -> tuple[torch.Tensor, tuple[Any, Any]]:
            want = (True, False, True)
            grads = primitives.backward(
                backend, g, slot.mean, slot.target, alpha, sum_sq, slot.mean.shape, call, want
            )
            return loss, (grads[0], grads[2])

        if self.primitive == BACKWARD:
            return backward
        self.made = backward(first)[1][0]
        self.gradients = [self.made.clone() for _ in self.pool.slots]
        grad_alpha = self.factor * forward_grad(first)[1][1]
        factor = torch.full_like(g, WEIGHTED if self.primitive == SCALE else 1.0)

        def scale(_: Slot) -> object:
            gradient = self.gradients[self.turn % len(self.gradients)]
            self.turn += 1
            scaled = primitives.scale(backend, factor, gradient, self.channel, grad_alpha, alpha.dtype, True)
            return loss, scaled

        return scale

    def prepare(self) -> Call:
        slot, call = self.pool.take(), self.call
        return lambda: call(slot)

    def finish(self) -> None:
        self.undo()

    def undo(self) -> None:
        if self.primitive == IN_PLACE:
            self.pool.restore_all()
        if self.primitive == SCALE:
            for gradient in self.gradients:
                gradient.copy_(self.made)

    def traffic(self) -> traffic.Traffic:
        return traffic.of_strategy(PRIMITIVES[self.primitive], self.primitive != SCALE, self.case.nbytes)
