"""The three ways in which a part's activations are stored, and the products over the channels in each.

A part is `n` samples of (channels, positions), and what a layer gives for it one block of memory without gaps:

    Planes    (n, channels, positions), a product for each sample: where features are stored so, nothing is reordered
    Rows      (n * positions, channels), one product: the channels are fastest, as in channels_last and in tokens
    Columns   (channels, n * positions), one product: a feature's positions stay neighbours when it is copied in

`matrix` is a block as one of these, `part` that matrix as (n, channels, positions).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Arrangement(Protocol):
    """What the three offer."""

    name: str

    @staticmethod
    def matrix(block: Tensor, n: int, channels: int, positions: int) -> Tensor:
        """The beginning of a flat block as the matrix of `n` samples."""

    @staticmethod
    def part(matrix: Tensor, n: int, positions: int) -> Tensor:
        """The matrix as (n, channels, positions)."""

    @staticmethod
    def native(part: Tensor) -> Tensor | None:
        """A tensor (n, channels, positions) from outside as a matrix, or None where it is stored otherwise."""

    @staticmethod
    def product(weight: Tensor, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out = weight x + bias over the channels, weight (out, in)."""

    @staticmethod
    def outer_shape(n: int, out: int, into: int) -> tuple[int, ...]:
        """The shape of the products that :meth:`add_outer` makes of `n` samples."""

    @staticmethod
    def add_outer(total: Tensor, g: Tensor, x: Tensor, product: Tensor | None) -> None:
        """Adds sum g x^T over the positions to `total` in fp32.

        Without `product` it is of `outer_shape`. 16-bit matrices have a 16-bit `product` of that shape, which is made
        first; the total is then (out, into).
        """

    @staticmethod
    def over_channels(g: Tensor) -> Tensor:
        """(channels,) in fp32: sum g over the positions."""


class Planes:
    """(n, channels, positions)."""

    name = "planes"

    @staticmethod
    def matrix(block: Tensor, n: int, channels: int, positions: int) -> Tensor:
        """As the protocol says."""
        return block[: n * channels * positions].view(n, channels, positions)

    @staticmethod
    def part(matrix: Tensor, n: int, positions: int) -> Tensor:
        """As the protocol says."""
        return matrix

    @staticmethod
    def native(part: Tensor) -> Tensor | None:
        """As the protocol says."""
        return part if part.is_contiguous() else None

    @staticmethod
    def product(weight: Tensor, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """As the protocol says."""
        weight = weight.expand(x.shape[0], *weight.shape)
        if bias is None:
            torch.bmm(weight, x, out=out)
        else:
            torch.baddbmm(bias[:, None], weight, x, out=out)

    @staticmethod
    def outer_shape(n: int, out: int, into: int) -> tuple[int, ...]:
        """As the protocol says: each sample of a part has its own."""
        return (n, out, into)

    @staticmethod
    def add_outer(total: Tensor, g: Tensor, x: Tensor, product: Tensor | None) -> None:
        """As the protocol says."""
        n = g.shape[0]
        if product is None:
            total[:n].baddbmm_(g, x.transpose(1, 2))
        else:
            total.add_(torch.bmm(g, x.transpose(1, 2), out=product[:n]).sum(0, dtype=torch.float32))

    @staticmethod
    def over_channels(g: Tensor) -> Tensor:
        """As the protocol says."""
        return g.sum((0, 2), dtype=torch.float32)


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = a b + bias, which is broadcast."""
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor, product: Tensor | None) -> None:
    """total += a b, by way of `product` where there is one."""
    if product is None:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b, out=product))


class Rows:
    """(n * positions, channels)."""

    name = "rows"

    @staticmethod
    def matrix(block: Tensor, n: int, channels: int, positions: int) -> Tensor:
        """As the protocol says."""
        return block[: n * channels * positions].view(n * positions, channels)

    @staticmethod
    def part(matrix: Tensor, n: int, positions: int) -> Tensor:
        """As the protocol says."""
        return matrix.view(n, positions, -1).transpose(1, 2)

    @staticmethod
    def native(part: Tensor) -> Tensor | None:
        """As the protocol says."""
        rows = part.transpose(1, 2)
        return rows.flatten(0, 1) if rows.is_contiguous() else None

    @staticmethod
    def product(weight: Tensor, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """As the protocol says."""
        _product(x, weight.t(), bias, out)

    @staticmethod
    def outer_shape(n: int, out: int, into: int) -> tuple[int, ...]:
        """As the protocol says."""
        return (out, into)

    @staticmethod
    def add_outer(total: Tensor, g: Tensor, x: Tensor, product: Tensor | None) -> None:
        """As the protocol says."""
        _add_product(total, g.t(), x, product)

    @staticmethod
    def over_channels(g: Tensor) -> Tensor:
        """As the protocol says."""
        return g.sum(0, dtype=torch.float32)


class Columns:
    """(channels, n * positions)."""

    name = "columns"

    @staticmethod
    def matrix(block: Tensor, n: int, channels: int, positions: int) -> Tensor:
        """As the protocol says."""
        return block[: n * channels * positions].view(channels, n * positions)

    @staticmethod
    def part(matrix: Tensor, n: int, positions: int) -> Tensor:
        """As the protocol says."""
        return matrix.view(-1, n, positions).transpose(0, 1)

    @staticmethod
    def native(part: Tensor) -> Tensor | None:
        """As the protocol says."""
        columns = part.transpose(0, 1)
        return columns.flatten(1) if columns.is_contiguous() else None

    @staticmethod
    def product(weight: Tensor, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """As the protocol says."""
        _product(weight, x, None if bias is None else bias[:, None], out)

    @staticmethod
    def outer_shape(n: int, out: int, into: int) -> tuple[int, ...]:
        """As the protocol says."""
        return (out, into)

    @staticmethod
    def add_outer(total: Tensor, g: Tensor, x: Tensor, product: Tensor | None) -> None:
        """As the protocol says."""
        _add_product(total, g, x.t(), product)

    @staticmethod
    def over_channels(g: Tensor) -> Tensor:
        """As the protocol says."""
        return g.sum(1, dtype=torch.float32)
