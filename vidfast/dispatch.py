"""Which back end runs, and why."""

from __future__ import annotations

import logging
import platform
import warnings

import torch
from torch import Tensor

from vidfast._torch import dispatch_modes, in_transform, interpreter_stack
from vidfast._version import __version__
from vidfast.backends import Backend
from vidfast.raw import PLAIN, not_plain

log = logging.getLogger("vidfast")

# The order of preference; a back end is one module `vidfast.backends.<name>` with a BACKEND. Why CUDA before Triton:
# docs/kernel-notes.md, "Defaults, and what decided them".
NAMES = ("cuda", "triton", "cpu")

_CPU_FIRST = NAMES[::-1]  # for tensors there: an interpreted GPU kernel is never what `auto` means

_loaded: dict[str, Backend] = {}
_picked: set[tuple[str, str]] = set()
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_tracing = torch._C._is_tracing


def load(name: str) -> Backend:
    """The back end of that name, imported on first use."""
    if name not in _loaded:
        from importlib import import_module

        _loaded[name] = import_module(f"vidfast.backends.{name}").BACKEND
    return _loaded[name]


def not_raw(*tensors: Tensor) -> str | None:
    """None if every tensor's memory may be handed to native code now, or the reason why not."""
    for x in tensors:
        reason = not_plain(x)
        if reason is not None:
            return reason
    if dispatch_modes():
        return "a torch dispatch mode is active"
    if _is_tracing():
        return "torch.jit.trace records torch's operators, not what a kernel writes"
    return None


def in_functorch(*tensors: Tensor) -> bool:
    """Whether one of them is inside a torch.func transform."""
    return interpreter_stack() is not None and any(_is_wrapped(x) for x in tensors)


def check_name(backend: str) -> None:
    """:raises ValueError: there is no back end of that name."""
    if backend not in ("auto", "reference", *NAMES):
        raise ValueError(f"backend must be one of {('auto', 'reference', *NAMES)}, got {backend!r}")


def compiles_to_operator(wanted: str, *tensors: Tensor) -> bool:
    """Whether torch.compile is to see our operator; False: the reference's plain PyTorch.

    An operator has no forward-mode derivative, no rule for torch.func, and none of how a wrapper such as DTensor is
    divided.

    Raises:
        ValueError: There is no back end of that name.
        RuntimeError: A back end asked for by name has none of this.
    """
    check_name(wanted)
    if wanted == "reference":
        return False
    obstacle = None
    for x in tensors:
        # what torch traces with stands for a plain tensor
        if type(x) not in PLAIN and type(x).__name__ not in ("FakeTensor", "FunctionalTensor"):
            obstacle = f"{type(x).__name__} is a tensor subclass"
    if obstacle is None and in_transform():
        obstacle = "torch.func's transforms and forward-mode derivatives do not see into its kernels"
    if obstacle is not None and wanted != "auto":
        raise RuntimeError(f"backend={wanted!r} cannot run here: {obstacle}; use backend='reference'")
    return obstacle is None


def choose(wanted: str, mean: Tensor, target: Tensor, alpha: Tensor) -> Backend | None:
    """The back end for this call; None is the reference.

    :raises ValueError: there is no back end of that name.
    :raises RuntimeError: the back end asked for by name cannot run, with the reason.
    """
    if wanted == "reference":
        return None
    obstacle = not_raw(mean, target, alpha)
    if wanted == "auto":
        if obstacle is None:
            for name in _CPU_FIRST if mean.is_cpu else NAMES:
                backend = load(name)
                if backend.supports(mean, target, alpha) is None:
                    _note(mean, name, "")
                    return backend
            obstacle = "; ".join(f"{name}: {load(name).supports(mean, target, alpha)}" for name in NAMES)
        _note(mean, "reference", obstacle)
        return None
    check_name(wanted)
    backend = load(wanted)
    reason = obstacle or backend.supports(mean, target, alpha)
    if reason is not None:
        raise RuntimeError(f"backend={wanted!r} cannot run here: {reason}")
    return backend


def _note(mean: Tensor, name: str, reason: str) -> None:
    kind = "cpu" if mean.is_cpu else mean.device.type
    if (kind, name) in _picked:
        return
    _picked.add((kind, name))
    log.debug("backend %s for tensors on %s%s", name, kind, f" ({reason})" if reason else "")
    if name == "reference" and kind == "cpu" and load("cpu").unavailable() is not None:
        warnings.warn(f"vidfast runs its slow reference: {reason}", RuntimeWarning, stacklevel=5)


def info() -> dict[str, object]:
    """What vidfast is on this machine: versions, and for each back end whether it runs, what it uses, or why not.

    `auto` takes the first of `backends` that is available and supports the tensors, else the reference. What
    was picked is logged once per device at level DEBUG by the logger "vidfast". A target laid out in memory
    otherwise than its mean, and a mean that is expanded or overlapping, are copied before the kernel runs.
    """
    backends: dict[str, object] = {}
    for name in NAMES:
        backend = load(name)
        reason = backend.unavailable()
        backends[name] = {"available": reason is None, **({"reason": reason} if reason else backend.info())}
    return {
        "vidfast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backends": backends,
    }
