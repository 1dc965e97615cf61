"""The primitives as torch.library operators: what stands in a compiled graph.

Functional, but for `vidfast::scale_`, and without derivatives: those belong to the operators of :mod:`vidfast.ops`,
which call these, so that a graph that torch has differentiated calls no Python of autograd's. They take reduction and
weight, never k: a Python float made from a shape would be a new graph for every batch size. By hand they may be called
with anything: each checks what it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vidfast import backends, primitives
from vidfast._torch import has_tangent, left_alone, mutate_where_donated
from vidfast.arguments import Call, check_options, check_tensors, check_weight, loss_factor
from vidfast.backends import PLAIN
from vidfast.backends.base import Backend
from vidfast.positions import Counts, Weights, weights_of
from vidfast.raw import DTYPES, NO_FORWARD_MODE, describe, not_raw, vector

LIBRARY: Any = torch.library.Library("vidfast", "FRAGMENT")  # type: ignore[no-untyped-call]
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    # torch's default for custom operators, said aloud: an operator with a lowering of its own gets no default
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)

TENSORS = "Tensor mean, Tensor target, Tensor alpha"
OPTIONS = "int channel_dim, float eps, str reduction, bool full, float weight, str backend"
WEIGHTS = "Tensor? mask=None, Tensor? factor=None"


def define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """A new operator of torch.ops.vidfast, for all devices.

    Not by torch.library.custom_op, whose wrappers take the host longer than a small problem's kernel.

    Args:
        name: Of the operator.
        schema: Its arguments and results, "(Tensor x) -> Tensor".
        kernel: What it does; no result may share memory with an argument or another result.
        fake: What its results look like, for tensors without memory.
    """
    LIBRARY.define(name + schema, tags=_TAGS)
    LIBRARY.impl(name, left_alone(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"vidfast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.vidfast, name).default


def _checked(
    mean: Tensor,
    target: Tensor,
    alpha: Tensor,
    factor: Tensor | None,
    channel_dim: int,
    eps: float,
    reduction: str,
    full: bool,
    weight: float,
    backend: str,
    mask: Tensor | None = None,
) -> tuple[Backend, Tensor, Call, Counts | None]:
    """(the back end, alpha as (C,), the call, what counts in it) of what a forward operator was given."""
    channel_dim, alpha = check_tensors(mean, target, alpha, channel_dim)  # by hand nothing was checked
    check_options(eps, reduction, weight)
    weight, weights = with_weights(mask, factor, weight, mean, channel_dim)
    tensors = [mean, target, alpha, *(weights.tensors if weights else ())]
    if has_tangent(*tensors):  # a compiled graph would drop it
        raise RuntimeError(NO_FORWARD_MODE)
    masked = mask is not None
    k = loss_factor(mean.shape, reduction, weight, masked)
    chosen = backends.choose(backend, mean, target, alpha, not_raw(*tensors))
    if mean.numel() == 0:
        chosen = PLAIN
    call = Call(channel_dim, eps, reduction, full, weight, backend=backend, k=k, masked=masked)
    return chosen, alpha, call, primitives.counted(chosen, mean, target, call, weights)


def with_weights(
    mask: Tensor | None, factor: Tensor | None, weight: float, like: Tensor, channel: int | None
) -> tuple[float, Weights | None]:
    """(the weight, what else there is of weights). A factor on the CPU is read, and is a part of the weight."""
    read = factor is not None and factor.is_cpu and like.is_cpu
    if read:
        weight = with_factor(weight, factor)
    return weight, weights_of(mask, None if read else factor, like, channel)


def with_factor(weight: float, factor: Tensor | None) -> float:
    """weight times the number that `factor` is, where there is one.

    Raises:
        ValueError: The factor is on a device, which would have to be waited for, or not one floating number.
    """
    if factor is None:
        return weight
    if not factor.is_cpu or factor.numel() != 1 or not factor.is_floating_point():
        raise ValueError(f"factor must be one floating number on the CPU, got {describe(factor)}")
    # A scalar is a number that the program was given; of one dimension it is a tensor, whose value is the caller's.
    found = weight * factor.item()
    return found if factor.dim() else check_weight(found)


def forward_kernel(mean: Tensor, target: Tensor, alpha: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(loss, sum_sq): the scalar of :func:`vidfast.gaussian_nll` and S_c = sum w (mean - target)^2 [C], fp64.

    Arguments are those of :func:`vidfast.gaussian_nll`; `factor`, one number, is a factor of weight.
    """
    channel_dim, eps, reduction, full, weight, backend = rest[:6]
    mask, factor = (*rest[6:], None, None)[:2]
    chosen, alpha, call, counts = _checked(
        mean, target, alpha, factor, channel_dim, eps, reduction, full, weight, backend, mask
    )
    return primitives.forward(chosen, mean, target, alpha, call, counts=counts)


def forward_fake(mean: Tensor, target: Tensor, alpha: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """What they look like."""
    return _empty_loss(mean, target), mean.new_empty(alpha.numel(), dtype=torch.float64)


def _empty_loss(mean: Tensor, target: Tensor) -> Tensor:
    wide = torch.float64 in (mean.dtype, target.dtype)
    return mean.new_empty((), dtype=torch.float64 if wide else torch.float32)


forward = define(
    "gaussian_nll_forward",
    f"({TENSORS}, {OPTIONS}, {WEIGHTS}) -> (Tensor, Tensor)",
    forward_kernel,
    forward_fake,
)


def forward_grad_kernel(
    mean: Tensor, target: Tensor, alpha: Tensor, factor: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d/d mean in its dtype and order of dimensions, d/d alpha [C] in fp64), both for g = 1.

    Arguments are those of :func:`vidfast.gaussian_nll`; `factor`, one number, is a factor of weight.
    """
    backend, alpha, call, counts = _checked(mean, target, alpha, factor, *options)
    loss, grad_mean, grad_alpha = primitives.forward_grad(backend, mean, target, alpha, call, counts=counts)
    return loss, laid_out(grad_mean, mean), grad_alpha


def forward_grad_fake(mean: Tensor, target: Tensor, alpha: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What they look like."""
    grad_alpha = mean.new_empty(alpha.numel(), dtype=torch.float64)
    return _empty_loss(mean, target), empty_like(mean, mean.dtype), grad_alpha


forward_grad = define(
    "gaussian_nll_forward_grad",
    f"({TENSORS}, Tensor? factor, {OPTIONS}, Tensor? mask=None) -> (Tensor, Tensor, Tensor)",
    forward_grad_kernel,
    forward_grad_fake,
)


def _backward(
    g: Tensor,
    mean: Tensor | None,
    target: Tensor | None,
    alpha: Tensor,
    sum_sq: Tensor,
    shape: Sequence[int],
    channel_dim: int,
    eps: float,
    reduction: str,
    full: bool,
    weight: float,
    backend: str,
    mean_wanted: bool,
    target_wanted: bool,
    alpha_wanted: bool,
    mask: Tensor | None = None,
    factor: Tensor | None = None,
) -> list[Tensor]:
    """The gradients that are wanted, in the order mean, target, alpha, times g.

    mean and target may be None where alpha's gradient alone is wanted; `shape` is theirs.
    """
    check_options(eps, reduction, weight)
    channel_dim %= len(shape)
    channels = shape[channel_dim]
    g, alpha = vector("g", g, 1, alpha.device), vector("alpha", alpha, channels, alpha.device)
    sum_sq = vector("sum_sq", sum_sq, channels, alpha.device, torch.float64)
    tensors = (g, g, alpha)
    if mean is None or target is None:
        if mean_wanted or target_wanted:
            raise ValueError("mean and target must be given where a gradient of theirs is wanted, got None")
    else:
        check_tensors(mean, target, alpha, channel_dim)
        if list(mean.shape) != list(shape):
            raise ValueError(f"shape must be that of mean, {tuple(mean.shape)}, got {tuple(shape)}")
        tensors = (mean, target, alpha)
    # a tensor of mean's shape without mean's memory
    like = g.new_empty(()).expand(list(shape)) if mean is None else mean
    weight, weights = with_weights(mask, factor, weight, like, channel_dim)
    obstacle = not_raw(*tensors, *(weights.tensors if weights else ()))
    chosen = backends.choose(backend, *tensors, obstacle)
    if math.prod(shape) == 0:
        chosen = PLAIN
    masked = mask is not None
    k = loss_factor(shape, reduction, weight, masked)
    call = Call(channel_dim, eps, reduction, full, weight, backend=backend, k=k, masked=masked)
    if mean is None or target is None:
        counts = primitives.counted_without(chosen, g, shape, call, weights)
    else:
        counts = primitives.counted(chosen, mean, target, call, weights)
    want = (mean_wanted, target_wanted, alpha_wanted)
    grads = primitives.backward(
        chosen, g.resolve_neg(), mean, target, alpha, sum_sq, shape, call, want, counts
    )
    likes = (mean, mean, alpha)
    return [
        laid_out(x, like) for x, like in zip(grads, likes, strict=True) if x is not None and like is not None
    ]


def _backward_fake(
    g: Tensor, mean: Tensor | None, target: Tensor | None, alpha: Tensor, *rest: Any
) -> list[Tensor]:
    mean_wanted, target_wanted, alpha_wanted = rest[8:11]  # behind sum_sq, shape and the options
    grads = []
    if mean_wanted:
        assert mean is not None
        grads.append(empty_like(mean, mean.dtype))
    if target_wanted:
        assert mean is not None and target is not None  # noqa: PT018
        grads.append(empty_like(mean, target.dtype))
    if alpha_wanted:
        grads.append(empty_like(alpha, alpha.dtype))
    return grads


backward = define(
    "gaussian_nll_backward",
    "(Tensor g, Tensor? mean, Tensor? target, Tensor alpha, Tensor sum_sq, SymInt[] shape, "
    f"{OPTIONS}, bool mean_wanted, bool target_wanted, bool alpha_wanted, {WEIGHTS}) -> Tensor[]",
    _backward,
    _backward_fake,
)


def _scaled(
    grad: Tensor,
    g: Tensor,
    grad_alpha: Tensor | None,
    channel: int,
    alpha_dtype: torch.dtype,
    backend: str,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    if grad.layout is not torch.strided or grad.dtype not in DTYPES:
        raise TypeError(f"grad must be a dense floating tensor, got {grad.layout} {describe(grad)}")
    if not -grad.dim() <= channel < grad.dim():
        raise ValueError(f"channel must be a dimension of grad, {tuple(grad.shape)}, got {channel}")
    if alpha_dtype not in DTYPES:
        raise TypeError(f"alpha_dtype must be float16, bfloat16, float32 or float64, got {alpha_dtype}")
    g = vector("g", g, 1, grad.device)
    if grad_alpha is not None:
        grad_alpha = vector("grad_alpha", grad_alpha, grad_alpha.numel(), grad.device, torch.float64)
    tensors = (grad, g) if grad_alpha is None else (grad, g, grad_alpha)
    chosen = backends.choose(backend, grad, grad, tensors[-1], not_raw(*tensors))
    if grad.numel() == 0:
        chosen = PLAIN
    channel %= grad.dim()
    result, of_alpha = primitives.scale(chosen, g, grad, channel, grad_alpha, alpha_dtype, in_place)
    assert result is not None
    return result, grad.new_empty(0, dtype=alpha_dtype) if of_alpha is None else of_alpha


def _scale(
    grad: Tensor,
    g: Tensor,
    grad_alpha: Tensor | None,
    channel: int,
    alpha_dtype: torch.dtype,
    backend: str,
    origin: Tensor | None = None,
    donated: bool = False,
) -> tuple[Tensor, Tensor]:
    """(grad, grad_alpha) times the scalar g, in grad's dtype and in alpha_dtype.

    grad has any shape with channels in the dimension `channel`; grad_alpha is (C,) in fp64, None gives no elements.
    `origin` is not read: it stands in a graph's backward for what requires grad, without which torch would take the
    gradients for constants there, and a second derivative for 0 instead of refusing it. Nor is `donated`, whether a
    graph's buffers may be written over: it stands there for Inductor, whose caches would take one graph for the other.
    """
    result, of_alpha = _scaled(grad, g, grad_alpha, channel, alpha_dtype, backend, False)
    return laid_out(result, grad), of_alpha


def _scale_in_place(
    grad: Tensor,
    g: Tensor,
    grad_alpha: Tensor | None,
    channel: int,
    alpha_dtype: torch.dtype,
    backend: str,
    origin: Tensor | None = None,
    donated: bool = False,
) -> Tensor:
    """As `vidfast::scale`, but grad is scaled where it is stored, and not touched where g is exactly 1."""
    result, of_alpha = _scaled(grad, g, grad_alpha, channel, alpha_dtype, backend, True)
    if result.data_ptr() != grad.data_ptr():  # its strides are of no kernel's
        grad.copy_(result)
    torch.autograd.graph.increment_version(grad)
    return of_alpha


def _empty_alpha(grad: Tensor, grad_alpha: Tensor | None, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(0 if grad_alpha is None else grad_alpha.shape, dtype=dtype)


def _scale_fake(
    grad: Tensor,
    g: Tensor,
    grad_alpha: Tensor | None,
    channel: int,
    alpha_dtype: torch.dtype,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor]:
    mutate_where_donated(scale, scale_)
    return empty_like(grad, grad.dtype), _empty_alpha(grad, grad_alpha, alpha_dtype)


def _scale_in_place_fake(
    grad: Tensor,
    g: Tensor,
    grad_alpha: Tensor | None,
    channel: int,
    alpha_dtype: torch.dtype,
    *_: Any,
    **__: Any,
) -> Tensor:
    return _empty_alpha(grad, grad_alpha, alpha_dtype)


_SCALING = (
    "Tensor g, Tensor? grad_alpha, int channel, ScalarType alpha_dtype, str backend, Tensor? origin=None, "
    "bool donated=False"
)
scale = define("scale", f"(Tensor grad, {_SCALING}) -> (Tensor, Tensor)", _scale, _scale_fake)
scale_ = define("scale_", f"(Tensor(a!) grad, {_SCALING}) -> Tensor", _scale_in_place, _scale_in_place_fake)


def empty_like(x: Tensor, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """What a gradient of x looks like: contiguous if x is, else in x's order of dimensions."""
    # torch.empty_like alone keeps the meaningless stride of a size of 1, and its fake kernel does not.
    order = torch.contiguous_format if x.is_contiguous() else torch.preserve_format
    return torch.empty_like(x, dtype=dtype, device=device or x.device, memory_format=order)


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x, which has no gaps, with the strides that the fake kernel promised."""
    if x.numel() > 0 and 1 not in x.shape and x.stride() == like.stride():
        return x
    strides = empty_like(like, x.dtype, "meta").stride()
    if x.stride() == strides:
        return x
    if all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), strides, strict=True)):
        return x.as_strided(x.shape, strides)  # they differ where a size is 1, and a stride means nothing
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
