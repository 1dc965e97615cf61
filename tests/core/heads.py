"""Heads in plain torch: a stack of layers and equation 5, in fp64 or in what autocast and modules make of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import vidfast
from vidfast.backends import cpu
from vidfast.head import kernel, parts, plan, way
from vidfast.regressor import regressed_nll

EPS = 1e-5
# How a head's activations are stored: by the back end's kernel, or in parts in one of three ways.
ARRANGEMENTS = ("kernel", "planes", "rows", "columns")


def has_kernel(head: Any) -> bool:
    """Whether its back end has a kernel for a HeadCall."""
    return bool(head.backend.has_head(head.module, len(head.stack.weights)))


in_parts_alone = mock.patch.object(kernel, "takes", return_value=False)
by_kernel = mock.patch.object(kernel, "takes", has_kernel)
# How layers are named by what they take: a map, a sequence of positions, tokens.
KINDS = ("maps", "sequences", "tokens", "vectors")


def channel_dim(kind: str) -> int:
    return -1 if kind == "tokens" else 1


def features(kind: str, batch: int, channels: int, size: int = 6) -> Tensor:
    shape = {
        "maps": (batch, channels, size, size + 1),
        "sequences": (batch, channels, 2 * size),
        "tokens": (batch, 2 * size, channels),
        "vectors": (batch, channels),
    }[kind]
    return torch.randn(shape)


def layers(kind: str, *widths: int, bias: bool = False) -> nn.Sequential:
    """As many as there are widths but one, ReLU between."""
    found: list[nn.Module] = []
    for into, out in pairwise(widths):
        if kind == "maps":
            found.append(nn.Conv2d(into, out, 1, bias=bias))
        elif kind == "sequences":
            found.append(nn.Conv1d(into, out, 1, bias=bias))
        else:
            found.append(nn.Linear(into, out, bias=bias))
        found.append(nn.ReLU())
    return nn.Sequential(*found[:-1])


def tensors_of(regressor: nn.Sequential) -> tuple[list[Tensor], list[Tensor | None]]:
    """The weights and the biases, as vid_head takes them."""
    linear: list[Any] = [*regressor][::2]
    return [layer.weight for layer in linear], [layer.bias for layer in linear]


@contextmanager
def stored(
    arrangement: str | None, samples_bytes: int | None = None, fast: bool | None = None
) -> Iterator[None]:
    """Within it heads are computed by the back end's kernel, or in parts that are stored so.

    None: in parts that are stored as the rules say. Parts are so large, and 16-bit products are said to be fast or not.
    """
    values: dict[str, object] = {}
    if arrangement == "kernel":
        if not cpu.BACKEND.has_head(torch.float32, 1):
            pytest.skip("this processor has no kernel for heads")
        with by_kernel:
            yield
        return
    if arrangement is not None:
        kind = {"planes": plan.Planes, "rows": plan.Rows, "columns": plan.Columns}[arrangement]
        values["_arrangement"] = lambda *_: kind
    if samples_bytes is not None:
        values["PART_BYTES"] = values["NARROW_PART_BYTES"] = dict.fromkeys(plan.PART_BYTES, samples_bytes)
    if fast is not None:
        values["cpu_multiplies"] = lambda _: fast
    with in_parts_alone, mock.patch.multiple(plan, **values) if values else mock.patch.dict({}):
        yield


class Ways:
    """What heads were computed by: the kernel, or parts and how."""

    def __init__(self, monkeypatch: Any) -> None:
        self.names: list[str] = []
        self.plans: list[Any] = []
        planned, run_kernel = parts.planned, kernel.gradients

        def counted(*args: Any) -> Any:
            student, target, made = planned(*args)
            self.names.append(made.arrangement.name)
            self.plans.append(made)
            return student, target, made

        def counted_kernel(*args: Any) -> Any:
            self.names.append("kernel")
            return run_kernel(*args)

        monkeypatch.setattr(parts, "planned", counted)
        monkeypatch.setattr(kernel, "gradients", counted_kernel)


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Within it nothing is computed in one pass."""
    with mock.patch.object(way, "_in_one_pass", return_value=None):
        yield


def gradients(
    regressor: nn.Module,
    alpha: Tensor,
    student: Tensor,
    target: Tensor,
    dim: int,
    amp: torch.dtype | None = None,
    g: float = 1.0,
    **options: Any,
) -> list[Tensor]:
    """[loss, d student, d alpha, d parameters...] of the library, divided by g again."""
    student = student.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=amp or torch.bfloat16, enabled=amp is not None):
        loss = regressed_nll(regressor, student, target, alpha, channel_dim=dim, eps=EPS, **options)
    inputs = [student, alpha, *regressor.parameters()]
    found = torch.autograd.grad(loss, inputs, torch.tensor(g))
    for x, gradient in zip(inputs, found, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (gradient.shape, gradient.dtype, gradient.stride())
    return [loss.detach(), *(gradient.double() / g for gradient in found)]


def exact(
    regressor: nn.Module, alpha: Tensor, student: Tensor, target: Tensor, dim: int, factor: float = 1.0
) -> list[Tensor]:
    """The same in fp64: equation 5 averaged, times `factor`."""
    wide = copy.deepcopy(regressor).double()
    s, a = student.detach().double().requires_grad_(), alpha.detach().double().requires_grad_()
    variance = torch.log1p(a.exp()) + EPS
    shape = [1] * s.dim()
    shape[dim] = -1
    variance = variance.view(shape)
    loss = factor * (0.5 * (variance.log() + (target.double() - wide(s)) ** 2 / variance)).mean()
    return [loss.detach(), *torch.autograd.grad(loss, [s, a, *wide.parameters()])]


def distance(found: Tensor, wanted: Tensor) -> float:
    """Of the norms."""
    return float((found.double() - wanted).norm() / wanted.norm())


def spread_alpha(channels: int) -> nn.Parameter:
    """A variance of its own for each channel."""
    return nn.Parameter(torch.linspace(-2.0, 3.0, channels))


__all__ = [
    "ARRANGEMENTS", "KINDS", "Ways", "by_kernel", "channel_dim", "distance", "exact", "features", "gradients",
    "has_kernel", "in_parts_alone", "layer_by_layer", "layers", "spread_alpha", "stored", "tensors_of", "vidfast",
]  # fmt: skip
