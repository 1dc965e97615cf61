"""The bounds of a result, stated once: how far from the oracle each output may be, per dtype.

The outputs' own rounding is added. Gradients of activations are counted in units in the last place of their
own dtype, from the oracle rounded to it, and hold in the dtype's normal range.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from oracle import Array, Expected, Options, expected
from places import Place
from torch import Tensor

# Relative to the sum of the terms' magnitudes: the loss and d/d alpha both cross zero.
RELATIVE = {torch.float32: 1e-6, torch.float64: 1e-13}
# Units in the last place of d/d mean and d/d target; one more rounding where one_pass meets g != 1.
ULPS = {torch.float32: 3, torch.float64: 4, torch.bfloat16: 1, torch.float16: 1}
ULPS_SCALED = {torch.float32: 4, torch.float64: 4, torch.bfloat16: 2, torch.float16: 2}
# On a GPU fp64 is farther off: v_c comes from the device's exp and log, right to a unit and not to half of one, and
# g k / v_c and the product with r are rounded one after another. On an H100 Triton's gradients reached 5 in 7 of some
# hundred thousand values; so did the PTX of both back ends where one_pass meets g != 1, interpreted.
ULPS_ON_GPU = {**ULPS, torch.float64: 6}
ULPS_SCALED_ON_GPU = {**ULPS_SCALED, torch.float64: 6}
# Mean signed error in units in the last place: rounding to nearest has none, truncation has a half.
BIAS = {torch.float32: 0.15, torch.bfloat16: 0.02, torch.float16: 0.02}


def accumulates_in(mean: torch.dtype, target: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in (mean, target) else torch.float32


def _ordered(x: Tensor) -> Tensor:
    """Integers in the order of the floats, neighbours one apart (0 and -0 are the same)."""
    size = x.element_size()
    bits = x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).to(torch.int64)
    return torch.where(bits < 0, -(bits + 2 ** (8 * size - 1)), bits)


def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """How many numbers of their dtype lie between a and b, plus one; 0 where they are equal."""
    assert a.dtype == b.dtype
    return (_ordered(a) - _ordered(b)).abs()


def ulp_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at fp64 values x."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.abs().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(x, info.eps), exponent - 1)


def round_to(x: Array, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.asarray(x).astype(np.float64)).to(dtype)


def check_scalar(what: str, got: Tensor, want: Array, scale: Array, relative: float) -> None:
    """|got - want| <= relative * scale + got's own rounding, for each element; NaN only where want is."""
    info = torch.finfo(got.dtype)
    value = got.detach().cpu().double().numpy()
    with np.errstate(invalid="ignore", over="ignore"):
        own = np.abs(want) * info.eps / 2 + info.tiny * info.eps
        error = np.abs(value - want)
        overflows = np.abs(want) >= info.max
        good = (
            (error <= relative * scale + own)
            | (np.isnan(value) & np.isnan(want))
            | (value == want)
            | (overflows & (np.sign(value) == np.sign(want)) & (np.abs(value) >= info.max))
        )
    assert np.all(good), (
        f"{what}: got {value[~good] if value.ndim else value}, want {want[~good] if value.ndim else want}, "
        f"error {error[~good] if value.ndim else error}, allowed {relative * scale + own}"
    )


def check_gradient(
    what: str, got: Tensor, want: Array, ulps: int, g: float = 1.0, scaled: bool = False
) -> None:
    """Within `ulps` of the oracle in the normal range; below it within the smallest normal number.

    scaled: the gradient was rounded once before it met g, so the range counts there too. fp16's subnormal
    range is fp32's normal one, and no excuse.
    """
    info = torch.finfo(got.dtype)
    value = got.detach().cpu()
    exact = torch.from_numpy(np.asarray(want).astype(np.float64))
    assert value.shape == exact.shape, f"{what}: got shape {tuple(value.shape)}, want {tuple(exact.shape)}"
    rounded = exact.to(got.dtype)
    both_nan = value.isnan() & rounded.isnan()
    distance = ulp_distance(value, rounded).masked_fill(both_nan, 0)
    smallest = rounded.abs().double()
    if scaled:
        smallest = torch.minimum(smallest, exact.abs() / max(abs(g), 1e-300))
    normal = (smallest >= info.tiny) | ~rounded.isfinite()
    if got.dtype is torch.float16:
        below = info.tiny * info.eps * (1 + abs(g) if scaled else 1)
    else:
        below = info.tiny * max(1.0, abs(g))
    bad = torch.where(
        normal, distance > ulps, ~((value.double() - rounded.double()).abs() <= below) & ~both_nan
    )
    if bad.any():
        i = tuple(int(n) for n in bad.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} values are out of bounds ({ulps} ulp of {got.dtype}); the "
            f"first at {i}: got {value[i].item()!r}, want {rounded[i].item()!r} ({int(distance[i])} ulp)"
        )


def check_unbiased(what: str, got: Tensor, want: Array, bound: float | None = None) -> None:
    """The mean error, along the axis and away from zero, is next to nothing in units in the last place."""
    exact = torch.from_numpy(np.asarray(want).astype(np.float64))
    keep = exact.abs() >= torch.finfo(got.dtype).tiny
    error = ((got.detach().cpu().double() - exact) / ulp_of(exact, got.dtype))[keep]
    bound = BIAS[got.dtype] if bound is None else bound
    for direction, signed in (("upwards", error), ("away from zero", error * exact[keep].sign())):
        mean = signed.mean().item()
        assert abs(mean) <= bound, f"{what}: the mean error {direction} is {mean:+.4f} ulp, allowed {bound}"


def ulps_allowed(dtype: torch.dtype, scaled: bool, on_gpu: bool, fractional: bool = False) -> int:
    """Of a gradient of an activation.

    scaled: one_pass met g != 1. fractional: a mask has other weights than 0 and 1, which is a rounding more before the
    last one; of 16 bits that does not show.
    """
    more = 1 if fractional and dtype in (torch.float32, torch.float64) else 0
    if not scaled:
        return (ULPS_ON_GPU if on_gpu else ULPS)[dtype] + more
    return (ULPS_SCALED_ON_GPU if on_gpu else ULPS_SCALED)[dtype] + more


def check_results(
    want: Expected,
    loss: Tensor,
    grad_mean: Tensor | None,
    grad_target: Tensor | None,
    grad_alpha: Tensor | None,
    *,
    g: float = 1.0,
    one_pass: bool = False,
    gpu_code: bool = False,
    mask: Tensor | None = None,
) -> None:
    """All outputs of one call against the oracle. loss is fp64 where an activation is, else fp32.

    gpu_code: made by a GPU's instructions, though the tensors are on the CPU.
    """
    relative = RELATIVE[loss.dtype]
    check_scalar("loss", loss, want.loss, want.loss_scale, relative)
    if grad_alpha is not None:
        check_scalar("d/d alpha", grad_alpha, want.grad_alpha, want.alpha_scale, relative)
    scaled = one_pass and g != 1.0
    for name, got, exact in (("mean", grad_mean, want.grad_mean), ("target", grad_target, want.grad_target)):
        if got is not None:
            on_gpu = gpu_code or got.device.type != "cpu"
            ulps = ulps_allowed(got.dtype, scaled, on_gpu, fractional=has_fractions(mask))
            check_gradient(f"d/d {name}", got, exact, ulps, g, scaled)


def has_fractions(mask: Tensor | None) -> bool:
    """Whether it has other weights than 0 and 1."""
    return mask is not None and not bool(((mask == 0) | (mask == 1)).all())


def as_leaf(x: Tensor) -> Tensor:
    """x where it lies, requiring grad: its strides and its address are kept."""
    return x.detach().requires_grad_()


def check_call(
    backend: Place,
    mean: Tensor,
    target: Tensor,
    alpha: Tensor,
    *,
    g: float = 1.0,
    strategy: str = "two_pass",
    inplace: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Runs one call forward and backward and holds every output to its bound. Inputs must come out untouched.

    two_pass: gradients of mean, target and alpha; one_pass: of mean and alpha. inplace works on a non-leaf
    that lies as mean does.
    """
    g = float(torch.tensor(g, dtype=accumulates_in(mean.dtype, target.dtype)))  # as it arrives
    want = expected(mean, target, alpha, g, Options(**options))
    before = [x.detach().clone() for x in (mean, target, alpha)]
    one_pass = strategy == "one_pass"
    m, a = as_leaf(mean), as_leaf(alpha)
    t = target.detach() if one_pass else as_leaf(target)
    fed = m
    if inplace:
        fed = _same_place(m)
    loss = backend.nll(fed, t, a, strategy=strategy, inplace=inplace, **options)
    assert loss.shape == ()
    assert loss.dtype == accumulates_in(mean.dtype, target.dtype)
    wanted = (m, a) if one_pass else (m, t, a)
    grads = torch.autograd.grad(loss, wanted, torch.tensor(g, dtype=loss.dtype, device=loss.device))
    grad_mean, grad_alpha = grads[0], grads[-1]
    grad_target = None if one_pass else grads[1]
    for x, grad in zip(wanted, grads, strict=True):
        assert grad.dtype == x.dtype
        assert grad.shape == x.shape
        assert grad.device == x.device
    check_results(
        want, loss, grad_mean, grad_target, grad_alpha,
        g=g, one_pass=one_pass, gpu_code=backend.gpu_code, mask=options.get("mask"),
    )  # fmt: skip
    if not inplace:
        for name, x, old in zip(("mean", "target", "alpha"), (mean, target, alpha), before, strict=True):
            assert torch.equal(_bits(x), _bits(old)), f"{name} was written"
    return loss, *grads


def _bits(x: Tensor) -> Tensor:
    return _ordered(x.detach().nan_to_num(nan=12345.0))


class _Lend(torch.autograd.Function):
    """The identity: a non-leaf on a fresh copy of the whole memory that x is a view of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        whole = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage()).clone()
        return whole.as_strided(x.shape, x.stride(), x.storage_offset())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def _same_place(x: Tensor) -> Tensor:
    lent = _Lend.apply(x)
    assert lent.stride() == x.stride()
    return lent
