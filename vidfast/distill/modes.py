"""The training and eval modes of networks: changed for a while, and given back as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn

Modes = list[tuple[nn.Module, bool]]


def modes_of(module: nn.Module) -> Modes:
    """Every submodule, the module itself first, with whether it is in training mode.

    Without those that have no mode, as a frozen network of TorchScript.
    """
    return [(m, m.training) for m in module.modules() if hasattr(m, "training")]


def set_modes(modes: Modes) -> None:
    """Give every module of the list its mode, and no other.

    Where a class has a `train()` of its own, that is called: such classes do more than to set a flag (LoRA layers merge
    their weights in eval mode). What it refuses, as exported programs do, or forgets, is set afterwards.
    """
    for module, training in modes:
        # Looked at one after the other: a parent's train() may have called a child's.
        if module.training != training and _has_own_modes(type(module)):
            with suppress(NotImplementedError):
                if training:
                    module.train()
                else:
                    module.eval()
    for module, training in modes:
        if module.training != training:
            own = vars(module)
            if "training" in own and not torch.compiler.is_compiling():
                own["training"] = training  # a tenth of the time that a module's setattr takes
            else:
                module.training = training


def _has_own_modes(kind: type[nn.Module]) -> bool:
    return kind.train is not nn.Module.train or kind.eval is not nn.Module.eval


@contextmanager
def kept_modes(module: nn.Module) -> Iterator[None]:
    """After the block every submodule has the mode that it had before."""
    modes = modes_of(module)
    try:
        yield
    finally:
        set_modes(modes)


# Reentrant, since a class's own train() may be in such a block too.
_LOCK = threading.RLock()
# By the module's id: how many blocks hold it in eval mode. Before them it was in training mode.
_HELD: dict[int, int] = {}


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode for a block; afterwards every submodule has the mode it had, frozen ones included.

    Several threads may be in such blocks with one module, or with modules that share some: the last one to leave gives
    each its mode back. While a thread is in such a block with a module in training mode, no other may train it.
    """
    if torch.compiler.is_compiling():  # a graph has neither locks nor other threads
        modes = modes_of(module)
        set_modes([(m, False) for m, _ in modes])
        try:
            yield
        finally:
            set_modes(modes)
        return
    with _LOCK:
        # Nearly always nothing is in training mode, and it is in every step that this is asked.
        all_in_eval = not _HELD and not any(getattr(m, "training", False) for m in module.modules())
        modes = [] if all_in_eval else modes_of(module)
        held = [m for m, training in modes if training or id(m) in _HELD]
        for m in held:
            _HELD[id(m)] = _HELD.get(id(m), 0) + 1
    try:
        if held:
            with _LOCK:
                set_modes([(m, False) for m, _ in modes])
        yield
    finally:
        if held:
            with _LOCK:
                free = _let_go(held)
                set_modes([(m, m.training or id(m) in free) for m, _ in modes])


def _let_go(held: list[nn.Module]) -> set[int]:
    """The ids of those of the modules that no block holds any longer."""
    free = set[int]()
    for m in held:
        _HELD[id(m)] -= 1
        if not _HELD[id(m)]:
            del _HELD[id(m)]
            free.add(id(m))
    return free


def train_mode(model: nn.Module, frozen: Iterable[nn.Module]) -> None:
    """Training mode, as classes of its modules understand it, for all but the frozen modules."""
    try:
        model.train()
    except NotImplementedError:  # there is an exported program in it
        set_modes([(module, True) for module, _ in modes_of(model)])
    set_modes([(module, False) for module in frozen])


def frozen_parts(network: nn.Module) -> list[nn.Module]:
    """The submodules that a training leaves in eval mode.

    Those in eval mode while the network is in training mode, and, where all of it is in eval mode, those whose
    parameters all require no gradient, with all that is in them.
    """
    in_eval = [module for module, training in modes_of(network) if not training]
    if getattr(network, "training", True):
        return in_eval
    frozen = [
        module
        for module in in_eval
        if list(module.parameters()) and not any(p.requires_grad for p in module.parameters())
    ]
    within = {id(m) for module in frozen for m in module.modules()}
    return [module for module in in_eval if id(module) in within]
