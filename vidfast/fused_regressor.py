"""A regressor of 1x1 convolutions and its loss together, a few samples at a time (CPU, fp32).

The loss is a sum over the batch, so nothing has to wait for the whole of it: of each few samples the activations, the
loss, and all gradients for an incoming gradient of 1 are made while the hidden activations are in the cache. They are
never stored for the whole batch, which is where a step's memory and its page faults are otherwise
(docs/kernel-notes.md, "Regressors"). A 1x1 convolution is a matrix product over the positions.

Gradients are those of the values that made the loss: what is changed in place before backward changes none of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vidfast import backends, primitives
from vidfast._torch import (
    graph_is_retained,
    in_forward_mode,
    in_functorch,
    products_differ_from_convolutions,
)
from vidfast.arguments import Call, loss_factor
from vidfast.autograd import incoming, not_twice
from vidfast.backends.base import Backend
from vidfast.layers import is_as_defined
from vidfast.layout import rows_of
from vidfast.memory import empty_dense, empty_fp32
from vidfast.raw import DTYPES, NO_FORWARD_MODE, not_raw, restored, save

# The widest activation of a part of the batch: it stays in the cache, and a product over it is worth starting.
_PART_BYTES, _PART_BYTES_IN_ROWS = 4 << 20, 8 << 20
# Matrix products of one sample each are the fastest over many positions and few channels: no tensor is reordered.
_FEWEST_POSITIONS, _MOST_CHANNELS = 128, 256

_relu_backward_into = torch.ops.aten.threshold_backward.grad_input


def pointwise_weights(regressor: nn.Module) -> list[Tensor] | None:
    """The weights (out, in, 1, 1) of plain 1x1 convolutions without bias and ReLUs in turn, or None for anything else.

    Plain: what the modules compute follows from their weights alone, so that it may be computed otherwise.
    """
    if type(regressor) is not nn.Sequential or len(regressor) % 2 == 0 or not is_as_defined(regressor):
        return None
    for position, part in enumerate(regressor):
        if position % 2 == 1:
            if type(part) is not nn.ReLU:
                return None
        elif (
            type(part) is not nn.Conv2d
            or (part.kernel_size, part.stride, part.groups) != ((1, 1), (1, 1), 1)
            or part.padding not in ((0, 0), "valid", "same")
            or part.bias is not None
            or part.weight.shape[2:] != (1, 1)
        ):
            return None
    return [part.weight for part in regressor if isinstance(part, nn.Conv2d)]


class _Stack:
    """The products of a stack of matrices with ReLU between, over parts of at most `samples` samples.

    Activations are (n, channels, positions). In `rows` they are stored with the channels fastest, and a product is one
    of whole matrices; otherwise with the positions fastest, and it is one for each sample.
    """

    def __init__(self, weights: Sequence[Tensor], student: Tensor) -> None:
        self.weights = [w.detach().flatten(1).contiguous() for w in weights]
        batch, _, positions = student.shape
        widest = max(max(w.shape) for w in self.weights)
        self.rows = (
            positions < _FEWEST_POSITIONS
            or widest > _MOST_CHANNELS
            or (not student.is_contiguous() and student.transpose(1, 2).is_contiguous())
        )
        most = _PART_BYTES_IN_ROWS if self.rows else _PART_BYTES
        self.samples = _evenly(batch, max(most // (4 * widest * positions), 1))
        self.positions = positions
        self.activations = [self.buffer(w.shape[0]) for w in self.weights]

    def buffer(self, channels: int) -> Tensor:
        if self.rows:
            return empty_fp32(self.samples, self.positions, channels).transpose(1, 2)
        return empty_fp32(self.samples, channels, self.positions)

    def has_such_strides(self, part: Tensor) -> bool:
        return (part.transpose(1, 2) if self.rows else part).is_contiguous()

    def as_stored(self, part: Tensor) -> Tensor:
        """A part of a tensor from outside with the strides that parts have here; copied only where it has others."""
        return part.transpose(1, 2).contiguous().transpose(1, 2) if self.rows else part.contiguous()

    def product(self, matrix: Tensor, x: Tensor, out: Tensor) -> None:
        """out = matrix x, over the channels."""
        if self.rows:
            torch.mm(_as_rows(x), matrix.t(), out=_as_rows(out))
        else:
            torch.bmm(matrix.expand(x.shape[0], *matrix.shape), x, out=out)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[x, hidden activations..., mean] of a part. They are written over by the next part."""
        found = [x]
        for index, (matrix, whole) in enumerate(zip(self.weights, self.activations, strict=True)):
            out = whole[: x.shape[0]]
            self.product(matrix, found[-1], out)
            found.append(out.relu_() if index + 1 < len(self.weights) else out)
        return found

    def parts(self, student: Tensor, target: Tensor) -> Iterator[tuple[int, list[Tensor], Tensor]]:
        """Of each part its first sample, its activations, of which the last is mean, and its target."""
        for begin in range(0, student.shape[0], self.samples):
            part = slice(begin, begin + self.samples)
            yield begin, self.forward(self.as_stored(student[part])), target[part]


def _evenly(batch: int, most: int) -> int:
    """Samples of a part, at most about `most`: of one size, and an even one, since threads share it by samples."""
    parts = math.ceil(batch / most)
    samples = math.ceil(batch / parts)
    return min(samples + samples % 2, batch) if most > 1 else 1


def _as_rows(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


class _Gradients:
    """Sums of the weights' gradients over the parts, and the student's gradient."""

    def __init__(self, stack: _Stack, student: Tensor, wanted: Sequence[bool]) -> None:
        self.stack = stack
        self.student = empty_dense(student, rows_of(student, 1).dense, student.dtype) if wanted[0] else None
        # The gradient goes down no further than one is wanted.
        self.lowest = list(wanted).index(True) if any(wanted) else len(wanted)
        self.hidden = [stack.buffer(a.shape[1]) for a in stack.activations[:-1]]
        lead = () if stack.rows else (stack.samples,)
        self.sums = [
            w.new_zeros(*lead, *w.shape) if want else None
            for w, want in zip(stack.weights, wanted[1:], strict=True)
        ]

    def add(self, activations: list[Tensor], g: Tensor, begin: int) -> None:
        """g is d loss / d mean of the part that begins at sample `begin`."""
        stack, n = self.stack, g.shape[0]
        for index in reversed(range(len(stack.weights))):
            below, total = activations[index], self.sums[index]
            if total is not None and stack.rows:
                total.addmm_(_as_rows(g).t(), _as_rows(below))
            elif total is not None:
                total[:n].baddbmm_(g, below.transpose(1, 2))
            if self.lowest > index:
                return
            down = stack.weights[index].t()
            if index > 0:
                lower = self.hidden[index - 1][:n]
                stack.product(down, g, lower)
                g = _relu_backward_into(lower, below, 0, grad_input=lower)
            elif self.student is not None:
                out = self.student[begin : begin + n]
                if stack.has_such_strides(out):
                    stack.product(down, g, out)
                else:
                    own = torch.empty_like(below)
                    stack.product(down, g, own)
                    out.copy_(own)

    def weights(self) -> list[Tensor | None]:
        return [s if s is None or self.stack.rows else s.sum(0) for s in self.sums]


class FusedVID(torch.autograd.Function):
    """(loss, origin) of (student, target, alpha, *weights), with every gradient already made for g = 1.

    student (B, C_s, P) and target (B, C, P), over P positions. See :class:`vidfast.autograd.OnePass` for origin.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        target: Tensor,
        alpha: Tensor,
        call: Call,
        backend: Backend,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(loss, origin); call.k is that of the whole batch."""
        stack = _Stack(weights, student)
        wants = ctx.needs_input_grad
        gradients = _Gradients(stack, student, (wants[0], *wants[5:]))
        alpha = alpha.contiguous()
        losses, grad_alpha = [], torch.zeros_like(alpha, dtype=torch.float64)
        for begin, activations, goal in stack.parts(student, target):
            mean = activations[-1]
            loss, grad_mean, of_alpha = primitives.forward_grad(backend, mean, goal, alpha, call)
            losses.append(loss.item())
            grad_alpha += of_alpha
            gradients.add(activations, grad_mean, begin)
        total = torch.tensor(math.fsum(losses), dtype=torch.float32, device="cpu")
        origin = total.new_empty(0)
        save(ctx, gradients.student, grad_alpha, *gradients.weights(), origin=origin)
        ctx.backend, ctx.alpha_dtype = backend, alpha.dtype
        ctx.weights = [(w.shape, w.stride()) for w in weights]
        ctx.set_materialize_grads(False)
        return total, origin

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> Any:
        """g times what was made in forward."""
        if g is None:
            return (None,) * (5 + len(ctx.weights))
        (student, grad_alpha, *weights), origin, own = restored(ctx, g.device)
        assert origin is not None
        g = incoming(g)
        student, grad_alpha = primitives.scale(
            ctx.backend,
            g,
            student,
            1,
            grad_alpha if ctx.needs_input_grad[2] else None,
            ctx.alpha_dtype,
            own and not graph_is_retained(),
        )
        # never in place: the sums stay for a second backward, and are small
        scaled = [
            None if w is None else _laid_out(w * g, *like)
            for w, like in zip(weights, ctx.weights, strict=True)
        ]
        if torch.is_grad_enabled():
            student, grad_alpha, *scaled = not_twice(origin, student, grad_alpha, *scaled)
        return student, None, grad_alpha, None, None, *scaled

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """There is no forward-mode derivative: a RuntimeError that says what to do."""
        raise RuntimeError(NO_FORWARD_MODE)


def _laid_out(matrix: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """(out, in) as the weight (out, in, 1, 1), with its strides: one in channels_last counts its ones otherwise."""
    dense = strides[:2] == matrix.stride()
    return matrix.as_strided(shape, strides) if dense else matrix.reshape(shape)


def fused_nll(
    regressor: nn.Module,
    student: Tensor,
    target: Tensor,
    alpha: Tensor,
    *,
    eps: float,
    reduction: str,
    weight: float,
    backend: str,
) -> Tensor | None:
    """`vidfast.gaussian_nll(regressor(student), target, alpha)` in one go, or None where it has to be in two.

    It can be fused where the regressor is a Sequential of plain 1x1 convolutions without bias and ReLUs in turn, all is
    fp32 on the CPU (the target may be 16 bits), no hook, compiler, autocast, transform or precision switch has a say,
    and `backend` finds the CPU kernels. The caller checks that shapes fit and that nothing watches the regressor.

    Args:
        regressor: The module.
        student: (B, C_s, *spatial).
        target: (B, C, *spatial), without gradient.
        alpha: (C,).
        eps: The smallest variance.
        reduction: "mean", "sum" or "batchmean".
        weight: A factor of the loss.
        backend: As in :func:`vidfast.gaussian_nll`.

    Returns:
        A scalar in fp32.
    """
    if backend == "reference" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return None
    if student.dtype != torch.float32 or target.dtype == torch.float64 or target.numel() == 0:
        return None
    if products_differ_from_convolutions():
        return None
    weights = pointwise_weights(regressor)
    if weights is None:
        return None
    tensors = (student, target, alpha, *weights)
    widths = [student.shape[1], *(w.shape[0] for w in weights)]
    if (
        any(not x.is_cpu for x in tensors)
        or any(w.dtype != torch.float32 for w in weights)
        or alpha.dtype not in DTYPES
        or [w.shape[1] for w in weights] != widths[:-1]
        or target.shape != (student.shape[0], widths[-1], *student.shape[2:])
        or (widths[-1],) != alpha.shape
        or target.requires_grad
        or not_raw(*tensors) is not None
        or in_functorch(*tensors)
        or in_forward_mode()
    ):
        return None
    chosen = backends.choose(backend, student, target, alpha, None)
    if not chosen.in_parts:
        return None
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (student, *weights))
    if torch.is_grad_enabled() and alpha.requires_grad and not learning:
        return None  # for alpha alone the sums of squares are enough, and gaussian_nll knows that
    k = loss_factor(target.shape, reduction, weight)  # of the whole, for each of its parts
    call = Call(1, eps, reduction, weight=weight, inplace=True, backend=backend, k=k)
    # any number of axes is positions, and a vector is one position
    student, target = (x.flatten(2) if x.dim() > 2 else x.unsqueeze(2) for x in (student, target))
    if rows_of(student, 1).copies:  # expanded, overlapping or a slice of its positions
        student = student.contiguous()
    if learning:
        loss: Tensor = FusedVID.apply(student, target, alpha, call, chosen, *weights)[0]  # type: ignore[no-untyped-call]
        return loss
    return _loss_alone(student, target, alpha, call, chosen, weights)


def _loss_alone(
    student: Tensor, target: Tensor, alpha: Tensor, call: Call, backend: Backend, weights: list[Tensor]
) -> Tensor:
    alpha = alpha.contiguous()
    losses = []
    for _, activations, goal in _Stack(weights, student).parts(student, target):
        mean = activations[-1]
        loss, _ = primitives.forward(backend, mean, goal, alpha, call)
        losses.append(loss.item())
    return torch.tensor(math.fsum(losses), dtype=torch.float32, device="cpu")
