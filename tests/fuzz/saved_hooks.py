"""What a caller's hooks may do with the tensors that autograd saves: store equal ones in any other way."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import numpy as np
import torch
from guarded import LAYOUTS, REPEATING, Memory, Plan, plan
from torch import Tensor

Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]
_WRITABLE = tuple(name for name in LAYOUTS if name not in REPEATING)


class Tagged(Tensor):
    """A subclass with torch's default behaviour."""


def _same(x: Any) -> Any:
    return x


def _to_numpy(x: Tensor) -> Any:
    return x.detach().cpu().clone() if x.dtype is torch.bfloat16 else x.detach().cpu().numpy().copy()


def _to_file(x: Tensor) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(x.detach(), file)
    return file


def _from_file(file: io.BytesIO) -> Tensor:
    file.seek(0)
    return torch.load(file)


def _wide(x: Tensor) -> tuple[torch.dtype, Tensor]:
    return x.dtype, x.detach().double()


def _column(x: Tensor, memory: Memory) -> Tensor:
    """One column of a table whose other columns are sentinels."""
    strides = [3 * s for s in torch.empty(x.shape, device="meta").stride()]
    return memory.copy("a column that a hook returned", x, Plan(tuple(x.shape), tuple(strides), 1))


def _expanded(x: Tensor) -> Tensor:
    """Stride 0 in every dimension along which nothing changes."""
    out = x
    for d in range(x.dim()):
        first = out.narrow(d, 0, 1) if x.numel() else out
        if torch.equal(first.expand_as(out), out):
            out = first.expand_as(out)
    return out


def _negated(x: Tensor) -> Tensor:
    """Equal to x, but its memory holds the opposites (is_neg)."""
    return torch._neg_view(-x)


def pair(name: str, rng: Random, memory: Memory) -> tuple[Pack, Unpack]:
    """The two functions of this hook.

    Args:
        name: One of HOOKS but "none".
        rng: Chooses strides.
        memory: Holds what the hook returns, with sentinels around it.
    """

    def strided(x: Tensor) -> Tensor:
        if x.dim() == 0 or x.numel() == 0:
            return x.clone()
        where = plan(rng.choice(_WRITABLE), tuple(x.shape), rng.randrange(x.dim()), rng)
        return memory.copy("a tensor that a hook returned", x, where)

    def dense(x: Tensor, shift: int = 0) -> Plan:
        return Plan(tuple(x.shape), torch.empty_like(x, device="meta").stride(), shift)

    def moved(x: Tensor) -> Tensor:
        shift = rng.randrange(1, 8)
        return memory.copy("a tensor that a hook returned", x, dense(x, shift))

    hooks: dict[str, tuple[Pack, Unpack]] = {
        "identity": (_same, _same),
        "clone": (lambda x: x.detach().clone(), _same),
        "strided": (lambda x: x.detach().clone(), strided),
        "packed strided": (lambda x: strided(x.detach()), _same),
        "moved": (lambda x: x.detach().clone(), moved),
        # the caller's own tensor, which may be read-only memory or stand for another, equal one too
        "stored": (lambda x: memory.copy("a tensor that a hook stored", x, dense(x), writable=False), _same),
        "column": (lambda x: x.detach().clone(), lambda x: _column(x, memory)),
        "expanded": (lambda x: x.detach().clone(), _expanded),
        "numpy": (_to_numpy, lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x),
        "file": (_to_file, _from_file),
        "fp64 and back": (_wide, lambda saved: saved[1].to(saved[0])),
        # a mask's bytes can be none
        "leaf": (
            lambda x: x.detach().clone(),
            lambda x: x.detach().clone().requires_grad_(x.dtype.is_floating_point),
        ),
        "negated": (lambda x: x.detach().clone(), _negated),
        "subclass": (lambda x: x.detach().clone(), lambda x: x.as_subclass(Tagged)),
    }
    hooks["strided for one Function"] = hooks["strided"]
    hooks["column for one Function"] = hooks["column"]
    return hooks[name]


HOOKS = (
    "identity",
    "clone",
    "strided",
    "packed strided",
    "moved",
    "stored",
    "column",
    "expanded",
    "numpy",
    "file",
    "fp64 and back",
    "leaf",
    "save_on_cpu",
    "strided for one Function",
    "column for one Function",
    "negated",
    "subclass",
)
ONE_FUNCTION = ("strided for one Function", "column for one Function")
# Equal tensors, but not plain memory: a RuntimeError is as good as the right value.
MAY_REFUSE = ("negated", "subclass")


@contextmanager
def saved_through(name: str, rng: Random, memory: Memory) -> Iterator[None]:
    """Within it, what autograd saves passes the hook; `hook_function` is for those of one Function."""
    if name == "none" or name in ONE_FUNCTION:
        yield
    elif name == "save_on_cpu":
        with torch.autograd.graph.save_on_cpu():
            yield
    else:
        with torch.autograd.graph.saved_tensors_hooks(*pair(name, rng, memory)):
            yield


def hook_function(name: str, loss: Tensor, rng: Random, memory: Memory) -> None:
    """Puts a hook on the saved tensors of the Function that made `loss`."""
    if name in ONE_FUNCTION and loss.grad_fn is not None:
        for saved in loss.grad_fn._raw_saved_tensors:
            try:
                saved.register_hooks(*pair(name, rng, memory))
            except RuntimeError as error:
                if "value None" not in str(error):  # a gradient that is not wanted
                    raise
