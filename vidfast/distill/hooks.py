"""The hook on one layer, or on what goes into it, and what it recorded in one forward pass."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vidfast._torch import last_forward_hook, last_forward_pre_hook, version_of

from .places import (
    NoSuchElementError,
    Place,
    argument_of,
    arguments_named,
    describe,
    element_of,
    elements_named,
)


class TapError(RuntimeError):
    """A tapped layer gave no activation that can be used; the text names the layer and says why."""


class Tap:
    """Records some elements of what one layer returns, or of what it is called with.

    places: what is recorded, all of one layer, and all of its input or none.
    """

    def __init__(self, places: Sequence[Place], clone: bool) -> None:
        self.places = tuple(places)
        self.layer, self.is_input = self.places[0].layer, self.places[0].is_input
        self.clone = clone
        self.recording = False
        self.with_grad = False
        self.in_inference_mode = False
        self.thread: int | None = None
        self.clear()

    def put_on(self, module: nn.Module) -> Any:
        """Hook the layer; returns the handle."""
        if self.is_input:
            return module.register_forward_pre_hook(self, with_kwargs=True)
        return module.register_forward_hook(self)

    def is_last_on(self, module: nn.Module) -> bool:
        """Whether this is the hook on the layer that runs behind all others."""
        return (last_forward_pre_hook if self.is_input else last_forward_hook)(module) is self

    def begin(self) -> None:
        """Record what the layer returns in this thread from now on."""
        self.clear()
        self.with_grad = torch.is_grad_enabled()
        # torch.compile traces neither of these; a graph is run by one thread.
        tracing = torch.compiler.is_compiling()
        self.in_inference_mode = not tracing and torch.is_inference_mode_enabled()
        self.thread = None if tracing else threading.get_ident()
        # Last: from here on, calls of other threads are told by the thread.
        self.recording = True

    def end(self) -> None:
        # Nothing may stay alive here after the step: the activations are the step's largest tensors.
        self.recording = False
        self.clear()

    def clear(self) -> None:
        self.outputs: list[Tensor] = []
        self.versions: list[int | None] = []
        self.calls = 0
        self.called_elsewhere = False

    @property
    def output(self) -> Tensor | None:
        """The first of what was recorded; None before the layer was called."""
        return self.outputs[0] if self.outputs else None

    def __call__(self, module: nn.Module, args: Any, value: Any) -> None:
        """What torch calls: with the layer's output, or, before the layer runs, with its arguments by name."""
        if not self.recording:
            return
        # torch.compile cannot trace threads, is_inference() and versions; a Distiller's probe has looked in eager mode.
        tracing = torch.compiler.is_compiling()
        if not tracing and self.thread not in (None, threading.get_ident()):
            self.called_elsewhere = True
            return
        self.calls += 1
        if self.calls > 1:
            raise TapError(
                f"layer {self.layer!r} ({type(module).__name__}) was called twice in one forward pass, so its "
                "activation is ambiguous; tap a layer that is called once, such as the block around it or an "
                "nn.Identity() of its own at the wanted place"
            )
        for place in self.places:
            output = self._found(place, module, args, value)
            if not tracing and output.is_inference() and not self.in_inference_mode:
                raise TapError(
                    f"layer {place.name!r} made its output under torch.inference_mode(), which autograd cannot "
                    "save; run the network under torch.no_grad() instead"
                )
            if self.with_grad and not torch.is_grad_enabled():
                raise TapError(
                    f"layer {place.name!r} ({type(module).__name__}) ran without gradients inside a network that runs "
                    "with them, so the loss could not reach its parameters (as in torch.utils.checkpoint with "
                    "use_reentrant=True); use use_reentrant=False, or tap a layer outside"
                )
            kept = output.clone() if self.clone else output
            self.outputs.append(kept)
            # Tensors of inference mode have no version.
            self.versions.append(None if tracing or kept.is_inference() else version_of(kept))

    def _found(self, place: Place, module: nn.Module, args: Any, value: Any) -> Tensor:
        """The Tensor that a tap's name means. Raises TapError where that is none."""
        verb = "was called with" if self.is_input else "returned"
        base, keys = self.layer, place.keys
        if self.is_input:
            base += ".input"
            try:
                value, keys = argument_of(place, args, value)
            except NoSuchElementError as error:
                raise TapError(
                    f"tap {place.name!r}: {self._name(module)} {error}; "
                    f"{_shown(arguments_named(base, args, value)) or 'tap what it returns'}"
                ) from None
            if place.keys:
                base += f"[{place.keys[0]}]"
        try:
            found = element_of(value, keys)
        except NoSuchElementError as error:
            base += "".join(f"[{key}]" for key in keys[: error.depth])
            what = (
                repr(base) if error.depth else f"what {'goes into' if self.is_input else 'comes out of'} it"
            )
            raise TapError(
                f"tap {place.name!r} of {self._name(module)}: {what} {error}; "
                f"{f'tap {base!r}' if isinstance(error.value, Tensor) else _instead(base, error.value, module)}"
            ) from None
        if not isinstance(found, Tensor):
            raise TapError(
                f"layer {place.name!r} ({type(module).__name__}) {verb} {describe(found)}, wanted one Tensor; "
                f"{_instead(place.name, found, module)}"
            )
        return found

    def _name(self, module: nn.Module) -> str:
        kind = type(module).__name__
        return f"layer {self.layer!r} ({kind})" if self.layer else f"the network itself ({kind})"

    def __reduce__(self) -> tuple[Any, ...]:
        # In a copy of a compiled network, and in a file, a hook of Python's own that takes anything and does nothing.
        return getattr, (nullcontext(), "__exit__")


def _instead(name: str, value: Any, module: nn.Module) -> str:
    """What to tap in place of a value that is no Tensor, or lacks an element."""
    inside = " inside it or" if any(module.children()) else ""
    other = f"a layer{inside} behind it that returns one, or an nn.Identity() through which the wanted Tensor passes"
    named = _shown(elements_named(name, value))
    return f"{named}; or tap {other}" if named else f"tap {other}"


def _shown(names: list[str]) -> str:
    more = ", ..." if len(names) > 4 else ""
    return f"name the one that is wanted: {', '.join(map(repr, names[:4]))}{more}" if names else ""
