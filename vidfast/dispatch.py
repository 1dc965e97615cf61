"""Which way a call takes: the reference, the operators of compiled graphs, or the kernels; and `vidfast.info()`."""

from __future__ import annotations

import platform

import torch
from torch import Tensor

from vidfast import backends
from vidfast._torch import has_tangent, in_forward_mode, in_functorch, in_transform
from vidfast._version import __version__
from vidfast.arguments import Call
from vidfast.backends.base import Backend
from vidfast.heteroscedastic.arguments import HeteroscedasticCall
from vidfast.positions import Weights
from vidfast.raw import NO_FORWARD_MODE, PLAIN_TYPES, not_raw
from vidfast.recall import KERNELS, OPERATOR, REFERENCE


def choose_way(
    mean: Tensor,
    target: Tensor,
    alpha: Tensor,
    call: Call | HeteroscedasticCall,
    weights: Weights | None = None,
) -> tuple[str, Backend | None]:
    """(one of the ways of :mod:`vidfast.recall`, the back end whose kernels compute it, if any do) of a checked call.

    Args:
        mean: mu(s).
        target: t, mean's shape.
        alpha: (C,), or what the variance of each element is made of.
        call: Everything else but tensors.
        weights: The tensors among it.

    Raises:
        ValueError: There is no such back end, or none for this reduction.
        RuntimeError: The back end asked for cannot run, or a transform of torch's cannot see into kernels.
    """
    tensors = [mean, target, alpha, *(weights.tensors if weights else ())]
    way = _way(tensors, call)
    if way != KERNELS:
        return way, None
    backend = backends.choose(call.backend, mean, target, alpha, not_raw(*tensors))
    return (KERNELS, backend) if backend is not backends.PLAIN and mean.numel() else (REFERENCE, None)


def _way(tensors: list[Tensor], call: Call | HeteroscedasticCall) -> str:
    """REFERENCE, OPERATOR, or KERNELS: those of the back end that is chosen then, if one is."""
    if call.reduction == "none":
        if call.backend not in ("auto", "reference"):
            raise ValueError(
                f"reduction='none' has no fused kernel: backend must be 'auto' or 'reference', got {call.backend!r}"
            )
        return REFERENCE
    if torch.compiler.is_compiling():
        compiles = compiles_to_operator(call.backend, *tensors)
        return OPERATOR if compiles else REFERENCE
    if call.backend == "reference":
        return REFERENCE
    if call.backend != "auto":
        backends.check_name(call.backend)
    if in_functorch(*tensors):
        raise RuntimeError(
            "vidfast's kernels cannot run inside torch.func transforms: use backend='reference'"
        )
    if in_forward_mode() and has_tangent(*tensors):
        raise RuntimeError(NO_FORWARD_MODE)
    return KERNELS


def compiles_to_operator(wanted: str, *tensors: Tensor) -> bool:
    """Whether torch.compile is to see our operator; False: the reference's plain PyTorch.

    An operator has no forward-mode derivative, no rule for torch.func, and none of how a wrapper such as DTensor is
    divided.

    Raises:
        ValueError: There is no back end of that name.
        RuntimeError: A back end was named, and its operator cannot run under a transform or on a subclass.
    """
    backends.check_name(wanted)
    if wanted == "reference":
        return False
    obstacle = None
    for x in tensors:
        # what torch traces with stands for a plain tensor
        if type(x) not in PLAIN_TYPES and type(x).__name__ not in ("FakeTensor", "FunctionalTensor"):
            obstacle = f"{type(x).__name__} is a tensor subclass"
    if obstacle is None and in_transform():
        obstacle = "torch.func's transforms and forward-mode derivatives do not see into its kernels"
    if obstacle is not None and wanted != "auto":
        raise RuntimeError(f"backend={wanted!r} cannot run here: {obstacle}; use backend='reference'")
    return obstacle is None


def info() -> dict[str, object]:
    """What vidfast is on this machine: versions, and for each back end whether it runs, what it uses, or why not.

    `auto` takes the first of `backends` that is available and supports the tensors, for those on the CPU "cpu" before
    the others, else the reference. What was picked is logged once for each kind of device, at level DEBUG by the logger
    "vidfast". A target laid out in memory
    otherwise than its mean, and a mean that is expanded or overlapping, are copied before the kernel runs.
    """
    found: dict[str, object] = {}
    for name in backends.NAMES:
        backend = backends.load(name)
        reason = backend.unavailable()
        found[name] = {"available": reason is None, **({"reason": reason} if reason else backend.info())}
    return {
        "vidfast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backends": found,
    }
