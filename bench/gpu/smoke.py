"""Every mapping and primitive of a GPU back end, in ten pairs of dtypes and with masks, against fp64 on the device.

    python -m bench.gpu.smoke [--few] [BACKEND ...]       in this process: for compute-sanitizer

The shared suite (tests/core) asks more, and takes longer; this says whether a back end works at all on this device.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vidfast

# (B, C, ...), one for each way through a back end: planes whole and in pieces, one channel, small planes in rows
# (joined, cut by tiles, in groups of chunks), logits, planes that are no whole vectors, single elements.
SHAPES: tuple[tuple[int, ...], ...] = (
    (2, 3, 40, 40),
    (5, 24, 7, 7),
    (4, 10, 14, 14),
    (33, 1000),
    (4001, 8),
    (5, 1, 77),
    (2, 5, 1030),
    (3, 2048, 7, 7),
    (1, 2, 1000001),
    (64, 256, 14, 14),
    (128, 64, 32, 32),
    (70001, 12),
    (2, 70001, 3),
    (1, 1, 1),
    (300, 24),
    (9, 64, 5, 5),
)
FEW_SHAPES: tuple[tuple[int, ...], ...] = (
    (2, 3, 40, 40),
    (3, 24, 7, 7),
    (33, 100),
    (400, 8),
    (5, 1, 77),
    (2, 5, 1030),
)
SMALLEST_SHAPES: tuple[tuple[int, ...], ...] = ((2, 2, 33, 33), (3, 5, 7, 7), (9, 8), (2, 1, 19))
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
PAIRS: tuple[tuple[torch.dtype, torch.dtype], ...] = (
    (F32, F32),
    (BF16, BF16),
    (F16, F16),
    (F64, F64),
    (BF16, F32),
    (F32, BF16),
    (F16, F32),
    (F32, F16),
)
PAIRS += ((F64, F32), (F16, BF16))
# Triton compiles kernels for every pair and shape, most of a second each: fewer of both there.
TRITON_SHAPES, TRITON_ALL_PAIRS, COMMON_PAIRS = 6, 2, PAIRS[:2]
LAYOUTS = ("contiguous", "channels_last", "slice")
# With a mask, for each way through a back end: planes whole, small planes in rows, and tokens; of Triton the last two.
MASKED_SHAPES: tuple[tuple[int, ...], ...] = ((2, 5, 1030), (5, 24, 7, 7), (2, 3, 40, 40), (300, 24))
MASKED_PAIRS, TRITON_MASKED_SHAPES = (*COMMON_PAIRS, (F64, F64), (BF16, F32)), 2
# bool; int64; weights between 0 and 1; NaN and inf where the weight is 0; all 0.
MASKS = ("booleans", "integers", "fractions", "NaN under zeros", "zeros")
STRATEGIES = ("one_pass", "one_pass in place", "two_pass", "forward")
EPS = 1e-5
# As k is 1/N, a gradient in fp16 needs a factor, as a loss scaler gives it.
WEIGHT = 1024.0
INCOMING = 3.0
# In units of the dtype's own precision (torch.finfo.eps), of each element of a gradient. An eps is one to two ulp, so
# these are about twice the bounds of tests/core/bounds.py, which the stages behind this one hold; in fp64 there is room
# for this oracle's own rounding.
UNITS = {F32: 5.0, F64: 16.0, BF16: 1.25, F16: 1.25}
# Of the loss and d/d alpha: over the sum of the magnitudes of their terms.
RELATIVE = {F32: 1e-6, F64: 1e-12}


@dataclass(frozen=True)
class Problem:
    """One call and its backward."""

    backend: str
    shape: tuple[int, ...]
    mean_dtype: torch.dtype
    target_dtype: torch.dtype
    layout: str
    strategy: str
    mask: str | None = None

    @property
    def title(self) -> str:
        dtypes = "/".join(str(d).removeprefix("torch.") for d in (self.mean_dtype, self.target_dtype))
        mask = "" if self.mask is None else f" mask of {self.mask}"
        return f"{self.backend} {'x'.join(map(str, self.shape))} {dtypes} {self.layout} {self.strategy}{mask}"


def problems(backends: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[Problem]:
    """Every combination; a layout that is another one's for its shape is left out."""

    def pairs_of(backend: str, number: int) -> Sequence[tuple[torch.dtype, torch.dtype]]:
        if backend != "triton" or number < TRITON_ALL_PAIRS:
            return PAIRS
        return COMMON_PAIRS if number < TRITON_SHAPES else ()

    return [
        Problem(backend, shape, *pair, layout, strategy)
        for backend in backends
        for number, shape in enumerate(shapes)
        for pair in pairs_of(backend, number)
        for layout in LAYOUTS
        if layout != "channels_last" or len(shape) == 4
        for strategy in STRATEGIES
    ]


def masked_problems(backends: Sequence[str], small: bool = False) -> list[Problem]:
    """Every mask in every strategy; `small`: on a shape of planes and one of rows, for an emulated device."""

    def of(backend: str) -> tuple[Sequence[tuple[int, ...]], Sequence[tuple[torch.dtype, torch.dtype]]]:
        if small:
            return ((2, 2, 33, 33), (9, 8)), COMMON_PAIRS
        if backend == "triton":
            return MASKED_SHAPES[-TRITON_MASKED_SHAPES:], COMMON_PAIRS
        return MASKED_SHAPES, MASKED_PAIRS

    return [
        Problem(backend, shape, *pair, layout, strategy, mask)
        for backend in backends
        for shape in of(backend)[0]
        for pair in of(backend)[1]
        for layout in LAYOUTS[:2]
        if layout != "channels_last" or len(shape) == 4
        for strategy in STRATEGIES
        for mask in MASKS
    ]


def mask_of(problem: Problem, device: str) -> Tensor:
    """Some positions count and some do not: all of the first sample do not, nor a run at the end, and single ones."""
    shape = (problem.shape[0], *problem.shape[2:])
    if problem.mask == "zeros":
        return torch.zeros(shape, dtype=torch.bool, device=device)
    generator = torch.Generator().manual_seed(hash(shape) % 1000)
    counts = torch.rand(shape, generator=generator) < 0.7
    counts[: 1 if shape[0] > 1 else 0] = False
    counts.view(-1)[-counts.numel() // 4 :] = False
    counts.view(-1)[counts.numel() // 2] = True
    if problem.mask == "integers":
        return counts.long().to(device)
    if problem.mask == "fractions":
        return (counts * (1 - torch.rand(shape, generator=generator))).to(device)
    return counts.to(device)


def spoil(x: Tensor, mask: Tensor) -> None:
    """NaN and inf where nothing counts: what uses a value there shows."""
    values = torch.tensor([torch.nan, torch.inf], dtype=x.dtype, device=x.device)
    at = torch.arange(mask.numel(), device=x.device).view(mask.shape).unsqueeze(1) % 2
    x.copy_(torch.where(mask.unsqueeze(1) != 0, x, values[at]))


def tensors(problem: Problem, device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(hash(problem.shape) % 1000)
    mean = torch.randn(problem.shape, device=device).to(problem.mean_dtype)
    target = torch.randn(problem.shape, device=device).to(problem.target_dtype)
    alpha = torch.randn(problem.shape[1], device=device)
    if problem.layout == "channels_last":
        mean, target = (x.contiguous(memory_format=torch.channels_last) for x in (mean, target))
    elif problem.layout == "slice":
        # NaN beside it: what reads beyond its rows shows. In a bigger tensor the rows are also apart.
        beside = mean.new_full((1, *problem.shape[1:]), torch.nan)
        mean = torch.cat([beside, mean, beside], 0)[1:-1]
        beside = target.new_full((problem.shape[0], 1, *problem.shape[2:]), torch.nan)
        target = torch.cat([target, beside], 1)[:, :-1]
    return mean, target, alpha


@dataclass(frozen=True)
class Exact:
    """Equation 5 and its gradients in fp64, for reduction "mean" and WEIGHT; gradients for an incoming one of 1."""

    loss: Tensor
    loss_scale: Tensor
    grad_mean: Tensor
    grad_alpha: Tensor
    alpha_scale: Tensor


def exact(mean: Tensor, target: Tensor, alpha: Tensor, mask: Tensor | None = None) -> Exact:
    zero = torch.zeros((), dtype=F64, device=alpha.device)
    v = torch.logaddexp(alpha.double(), zero) + EPS
    r = mean.double() - target.double()
    m, w = float(r.numel() // r.shape[1]), zero + 1
    if mask is not None:
        w = mask.double().unsqueeze(1)
        m, r = float(w.sum()), torch.where(w != 0, r, zero)
    dims = [d for d in range(r.dim()) if d != 1]
    s = (w * r * r).sum(dims)
    k = WEIGHT / (m * r.shape[1]) if m else 0.0
    logs, squares = m / 2 * v.log(), s / (2 * v)
    slope = k * alpha.double().sigmoid()
    upper, lower = m / (2 * v), s / (2 * v * v)
    per_channel = [1, -1] + [1] * (r.dim() - 2)
    return Exact(
        k * (logs + squares).sum(),
        k * (logs.abs() + squares).sum(),
        k * w * r / v.view(per_channel),
        slope * (upper - lower),
        slope * (upper + lower),
    )


class Lend(torch.autograd.Function):
    """A copy of a tensor, with its strides, that autograd takes for a layer's output: `inplace` may write over it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def check(problem: Problem, device: str) -> dict[str, Any]:
    """{} if every output is within its bound, else {"error": what is not}."""
    mean, target, alpha = tensors(problem, device)
    mask = None if problem.mask is None else mask_of(problem, device)
    if mask is not None and problem.mask == "NaN under zeros":
        spoil(mean, mask)
        spoil(target, mask)
    want = exact(mean, target, alpha, mask)
    wide = F64 if F64 in (problem.mean_dtype, problem.target_dtype) else F32
    options: dict[str, Any] = {"backend": problem.backend, "eps": EPS, "weight": WEIGHT, "mask": mask}
    faults: list[str] = []

    def compare(what: str, got: Tensor, exact: Tensor, allowed: Tensor) -> None:
        error = (got.double() - exact).abs()
        # NaN is never within a bound
        bad = ~(error <= allowed)
        if bool(bad.any()):
            worst = float((error / allowed).nan_to_num(nan=torch.inf).max())
            faults.append(
                f"{what}: {int(bad.sum())} of {bad.numel()} beyond the bound, at worst {worst:.3g} times"
            )

    def gradient(what: str, got: Tensor, exact: Tensor) -> None:
        info = torch.finfo(got.dtype)
        allowed = UNITS[got.dtype] * info.eps * exact.abs() + 2 * INCOMING * info.tiny * info.eps
        compare(what, got, exact, allowed)

    def scalars(g: float, loss: Tensor, grad_alpha: Tensor | None) -> None:
        own = torch.finfo(wide).eps
        compare("loss", loss, want.loss, RELATIVE[wide] * want.loss_scale + own * want.loss.abs())
        if grad_alpha is not None:
            allowed = g * (RELATIVE[F32] * want.alpha_scale + torch.finfo(F32).eps * want.grad_alpha.abs())
            compare("d alpha", grad_alpha, g * want.grad_alpha, allowed)

    if problem.strategy == "forward":
        with torch.no_grad():
            scalars(1.0, vidfast.gaussian_nll(mean, target, alpha, **options), None)
        return {"error": "; ".join(faults)} if faults else {}
    strategy = problem.strategy.split()[0]
    for g in (1.0, INCOMING):
        leaf, a = mean.detach().requires_grad_(), alpha.clone().requires_grad_()
        t = target.detach()
        fed, inputs = leaf, [leaf, a]
        if strategy == "two_pass":
            inputs.append(t.requires_grad_())
        in_place = problem.strategy.endswith("in place")
        if in_place:
            fed = Lend.apply(leaf)  # type: ignore[no-untyped-call]
        options["strategy"] = strategy
        loss = vidfast.gaussian_nll(fed, t, a, inplace=in_place, **options)
        grads = torch.autograd.grad(loss, inputs, torch.full_like(loss, g))
        scalars(g, loss.detach(), grads[1])
        gradient("d mean", grads[0], g * want.grad_mean)
        if strategy == "two_pass":
            gradient("d target", grads[2], -g * want.grad_mean)
    return {"error": "; ".join(faults)} if faults else {}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.smoke", description="Checks GPU back ends against fp64 on the device."
    )
    parser.add_argument(
        "backends", nargs="*", default=["cuda", "triton"], metavar="BACKEND", help="default: both"
    )
    parser.add_argument(
        "--few", action="store_true", help="a third of the calls on six small shapes: for compute-sanitizer"
    )
    parser.add_argument(
        "--smallest", action="store_true", help="some calls on four tiny shapes: for an emulated device"
    )
    arguments = parser.parse_args(argv)
    shapes = SMALLEST_SHAPES if arguments.smallest else FEW_SHAPES if arguments.few else SHAPES
    wanted = problems(arguments.backends, shapes)
    masked = masked_problems(arguments.backends, arguments.smallest)
    if arguments.smallest or arguments.few:
        wanted = wanted[:: 5 if arguments.smallest else 3]  # neither divides the strategies
        masked = masked[:: 3 if arguments.smallest else 11]  # nor these, nor the masks
    wanted += masked
    bad = 0
    for problem in wanted:
        error = check(problem, "cuda").get("error")
        if error is not None:
            bad += 1
            print(f"{problem.title}: {error}", flush=True)
    torch.cuda.synchronize()
    print(f"{len(wanted)} calls, {bad} of them wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
