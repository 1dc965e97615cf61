"""Heads for the CPU back end's kernel, called directly, and what they are in fp64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from heads import distance
from problems import BF16, FP16, FP32
from torch import Tensor

from vidfast import memory
from vidfast.arguments import Call
from vidfast.backends import cpu
from vidfast.head import kernel
from vidfast.head.gradients import HeadCall, Wanted
from vidfast.head.stack import Stack

_C: Any = memory._C
BACKEND: Any = cpu.BACKEND
# Of 16-bit modules: rounding of activations, each to half a unit; of fp32 the products' own.
CLOSE = {FP32: 3e-6, BF16: 2e-2, FP16: 3e-3}


class Problem:
    """A head whose activations are exact in 16 bits up to the last layer: a ReLU decides as it does in fp64."""

    def __init__(
        self, batch: int, widths: tuple[int, ...], positions: int, bias: bool = False, seed: int = 0
    ) -> None:
        torch.manual_seed(seed)
        self.student = torch.randint(-4, 5, (batch, widths[0], positions)) / 4
        self.target = torch.randn(batch, widths[-1], positions)
        self.weights = [
            torch.randint(-2, 3, (out, into)) / 4 * (torch.rand(out, into) < 4 / into)
            for into, out in pairwise(widths)
        ]
        self.biases = [torch.randint(-2, 3, (w.shape[0],)) / 4 if bias else None for w in self.weights]
        self.alpha = torch.linspace(-1.0, 3.0, widths[-1])
        self.k = 1.0 / self.target.numel()
        self.counted: Tensor | None = None  # (batch, positions): what each counts

    def head(self, module: torch.dtype, **features: Tensor) -> HeadCall:
        stack = Stack(tuple(self.weights), tuple(self.biases), False)
        student, target = features.get("student", self.student), features.get("target", self.target)
        head = HeadCall(stack, student, target, self.alpha, Call(1, 1e-5, "mean", k=self.k), BACKEND, module)
        if self.counted is None:
            return head
        return head._replace(positions=self.counted, values=self.counted.sum(dtype=torch.float64).item())

    def run(
        self, module: torch.dtype = FP32, wanted: Wanted | None = None, **features: Tensor
    ) -> list[Tensor | None]:
        """[loss, d student, d alpha, d weights..., d biases...] of the kernel."""
        n = len(self.weights)
        wanted = wanted or Wanted(True, [True] * n, [b is not None for b in self.biases])
        found = kernel.gradients(self.head(module, **features), wanted)
        return [found.loss, found.student, found.alpha, *found.weights, *found.biases]

    def exact(self, **features: Tensor) -> list[Tensor | None]:
        """The same in fp64."""
        leaves = [features.get("student", self.student), self.alpha, *self.weights, *self.biases]
        s, alpha, *layered = (None if x is None else x.double().requires_grad_() for x in leaves)
        assert s is not None
        assert alpha is not None
        n, x = len(self.weights), s
        target = features.get("target", self.target).double()
        counted = torch.ones(()) if self.counted is None else self.counted.double()[:, None]
        x, target = (torch.where(counted != 0, value, 0.0) for value in (x, target))
        for index in range(n):
            weight, bias = layered[index], layered[n + index]
            assert weight is not None
            x = torch.einsum("oc,bcp->bop", weight, torch.relu(x) if index else x)
            x = x if bias is None else x + bias[:, None]
        v = (torch.nn.functional.softplus(alpha) + 1e-5)[:, None]
        loss = self.k * (counted * 0.5 * (v.log() + (target - x) ** 2 / v)).sum()
        inputs = [s, alpha, *layered]
        given = iter(torch.autograd.grad(loss, [x for x in inputs if x is not None]))
        return [loss.detach(), *(None if x is None else next(given) for x in inputs)]


def checked(found: list[Tensor | None], wanted: list[Tensor | None], close: float) -> None:
    for ours, right in zip(found, wanted, strict=True):
        assert (ours is None) == (right is None)
        if ours is not None and right is not None:
            assert ours.shape == right.shape
            assert distance(ours, right) < close
