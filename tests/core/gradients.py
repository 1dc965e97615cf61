"""Leaves to differentiate, and what autograd keeps for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from places import Place
from problems import BY_NAME, FP32, Case
from torch import Tensor

STRATEGIES = ("one_pass", "two_pass")
CASE = BY_NAME["plane_49"]


def leaves(
    backend: Place, case: Case = CASE, dtype: torch.dtype = FP32, target: bool = False
) -> list[Tensor]:
    """mean and alpha requiring grad, target if asked."""
    m, t, a = case.tensors(dtype, device=backend.device)
    return [m.requires_grad_(), t.requires_grad_(target), a.requires_grad_()]


def scalar(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def kept(make: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the tensors that autograd keeps for its backward."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        return make(), saved


def big(tensors: list[Tensor], n: int) -> list[Tensor]:
    return [x for x in tensors if x.numel() >= n]
