"""What is known of a module at the moment of a call: who sees what it computes, and whether it is what torch defines.

Parts, hooks and methods may have been exchanged since the module was built, so nothing of this is remembered.
"""

from __future__ import annotations

from itertools import pairwise
from types import BuiltinFunctionType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vidfast._torch import (
    CALLED_METHODS,
    CONVOLUTION,
    any_global_hook,
    compiled_call,
    dispatch_modes,
    fake_tensor,
    function_mode,
    has_hook,
    registered_parameter,
)
from vidfast.raw import PLAIN_TYPES

# Layers whose output is new memory that none of them needs in backward.
_OWNING = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Upsample,
)
# What a call of a layer goes through, as it was when this module was imported: compared by identity.
_OF_KIND = {
    kind: tuple((name, getattr(kind, name)) for name in CALLED_METHODS if hasattr(kind, name))
    for kind in (*_OWNING, nn.ReLU, nn.Sequential)
}
# Without those that something had replaced before.
_AS_DEFINED: dict[type[nn.Module], tuple[tuple[str, object], ...]] = {
    kind: methods
    for kind, methods in _OF_KIND.items()
    if all(str(getattr(method, "__module__", "")).startswith("torch.") for _, method in methods)
}
_FUNCTIONS = tuple(
    (place, name, getattr(place, name))
    for place, name in ((F, "conv2d"), (F, "relu"), (torch, "conv2d"), (torch, "relu"), (torch, "relu_"))
)
_FUNCTIONS_WERE_TORCHS = (
    all(isinstance(function, BuiltinFunctionType) for place, name, function in _FUNCTIONS if name != "relu")
    and isinstance(torch.relu, BuiltinFunctionType)
    and F.relu.__module__ == F.__name__
)
_PLAIN_OR_NONE = (*PLAIN_TYPES, type(None))


def is_watched(module: nn.Module) -> bool:
    """Whether anything sees, and may keep, what goes into the module or a part of it or comes out.

    That is a hook of a part, a backward hook too (what it wraps cannot be written over); a hook for all modules; a
    TorchFunctionMode or TorchDispatchMode, as selective checkpointing and profilers use. A compiler is none of these.
    """
    if not torch.compiler.is_compiling() and (function_mode() or dispatch_modes()):
        return True
    return any_global_hook() or any(has_hook(part) for part in module.modules())


def is_as_defined(module: nn.Module) -> bool:
    """Whether the module and its parts are layers known here that compute what torch defines, by torch's own code.

    No subclass, no method exchanged on an instance or on its class, nothing compiled, no weight that is a subclass.
    """
    return _functions_are_torchs() and all(_is_untouched(part) for part in module.modules())


def _is_untouched(part: nn.Module) -> bool:
    """Likewise of the layer alone, without its parts and torch's functions."""
    own, kind = part.__dict__, type(part)
    methods = _AS_DEFINED.get(kind)
    if methods is None or compiled_call(part) is not None:
        return False
    exporting = _is_exporting()
    for name, method in methods:
        # torch.export calls modules by a method of its own, and gives them fake weights
        if name in own or (getattr(kind, name) is not method and not (exporting and name == "__call__")):
            return False
    weight = type(registered_parameter(part, "weight", own.get("weight")))
    return weight in _PLAIN_OR_NONE or (exporting and issubclass(weight, fake_tensor()))


def _is_exporting() -> bool:
    """Whether torch.export runs the module's own code, rather than a tracer that reads it."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def _functions_are_torchs() -> bool:
    return _FUNCTIONS_WERE_TORCHS and all(
        getattr(place, name) is function for place, name, function in _FUNCTIONS
    )


def last_layer(module: nn.Module) -> nn.Module:
    """The layer whose output is the regressor's."""
    # Exact types: a subclass may do anything with its output.
    while type(module) is nn.Sequential and len(module):
        module = module[-1]
    return module


def owns_its_output(module: nn.Module) -> bool:
    """Whether the output may be written over: nothing else reads it afterwards, and no layer needs it in backward.

    So it is where a regressor that nothing watches ends in a convolution, a linear layer or an interpolation, by
    torch's own code. Any other may return its input, a view of it, or something that it keeps.
    """
    if is_watched(module) or not _functions_are_torchs():
        return False
    while type(module) is nn.Sequential and len(module) and _is_untouched(module):
        module = module[-1]
    return type(module) in _OWNING and _is_untouched(module)


def own_rectifiers(module: nn.Module) -> list[int]:
    """Where in a plain Sequential that nothing watches a ReLU may write over its input.

    That is what the layer before it made, and nothing else reads.
    """
    if type(module) is not nn.Sequential or is_watched(module):
        return []
    if not (_functions_are_torchs() and _is_untouched(module)):
        return []
    layers = [*module]
    return [
        place
        for place, (before, layer) in enumerate(pairwise(layers), 1)
        if type(layer) is nn.ReLU
        and type(before) in _OWNING
        and _is_untouched(before)
        and _is_untouched(layer)
    ]


def is_pointwise(module: nn.Module) -> bool:
    """Whether it is made of 1x1 nn.Conv2d, and no other product: how positions are arranged is then all the same."""
    layers = [part for part in module.modules() if isinstance(part, (nn.Linear, CONVOLUTION))]
    return bool(layers) and all(
        isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) and part.stride == (1, 1)
        for part in layers
    )


def weight_dtype(module: nn.Module) -> torch.dtype | None:
    """The floating dtype of the module's first weight, or None where it has none.

    A replica of DataParallel and a module under FSDP's flat parameters have no parameters: there the weights are
    attributes.
    """
    for parameter in module.parameters():  # dynamo of torch 2.6 cannot trace next() with a default
        if parameter.is_floating_point():
            return parameter.dtype
    if torch.compiler.is_compiling():
        return None
    tensors = (x for part in module.modules() for x in part.__dict__.values() if isinstance(x, Tensor))
    return next((x.dtype for x in tensors if x.is_floating_point()), None)
