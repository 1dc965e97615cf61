"""The protocol of a back end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from vidfast.arguments import Call
from vidfast.heteroscedastic.arguments import HeteroscedasticCall
from vidfast.heteroscedastic.layout import Rows
from vidfast.layout import Layout, RowLayout
from vidfast.positions import Counts


class Backend(Protocol):
    """What a back end offers: it says whether it can run, and fills outputs that it is given.

    With v_c = softplus(alpha_c) + eps, r = mean - target, S_c = sum r^2 over the M = outer * inner values of channel c
    and N = M C elements in all:

        loss = k * sum_c [M/2 log v_c + S_c / (2 v_c)], and k N/2 log(2 pi) if `full`
        d loss / d mean = k r / v_c
        d loss / d alpha_c = k [M / (2 v_c) - S_c / (2 v_c^2)] sigmoid(alpha_c)

    With `counts` there is a weight w_p for each of the outer * inner positions, the same for all channels: S_c is then
    sum w_p r^2, M sum w_p, N M C, and d loss / d mean is k w_p r / v_c. Where w_p is 0, mean and target are not used,
    whatever is there, and gradients are 0; where it is 0 for a whole tile, nothing of it is computed. M and k are then
    the two numbers of `counts.totals`, which is read where it is stored, and not those of the layout and the call; so
    they are where a weight alone is on the device, and `counts.positions` is None.

    mean, target and their gradients are walked as `layout` says: element (o, c, i) of mean is stored at
    `o * mean_stride + c * inner + i`, of target at `o * target_stride + ...`, and of outputs without gaps at
    `o * C * inner + ...`. Vectors over the channels are contiguous. Each dtype is fp16, bf16, fp32 or fp64; loss is
    fp64 if mean or target is, else fp32, and g any of the four. Tensors may require grad. Nothing overlaps but what is
    named below: grad_mean may be mean, and result source.

    Of a call it reads `k`, `eps`, `full`, `inplace` and `channel`: `k` holds the weight and the reduction, and may be
    that of a whole of which the tensors are a part. (The plain back end, which is never given a part, reads those two
    instead.) Sums are added in a fixed order, so that results are bitwise repeatable; r is formed in the widest of
    mean's type, target's and fp32, and what belongs to a channel in fp64. No value of a tensor is asked for in Python
    (`item`, `float`, `numpy`, `==`). Workspaces come from :func:`vidfast.memory.workspace`, and everything is launched
    on the current stream of the tensors' device. Offsets of elements have 64 bits.

    Attributes:
        name: By which a user asks for it.
        walks: Whether it reads and writes by addresses, so that tensors have to be stored as `layout` says. One that
            does not gets them as they came, except in place; of a layout it may read channels and outer * inner.
        in_parts: Whether a small call costs so little that a regressor and its loss are best computed a few samples
            at a time. Such a one is a :class:`PartsBackend`.
    """

    name: str
    walks: bool
    in_parts: bool

    def unavailable(self) -> str | None:
        """None if this back end can run on this machine at all, or the reason why not."""

    def supports(self, mean: Tensor, target: Tensor, alpha: Tensor) -> str | None:
        """None if it takes these tensors, or the reason why not, which may be that it is unavailable.

        Asked at every call. Where alpha's gradient alone is wanted in a compiled graph, the scalar g stands for mean
        and target; where a regressor is computed with its loss, its input for mean.
        """

    def info(self) -> dict[str, object]:
        """Facts for :func:`vidfast.info`: versions, devices, architectures."""

    def total(
        self,
        positions: Tensor | None,
        factor: Tensor | None,
        count: int,
        k: float,
        channels: int,
        *,
        totals: Tensor,
    ) -> None:
        """Fills totals, (2,) in fp64, with M and k: what is known on the device alone.

        M is the positions' sum, added in fp64 in a fixed order, or `count` where there are none; k is `k` times the
        one number `factor`, where there is one, and divided by M `channels` if that is not 0. With positions k is 0
        where M is, whatever the factor.

        Args:
            positions: (count,) without gaps, or shaped otherwise: uint8, fp32 or fp64; None: 1 each.
            factor: One number, fp16, bf16, fp32 or fp64; None: 1.
            count: Of positions.
            k: As above.
            channels: As above.
            totals: What is filled, on the device of the others.
        """

    def forward(
        self,
        mean: Tensor,
        target: Tensor,
        alpha: Tensor,
        layout: Layout,
        call: Call,
        *,
        loss: Tensor,
        sum_sq: Tensor,
        counts: Counts | None = None,
    ) -> None:
        """Fills the loss and sum_sq, (C,) in fp64: 2 N of traffic."""

    def forward_grad(
        self,
        mean: Tensor,
        target: Tensor,
        alpha: Tensor,
        layout: Layout,
        call: Call,
        *,
        loss: Tensor,
        grad_mean: Tensor,
        grad_alpha: Tensor,
        counts: Counts | None = None,
    ) -> None:
        """Fills the loss, grad_mean and grad_alpha, (C,) in fp64, for an incoming gradient of 1: 3 N.

        With `call.inplace` grad_mean is mean's own memory, with its strides.
        """

    def backward(
        self,
        g: Tensor,
        mean: Tensor | None,
        target: Tensor | None,
        alpha: Tensor,
        sum_sq: Tensor,
        layout: Layout,
        call: Call,
        *,
        grad_mean: Tensor | None,
        grad_target: Tensor | None,
        grad_alpha: Tensor | None,
        counts: Counts | None = None,
    ) -> None:
        """Fills the gradients that are there, times the scalar g: 3 N (4 for both activations').

        g is read where it is stored. For grad_alpha, (C,) in alpha's dtype, sum_sq is
        all it takes: alone, mean and target are None.
        """

    def scale(
        self,
        g: Tensor,
        rows: RowLayout | None,
        source: Tensor | None,
        grad_alpha: Tensor | None,
        *,
        result: Tensor | None,
        scaled_alpha: Tensor | None,
    ) -> None:
        """Fills result = g source and scaled_alpha = g grad_alpha, of which either may be absent.

        `rows` describes source, which a back end that does not walk gets as it came; result is source itself, and
        untouched where g is 1 (0 or 2 N), or has no gaps.
        grad_alpha is (C,) in fp64, scaled_alpha in alpha's dtype.
        """

    # One variance an element: csrc/heteroscedastic.h says what is computed. `rows` describes the three tensors and the
    # gradients, as `layout` does above; `counts` is as above, but its positions' weights are of `rows.channels` and
    # `rows.inner`, and only its k is read. Of a call it reads `transform`, `eps`, `beta`, `k`, `full` and
    # `negative_is_nan`. r, the variance and what follows are formed in fp64 if one of the three tensors is, else fp32.

    def heteroscedastic_forward(
        self,
        mean: Tensor,
        target: Tensor,
        raw: Tensor,
        rows: Rows,
        call: HeteroscedasticCall,
        *,
        loss: Tensor,
        counts: Counts | None = None,
    ) -> None:
        """Fills the loss: 3 N of traffic."""

    def heteroscedastic_forward_grad(
        self,
        mean: Tensor,
        target: Tensor,
        raw: Tensor,
        rows: Rows,
        call: HeteroscedasticCall,
        *,
        loss: Tensor,
        grad_mean: Tensor | None,
        grad_raw: Tensor | None,
        counts: Counts | None = None,
    ) -> None:
        """Fills the loss, and for an incoming gradient of 1 the gradients that are there: 5 N.

        grad_mean may be mean itself, and grad_raw raw.
        """

    def heteroscedastic_backward(
        self,
        g: Tensor,
        mean: Tensor,
        target: Tensor,
        raw: Tensor,
        rows: Rows,
        call: HeteroscedasticCall,
        *,
        grad_mean: Tensor | None,
        grad_target: Tensor | None,
        grad_raw: Tensor | None,
        counts: Counts | None = None,
    ) -> None:
        """Fills the gradients that are there, times the scalar g: up to 6 N. g is read where it is stored."""


class PartsBackend(Backend, Protocol):
    """What a back end whose `in_parts` is True offers besides: whole heads, and what lies between a head's products.

    Tensors are fp32, bf16 or fp16.
    """

    def has_head(self, module: torch.dtype, layers: int) -> bool:
        """Whether it has a kernel for heads of so many layers that give that dtype."""

    def head(
        self,
        student: Tensor,
        target: Tensor,
        alpha: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        call: Call,
        module: torch.dtype,
        *,
        loss: Tensor,
        grad_student: Tensor | None,
        grad_alpha: Tensor | None,
        grad_weights: Sequence[Tensor | None],
        grad_biases: Sequence[Tensor | None],
        positions: Tensor | None = None,
        values: float = 0.0,
    ) -> None:
        """Fills the loss of a stack of layers, and for an incoming gradient of 1 every gradient that is there.

        With x_1 the student, x_l+1 = relu(W_l x_l + b_l), and the last one without ReLU the mean. What a layer takes
        and gives, and gradients of that, are rounded to `module`, but for the student's gradient; products and sums are
        of at least fp32. No number depends on the threads. Its workspace comes from
        :func:`vidfast.memory.empty_scratch`.

        Args:
            student: (B, C_s, positions), any strides, with elements.
            target: (B, C, positions), any strides.
            alpha: (C,) without gaps.
            weights: (out, in) each without gaps, as many as :meth:`has_head` takes.
            biases: As many, (out,) or None.
            call: `k` and `eps` are read.
            module: fp32, bf16 or fp16.
            loss: A scalar in fp32.
            grad_student: Of the student's shape and dtype, any strides.
            grad_alpha: (C,) in fp64; None: the loss alone is wanted.
            grad_weights: (out, in) in fp32 without gaps, or None each.
            grad_biases: (out,) in fp32, or None each.
            positions: (B, positions) without gaps, w_p >= 0: uint8 or fp32; None: 1 each. S_c is then sum w_p r^2, and
                where w_p is 0 the student is taken as 0 before the first layer, whatever is there, its gradient is 0
                and the target is not used; tiles in which nothing counts are not computed.
            values: M, what the positions' weights sum to; read with them alone.
        """

    def rectify(self, x: Tensor, rounded: torch.dtype, positive: bool) -> None:
        """Replaces x by max(x, 0) where `positive` is True (NaN stays NaN), then rounds it to values of `rounded`.

        Here and below tensors have no gaps.
        """

    def rectify_backward(
        self, gradient: Tensor, activation: Tensor, out: Tensor, rounded: torch.dtype
    ) -> None:
        """`out` = gradient where activation, what :meth:`rectify` gave, is not 0, else 0; then rounded likewise.

        out may be either of the others.
        """
