"""Named layers of any network -> their activations, by forward hooks.

In a network that runs as it stands, the hooks are on its layers while `recording()` lasts and at no other time. So a
network that is not recording is as it was before: it can be called in another thread, copied, pickled, scripted and
checkpointed. A graph of `torch.compile` has in it the hooks that were there when it was made, and does not look for
others; in a network that is compiled they stay on their layers for the life of the `Taps`, and record nothing but in
`recording()`.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vidfast._torch import (
    constant_while_traced,
    dynamo_watches,
    is_compiled,
    last_forward_hook,
    uncompiled,
    version_of,
)

from .registry import UnknownNameError, near_matches


class TapError(RuntimeError):
    """A tapped layer gave no activation that can be used; the text names the layer and says why."""


class _Tap:
    """The hook on one layer, and what it recorded in one forward pass."""

    def __init__(self, layer: str, clone: bool) -> None:
        self.layer = layer
        self.clone = clone
        self.recording = False
        self.with_grad = False
        self.in_inference_mode = False
        self.thread: int | None = None
        self.clear()

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
        self.output: Tensor | None = None
        self.version: int | None = None
        self.calls = 0
        self.called_elsewhere = False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
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
        if not isinstance(output, Tensor):
            inside = " inside it or" if any(module.children()) else ""
            raise TapError(
                f"layer {self.layer!r} ({type(module).__name__}) returned {_describe(output)}, wanted one Tensor; "
                f"tap a layer{inside} behind it that returns one, or an nn.Identity() through which the wanted "
                "Tensor passes"
            )
        if not tracing and output.is_inference() and not self.in_inference_mode:
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
        # Tensors of inference mode have no version.
        self.version = None if tracing or self.output.is_inference() else version_of(self.output)

    def __reduce__(self) -> tuple[Any, ...]:
        # In a copy of a compiled network, and in a file, a hook of Python's own that takes anything and does nothing.
        return getattr, (nullcontext(), "__exit__")


def _describe(output: object) -> str:
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"


_NUMBERS = itertools.count()
_TAPS: weakref.WeakValueDictionary[str, Taps] = weakref.WeakValueDictionary()


class Taps:
    """Forward hooks on the layers named, of any nn.Module.

        taps = Taps(network, ["layer1", "layer2.0.conv1"])
        with taps.recording() as activations:
            network(images)
            features = activations()        # {"layer1": Tensor, "layer2.0.conv1": Tensor}
        taps.remove()

    `layers` are names as in `network.named_modules()`; they are looked up at every recording, so a layer that was
    replaced is tapped where it was. Recorded is what the layer's caller gets: what other hooks make of the output
    too, those that are registered later included. With `clone=True` every activation is copied as it is
    recorded, which lets a layer be tapped whose output is modified in place afterwards (an in-place ReLU
    behind a convolution or a BatchNorm, as in torchvision's VGG and ResNet). A network wrapped by
    `torch.compile(network)` is tapped by the names that its layers had before.

    A recording takes what its own thread calls, so other threads may run the network meanwhile, unless it is compiled:
    a graph does not know its thread.

    Raises UnknownNameError (a ValueError) for a layer that is not there, listing near matches; TapError for layers
    that run no hooks, as those of TorchScript and of exported programs; TypeError for a lone str.
    """

    def __init__(
        self, network: nn.Module, layers: Iterable[str], *, clone: bool = False, role: str = "network"
    ) -> None:
        if isinstance(layers, str):
            raise TypeError(f"wanted the names of layers, such as [{layers!r}], got one str")
        names = list(dict.fromkeys(layers))
        _check_layers(network, names, role)
        self.network, self.role = network, role
        self.clone = clone
        self._removed = False
        self._begin_anew([_Tap(name, clone) for name in names])

    def _begin_anew(self, taps: list[_Tap]) -> None:
        """What belongs to this object alone, and not to its copies."""
        self._taps = taps
        # By layer: the module that a lasting hook is on, and the hook's handle.
        self._attached: dict[str, tuple[nn.Module, Any]] = {}
        # The taps of a compiled network are one set, so one thread records at a time.
        self._lock = threading.RLock()
        self._key = f"taps {next(_NUMBERS)}"
        _TAPS[self._key] = self
        weakref.finalize(self, _detach, self._attached).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        own = ("_taps", "_attached", "_lock", "_key")
        state = {name: value for name, value in self.__dict__.items() if name not in own}
        return {**state, "layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        layers = state.pop("layers")
        self.__dict__.update(state)
        self._begin_anew([_Tap(name, self.clone) for name in layers])

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
        handles: list[Any] = []
        if torch.compiler.is_compiling():
            _attach_while_traced(self._key)
            taps, lasting = self._taps, True
        else:
            taps, handles, lasting = self._begin()
        try:
            for tap in taps:
                tap.begin()
            yield partial(self._collect, taps)
        finally:
            for handle in handles:
                handle.remove()
            for tap in taps:
                tap.end()
            if lasting and not torch.compiler.is_compiling():
                self._lock.release()

    def _begin(self) -> tuple[list[_Tap], list[Any], bool]:
        """The taps to record with, the handles to remove afterwards, and whether the lock is held."""
        paths = [self._path(tap.layer) for tap in self._taps]
        if self._may_be_compiled(paths):
            self._lock.acquire()
            try:
                self.attach()
            except BaseException:
                self._lock.release()
                raise
            return self._taps, [], True
        self.detach()
        taps = [_Tap(tap.layer, tap.clone) for tap in self._taps]
        handles: list[Any] = []
        try:
            for tap, path in zip(taps, paths, strict=True):
                handles.append(path[-1].register_forward_hook(tap))
        except BaseException:
            for handle in handles:
                handle.remove()
            raise
        return taps, handles, False

    def attach(self) -> None:
        """Put hooks on the layers that stay there, each behind the hooks that its layer has; for compiled networks."""
        for tap in self._taps:
            module = self._path(tap.layer)[-1]
            held, handle = self._attached.get(tap.layer, (None, None))
            if held is module and last_forward_hook(module) is tap:
                continue
            if handle is not None:
                handle.remove()
            self._attached[tap.layer] = module, module.register_forward_hook(tap)

    def _may_be_compiled(self, paths: list[list[nn.Module]]) -> bool:
        """Whether a graph of torch.compile may run the layers: one is made now, or a module on a path is compiled."""
        if dynamo_watches() or is_compiled(self.network):
            return True
        return any(is_compiled(module) for path in paths for module in path)

    def _path(self, layer: str) -> list[nn.Module]:
        """The modules from the network down to a layer."""
        # What torch.compile returns is a module around the network, whose layers keep their names this way.
        path = [uncompiled(self.network)]
        for name in layer.split("."):
            found = getattr(path[-1], name, None)
            if not isinstance(found, nn.Module):
                raise UnknownNameError(
                    f"the {self.role} ({type(path[0]).__name__}) has no layer {layer!r} any more; it was there when "
                    "the taps were made"
                )
            path.append(found)
        return path

    def _collect(self, taps: list[_Tap]) -> dict[str, Tensor]:
        """The activations by layer name. Raises TapError for a layer not called or modified in place since."""
        activations: dict[str, Tensor] = {}
        for tap in taps:
            if tap.output is None:
                raise TapError(
                    f"layer {tap.layer!r} was not called in the forward pass: {self._why_not(tap)}"
                )
            if tap.version is not None and version_of(tap.output) != tap.version:
                raise TapError(
                    f"the output of layer {tap.layer!r} was modified in place after the layer returned it (as an "
                    "in-place ReLU behind it does); tap the layer that modifies it, or ask for a copy with "
                    "clone=True (clone_taps=True in Distiller)"
                )
            activations[tap.layer] = tap.output
        return activations

    def _why_not(self, tap: _Tap) -> str:
        """What kept a layer from being called, as far as it can be told, and what to do."""
        if tap.called_elsewhere:
            return (
                "another thread called it, as torch.nn.DataParallel does; use DistributedDataParallel around the "
                "Distiller"
            )
        if not torch.compiler.is_compiling() and self._may_be_compiled([self._path(tap.layer)]):
            return (
                f"torch.compile made a graph of the {self.role} before there were taps, and runs it without them; "
                "call torch.compiler.reset() once, after the Distiller (or the Taps) was made, so that the graph is "
                "made again"
            )
        return (
            "these inputs take another way through the network, or the layer around it reads its weights without "
            "calling it (as torch.nn.MultiheadAttention does with its out_proj), or torch.compile made a graph of a "
            "part before there were taps; tap a layer that is called, or call torch.compiler.reset()"
        )

    def detach(self) -> None:
        """Take hooks off that stayed on a network which was compiled; the next recording puts on what it needs."""
        _detach(self._attached)

    def remove(self) -> None:
        """Take what hooks there are off the network; nothing can be recorded afterwards."""
        self.detach()
        self._removed = True


@constant_while_traced
def _attach_while_traced(key: str) -> None:
    _TAPS[key].attach()


def _detach(attached: dict[str, tuple[nn.Module, Any]]) -> None:
    for _, handle in attached.values():
        handle.remove()
    attached.clear()


def _check_layers(network: nn.Module, names: list[str], role: str) -> None:
    """Raises UnknownNameError for a name that is no layer's, TapError for a layer that runs no hooks."""
    network = uncompiled(network)
    if names and isinstance(network, torch.jit.ScriptModule):
        raise TapError(_unhookable(role, names[0], "is TorchScript, whose layers run no hooks"))
    # Shared modules have several names; every one of them is a valid name here.
    modules = dict(network.named_modules(remove_duplicate=False))
    for name in names:
        if not name or name not in modules:
            raise UnknownNameError(
                f"the {role} ({type(network).__name__}) has no layer {name!r}: {near_matches(name, modules)}"
            )
        if isinstance(modules[name], torch.jit.ScriptModule):
            raise TapError(_unhookable(role, name, "is TorchScript there, whose layers run no hooks"))
        for around in ("", *itertools.accumulate(name.split("."), "{}.{}".format)):
            graph = modules[around]
            if around != name and isinstance(graph, torch.fx.GraphModule):
                inner = name.removeprefix(f"{around}.")
                called = (str(node.target) for node in graph.graph.nodes if node.op == "call_module")
                if not any(f"{inner}.".startswith(f"{target}.") for target in called):
                    raise TapError(
                        _unhookable(role, name, "is a graph (as torch.export makes) that calls no such layer")
                    )


def _unhookable(role: str, layer: str, why: str) -> str:
    return (
        f"layer {layer!r} cannot be tapped: the {role} {why}; tap the nn.Module that it was made from, or take terms "
        "that read the logits alone, such as KD"
    )
