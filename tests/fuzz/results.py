"""Where results are stored while a case runs: in torch's memory, in vidfast.memory, or between sentinels."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from guarded import Memory
from torch import Tensor

from vidfast import memory


@contextmanager
def results_in(which: str, guarded: Memory) -> Iterator[None]:
    """Within it, the memory of gradients and sums is "plain", "kept" from call to call, or "guarded"."""
    if which == "kept":
        with mock.patch.object(memory, "KEPT_FROM", 64):
            yield
    elif which == "guarded":
        with _patched(guarded):
            yield
    else:
        yield


@contextmanager
def _patched(guarded: Memory) -> Iterator[None]:
    plain_like, dense_like = torch.empty_like, memory.empty_dense

    def empty_like(x: Tensor, **options: Any) -> Tensor:
        return _between_sentinels(plain_like(x, **options), guarded)

    def dense(*args: Any, **options: Any) -> Tensor:
        with mock.patch.object(torch, "empty_like", plain_like):
            out = dense_like(*args, **options)
        return _between_sentinels(out, guarded)

    holders = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("vidfast.") and getattr(module, "empty_dense", None) is dense_like
    ]
    patches = [mock.patch.object(module, "empty_dense", dense) for module in holders]
    with mock.patch.object(torch, "empty_like", empty_like):
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def _between_sentinels(x: Tensor, guarded: Memory) -> Tensor:
    """Memory like x's. Only plain floating tensors on this device's memory are replaced."""
    if type(x) is not Tensor or not x.dtype.is_floating_point or x.is_meta:
        return x
    return guarded.empty(tuple(x.shape), x.stride(), x.dtype, x.device)
