"""Whether a student gives its logits in training as it does in the probe, which runs in eval mode."""

from __future__ import annotations

import inspect
from contextlib import suppress
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from vidfast._torch import BATCH_NORM, keep_attributes

from .inputs import Picker, call
from .modes import kept_modes, modes_of, set_modes
from .places import describe

# What these do in training is not where a network's outputs come from, and it would leave traces.
_LEFT_ALONE = (
    BATCH_NORM,
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    torch.jit.ScriptModule,
)


def check_training_logits(student: nn.Module, inputs: Any, pick: Picker, found: Tensor) -> None:
    """Refuse a student in whose output of training mode no logits are found, such as with heads of deep supervision.

    A student that has a class with a method or property that reads `self.training` runs once more, with such modules
    alone in training mode. Buffers, frozen parameters, modes and the attributes of these modules are as before
    afterwards; what is in a list of theirs is not. The caller keeps the random state.

    pick: finds the logits in what the student returns. found: those of eval mode.

    Raises ValueError where `pick` finds no Tensor of as many dimensions and classes. Other sizes may differ.
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
    alike = (
        isinstance(logits, Tensor) and logits.dim() == found.dim() and logits.shape[1:2] == found.shape[1:2]
    )
    if not alike:
        what = f"a Tensor {tuple(output.shape)}" if isinstance(output, Tensor) else describe(output)
        raise ValueError(
            f"wanted logits {tuple(found.shape)} from the student ({type(student).__name__}) in training mode too, as "
            f"in eval mode; there it returns {what}, and logits= makes of it {told}. Give Distiller(..., logits=) a "
            "function that takes both, such as lambda out: out if isinstance(out, torch.Tensor) else out[0], or switch "
            "the further heads off"
        )


def _looks_at_its_mode(module: nn.Module) -> bool:
    """Whether a class outside of torch has code that reads `training`."""
    if isinstance(module, _LEFT_ALONE) or not hasattr(module, "training"):
        return False
    for kind in type(module).__mro__:
        if kind.__module__.split(".")[0] in ("torch", "builtins"):
            continue
        for member in vars(kind).values():
            function = member.fget if isinstance(member, property) else member
            code = (
                getattr(inspect.unwrap(function), "__code__", None) if inspect.isfunction(function) else None
            )
            if code is not None and _reads_training(code):
                return True
    return False


def _reads_training(code: CodeType) -> bool:
    """Whether a function's code, or that of a function or comprehension in it, has the attribute `training`."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return "training" in code.co_names or any(map(_reads_training, inner))


def _in_training(student: nn.Module, training: list[nn.Module], inputs: Any) -> Any:
    """What the student returns with these modules in training mode; None where it does not run so."""
    within = {id(m) for m in training}
    tensors = [
        tensor
        for module in student.modules()
        for tensor in (*module.buffers(recurse=False), *module.parameters(recurse=False))
        # An optimizer changes parameters; what a training mode changes belongs to such modules or takes no gradient.
        if id(module) in within or not tensor.requires_grad
    ]
    before = [(t, t.detach().clone()) for t in tensors if not (t.is_inference() or t.is_meta)]
    restores = [keep_attributes(module) for module in training]
    output = None
    try:
        with kept_modes(student):
            set_modes([(m, id(m) in within) for m, _ in modes_of(student)])
            with suppress(Exception):  # what fails here may be the mixture of modes
                output = call(student, inputs)
    finally:
        for restore in restores:
            restore()
        with torch.no_grad():
            for tensor, value in before:
                # Not by its version: what is written to .data has another one.
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
    return output
