"""Private names of torch, each with what stands in for it where the installed torch has no such name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import DeviceContext

_module: Any = torch.nn.modules.module
# torch 2.7 and later.
_has_any_global_hook: Callable[[], object] | None = getattr(_module, "_has_any_global_hook", None)
_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


def any_global_hook() -> bool:
    """Whether a hook for all modules is registered: `torch.nn.modules.module.register_module_*_hook`."""
    if _has_any_global_hook is not None:
        return bool(_has_any_global_hook())
    return any(getattr(_module, name) for name in _GLOBAL_HOOKS)


# Every torch that is supported has these.
# Whether a tensor is a wrapper of functionalization, whose type is Tensor and whose memory is not its values.
is_functional: Callable[[torch.Tensor], bool] = torch._is_functional_tensor
_unpack_dual: Any = torch._VF._unpack_dual
_shown: Any = torch._C._SetExcludeDispatchKeyGuard
_BELOW_AUTOGRAD = torch._C.DispatchKey.ADInplaceOrView
interpreter_stack: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_function_mode_count: Callable[[], int] = torch._C._len_torch_function_stack
_function_modes: Callable[[], list[Any]] = torch.overrides._get_current_function_mode_stack
# torch 2.9 and later: the precision of fp32 products, for each library and kind of operation.
_fp32_precision: Callable[[str, str], str] | None = getattr(torch._C, "_get_fp32_precision_getter", None)
_FULL_PRECISION = ("none", "ieee")


# torch 2.7 and later.
_top_hooks: Callable[[bool], object] | None = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)


def saved_tensors_are_hooked() -> bool:
    """Whether `torch.autograd.graph.saved_tensors_hooks` are around this code; False where torch cannot tell."""
    return _top_hooks is not None and _top_hooks(True) is not None


def has_tangent(x: torch.Tensor) -> bool:
    """Whether x carries a forward-mode derivative. Nothing is known of functorch's wrappers.

    Level 0 is the only one that there is, and is read here whether or not Python entered it: a compiled graph does not.
    """
    if torch.is_inference_mode_enabled() or x.is_inference():
        return False
    # an operator's own code runs below autograd, where tangents are not to be seen
    with _shown(_BELOW_AUTOGRAD, False):
        return _unpack_dual(x, level=0).tangent is not None


def in_transform() -> bool:
    """Whether a transform of torch.func is around this code, or a level of forward-mode derivatives."""
    from torch.autograd import forward_ad

    return forward_ad._current_level >= 0 or interpreter_stack() is not None


# What torch.compiler.assume_constant_result sets, which imports dynamo: torch.compile calls the function as it traces,
# inside the transforms that it has entered, and takes its answer for a constant.
in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def dispatch_modes() -> bool:
    """Whether a TorchDispatchMode is active."""
    return _dispatch_modes() > 0


def function_mode() -> bool:
    """Whether a TorchFunctionMode may change what torch's functions do. A default device is none of those."""
    return _function_mode_count() > 0 and any(type(mode) is not DeviceContext for mode in _function_modes())


def products_differ_from_convolutions() -> bool:
    """Whether fp32 products on the CPU may be computed otherwise as matrix products than as convolutions.

    `torch.set_float32_matmul_precision` and `torch.backends.mkldnn.matmul.fp32_precision` speak of the one,
    `torch.backends.mkldnn.conv.fp32_precision` of the other.
    """
    if _fp32_precision is None:
        tf32 = bool(getattr(torch.backends.mkldnn, "allow_tf32", False))
        return tf32 or torch.get_float32_matmul_precision() != "highest"
    return any(_fp32_precision("mkldnn", kind) not in _FULL_PRECISION for kind in ("conv", "matmul"))
