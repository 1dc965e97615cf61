"""Named layers of any network -> their activations, by forward hooks. What a name may say is in `places.py`.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vidfast._torch import constant_while_traced, dynamo_watches, is_compiled, uncompiled, version_of

from .hooks import Tap
from .hooks import TapError as TapError
from .kinds import Kind, kind_of
from .places import Place, parse
from .registry import UnknownNameError, near_matches

_NUMBERS = itertools.count()
_TAPS: weakref.WeakValueDictionary[str, Taps] = weakref.WeakValueDictionary()


class Taps:
    """Forward hooks on the layers named, of any nn.Module.

        taps = Taps(network, ["layer1", "layer2.0.conv1"])
        with taps.recording() as activations:
            network(images)
            features = activations()        # {"layer1": Tensor, "layer2.0.conv1": Tensor}
        taps.remove()

    `layers` are names as in `network.named_modules()`, or of an element of what a layer returns ("layer3[0]") or is
    called with ("head.input"): `places.py` has them all. They are looked up at every recording, so a layer that was
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
        self._places = _checked_places(network, list(dict.fromkeys(layers)), role)
        self.network, self.role = network, role
        self.clone = clone
        self._removed = False
        self._begin_anew()

    def _begin_anew(self) -> None:
        """What belongs to this object alone, and not to its copies."""
        self._taps = self._new_taps()
        # By layer, and whether its input is meant: the module that a lasting hook is on, and the hook's handle.
        self._attached: dict[tuple[str, bool], tuple[nn.Module, Any]] = {}
        # The taps of a compiled network are one set, so one thread records at a time.
        self._lock = threading.RLock()
        self._key = f"taps {next(_NUMBERS)}"
        _TAPS[self._key] = self
        weakref.finalize(self, _detach, self._attached).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        own = ("_taps", "_attached", "_lock", "_key")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_anew()

    @property
    def layers(self) -> tuple[str, ...]:
        """The names as they were given."""
        return tuple(place.name for place in self._places)

    def kinds(self) -> dict[str, Kind]:
        """What each layer's class tells of the features that it gives, by the names given."""
        return {place.name: kind_of(self._path(place.layer), place) for place in self._places}

    def _new_taps(self) -> list[Tap]:
        """A hook for each layer, and each layer's input, of which something is recorded."""
        grouped: dict[tuple[str, bool], list[Place]] = {}
        for place in self._places:
            grouped.setdefault((place.layer, place.is_input), []).append(place)
        return [Tap(places, self.clone) for places in grouped.values()]

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

    def _begin(self) -> tuple[list[Tap], list[Any], bool]:
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
        taps = self._new_taps()
        handles: list[Any] = []
        try:
            for tap, path in zip(taps, paths, strict=True):
                handles.append(tap.put_on(path[-1]))
        except BaseException:
            for handle in handles:
                handle.remove()
            raise
        return taps, handles, False

    def attach(self) -> None:
        """Put hooks on the layers that stay there, each behind the hooks that its layer has; for compiled networks."""
        for tap in self._taps:
            module = self._path(tap.layer)[-1]
            of = (tap.layer, tap.is_input)
            held, handle = self._attached.get(of, (None, None))
            if held is module and tap.is_last_on(module):
                continue
            if handle is not None:
                handle.remove()
            self._attached[of] = module, tap.put_on(module)

    def _may_be_compiled(self, paths: list[list[nn.Module]]) -> bool:
        """Whether a graph of torch.compile may run the layers: one is made now, or a module on a path is compiled."""
        if dynamo_watches() or is_compiled(self.network):
            return True
        return any(is_compiled(module) for path in paths for module in path)

    def _path(self, layer: str) -> list[nn.Module]:
        """The modules from the network down to a layer."""
        # What torch.compile returns is a module around the network, whose layers keep their names this way.
        path = [uncompiled(self.network)]
        for name in layer.split(".") if layer else ():
            found = getattr(path[-1], name, None)
            if not isinstance(found, nn.Module):
                raise UnknownNameError(
                    f"the {self.role} ({type(path[0]).__name__}) has no layer {layer!r} any more; it was there when "
                    "the taps were made"
                )
            path.append(found)
        return path

    def _collect(self, taps: list[Tap]) -> dict[str, Tensor]:
        """The activations by name. Raises TapError for a layer not called or modified in place since."""
        activations: dict[str, Tensor] = {}
        for tap in taps:
            if not tap.outputs:
                raise TapError(
                    f"layer {tap.layer!r} was not called in the forward pass: {self._why_not(tap)}"
                )
            for place, output, version in zip(tap.places, tap.outputs, tap.versions, strict=True):
                if version is not None and version_of(output) != version:
                    raise TapError(_modified(place))
                activations[place.name] = output
        return {place.name: activations[place.name] for place in self._places}

    def _why_not(self, tap: Tap) -> str:
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


def _modified(place: Place) -> str:
    what, by = (
        ("input", "by the layer, or after it (as an in-place ReLU at its start does)")
        if place.is_input
        else ("output", "after the layer returned it (as an in-place ReLU behind it does)")
    )
    return (
        f"the {what} of layer {place.layer!r} was modified in place {by}; tap the layer that modifies it, or ask for a "
        "copy with clone=True (clone_taps=True in Distiller)"
    )


def _detach(attached: dict[Any, tuple[nn.Module, Any]]) -> None:
    for _, handle in attached.values():
        handle.remove()
    attached.clear()


def _checked_places(network: nn.Module, names: Sequence[str], role: str) -> tuple[Place, ...]:
    """The names taken apart.

    Raises UnknownNameError for a name that is no layer's, TapError for a layer that runs no hooks.
    """
    network = uncompiled(network)
    if names and isinstance(network, torch.jit.ScriptModule):
        raise TapError(_unhookable(role, names[0], "is TorchScript, whose layers run no hooks"))
    # Shared modules have several names; every one of them is a valid name here.
    modules = dict(network.named_modules(remove_duplicate=False))
    places = []
    for name in names:
        place = parse(name, modules)
        if place.layer not in modules or not (place.layer or place.keys):
            raise UnknownNameError(
                f"the {role} ({type(network).__name__}) has no layer {name!r}: {near_matches(place.layer, modules)}"
                "; 'layer[0]' is an element of what a layer returns, 'layer.input' what it is called with"
            )
        _check_hookable(modules, place.layer, role)
        places.append(place)
    return tuple(places)


def _check_hookable(modules: Mapping[str, nn.Module], name: str, role: str) -> None:
    """Raises TapError for a layer that runs no hooks."""
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
