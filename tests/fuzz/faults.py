"""A back end that is broken on purpose, in one way at a time, to show that the fuzz notices it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vidfast import primitives
from vidfast.arguments import Call
from vidfast.backends import Backend
from vidfast.backends.cpu import CpuBackend
from vidfast.head import function, parts, way
from vidfast.layout import Layout

Primitive = Callable[..., Any]
# A fault replaces a primitive: it is given the right one and the arguments.
Fault = Callable[..., Any]


def _neighbour(x: Tensor | None, distance: int) -> None:
    """Writes the element `distance` behind x's last one, or before its first, where its storage has one."""
    if x is None:
        return
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    at = x.storage_offset() + (last + distance if distance > 0 else distance)
    if 0 <= at < x.untyped_storage().nbytes() // x.element_size():
        x.detach().as_strided((1,), (1,), at).fill_(1.0)


def _last_is_zero(right: Primitive, *args: Any) -> Any:
    loss, grad, alpha = right(*args)
    grad[(-1,) * grad.dim()] = 0
    return loss, grad, alpha


def _one_off(right: Primitive, *args: Any) -> Any:
    loss, grad, alpha = right(*args)
    return loss, grad.copy_(grad.flatten().roll(1).view(grad.shape)), alpha


def _beside_result(index: int, distance: int) -> Fault:
    def fault(right: Primitive, *args: Any) -> Any:
        results = right(*args)
        _neighbour(results[index], distance)
        return results

    return fault


def _beside_argument(index: int, distance: int) -> Fault:
    def fault(right: Primitive, *args: Any) -> Any:
        results = right(*args)
        _neighbour(args[index], distance)
        return results

    return fault


def _writes_target(right: Primitive, backend: Backend, mean: Tensor, target: Tensor, *rest: Any) -> Any:
    results = right(backend, mean, target, *rest)
    target.view(target.shape)[(0,) * target.dim()] += 1
    return results


def _dense(which: str) -> Fault:
    """The outer stride is taken for that of a dense tensor."""

    def fault(right: Callable[..., Layout], *args: Any) -> Layout:
        layout = right(*args)
        return layout._replace(**{which: layout.channels * layout.inner})

    return fault


def _with(index: int, value: Callable[[Any], Any]) -> Fault:
    """One argument is another one."""

    def fault(right: Primitive, *args: Any) -> Any:
        return right(*args[:index], value(args[index]), *args[index + 1 :])

    return fault


def _called(**changes: Callable[[Any], Any]) -> Fault:
    """Something that was asked for is another one."""

    def changed(call: Call) -> Call:
        return call._replace(**{name: change(getattr(call, name)) for name, change in changes.items()})

    return _with(4, changed)


def _count(mean: Tensor, alpha: Tensor) -> int:
    """M, the values of one channel."""
    return mean.numel() // alpha.numel()


def _no_logarithm(
    right: Primitive,
    backend: Backend,
    mean: Tensor,
    target: Tensor,
    alpha: Tensor,
    call: Call,
    *rest: Any,
) -> Any:
    loss, sum_sq = right(backend, mean, target, alpha, call, *rest)
    wide = alpha.double()
    variance = torch.logaddexp(wide, torch.zeros_like(wide)) + call.eps
    return loss - call.k / 2 * _count(mean, alpha) * variance.log().sum().to(loss.dtype), sum_sq


def _no_count(
    right: Primitive,
    backend: Backend,
    mean: Tensor,
    target: Tensor,
    alpha: Tensor,
    call: Call,
    *rest: Any,
) -> Any:
    loss, grad, grad_alpha = right(backend, mean, target, alpha, call, *rest)
    wide = alpha.double()
    variance = torch.logaddexp(wide, torch.zeros_like(wide)) + call.eps
    return loss, grad, grad_alpha - call.k * _count(mean, alpha) / (2 * variance) * wide.sigmoid()


def _sign_of_target(right: Primitive, *args: Any) -> Any:
    mean, target, alpha = right(*args)
    return mean, None if target is None else -target, alpha


def _finite(right: Primitive, *args: Any) -> Any:
    loss, grad, alpha = right(*args)
    return loss, grad.nan_to_num_(), alpha


def _one_buffer() -> Fault:
    """Calls of one shape share the memory of their gradient."""
    kept: dict[Any, Tensor] = {}

    def fault(right: Primitive, *args: Any) -> Any:
        loss, grad, alpha = right(*args)
        shared = kept.setdefault((grad.shape, grad.stride(), grad.dtype), grad.clone())
        return loss, shared.copy_(grad), alpha

    return fault


def _fp32_alpha(right: Primitive, *args: Any) -> Any:
    mean, target, alpha = right(*args)
    return mean, target, None if alpha is None else alpha.float()


FORWARD, GRAD, BACKWARD, SCALE = "forward", "forward_grad", "backward", "scale"
LAYOUT = "layout_of"  # what the primitives ask
FAULTS: dict[str, Callable[[], dict[str, Fault]]] = {
    "the last element of d/d mean is left out": lambda: {GRAD: _last_is_zero},
    "d/d mean is one element off": lambda: {GRAD: _one_off},
    "the element behind d/d mean is written": lambda: {GRAD: _beside_result(1, 1)},
    "the element before d/d mean is written": lambda: {GRAD: _beside_result(1, -1)},
    "an element far behind d/d mean is written": lambda: {GRAD: _beside_result(1, 63)},
    "the element behind the loss is written": lambda: {FORWARD: _beside_result(0, 1)},
    "the element behind the sums is written": lambda: {FORWARD: _beside_result(1, 1)},
    "the element behind d/d alpha is written": lambda: {BACKWARD: _beside_result(2, 1)},
    "the element behind d/d target is written": lambda: {BACKWARD: _beside_result(1, 1)},
    "the element behind mean is written": lambda: {GRAD: _beside_argument(1, 1)},
    "the element before alpha is written": lambda: {FORWARD: _beside_argument(3, -1)},
    "target is written": lambda: {GRAD: _writes_target},
    "mean's stride is taken for dense": lambda: {LAYOUT: _dense("mean_stride")},
    "target's stride is taken for dense": lambda: {LAYOUT: _dense("target_stride")},
    "the loss lacks its logarithm": lambda: {FORWARD: _no_logarithm},
    "the loss lacks its constant": lambda: {GRAD: _called(full=lambda _: False)},
    "d/d alpha lacks the count": lambda: {GRAD: _no_count},
    "k is rounded to fp32": lambda: {FORWARD: _called(k=lambda k: float(torch.tensor(k)))},
    "eps is ignored": lambda: {GRAD: _called(eps=lambda _: 1e-5)},
    "one_pass ignores g": lambda: {SCALE: _with(1, torch.ones_like)},
    "two_pass ignores g": lambda: {BACKWARD: _with(1, torch.ones_like)},
    "a retained gradient is scaled where it is": lambda: {SCALE: _with(6, lambda _: True)},
    "calls share a buffer": lambda: {GRAD: _one_buffer()},
    "inplace does not write": lambda: {GRAD: _called(inplace=lambda _: False)},
    "d/d target has the sign of d/d mean": lambda: {BACKWARD: _sign_of_target},
    "nan becomes a number": lambda: {GRAD: _finite},
    "d/d alpha is always fp32": lambda: {BACKWARD: _fp32_alpha},
}


@contextmanager
def broken(name: str, faults: dict[str, Fault]) -> Iterator[None]:
    """Within it, the back end of that name has these faults."""
    with ExitStack() as patches:
        for asked, fault in faults.items():
            patches.enter_context(mock.patch.object(primitives, asked, _broken(name, asked, fault)))
        yield


def _broken(name: str, asked: str, fault: Fault) -> Callable[..., Any]:
    right = getattr(primitives, asked)

    def run(backend: Backend, *args: Any) -> Any:
        return fault(right, backend, *args) if backend.name == name else right(backend, *args)

    return run if asked != LAYOUT else lambda *args: fault(right, *args)


def _without_last_part(right: Primitive) -> Primitive:
    def some(layers: Any, *args: Any) -> Iterator[Any]:
        found = list(right(layers, *args))
        yield from found[:-1] if len(found) > 1 else found

    return some


def _stale_activations(right: Primitive) -> Primitive:
    """All parts are computed before the first is used: each finds the last one's activations."""

    def some(layers: Any, *args: Any) -> Iterator[Any]:
        yield from list(right(layers, *args))

    return some


_PARTS = parts._Layers.parts


def _without_relu(_: Any, gradient: Tensor, activation: Tensor, out: Tensor, rounded: torch.dtype) -> None:
    del activation, rounded
    out.copy_(gradient)


_HEAD = CpuBackend.head


def _without_last_position(
    backend: CpuBackend, student: Tensor, target: Tensor, *args: Any, **given: Any
) -> None:
    gradient = given["grad_student"]
    if target.shape[2] > 1:
        student, target = student[:, :, :-1], target[:, :, :-1]
        given["grad_student"] = None if gradient is None else gradient.zero_()[:, :, :-1]
    _HEAD(backend, student, target, *args, **given)


def _adding_twice(backend: CpuBackend, *args: Any, **given: Any) -> None:
    """As where what threads have summed is added to the first sum once more."""
    _HEAD(backend, *args, **given)
    for gradient in given["grad_weights"]:
        if gradient is not None:
            gradient.mul_(2)


def _without_first_layer(backend: CpuBackend, *args: Any, **given: Any) -> None:
    given["grad_weights"] = [None, *given["grad_weights"][1:]]
    _HEAD(backend, *args, **given)


# Of heads, by the kernel and in parts: (object, name, what stands there instead).
VID_FAULTS: dict[str, tuple[Any, str, Any]] = {
    "the last part is left out": (parts._Layers, "parts", _without_last_part(_PARTS)),
    "parts find the last one's activations": (parts._Layers, "parts", _stale_activations(_PARTS)),
    "ReLU has no backward": (CpuBackend, "rectify_backward", _without_relu),
    "a kernel leaves out the last position": (CpuBackend, "head", _without_last_position),
    "a kernel adds up its gradients twice": (CpuBackend, "head", _adding_twice),
    "a kernel leaves out a layer's gradient": (CpuBackend, "head", _without_first_layer),
    "the weight and the reduction are ignored": (way, "loss_factor", lambda *_: 1.0),
    "a retained gradient is scaled where it is": (function, "graph_is_retained", lambda: False),
    "weights' gradients ignore their strides": (
        function,
        "laid_out",
        lambda matrix, shape, strides: (matrix.t() if matrix.dim() > 1 else matrix).reshape(shape),
    ),
}
