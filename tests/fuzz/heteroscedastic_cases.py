"""Random calls with one variance an element: shapes, layouts, dtypes, options, ways to differentiate, from a seed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from places import Place
from torch import Tensor
from variances import check_results, computed_in, expected

import vidfast

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASKS = ("none", "none", "elements", "rows", "samples", "positions")
STORED = ("dense", "permuted", "slice", "gaps", "shifted", "expanded")


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        seed: It is made from.
        shape: Of mean, target and raw.
        stored: How each of the three is stored; "halves": mean and raw are the halves of one tensor along `dim`.
        dtypes: Of the three.
        dim: As above.
        options: Of the call, but for mask, strategy and backend.
        strategy: "one_pass" or "two_pass".
        mask: One of MASKS.
        mask_dtype: Of the mask.
        g: The incoming gradient.
        spread: How far raw reaches.
        inplace: Whether gradients are written over mean and raw.
    """

    seed: int
    shape: tuple[int, ...]
    stored: tuple[str, str, str]
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    dim: int
    options: dict[str, Any]
    strategy: str
    mask: str
    mask_dtype: torch.dtype
    g: float
    spread: float
    inplace: bool


def make_case(seed: int) -> Case:
    """The case of a seed."""
    draw = random.Random(seed)
    rank = draw.choice((1, 2, 2, 3, 4, 4, 5))
    longest = max(2, int(6000 ** (1 / rank)))
    shape = tuple(
        draw.choice((1, 2, 3, draw.randint(1, longest), draw.randint(1, longest))) for _ in range(rank)
    )
    halves = draw.random() < 0.4
    one = draw.choice(DTYPES)
    alike = draw.random() < 0.6
    dtypes = (one, one, one) if alike else (one, draw.choice(DTYPES), one if halves else draw.choice(DTYPES))
    stored = (
        ("halves", draw.choice(STORED), "halves") if halves else tuple(draw.choice(STORED) for _ in range(3))
    )
    transform, eps = draw.choice((("softplus", 1e-3), ("exp", 1e-3), ("exp", 0.0), ("identity", 0.05)))
    strategy = draw.choice(("one_pass", "two_pass"))
    channel_dim = draw.choice((None, *range(-rank, rank)))
    mask = draw.choice(MASKS)
    if mask == "positions" and channel_dim is None:
        mask = "elements"
    if mask == "elements" and channel_dim is not None:
        mask = "positions"
    if mask in ("rows", "samples") and channel_dim is not None and (rank == 1 or channel_dim % rank == 0):
        channel_dim = None
    reductions = ["mean", "sum"] + (["batchmean"] if channel_dim is None or channel_dim % rank else [])
    options = {
        "transform": transform, "eps": eps, "beta": draw.choice((0.0, 0.0, 0.5, 1.0, 0.3)), "channel_dim": channel_dim,
        "reduction": draw.choice(reductions), "full": draw.random() < 0.5, "weight": draw.choice((1.0, 0.25, 3.0)),
    }  # fmt: skip
    half = torch.float16 in dtypes
    return Case(
        seed, shape, stored, dtypes, draw.randrange(rank), options, strategy, mask,
        draw.choice((torch.bool, torch.uint8, torch.float32, torch.int64)), draw.choice((1.0, 1.0, -2.5, 64.0)),
        1.5 if half else draw.choice((1.5, 4.0, 30.0)), strategy == "one_pass" and draw.random() < 0.2,
    )  # type: ignore[arg-type]  # fmt: skip


def _store(x: Tensor, how: str, draw: random.Random) -> Tensor:
    """x's values, stored otherwise; what lies between them is NaN."""
    dims = list(range(x.dim()))
    if how == "permuted":
        draw.shuffle(dims)
        return x.permute(dims).contiguous().permute([dims.index(d) for d in range(x.dim())])
    if how in ("slice", "gaps"):
        at = draw.randrange(x.dim()) if how == "slice" else x.dim() - 1
        step = 1 if how == "slice" else 2
        sizes = [n * step + 3 if d == at else n for d, n in enumerate(x.shape)]
        room = x.new_full(sizes, math.nan)
        view = room.narrow(at, 2, x.shape[at] * step)
        return view[
            (..., *[slice(None)] * at, slice(None, None, step))[-x.dim() :] if step > 1 else ...
        ].copy_(x)
    if how == "shifted":
        return x.new_full((x.numel() + 5,), math.nan)[3 : 3 + x.numel()].view(x.shape).copy_(x)
    if how == "expanded":
        at = draw.randrange(x.dim())
        return x.narrow(at, 0, 1).expand(x.shape)
    return x.clone()


def _tensors(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(mean, target, raw, the tensor that mean and raw are halves of)."""
    draw, generator = random.Random(case.seed + 1), torch.Generator().manual_seed(case.seed)

    def values(kind: str) -> Tensor:
        if kind != "raw":
            return torch.randn(case.shape, generator=generator, dtype=torch.float64)
        x = torch.rand(case.shape, generator=generator, dtype=torch.float64)
        return 0.01 + 3 * x if case.options["transform"] == "identity" else (2 * x - 1) * case.spread

    mean, target, raw = (
        values(k).to(device, t) for k, t in zip(("mean", "target", "raw"), case.dtypes, strict=True)
    )
    target = _store(target, case.stored[1], draw)
    if case.stored[0] != "halves":
        return _store(mean, case.stored[0], draw), target, _store(raw, case.stored[2], draw), None
    both = torch.cat([mean, raw], case.dim)
    whole = _store(both, draw.choice(("dense", "permuted")), draw)
    return (*whole.chunk(2, case.dim), whole)[0], target, whole.chunk(2, case.dim)[1], whole


def _mask(case: Case, device: torch.device) -> Tensor | None:
    shape, channel = list(case.shape), case.options["channel_dim"]
    if case.mask == "none":
        return None
    if case.mask == "samples":
        shape = shape[:1]
    elif case.mask == "rows":
        shape = [
            1 if d or (channel is not None and d == channel % len(shape)) else n for d, n in enumerate(shape)
        ]
    elif case.mask == "positions":
        del shape[channel]
    random_numbers = torch.rand(shape, generator=torch.Generator().manual_seed(case.seed + 2))
    weights = (random_numbers < 0.6).double() * (1 + 2 * (random_numbers * 8).floor() / 8)
    return (weights if case.mask_dtype.is_floating_point else weights.ceil()).to(device, case.mask_dtype)


def run_case(case: Case, backend: Place) -> None:
    """Runs the call forward and backward and holds every output to its bound."""
    mean, target, raw, whole = _tensors(case, backend.device)
    mask = _mask(case, backend.device)
    dtype = computed_in(mean, target, raw)
    g = float(torch.tensor(case.g, dtype=dtype))
    want = expected(mean, target, raw, g, mask=mask, **case.options)
    needs_target = case.strategy == "two_pass"
    if whole is not None:
        leaf = whole.detach().requires_grad_()
        given = leaf * 1 if case.inplace else leaf
        m, u = given.chunk(2, case.dim)
    else:
        m, u = (x.detach().requires_grad_() for x in (mean, raw))
    t = target.detach().requires_grad_(needs_target)
    inplace = case.inplace and whole is not None
    loss = vidfast.heteroscedastic_nll(
        m, t, u, mask=mask, strategy=case.strategy, inplace=inplace, backend=backend.name, **case.options
    )
    assert loss.dtype == dtype
    incoming = torch.tensor(g, dtype=dtype, device=loss.device)
    if whole is not None:
        loss.backward(incoming)
        assert leaf.grad is not None
        of_mean, of_raw = leaf.grad.chunk(2, case.dim)
        of_target = t.grad
    else:
        wanted = (m, t, u) if needs_target else (m, u)
        grads = torch.autograd.grad(loss, wanted, incoming)
        of_mean, of_raw, of_target = grads[0], grads[-1], grads[1] if needs_target else None
    check_results(want, dtype, loss, of_mean, of_target, of_raw, g)
