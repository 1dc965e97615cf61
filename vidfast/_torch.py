"""Private names of torch, each with what stands in for it where the installed torch has no such name.

Nothing else in vidfast uses one. A stand-in gives the answer for plain tensors outside of every mode and transform, or
the cautious one; the comment at each says what is then not noticed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

T = TypeVar("T")


def _private(place: object, name: str, stand_in: T) -> T:
    """`place.name`, or the stand-in where there is no such name."""
    found: T = getattr(place, name, stand_in)
    return found


def _no(*_: object) -> bool:
    return False


def _none(*_: object) -> Any:
    return None


def _zero() -> int:
    return 0


_C: Any = torch._C
_functorch = _private(_C, "_functorch", None)
_autograd = _private(_C, "_autograd", None)


# ---- what torch.compile is told


def constant_while_traced(function: Callable[..., T]) -> Callable[..., T]:
    """Has torch.compile call the function as it traces and take its answer for a constant.

    As torch.compiler.assume_constant_result, which imports dynamo. It is called inside the transforms that the tracer
    has entered. A torch that does not know the mark traces into the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# As torch.compiler.disable, which imports dynamo.
_disabled: Callable[[Callable[..., Any]], Callable[..., Any]] = _private(
    torch, "_disable_dynamo", torch.compiler.disable
)
# What dynamo does with the frames that run now; None: nothing. Without: it is taken to do something.
_frame_callback: Callable[[], object] = _private(
    _private(_private(_C, "_dynamo", None), "eval_frame", None), "get_eval_frame_callback", bool
)


def left_alone(function: Callable[..., T]) -> Callable[..., T]:
    """Has dynamo leave a function alone that torch's dispatcher calls, in a frame that is not compiled too.

    As torch.compiler.disable, whose wrapper takes several microseconds for each call, where dynamo does nothing too.
    """
    disabled = _disabled(function)

    def call(*args: Any, **options: Any) -> T:
        return (function if _frame_callback() is None else disabled)(*args, **options)

    return call


def dynamo_watches() -> bool:
    """Whether torch.compile may make graphs of the frames that run now. Where torch does not say: yes."""
    return _frame_callback() is not None


def comptime() -> Callable[[Callable[[Any], None]], None] | None:
    """dynamo's comptime, which calls a function while it traces, with the frame that asks. None: there is none."""
    try:
        from torch._dynamo.comptime import comptime as found
    except ImportError:
        return None
    return found


# ---- what a tensor is

# A wrapper of functionalization: its type is Tensor, its memory is not its values. Without: taken for a plain tensor.
is_functional: Callable[[Tensor], bool] = _private(torch, "_is_functional_tensor", _no)
# A zero tensor has no memory of its own. Without: taken for a plain one; only forward-mode derivatives make them.
is_zero_tensor: Callable[[Tensor], bool] = _private(Tensor, "_is_zerotensor", _no)
# A tensor inside one of torch.func's transforms. Without: `interpreter_stack` alone speaks of them.
is_functorch_wrapped: Callable[[Tensor], bool] = _private(_functorch, "is_functorch_wrapped_tensor", _no)
# One of a batch of gradients (is_grads_batched). Without: its address raises, in torch's words.
is_batched: Callable[[Tensor], bool] = _private(_functorch, "is_legacy_batchedtensor", _no)

_is_view: Callable[[Tensor], bool] = _private(Tensor, "_is_view", _no)
_unpack_dual: Any = _private(_private(torch, "_VF", None), "_unpack_dual", None)
_without_key: Any = _private(_C, "_SetExcludeDispatchKeyGuard", None)
_BELOW_AUTOGRAD = _private(_private(_C, "DispatchKey", None), "ADInplaceOrView", None)


def base_of(x: Tensor) -> Tensor | None:
    """The tensor that x is a view of, else x. Where torch does not say: x."""
    return _private(x, "_base", x) if _is_view(x) else x


def has_hooks(x: Tensor) -> bool:
    """Whether x has a hook for its gradient. Where torch does not say: yes."""
    return bool(_private(x, "_backward_hooks", True))


def version_of(x: Tensor) -> int:
    """How often x was written over. Where torch does not count: 0, and nothing is noticed."""
    return _private(x, "_version", 0)


def fake_tensor() -> type:
    """The class of tensors without memory with which torch traces. Where there is none: a class of no tensor."""
    try:
        from torch._subclasses.fake_tensor import FakeTensor
    except ImportError:
        return type(None)
    return FakeTensor


def has_tangent(*tensors: Tensor) -> bool:
    """Whether one of them carries a forward-mode derivative. Nothing is known of functorch's wrappers.

    Level 0 is the only one that there is, and is read here whether or not Python entered it: a compiled graph does not.
    Where torch has no such names, it is read inside `forward_ad.dual_level()` alone, and not in an operator's own code.
    """
    if torch.is_inference_mode_enabled():
        return False
    if _unpack_dual is None or _without_key is None or _BELOW_AUTOGRAD is None:
        unpack: Any = forward_ad.unpack_dual
        return in_forward_mode() and any(
            unpack(x).tangent is not None for x in tensors if not x.is_inference()
        )
    # an operator's own code runs below autograd, where tangents are not to be seen
    with _without_key(_BELOW_AUTOGRAD, False):
        for x in tensors:
            if not x.is_inference() and _unpack_dual(x, level=0).tangent is not None:
                return True
    return False


# ---- what is around a call

# torch.func's transforms, the innermost last. Without: they are noticed by the tensors that they wrap.
interpreter_stack: Callable[[], Any] = _private(_functorch, "peek_interpreter_stack", _none)
# Whether torch.jit.trace records. Without: it records a loss that is a constant.
is_jit_tracing: Callable[[], bool] = _private(_C, "_is_tracing", _no)
# How many modes see operators, and how many see functions. Without: not noticed.
dispatch_modes: Callable[[], int] = _private(_C, "_len_torch_dispatch_stack", _zero)
_function_mode_count: Callable[[], int] = _private(_C, "_len_torch_function_stack", _zero)
_function_modes: Callable[[], list[Any]] = _private(torch.overrides, "_get_current_function_mode_stack", list)
# torch 2.7 and later. Without: a gradient is scaled in place under hooks too, where nothing else refers to it.
_top_hooks: Callable[[bool], object] = _private(_autograd, "_top_saved_tensors_default_hooks", _none)
# Whether the graph of the backward pass that runs is kept. Without: it is taken to be, and nothing is scaled in place.
_keep_graph: Callable[[], object] | None = getattr(_autograd, "_get_current_graph_task_keep_graph", None)
# torch 2.9 and later: the precision of fp32 products, for each library and kind of operation.
_fp32_precision: Callable[[str, str], str] | None = getattr(_C, "_get_fp32_precision_getter", None)
_FULL_PRECISION = ("none", "ieee")


# torch.compile's own check of what a graph was made for, one call for several tensors.
_guards: Any = _private(_private(_private(_C, "_dynamo", None), "guards", None), "TensorGuards", None)


def alike(*tensors: Tensor) -> Callable[..., bool] | None:
    """A function of as many objects: whether they are like these tensors, wherever their memory is.

    Like in type, dtype, device, shape, strides, requires_grad, and in how torch's dispatcher sees them now: as plain
    ones, negated, functional, without memory, in a transform, under a dispatch mode or autocast. Of jit tracing and
    forward-mode derivatives it says nothing.

    Args:
        tensors: Strided ones, of any dtype and device.

    Returns:
        The function; None where torch has no such check.
    """
    if _guards is None:
        return None
    sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
    try:
        guard = _guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        check: Callable[..., bool] = guard.check
        return check if check(*tensors) is True else None
    except (TypeError, SystemError, RuntimeError):  # its arguments are others
        return None


@lru_cache(maxsize=8)
def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """What `function.apply` ends in, for tensors that no transform of torch.func holds, outside of transforms.

    Before it, torch looks for default arguments and unwraps what transforms left behind.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


def in_forward_mode() -> bool:
    """Whether a level of forward-mode derivatives is entered. Where torch does not say: no."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def in_functorch(*tensors: Tensor) -> bool:
    """Whether one of them is inside a torch.func transform."""
    return interpreter_stack() is not None and any(is_functorch_wrapped(x) for x in tensors)


@constant_while_traced
def in_transform() -> bool:
    """Whether a transform of torch.func is around this code, or a level of forward-mode derivatives."""
    return in_forward_mode() or interpreter_stack() is not None


def function_mode() -> bool:
    """Whether a TorchFunctionMode may change what torch's functions do. A default device is none of those."""
    return _function_mode_count() > 0 and any(not _is_default_device(mode) for mode in _function_modes())


def _is_default_device(mode: object) -> bool:
    """Where torch has no such class, a default device counts as a mode."""
    try:
        from torch.utils._device import DeviceContext
    except ImportError:
        return False
    return type(mode) is DeviceContext


def saved_tensors_are_hooked() -> bool:
    """Whether `torch.autograd.graph.saved_tensors_hooks` are around this code; False where torch cannot tell."""
    return _top_hooks(True) is not None


def graph_is_retained() -> bool:
    """Whether the backward pass that is running may be run again; True where torch cannot tell."""
    return _keep_graph is None or bool(_keep_graph())


_executes: Callable[[object], object] | None = getattr(_C, "_will_engine_execute_node", None)


@lru_cache(maxsize=1)
def marker() -> Tensor:
    """A leaf without elements, for :func:`reaches_all_leaves`: an input of functions that give it no gradient."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.float32, device="cpu", requires_grad=True)


def reaches_all_leaves(marker_node: object) -> bool:
    """Whether the backward pass that is running was asked for all leaves, not for some tensors; False if unknown.

    Args:
        marker_node: Where the gradient of :func:`marker` goes. It is among no tensors that a caller asks for.
    """
    return _executes is not None and bool(_executes(marker_node))


@constant_while_traced
def products_differ_from_convolutions() -> bool:
    """Whether fp32 products on the CPU may be computed otherwise as matrix products than as convolutions.

    `torch.set_float32_matmul_precision` and `torch.backends.mkldnn.matmul.fp32_precision` speak of the one,
    `torch.backends.mkldnn.conv.fp32_precision` of the other. Before torch 2.9 there is one setting for both.
    """
    if _fp32_precision is None:
        tf32 = bool(getattr(torch.backends.mkldnn, "allow_tf32", False))
        return tf32 or torch.get_float32_matmul_precision() != "highest"
    return any(_fp32_precision("mkldnn", kind) not in _FULL_PRECISION for kind in ("conv", "matmul"))


# Whether torch's library for products on the CPU has those dtypes at all. Without: it does not.
_mkldnn: Any = _private(torch.ops, "mkldnn", None)
_HAS_PRODUCTS = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}
# The instructions that make 16-bit products fast, as `torch.cpu.get_capabilities` calls them, and before there was one
# what said so. Without any: they are not there.
_capabilities: Callable[[], dict[str, Any]] | None = getattr(torch.cpu, "get_capabilities", None)
_FAST_PRODUCTS = {
    torch.bfloat16: {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"},
    # AVX-512's are not among them: oneDNN widens what it adds up, and computes no faster than in fp32.
    torch.float16: {"amx_fp16": "_is_amx_fp16_supported"},
}


# The instructions that multiply tiles, several times as fast as vectors; of fp16 these are the only fast ones.
_TILES = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}


@lru_cache(maxsize=4)
def cpu_has_tiles(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of that 16-bit type by the processor's tiles. Where it does not say: no."""
    return cpu_multiplies(dtype) and _says(dtype, _TILES[dtype])


def _says(dtype: torch.dtype, name: str) -> bool:
    """Whether torch says that the processor has instructions of `_FAST_PRODUCTS`."""
    if _capabilities is not None:
        return bool(_capabilities().get(name, False))
    return bool(_private(torch.cpu, _FAST_PRODUCTS[dtype][name], _no)())


@lru_cache(maxsize=4)
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of that 16-bit type faster than those of fp32, and torch has it do so.

    Where torch does not say: no. oneDNN emulates what a processor lacks, 20 to 50 times as slowly as it computes fp32.
    """
    supported = _private(_mkldnn, _HAS_PRODUCTS[dtype], _no)
    fast = any(_says(dtype, name) for name in _FAST_PRODUCTS[dtype])
    try:
        return fast and bool(torch.backends.mkldnn.is_available() and supported())  # type: ignore[no-untyped-call]
    except (RuntimeError, AttributeError):  # an operator that this build does not have
        return False


# torch's own name for it, which its compilers use too; absent in builds without CUDA.
_raw_stream: Callable[[int], int] | None = getattr(_C, "_cuda_getCurrentRawStream", None)


def current_stream(index: int) -> int:
    """The address of the current stream of the CUDA device `index`. Where torch has no such name: by a longer way."""
    if _raw_stream is not None:
        return _raw_stream(index)
    return int(torch.cuda.current_stream(index).cuda_stream)


# ---- what Inductor makes of an operator

_mutated_by_inductor = set[object]()


@constant_while_traced
def donates_buffers() -> bool:
    """Whether backward graphs may write over what was saved for them alone. Where torch does not say: no."""
    try:
        from torch._functorch import config
    except ImportError:
        return False
    return bool(_private(config, "donated_buffer", False))


def mutate_where_donated(functional: Any, mutating: Any) -> None:
    """Has Inductor call `mutating` for `functional` where the first argument is memory that a backward graph may reuse.

    Such a donated buffer was saved for backward and is nothing else, torch refuses to run the graph that reads it
    again, and here nothing else in the graph reads it. Were the operator in the graph a mutating one, torch's tracer
    would make it functional, and Inductor copy the buffer over itself. To be called while `functional` is traced:
    before Inductor is imported it does nothing, and where torch's names are others, `functional` runs as it stands.

    Args:
        functional: (Tensor first, ..., bool donated) -> (Tensor like first, others); where `donated` is False, it runs
            as it stands.
        mutating: (Tensor(a!) first, ...) -> others, with the same arguments.
    """
    if functional in _mutated_by_inductor or "torch._inductor.lowering" not in sys.modules:
        return
    _mutated_by_inductor.add(functional)
    try:
        from torch._inductor.ir import DonatedBuffer
        from torch._inductor.virtualized import V

        lowering: Any = sys.modules["torch._inductor.lowering"]
        fallback_handler, register_lowering = lowering.fallback_handler, lowering.register_lowering
    except (ImportError, AttributeError):
        return
    as_it_stands = fallback_handler(functional, add_to_fallback_set=False)
    in_place = fallback_handler(mutating, add_to_fallback_set=False)

    def lower(first: Any, *rest: Any, **options: Any) -> Any:
        node: Any = V.graph.current_node.args[0]
        buffer = getattr(getattr(first, "data", None), "data", None)
        if rest[-1] is True and isinstance(buffer, DonatedBuffer) and len(node.users) == 1:
            others = in_place(first, *rest, **options)
            return first, others
        return as_it_stands(first, *rest, **options)

    register_lowering(functional, type_promotion_kind=None)(lower)


# ---- modules

_modules: Any = torch.nn.modules.module
# torch 2.7 and later. Without: the registries themselves are looked at.
_has_any_global_hook: Callable[[], object] | None = getattr(_modules, "_has_any_global_hook", None)
_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)
_HAS_HOOK_LISTS = all(
    hasattr(nn.Identity(), name)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
)
# What a call of a layer goes through. A torch without one of them goes through the others.
CALLED_METHODS = ("__call__", "_wrapped_call_impl", "_call_impl", "_slow_forward", "forward", "_conv_forward")
# The classes of all convolutions and batch normalisations. Without: those that have a public name.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CONVOLUTION: Any = _private(nn.modules.conv, "_ConvNd", CONVOLUTIONS)
BATCH_NORM: Any = _private(nn.modules.batchnorm, "_BatchNorm", BATCH_NORMS)


def any_global_hook() -> bool:
    """Whether a hook for all modules is registered: `torch.nn.modules.module.register_module_*_hook`.

    Where torch has neither the function nor the registries: False.
    """
    if _has_any_global_hook is not None:
        return bool(_has_any_global_hook())
    return any(getattr(_modules, name, None) for name in _GLOBAL_HOOKS)


def has_forward_hook(module: nn.Module) -> bool:
    """Whether a forward hook is registered on the module itself. Where torch keeps no such list: False."""
    return bool(_private(module, "_forward_hooks", None))


def last_forward_hook(module: nn.Module) -> object:
    """The forward hook that runs last on the module itself. None: there is none, or torch keeps no such list."""
    return _last(_private(module, "_forward_hooks", None))


def last_forward_pre_hook(module: nn.Module) -> object:
    """As :func:`last_forward_hook`, of the hooks that run before the module."""
    return _last(_private(module, "_forward_pre_hooks", None))


def _last(hooks: Any) -> object:
    return next(reversed(hooks.values())) if hooks else None


def keep_attributes(module: nn.Module) -> Callable[[], None]:
    """A function that gives a module the attributes, parameters, buffers and submodules back that it has now.

    The objects, not what is in them: a tensor or a list that was changed stays so.
    """
    before = dict(vars(module))
    registered = ("_parameters", "_buffers", "_modules")
    entries = {name: dict(before[name]) for name in registered if isinstance(before.get(name), dict)}

    def restore() -> None:
        now = vars(module)
        for name in now.keys() - before.keys():
            del now[name]
        now.update(before)
        for name, objects in entries.items():
            now[name].clear()
            now[name].update(objects)

    return restore


def has_hook(module: nn.Module) -> bool:
    """Whether any hook is registered on the module itself. A torch without these lists: True."""
    return not _HAS_HOOK_LISTS or bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def compiled_call(module: nn.Module) -> Any:
    """What `module.compile()` has put in place of its call; None: nothing, or a torch without it."""
    return _private(module, "_compiled_call_impl", None)


def set_compiled_call(module: nn.Module, call: Any) -> None:
    """Puts back what :func:`compiled_call` gave. A torch without it calls the module as it is."""
    if call is None:  # as before there was any: TorchScript does not read None in its place
        module.__dict__.pop("_compiled_call_impl", None)
    else:
        module._compiled_call_impl = call


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of the module is one of torch.compile's: by `module.compile()` or `torch.compile(module)`."""
    return compiled_call(module) is not None or "_orig_mod" in _private(module, "_modules", ())


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile(module)` wraps, else the module. A torch that wraps otherwise: the wrapper."""
    return _private(module, "_orig_mod", module)


def registered_parameter(module: nn.Module, name: str, default: object = None) -> object:
    """The parameter of that name, not by getattr, which takes long to find that there is none."""
    try:
        return module._parameters.get(name, default)
    except AttributeError:
        return getattr(module, name, default)
