"""torch.nn.GaussianNLLLoss by the kernels: torch's signature and meaning, without its synchronisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from vidfast import backends
from vidfast._torch import has_tangent, in_forward_mode, in_functorch
from vidfast.arguments import BackendName, as_number, check_dense, loss_factor
from vidfast.heteroscedastic.arguments import CLAMP, HeteroscedasticCall
from vidfast.heteroscedastic.call import computed
from vidfast.heteroscedastic.negative import MESSAGE, check_no_negative

_REDUCTIONS = ("none", "mean", "sum")


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
    *,
    check: bool = False,
    backend: BackendName = "auto",
) -> Tensor:
    """torch.nn.functional.gaussian_nll_loss, fused: `1/2 (log max(var, eps) + (input - target)^2 / max(var, eps))`.

    A variance of input's shape is read where it is stored. One that is broadcast, as a target or input that is, is
    expanded first, which costs a pass or two. As in torch the clamp is not differentiated.

    Args:
        input: The expectation; any shape.
        target: The sample; input's shape, or one that broadcasts with it.
        var: The variance: of input's shape, of one dimension fewer (the last), with exactly one dimension of size 1
            where they differ, or a number.
        full: Adds 1/2 log(2 pi) per element.
        eps: var is clamped to it from below.
        reduction: "mean", "sum" or "none" (by plain PyTorch).
        check: Whether a negative variance on a GPU is looked for before, as torch does, which waits for the device.
            Without it the loss, and the gradients of that element, are NaN. On the CPU it is an error always.
        backend: "auto", "reference" (plain PyTorch), or a back end by name; see :func:`vidfast.info`.

    Returns:
        A scalar, or for "none" the shape that the three broadcast to, of the dtype that torch gives: bf16 for bf16.

    Raises:
        TypeError: A tensor is of no real dtype, or an option of another type.
        ValueError: var is of another shape, negative, or a name is unknown.
        RuntimeError: input and target do not broadcast, or the back end asked for cannot run.
    """
    if has_torch_function_variadic(input, target, var):
        found: Tensor = handle_torch_function(
            F.gaussian_nll_loss,
            (input, target, var),
            input,
            target,
            var,
            full=full,
            eps=eps,
            reduction=reduction,
        )
        return found
    eps = _check_options(full, eps, reduction, check, backend)
    if not isinstance(input, Tensor) or not isinstance(target, Tensor):
        check_dense(input=input, target=target)
    dtype = result_dtype(input, target, var)
    input, target, variances = _matched(input, target, var, dtype)
    if backend == "auto" and not torch.compiler.is_compiling() and _in_transform(input, target, variances):
        backend = "reference"
    if check and not variances.is_cpu and bool((variances < 0).any()):
        raise ValueError(MESSAGE)
    k = 0.0
    if reduction != "none" and type(input.numel()) is int and not torch.compiler.is_compiling():
        k = loss_factor(input.shape, reduction, 1.0)
    call = HeteroscedasticCall(
        CLAMP, max(eps, 0.0), reduction=reduction, full=full, backend=backend, k=k, negative_is_nan=True
    )
    loss = computed(input, target, variances, call)
    if not torch.compiler.is_compiling() and not in_functorch(input, target, variances):
        check_no_negative(call, variances, loss.detach().sum() if reduction == "none" else loss)
    return loss.to(dtype)


def _check_options(full: bool, eps: float, reduction: str, check: bool, backend: str) -> float:
    """eps as Python's float, where the other options are what they must be.

    Raises:
        TypeError: A number or flag is something else.
        ValueError: A name is unknown.
    """
    for name, flag in (("full", full), ("check", check)):
        if type(flag) is not bool:
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {_REDUCTIONS}, got {reduction!r}")
    backends.check_name(backend)
    return as_number("eps", eps)


def _in_transform(*tensors: Tensor) -> bool:
    """Whether torch.func or a forward-mode derivative has to see into the loss, as it sees into torch's."""
    return in_functorch(*tensors) or (in_forward_mode() and has_tangent(*tensors))


def result_dtype(input: Tensor, target: Tensor, var: Tensor | float) -> torch.dtype:
    """The dtype that torch gives the loss of these."""
    same = input.dtype == target.dtype and (not isinstance(var, Tensor) or var.dtype == input.dtype)
    dtype = input.dtype if same else torch.result_type(input, target)
    if isinstance(var, Tensor) and not same:
        rank = max(input.dim(), target.dim())
        dtype = torch.result_type(torch.empty([1] * rank, dtype=dtype, device="meta"), var.to("meta"))
    if not (dtype.is_floating_point or dtype.is_complex):
        dtype = torch.get_default_dtype()
    half = dtype in (torch.float16, torch.bfloat16)
    # under autocast torch's log and pow are fp32 on these devices
    return torch.float32 if half and input.is_cuda and torch.is_autocast_enabled("cuda") else dtype


def _matched(
    input: Tensor, target: Tensor, var: Tensor | float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The three in one shape, expanded where they broadcast, and in floating dtypes.

    Raises:
        TypeError: One is complex.
        ValueError: var is of another shape, or a negative number.
        RuntimeError: input and target do not broadcast.
    """
    if isinstance(var, Tensor):
        shape, given = input.shape, var.shape
        if given != shape:
            if given == shape[:-1]:
                var = var.unsqueeze(-1)
            elif len(given) != len(shape) or [b for a, b in zip(shape, given, strict=True) if a != b] != [1]:
                raise ValueError(
                    f"var is of incorrect size: it must have input's shape, {tuple(shape)}, that without its last "
                    f"dimension, or exactly one dimension of size 1 where they differ, got {tuple(given)}"
                )
    else:
        number = as_number("var", var)
        if number < 0:
            raise ValueError(f"{MESSAGE}, got {number}")
        var = torch.full((), number, dtype=dtype, device=input.device)
    tensors = [x if x.is_floating_point() or x.is_complex() else x.to(dtype) for x in (input, target, var)]
    whole = torch.broadcast_shapes(*(x.shape for x in tensors))  # type: ignore[no-untyped-call]
    input, target, var = (x if x.shape == whole else x.expand(whole) for x in tensors)
    check_dense(input=input, target=target, var=var)
    return input, target, var


class GaussianNLLLoss(nn.GaussianNLLLoss):
    """torch.nn.GaussianNLLLoss by the kernels; see :func:`gaussian_nll_loss`.

    Args:
        full: Adds 1/2 log(2 pi) per element.
        eps: Variances are clamped to it from below.
        reduction: "mean", "sum" or "none".
        check: Whether negative variances on a GPU are looked for, which waits for the device.
        backend: "auto", "reference", or a back end by name.

    Raises:
        TypeError: A number or flag is something else.
        ValueError: A name is unknown.
    """

    def __init__(
        self,
        *,
        full: bool = False,
        eps: float = 1e-6,
        reduction: str = "mean",
        check: bool = False,
        backend: BackendName = "auto",
    ) -> None:
        eps = _check_options(full, eps, reduction, check, backend)
        super().__init__(full=full, eps=eps, reduction=reduction)
        self.check = check
        self.backend: BackendName = backend

    if TYPE_CHECKING:  # nn.Module's own is Any

        def __call__(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
            """The loss; see `forward`."""
            ...

    def forward(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
        """The loss; see :func:`gaussian_nll_loss`."""
        return gaussian_nll_loss(
            input, target, var, self.full, self.eps, self.reduction, check=self.check, backend=self.backend
        )

    def extra_repr(self) -> str:
        """What `repr` shows in brackets."""
        return (
            f"full={self.full}, eps={self.eps}, reduction={self.reduction!r}, check={self.check}, "
            f"backend={self.backend!r}"
        )
