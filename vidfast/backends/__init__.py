"""The back ends: which there are, which one a call gets, and why.

A back end is one module `vidfast.backends.<name>` with a BACKEND that follows the protocol of `base`.
"""

from __future__ import annotations

import logging
from importlib import import_module

from torch import Tensor

from vidfast.backends.base import Backend as Backend
from vidfast.backends.plain import PLAIN as PLAIN

log = logging.getLogger("vidfast")

# The order of preference. Why CUDA before Triton: docs/kernel-notes.md, "Defaults, and what decided them".
NAMES = ("cuda", "triton", "cpu")

# For tensors on the CPU: an interpreted GPU kernel is never what `auto` means.
_CPU_FIRST = ("cpu", *(name for name in NAMES if name != "cpu"))

_loaded: dict[str, Backend] = {}
_picked: set[tuple[str, str]] = set()


def load(name: str) -> Backend:
    """The back end of that name, imported on first use."""
    if name not in _loaded:
        _loaded[name] = import_module(f"vidfast.backends.{name}").BACKEND
    return _loaded[name]


def still_takes(backend: Backend | None, mean: Tensor, target: Tensor, alpha: Tensor) -> bool:
    """Whether a back end that was chosen before is still the one of its name, and takes these tensors."""
    return (
        backend is not None
        and _loaded.get(backend.name) is backend
        and backend.supports(mean, target, alpha) is None
    )


def check_name(backend: str) -> None:
    """Checks that a user may ask for the back end of that name.

    Raises:
        ValueError: There is none.
    """
    if backend not in ("auto", "reference", *NAMES):
        raise ValueError(f"backend must be one of {('auto', 'reference', *NAMES)}, got {backend!r}")


def choose(wanted: str, mean: Tensor, target: Tensor, alpha: Tensor, obstacle: str | None) -> Backend:
    """The back end for this call: that of the name, or for "auto" the first that takes the tensors.

    Args:
        wanted: "auto", "reference" or a name.
        mean: Of the call.
        target: Of the call.
        alpha: Of the call.
        obstacle: Why no kernel may have these tensors, by :func:`vidfast.raw.not_raw`.

    Raises:
        ValueError: There is no back end of that name.
        RuntimeError: The back end asked for by name cannot run, with the reason.
    """
    if wanted == "reference":
        return PLAIN
    if wanted == "auto":
        kind = "cpu" if mean.is_cpu else mean.device.type
        if obstacle is None:
            for name in _CPU_FIRST if mean.is_cpu else NAMES:
                backend = load(name)
                if backend.supports(mean, target, alpha) is None:
                    if (kind, name) not in _picked:
                        _note(kind, name)
                    return backend
            obstacle = "; ".join(f"{name}: {load(name).supports(mean, target, alpha)}" for name in NAMES)
        if (kind, PLAIN.name) not in _picked:
            _note(kind, PLAIN.name, obstacle)
        return PLAIN
    check_name(wanted)
    backend = load(wanted)
    reason = obstacle or backend.supports(mean, target, alpha)
    if reason is not None:
        raise RuntimeError(f"backend={wanted!r} cannot run here: {reason}")
    return backend


def _note(kind: str, name: str, reason: str = "") -> None:
    """Says once what "auto" took for tensors on this kind of device."""
    _picked.add((kind, name))
    log.debug("backend %s for tensors on %s%s", name, kind, f" ({reason})" if reason else "")
    if name == PLAIN.name and kind == "cpu" and load("cpu").unavailable() is not None:
        from vidfast.unbuilt import warn_at_caller

        warn_at_caller(f"vidfast runs its slow reference: {reason}")
