"""A head on the CPU, a few samples at a time: the loss and every gradient for an incoming gradient of 1.

The loss is a sum over the batch, so nothing has to wait for the whole of it: of each few samples the activations, the
loss, and all gradients are made while the hidden activations are in the cache. They are never stored for the whole
batch, which is where a step's memory and its page faults are otherwise (docs/kernel-notes.md, "Regressors").

Numbers. A layer gives values of the module's dtype, fp32 or one of 16 bits. Where the processor has fast products of
that type (:func:`vidfast._torch.cpu_multiplies`), activations are stored in it, and what torch has no fp32 result for,
a part's share of a weight's gradient, is rounded to it and added in fp32. Elsewhere products are computed in fp32, and
their results rounded where a layer would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vidfast import primitives
from vidfast.backends.base import PartsBackend
from vidfast.head.arrangement import Planes
from vidfast.head.gradients import Gradients, HeadCall, Wanted
from vidfast.head.plan import Plan, planned
from vidfast.head.stack import Stack
from vidfast.layout import rows_of
from vidfast.memory import empty_dense, empty_scratch
from vidfast.positions import Counts, Weights


class _Layers:
    """The products of a stack of layers over parts of the batch, and the memory of one part.

    Args:
        stack: That fits the student.
        student: (B, C_s, positions), dense.
        plan: How.
        backend: For what lies between the products.
        positions: The weight of each of the student's positions, or None. Where it is 0 the student is taken as 0.
    """

    def __init__(
        self,
        stack: Stack,
        student: Tensor,
        plan: Plan,
        backend: PartsBackend,
        positions: Tensor | None = None,
    ) -> None:
        self.student, self.plan, self.backend = student, plan, backend
        self.weights = [self._as_products(weight.detach().flatten(1)) for weight in stack.weights]
        self.biases = [None if bias is None else self._as_products(bias.detach()) for bias in stack.biases]
        self.channels = [student.shape[1], *(weight.shape[0] for weight in self.weights)]
        self.rounds = plan.module is not plan.products
        # The student's memory is used as it is where it can be; what is to be rounded is copied.
        first = student[: plan.samples]
        may = student.dtype is plan.products and not self.rounds and positions is None
        self.unselected = None
        if positions is not None:
            self.unselected = (positions == 0).view(student.shape[0], 1, student.shape[2])
        self.borrows = may and plan.arrangement.native(first) is not None
        self.blocks = [
            self.block(0 if self.borrows and layer == 0 else channels)
            for layer, channels in enumerate(self.channels)
        ]

    def _as_products(self, weight: Tensor) -> Tensor:
        """Rounded as the module would have it, and without gaps."""
        return weight.to(self.plan.module).to(self.plan.products).contiguous()

    def block(self, channels: int) -> Tensor:
        """Memory for so many channels of a part."""
        return empty_scratch(self.plan.samples * self.plan.positions * channels, self.plan.products)

    def matrix(self, block: Tensor, n: int, layer: int) -> Tensor:
        """The block as the matrix of what goes into a layer, of `n` samples."""
        return self.plan.arrangement.matrix(block, n, self.channels[layer], self.plan.positions)

    def part(self, matrix: Tensor, n: int) -> Tensor:
        """A matrix as (n, channels, positions)."""
        return self.plan.arrangement.part(matrix, n, self.plan.positions)

    def forward(self, begin: int, n: int) -> list[Tensor]:
        """[the student, hidden activations..., mean] of `n` samples as matrices, until the next part."""
        found = [self._student(begin, n)]
        last = len(self.weights)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True), 1):
            out = self.matrix(self.blocks[layer], n, layer)
            self.plan.arrangement.product(weight, found[-1], bias, out)
            if layer < last or self.rounds:
                self.backend.rectify(out, self.plan.module, layer < last)
            found.append(out)
        return found

    def parts(self, target: Tensor) -> Iterator[tuple[int, int, list[Tensor], Tensor]]:
        """Of each part its first sample, how many there are, its activations, and its target."""
        batch, most = self.student.shape[0], self.plan.samples
        for begin in range(0, batch, most):
            n = min(most, batch - begin)
            yield begin, n, self.forward(begin, n), target[begin : begin + n]

    def _student(self, begin: int, n: int) -> Tensor:
        """A part of the student as a matrix, rounded as the module's first layer would."""
        part = self.student[begin : begin + n]
        if self.borrows:
            native = self.plan.arrangement.native(part)
            assert native is not None, "every part of the student is stored as its first one is"
            return native
        matrix = self.matrix(self.blocks[0], part.shape[0], 0)
        own = self.part(matrix, n).copy_(part)
        if self.unselected is not None:
            own.masked_fill_(self.unselected[begin : begin + n], 0)
        if self.rounds and part.dtype is not self.plan.module:
            self.backend.rectify(matrix, self.plan.module, False)
        return matrix


class _Sums:
    """The weights' and biases' gradients over the parts, and the student's gradient."""

    def __init__(self, layers: _Layers, wanted: Wanted) -> None:
        self.layers, self.kind = layers, layers.plan.arrangement
        student, plan = layers.student, layers.plan
        self.student = (
            empty_dense(student, rows_of(student, 1).dense, student.dtype) if wanted.student else None
        )
        shapes = [self.kind.outer_shape(plan.samples, *weight.shape) for weight in layers.weights]
        narrow = plan.products is not torch.float32
        self.weights = [
            _zeros(*(weight.shape if narrow else shape)) if want else None
            for weight, shape, want in zip(layers.weights, shapes, wanted.weights, strict=True)
        ]
        self.biases = [
            _zeros(weight.shape[0]) if want else None
            for weight, want in zip(layers.weights, wanted.biases, strict=True)
        ]
        # The gradient goes down no further than one is wanted: below that layer nothing is learned.
        learned = [w or b for w, b in zip(wanted.weights, wanted.biases, strict=True)]
        self.lowest = 0 if wanted.student else (learned.index(True) + 1 if any(learned) else len(learned) + 1)
        # In products of each sample's own a transposed weight is the slower one.
        self.down = [
            weight.t().contiguous() if self.kind is Planes else weight.t() for weight in layers.weights
        ]
        widths_below = layers.channels[max(self.lowest, 0 if self._is_copied() else 1) : -1]
        # What is in there is read before anything else comes: a part's share of a weight's gradient, or a gradient.
        shares = [
            math.prod(s) if narrow and want else 0 for s, want in zip(shapes, wanted.weights, strict=True)
        ]
        self.spare = empty_scratch(
            max(*shares, plan.samples * plan.positions * max(widths_below, default=0)), plan.products
        )
        self.products = [
            self.spare[:share].view(shape) if share else None
            for share, shape in zip(shares, shapes, strict=True)
        ]

    def _is_copied(self) -> bool:
        """Whether the student's gradient is made in memory of its own before it is stored."""
        if self.student is None:
            return False
        first = self.student[: self.layers.plan.samples]
        return self.student.dtype is not self.layers.plan.products or self.kind.native(first) is None

    def add(self, activations: list[Tensor], begin: int, n: int) -> None:
        """Of `n` samples from `begin` on, with d loss / d mean in the place of the mean.

        A gradient of a hidden activation is written over it: nothing reads it afterwards.
        """
        layers, g = self.layers, activations[-1]
        for layer in reversed(range(len(self.weights))):
            below, total, of_bias = activations[layer], self.weights[layer], self.biases[layer]
            if total is not None:
                self.kind.add_outer(total, g, below, self.products[layer])
            if of_bias is not None:
                of_bias.add_(self.kind.over_channels(g))
            if self.lowest > layer:
                return
            if layer == 0:
                self._add_student(g, begin, n)
                return
            spare = layers.matrix(self.spare, n, layer)
            self.kind.product(self.down[layer], g, None, spare)
            layers.backend.rectify_backward(spare, below, below, layers.plan.module)
            g = below

    def _add_student(self, g: Tensor, begin: int, n: int) -> None:
        assert self.student is not None
        out = self.student[begin : begin + n]
        native = self.kind.native(out) if out.dtype is g.dtype else None
        if native is not None:
            self.kind.product(self.down[0], g, None, native)
        else:
            spare = self.layers.matrix(self.spare, n, 0)
            self.kind.product(self.down[0], g, None, spare)
            out.copy_(self.layers.part(spare, n))

    def of_weights(self) -> list[Tensor | None]:
        """(out, in) each."""
        return [
            None if total is None else total.sum(0) if total.dim() == 3 else total for total in self.weights
        ]


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def gradients(head: HeadCall, wanted: Wanted) -> Gradients:
    """The loss of a head and the wanted gradients, `factor` 1."""
    student, target, plan = planned(head)
    layers = _Layers(head.stack, student, plan, head.backend, head.positions)
    sums = _Sums(layers, wanted)
    alpha = head.alpha.contiguous()
    losses, of_alpha = [], torch.zeros_like(alpha, dtype=torch.float64)
    for begin, n, activations, target_part in layers.parts(target):
        mean = layers.part(activations[-1], n)
        counts = _counts(head, mean, target_part, begin, n)
        loss, _, part_of_alpha = primitives.forward_grad(
            head.backend, mean, target_part, alpha, head.call, counts=counts
        )
        losses.append(loss.item())
        of_alpha += part_of_alpha
        if layers.rounds:
            head.backend.rectify(activations[-1], plan.module, False)
        sums.add(activations, begin, n)
    of_student = sums.student
    if of_student is not None and of_student.shape != head.student.shape:  # every position was a sample
        batch, channels, positions = head.student.shape
        of_student = of_student.view(batch, positions, channels).transpose(1, 2)
    return Gradients(_scalar(math.fsum(losses)), 1.0, of_student, of_alpha, sums.of_weights(), sums.biases)


def loss_alone(head: HeadCall) -> Tensor:
    """The loss, a scalar in fp32, where no gradient is wanted."""
    student, target, plan = planned(head)
    layers = _Layers(head.stack, student, plan, head.backend, head.positions)
    alpha = head.alpha.contiguous()
    losses = []
    for begin, n, activations, target_part in layers.parts(target):
        mean = layers.part(activations[-1], n)
        counts = _counts(head, mean, target_part, begin, n)
        loss = primitives.forward(head.backend, mean, target_part, alpha, head.call, counts=counts)[0]
        losses.append(loss.item())
    return _scalar(math.fsum(losses))


def _counts(head: HeadCall, mean: Tensor, target: Tensor, begin: int, n: int) -> Counts | None:
    """What counts in `n` samples from `begin` on, with the whole head's k."""
    if head.positions is None:
        return None
    mask = head.positions.view(-1, mean.shape[2])[begin : begin + n].unsqueeze(1)
    call = head.call._replace(reduction="sum")  # k is divided already
    return primitives.counted(head.backend, mean, target, call, Weights(mask, None))


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")
