"""Whether a student gives its logits in training as it does in the probe, which runs in eval mode."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, dropout, instancenorm

from vidfast._torch import version_of

from .inputs import Picker, call
from .modes import kept_modes, modes_of, set_modes
from .places import describe

# What these do in training is not where a network's outputs come from, and it would leave traces.
_LEFT_ALONE = (batchnorm._BatchNorm, instancenorm._InstanceNorm, dropout._DropoutNd)


def check_training_logits(student: nn.Module, inputs: Any, pick: Picker, found: Tensor) -> None:
    """Refuse a student whose output in training mode is another, such as with heads of deep supervision.

    A student that has a class that looks at its mode runs once more, with such modules alone in training mode;
    buffers and modes are as before afterwards. The caller keeps the random state.

    pick: finds the logits in what the student returns. found: those of eval mode.

    Raises ValueError where `pick` finds no logits of that shape.
    """
    training = [m for m in student.modules() if _looks_at_its_mode(m)]
    if not training:
        return
    output = _in_training(student, training, inputs)
    if output is None:
        return
    try:
        logits: Any = pick(output)
    except Exception as error:
        logits, told = None, f"{type(error).__name__}: {error}"
    else:
        told = describe(logits) if not isinstance(logits, Tensor) else f"{tuple(logits.shape)}"
    if not isinstance(logits, Tensor) or logits.shape != found.shape:
        what = f"a Tensor {tuple(output.shape)}" if isinstance(output, Tensor) else describe(output)
        raise ValueError(
            f"wanted logits {tuple(found.shape)} from the student ({type(student).__name__}) in training mode too, as "
            f"in eval mode; there it returns {what}, and logits= makes of it {told}. Give Distiller(..., logits=) a "
            "function that takes both, such as lambda out: out if isinstance(out, torch.Tensor) else out[0], or switch "
            "the further heads off"
        )


def _looks_at_its_mode(module: nn.Module) -> bool:
    """Whether a class outside of torch has code that reads `training`."""
    if isinstance(module, (*_LEFT_ALONE, torch.jit.ScriptModule)) or not hasattr(module, "training"):
        return False
    for kind in type(module).__mro__:
        if kind.__module__.split(".")[0] in ("torch", "builtins"):
            continue
        for member in vars(kind).values():
            code = getattr(inspect.unwrap(member), "__code__", None) if inspect.isfunction(member) else None
            if code is not None and "training" in code.co_names:
                return True
    return False


def _in_training(student: nn.Module, training: list[nn.Module], inputs: Any) -> Any:
    """What the student returns with these modules in training mode; None where it does not run so."""
    buffers = [b for b in student.buffers() if not b.is_inference() and not b.is_meta]
    before = [(version_of(b), b.clone()) for b in buffers]
    with kept_modes(student):
        within = {id(m) for m in training}
        set_modes([(m, id(m) in within) for m, _ in modes_of(student)])
        output = None
        with suppress(Exception):  # what fails here may be the mixture of modes
            output = call(student, inputs)
    with torch.no_grad():
        for buffer, (version, value) in zip(buffers, before, strict=True):
            if version_of(buffer) != version:
                buffer.copy_(value)
    return output
