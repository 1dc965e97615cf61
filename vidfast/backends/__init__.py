"""The back ends: values of one protocol, so that adding one is adding a file and a line in `dispatch`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from vidfast.layout import Layout


class Backend(Protocol):
    """What a back end offers. N = outer * C * inner elements, [C] one number a channel.

    mean and target are walked as `layout` says and alpha is contiguous. A saved-tensor hook may have
    replaced what `backward` and `scale` get: they take it through :func:`vidfast.raw.vector` before an address is read.
    loss = k * sum_c [M/2 log v_c + S_c / (2 v_c)] with v_c = softplus(alpha_c) + eps and
    S_c = sum r^2, r = mean - target. loss is fp64 if mean or target is, else fp32; sum_sq is fp64.
    """

    name: str

    def unavailable(self) -> str | None:
        """None if this back end can run on this machine at all, or the reason why not."""

    def supports(self, mean: Tensor, target: Tensor, alpha: Tensor) -> str | None:
        """None if it takes these tensors, or the reason why not."""

    def info(self) -> dict[str, object]:
        """What a person wants to know of it: versions, devices, architectures."""

    def forward(
        self, mean: Tensor, target: Tensor, alpha: Tensor, layout: Layout, k: float, eps: float, full: bool
    ) -> tuple[Tensor, Tensor]:
        """(loss, sum_sq [C]): 2 N of traffic."""

    def forward_grad(
        self,
        mean: Tensor,
        target: Tensor,
        alpha: Tensor,
        layout: Layout,
        k: float,
        eps: float,
        full: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, grad_mean, grad_alpha [C] fp64) for an incoming gradient of 1: 3 N.

        grad_mean has mean's shape, dtype and order of dimensions; with `inplace` it is written over mean
        and is a detached alias of it.
        """

    def backward(
        self,
        g: Tensor,
        mean: Tensor | None,
        target: Tensor | None,
        alpha: Tensor,
        sum_sq: Tensor,
        layout: Layout,
        k: float,
        eps: float,
        want: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of mean, target and alpha, those that `want` names, times the scalar g: 3 N (4 for both).

        g is read where it lies, never on the host of a device. For alpha alone mean and target are None:
        sum_sq is all it takes. The gradients are dense in mean's order of dimensions.
        """

    def scale(
        self,
        g: Tensor,
        grad_mean: Tensor | None,
        channel: int,
        grad_alpha: Tensor | None,
        alpha_dtype: torch.dtype,
        in_place: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(grad_mean, grad_alpha) times the scalar g; grad_alpha comes in fp64 and leaves in `alpha_dtype`.

        `in_place` scales grad_mean where it lies, and touches nothing where g is 1 (0 or 2 N).
        """
