"""Named layers of any network -> their activations, by forward hooks.

The hooks stay on the network for the life of the `Taps` and record only inside `recording()`: outside of it
they return at once and hold nothing, so the network can be called, copied, pickled and checkpointed as
before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vidfast._torch import uncompiled, version_of

from .registry import UnknownNameError, near_matches


class TapError(RuntimeError):
    """A tapped layer gave no activation that can be used; the text names the layer and says why."""


class _Tap:
    """The hook on one layer. A class and not a closure, so that a hooked network pickles and deep-copies."""

    def __init__(self, layer: str, clone: bool) -> None:
        self.layer = layer
        self.clone = clone
        self.recording = False
        self.with_grad = False
        self.clear()

    def clear(self) -> None:
        self.output: Tensor | None = None
        self.version: int | None = None
        self.calls = 0

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.recording:
            return
        self.calls += 1
        if self.calls > 1:
            raise TapError(
                f"layer {self.layer!r} ({type(module).__name__}) was called twice in one forward pass, so its "
                "activation is ambiguous; tap a layer that is called once"
            )
        if not isinstance(output, Tensor):
            raise TapError(
                f"layer {self.layer!r} ({type(module).__name__}) returned {_describe(output)}, wanted one Tensor; "
                "tap a layer inside it that returns one"
            )
        # torch.compile cannot trace is_inference() and versions; a Distiller's probe has looked in eager mode.
        tracing = torch.compiler.is_compiling()
        if not tracing and output.is_inference():
            raise TapError(
                f"layer {self.layer!r} made its output under torch.inference_mode(), which autograd cannot "
                "save; run the network under torch.no_grad() instead"
            )
        if self.with_grad and not torch.is_grad_enabled():
            raise TapError(
                f"layer {self.layer!r} ({type(module).__name__}) ran without gradients inside a network that runs "
                "with them, so the loss could not reach its parameters (as in torch.utils.checkpoint with "
                "use_reentrant=True); use use_reentrant=False, or tap a layer outside"
            )
        self.output = output.clone() if self.clone else output
        self.version = None if tracing else version_of(self.output)


def _describe(output: object) -> str:
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"


class Taps:
    """Forward hooks on the layers named, of any nn.Module.

        taps = Taps(network, ["layer1", "layer2.0.conv1"])
        with taps.recording() as activations:
            network(images)
            features = activations()        # {"layer1": Tensor, "layer2.0.conv1": Tensor}
        taps.remove()

    `layers` are names as in `network.named_modules()`. With `clone=True` every activation is copied as it is
    recorded, which lets a layer be tapped whose output is modified in place afterwards (an in-place ReLU
    behind a convolution or a BatchNorm, as in torchvision's VGG and ResNet). A network wrapped by
    `torch.compile(network)` is tapped by the names that its layers had before.

    Raises UnknownNameError (a ValueError) for a layer that is not there, listing near matches; TypeError for a
    lone str.
    """

    def __init__(
        self, network: nn.Module, layers: Iterable[str], *, clone: bool = False, role: str = "network"
    ) -> None:
        if isinstance(layers, str):
            raise TypeError(f"wanted the names of layers, such as [{layers!r}], got one str")
        names = list(dict.fromkeys(layers))
        # What torch.compile returns is a module around the network, whose layers keep their names this way.
        network = uncompiled(network)
        # Shared modules have several names; every one of them is a valid name here.
        modules = dict(network.named_modules(remove_duplicate=False))
        for name in names:
            if not name or name not in modules:
                raise UnknownNameError(
                    f"the {role} ({type(network).__name__}) has no layer {name!r}: {near_matches(name, modules)}"
                )
        self._taps = [_Tap(name, clone) for name in names]
        self._handles = [modules[tap.layer].register_forward_hook(tap) for tap in self._taps]
        self._removed = False

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(tap.layer for tap in self._taps)

    @contextmanager
    def recording(self) -> Iterator[Callable[[], dict[str, Tensor]]]:
        """Record during the block; yields a function that checks and returns what was recorded.

        Raises TapError after `remove`.
        """
        if self._removed:
            raise TapError("the taps were removed from the network; make new ones")
        for tap in self._taps:
            tap.clear()
            tap.recording = True
            tap.with_grad = torch.is_grad_enabled()
        try:
            yield self._collect
        finally:
            # Nothing may stay alive here after the step: the activations are the step's largest tensors.
            for tap in self._taps:
                tap.recording = False
                tap.clear()

    def _collect(self) -> dict[str, Tensor]:
        """The activations by layer name. Raises TapError for a layer not called or modified in place since."""
        activations: dict[str, Tensor] = {}
        for tap in self._taps:
            if tap.output is None:
                raise TapError(f"layer {tap.layer!r} was not called in the forward pass")
            if tap.version is not None and version_of(tap.output) != tap.version:
                raise TapError(
                    f"the output of layer {tap.layer!r} was modified in place after the layer returned it (as an "
                    "in-place ReLU behind it does); tap the layer that modifies it, or ask for a copy with "
                    "clone=True (clone_taps=True in Distiller)"
                )
            activations[tap.layer] = tap.output
        return activations

    def remove(self) -> None:
        """Take the hooks off the network; nothing can be recorded afterwards."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._removed = True
