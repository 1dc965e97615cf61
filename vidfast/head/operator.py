"""A head as operators: what torch.compile and torch.export see of it, on the CPU.

`vidfast::vid_head_v2` has the derivative, as the operators of :mod:`vidfast.ops`; in a graph that torch has
differentiated stand the two without, `vidfast::vid_head_forward` and `vidfast::vid_head_forward_grad`, and
`vidfast::scale`. All take features as (B, C, positions), and reduction and weight, never k. An operator's name ends in
a version, which is raised whenever anything in its backward changes (:mod:`vidfast.ops` says why).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidfast import backends
from vidfast._torch import has_tangent
from vidfast.arguments import Call, check_options, loss_factor
from vidfast.backends.base import PartsBackend
from vidfast.backends.plain import reference_nll
from vidfast.head import compute
from vidfast.head.gradients import HeadCall, Wanted
from vidfast.head.stack import Stack
from vidfast.ops import check_constants, differentiable
from vidfast.positions import Weights, as_weights
from vidfast.primitive_ops import define, empty_like, laid_out, with_weights
from vidfast.raw import DTYPES, NO_FORWARD_MODE, not_raw
from vidfast.scaling import OF_OPERATORS, not_twice, scaled
from vidfast.tracing import weight_in_graph

_TENSORS = (
    "(Tensor student, Tensor target, Tensor alpha, Tensor[] weights, Tensor?[] biases, Tensor? factor, "
)
_OPTIONS = "bool convolutions, float eps, str reduction, float weight, ScalarType module, str backend"
# How many these are.
_OPTION_COUNT = 6


def _checked(
    student: Tensor,
    target: Tensor,
    alpha: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    factor: Tensor | None,
    convolutions: bool,
    eps: float,
    reduction: str,
    weight: float,
    module: torch.dtype,
    backend: str,
    mask: Tensor | None = None,
) -> tuple[HeadCall, Weights | None]:
    """(the head, whose call has no k yet, its weights) of what an operator was given."""
    check_options(eps, reduction, weight)
    if module not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"module must be float32, bfloat16 or float16, got {module}")
    stack = Stack(tuple(weights), tuple(biases), convolutions)
    tensors = (student, target, alpha, *stack.tensors)
    if student.dim() != 3 or target.dim() != 3 or not stack.fits(student.shape[1], target.shape[1]):
        raise ValueError(
            "student and target must be (B, C, positions) and the layers lead from one to the other, got "
            f"{tuple(student.shape)}, {tuple(target.shape)} and {[tuple(w.shape) for w in weights]}"
        )
    if student.shape[::2] != target.shape[::2] or alpha.shape != target.shape[1:2]:
        raise ValueError(
            "student, target and alpha must be (B, C_s, P), (B, C, P) and (C,), got "
            f"{tuple(student.shape)}, {tuple(target.shape)} and {tuple(alpha.shape)}"
        )
    if any(x.dtype not in DTYPES or x.dtype is torch.float64 for x in (student, target, *stack.tensors)):
        raise TypeError(
            "student, target and the layers must be float32, bfloat16 or float16, got "
            f"{[x.dtype for x in (student, target, *stack.tensors)]}"
        )
    weight, given = with_weights(mask, factor, weight, target, 1)
    tensors = (*tensors, *(given.tensors if given else ()))
    if has_tangent(*tensors):  # a compiled graph would drop it
        raise RuntimeError(NO_FORWARD_MODE)
    chosen = backends.choose(backend, student, target, alpha, not_raw(*tensors))
    if not chosen.in_parts:
        raise RuntimeError(f"backend={backend!r} cannot run here: {chosen.name} computes no head in one pass")
    masked = mask is not None
    k = loss_factor(target.shape, reduction, weight, masked)
    call = Call(1, eps, reduction, weight=weight, inplace=True, backend=backend, k=k, masked=masked)
    return HeadCall(stack, student, target, alpha, call, chosen, module), given  # type: ignore[arg-type]


def counted(
    backend: PartsBackend, target: Tensor, call: Call, mask: Tensor | None, factor: Tensor | None
) -> tuple[Call, Tensor | None, float]:
    """(the call with all of its k, positions, values) as :class:`vidfast.head.gradients.HeadCall` has them.

    Args:
        backend: That computes heads, on the CPU, where a number costs no wait.
        target: (B, C, positions), with elements.
        call: With the part of k that shapes and numbers decide.
        mask: (B or 1, 1, positions or 1), or None.
        factor: One number that k is multiplied with, or None.
    """
    batch, channels, count = target.shape
    if mask is None and factor is None:
        return call, None, float(batch * count)
    positions = None
    if mask is not None:
        positions = as_weights(mask.expand(batch, 1, count).squeeze(1), wide=False).contiguous()
    totals = torch.empty(2, dtype=torch.float64, device="cpu")
    backend.total(positions, factor, batch * count, call.k, channels if call.divides else 0, totals=totals)
    values, k = totals.tolist()
    return call._replace(k=k), positions, values


def _with_counts(head: HeadCall, given: Weights | None) -> HeadCall:
    call, positions, values = counted(head.backend, head.target, head.call, *(given or (None, None)))
    return head._replace(call=call, positions=positions, values=values)


def _of_nothing(head: HeadCall, given: Weights | None) -> Tensor:
    """The loss where there is no element to score."""
    mean = head.target.new_zeros(head.target.shape, dtype=torch.float32)
    return reference_nll(mean, head.target.float(), head.alpha, head.call, given).float()


def _forward(student: Tensor, target: Tensor, alpha: Tensor, *rest: Any) -> Tensor:
    """The loss, a scalar in fp32, without gradients; the arguments are those of `_checked`."""
    head, given = _checked(student, target, alpha, *rest)
    if student.numel() == 0 or target.numel() == 0:
        return _of_nothing(head, given)
    return compute.loss_alone(_with_counts(head, given))


def _forward_fake(student: Tensor, *_: Any) -> Tensor:
    return student.new_empty((), dtype=torch.float32)


forward = define(
    "vid_head_forward", f"{_TENSORS}{_OPTIONS}, Tensor? mask=None) -> Tensor", _forward, _forward_fake
)


def _wanted_numbers(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], wanted: Sequence[bool]
) -> int:
    """How many numbers the gradients of the layers are that are wanted."""
    layers = zip((*weights, *biases), wanted[1:], strict=True)
    return sum(x.numel() for x, want in layers if want and x is not None)


def _forward_grad(
    student: Tensor, target: Tensor, alpha: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, rest, d student, d alpha, d layers), for g = 1; as `_checked`, but for `wanted` before the mask.

    `wanted` says whether the gradients of the student, of each weight and of each bias are. d student is of the
    student's dtype and order of dimensions, and has to be multiplied with `rest` yet, a scalar in fp64. d alpha is (C,)
    in fp64; d layers is one vector in fp32 of all that are wanted, weights first. What is not wanted has no elements.
    """
    weights, biases, factor, *rest = others
    options: tuple[Any, Any, Any, Any, Any, Any] = tuple(rest[:_OPTION_COUNT])
    wanted, mask = (*rest[_OPTION_COUNT:], None)[:2]
    head, given = _checked(student, target, alpha, weights, biases, factor, *options, mask)
    stack = head.stack
    n = len(stack.weights)
    of = Wanted(wanted[0], wanted[1 : 1 + n], wanted[1 + n :])
    if student.numel() == 0 or target.numel() == 0:
        zeros = laid_out(torch.zeros_like(student), student) if of.student else student.new_empty(0)
        of_layers = student.new_zeros(
            _wanted_numbers(stack.weights, stack.biases, wanted), dtype=torch.float32
        )
        nothing = alpha.new_zeros(alpha.shape, dtype=torch.float64)
        one = torch.ones((), dtype=torch.float64, device="cpu")
        return _of_nothing(head, given), one, zeros, nothing, of_layers
    found = compute.gradients(_with_counts(head, given), of)
    of_student = found.student
    made = [x.flatten() for x in (*found.weights, *found.biases) if x is not None]
    return (
        found.loss,
        torch.tensor(found.factor, dtype=torch.float64, device="cpu"),
        student.new_empty(0) if of_student is None else laid_out(of_student, student),
        found.alpha,
        torch.cat(made) if made else student.new_empty(0, dtype=torch.float32),
    )


def _forward_grad_fake(
    student: Tensor,
    target: Tensor,
    alpha: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    factor: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wanted = rest[_OPTION_COUNT]
    return (
        student.new_empty((), dtype=torch.float32),
        student.new_empty((), dtype=torch.float64),
        empty_like(student, student.dtype) if wanted[0] else student.new_empty(0),
        alpha.new_empty(alpha.shape, dtype=torch.float64),
        student.new_empty(_wanted_numbers(weights, biases, wanted), dtype=torch.float32),
    )


forward_grad = define(
    "vid_head_forward_grad",
    f"{_TENSORS}{_OPTIONS}, bool[] wanted, Tensor? mask=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_grad,
    _forward_grad_fake,
)


class _Head(torch.autograd.Function):
    """The loss of (student, target, alpha, mask, factor, options, *weights, *biases); backward multiplies by g."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        target: Tensor,
        alpha: Tensor,
        mask: Tensor | None,
        factor: Tensor | None,
        options: tuple[Any, ...],
        *layers: Tensor | None,
    ) -> Tensor:
        """Of `vidfast::vid_head_forward_grad`; layers: the weights, then as many biases or None."""
        check_constants(target, mask, factor)
        n, needs = len(layers) // 2, ctx.needs_input_grad
        wanted = [needs[0], *needs[6:]]
        loss, rest, of_student, of_alpha, of_layers = forward_grad(
            student, target, alpha, layers[:n], layers[n:], factor, *options, wanted, mask
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            of_student, of_alpha, of_layers, rest, loss, alpha if alpha.requires_grad else None
        )
        ctx.layers = [
            (x.shape, x.dtype) if x is not None and need else None
            for x, need in zip(layers, needs[6:], strict=True)
        ]
        *_, module, ctx.backend = options
        ctx.alpha_dtype, ctx.has_rest = alpha.dtype, compute.stores_fp16(module, student.dtype)
        result: Tensor = loss
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        """g times what was made in forward."""
        if g is None:
            return (None,) * (6 + len(ctx.layers))
        of_student, of_alpha, of_layers, rest, loss, alpha = ctx.saved_tensors
        student = of_student if ctx.needs_input_grad[0] else None
        grad_alpha = of_alpha if ctx.needs_input_grad[2] else None

        def times(
            g: Tensor, grad: Tensor | None, grad_alpha: Tensor | None
        ) -> tuple[Tensor | None, Tensor | None]:
            return scaled(g, grad, 1, grad_alpha, ctx.alpha_dtype, ctx.backend, loss, alpha)

        if ctx.has_rest:  # else nothing is left of k
            student = times(g.double() * rest, student, None)[0]
            grad_alpha = times(g, None, grad_alpha)[1]
        else:
            student, grad_alpha = times(g, student, grad_alpha)
        found: list[Tensor | None] = []
        begin, times_g = 0, of_layers * g
        for layer in ctx.layers:
            if layer is None:
                found.append(None)
                continue
            shape, dtype = layer
            size = shape.numel()
            found.append(times_g[begin : begin + size].view(shape).to(dtype))
            begin += size
        if torch.is_grad_enabled():
            found = not_twice(loss, *found, advice=OF_OPERATORS)
        return (student, None, grad_alpha, None, None, None, *found)


def _apply(
    student: Tensor,
    target: Tensor,
    alpha: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    factor: Tensor | None,
    *rest: Any,
) -> Tensor:
    """autograd looks for tensors among a Function's arguments, not in lists."""
    options, mask = rest[:_OPTION_COUNT], (*rest[_OPTION_COUNT:], None)[0]
    loss: Tensor = _Head.apply(student, target, alpha, mask, factor, options, *weights, *biases)  # type: ignore[no-untyped-call]
    return loss


head = differentiable(
    "vid_head_v2",
    f"{_TENSORS}{_OPTIONS}, Tensor? mask=None) -> Tensor",
    _forward,
    _forward_fake,
    _apply,
    forward,
)


def call_operator(
    stack: Stack,
    student: Tensor,
    target: Tensor,
    alpha: Tensor,
    call: Call,
    module: torch.dtype,
    mask: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """The loss by the operator, for :func:`vidfast.head.way.head_nll` while it is traced.

    Args:
        stack: The layers.
        student: (B, C_s, positions).
        target: (B, C, positions).
        alpha: (C,).
        call: Everything else but tensors.
        module: What the layers give.
        mask: (B, 1, positions), or None.
        given: A weight that is a tensor, or None.
    """
    weight, factor, outside = weight_in_graph(call.weight, True)
    loss: Tensor = head(
        student, target, alpha, list(stack.weights), list(stack.biases), factor if given is None else given,
        stack.convolutions, call.eps, call.reduction, weight, module, call.backend, mask,
    )  # fmt: skip
    return loss if outside is None else outside * loss
