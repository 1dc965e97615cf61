"""The training and eval modes of networks: changed for a while, and given back as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import nn

Modes = list[tuple[nn.Module, bool]]


def modes_of(module: nn.Module) -> Modes:
    """Every submodule, the module itself first, with whether it is in training mode.

    Without those that have no mode, as a frozen network of TorchScript.
    """
    return [(m, m.training) for m in module.modules() if hasattr(m, "training")]


def restore(modes: Modes) -> None:
    """Give every submodule the mode that `modes_of` found, through `train()` where a class has one of its own.

    Such classes do more than to set a flag (LoRA layers merge their weights in eval mode), and must undo it.
    """
    for module, training in modes:
        if module.training != training:
            with suppress(NotImplementedError):
                module.train(training)
    for module, training in modes:
        if module.training != training:
            module.training = training


@contextmanager
def kept_modes(module: nn.Module) -> Iterator[None]:
    """After the block every submodule has the mode that it had before."""
    modes = modes_of(module)
    try:
        yield
    finally:
        restore(modes)


@dataclass
class _InEvalMode:
    """A network that some blocks have put into eval mode: how many of them, and the modes that it had before."""

    blocks: int
    modes: Modes


_LOCK = threading.Lock()
_IN_EVAL_MODE: dict[int, _InEvalMode] = {}


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode for a block; afterwards every submodule has the mode it had, frozen ones included.

    Several threads may be in such blocks with one module: the last one to leave gives its modes back.
    """
    if torch.compiler.is_compiling():  # a graph has neither locks nor other threads
        modes = modes_of(module)
        _to_eval(module, modes)
        try:
            yield
        finally:
            restore(modes)
        return
    with _LOCK:
        entry = _IN_EVAL_MODE.get(id(module))
        if entry is None:
            modes = modes_of(module)
            if any(training for _, training in modes):
                entry = _IN_EVAL_MODE[id(module)] = _InEvalMode(0, modes)
                _to_eval(module, modes)
        if entry is not None:
            entry.blocks += 1
    try:
        yield
    finally:
        if entry is not None:
            with _LOCK:
                entry.blocks -= 1
                if not entry.blocks:
                    del _IN_EVAL_MODE[id(module)]
                    restore(entry.modes)


def _to_eval(module: nn.Module, modes: Modes) -> None:
    """Eval mode, if anything is in training mode."""
    if any(training for _, training in modes):
        try:
            module.eval()
        except NotImplementedError:  # an exported program, whose graph is of one mode
            for submodule, _ in modes:
                submodule.training = False


def train_mode(model: nn.Module, frozen: Iterable[nn.Module]) -> None:
    """Training mode for all but the frozen modules."""
    model.train()
    for module in frozen:
        module.training = False


def frozen_parts(network: nn.Module) -> list[nn.Module]:
    """The submodules that a training leaves in eval mode.

    Those in eval mode while the network is in training mode, and, where all of it is in eval mode, those whose
    parameters all require no gradient.
    """
    in_eval = [module for module in network.modules() if not module.training]
    if network.training:
        return in_eval
    return [
        module
        for module in in_eval
        if list(module.parameters()) and not any(p.requires_grad for p in module.parameters())
    ]
