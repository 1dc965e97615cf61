"""Problems of one variance an element, by a back end's methods as they are: strides, weights, dtypes, every output.

The oracle is vidfast/heteroscedastic/reference.py in fp64. What is between rows, and what no weight selects, is NaN or
infinite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from bounds import RELATIVE, check_scalar
from torch import Tensor

from vidfast.heteroscedastic import reference
from vidfast.heteroscedastic.arguments import CLAMP, EXP, LOG_VARIANCE, SOFTPLUS, HeteroscedasticCall
from vidfast.heteroscedastic.layout import Rows
from vidfast.positions import Counts, Weights

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TRANSFORMS = {"softplus": SOFTPLUS, "exp": EXP, "log_variance": LOG_VARIANCE, "clamp": CLAMP}
K, G = 0.37, -2.5
NAN_OR_INF = torch.tensor([math.nan, math.inf, -math.inf])
# What a gradient may be off before it is rounded to its dtype, in units of the type that it is computed in: some eight
# roundings of half a unit, and exp's and log's own.
UNITS = 6
OUTSIDE = 7.0  # what is between rows of memory that is written


@dataclass(frozen=True)
class Shape:
    """Rows of neighbours; what is between two of mean's, target's and raw's; what a weight is for."""

    name: str
    outer: int
    row: int
    gaps: tuple[int, int, int] = (0, 0, 0)
    channels: int = 1
    inner: int = 1
    shift: int = 0  # elements from an address that vectors may have

    def __str__(self) -> str:
        return self.name


SHAPES = (
    Shape("one", 1, 1),
    Shape("three", 1, 3),
    Shape("seven", 1, 7),
    Shape("one_vector", 1, 8),
    Shape("vectors", 1, 512),
    Shape("tail", 1, 403),
    Shape("shifted", 1, 300, shift=1),
    Shape("halves", 5, 96, (96, 0, 96), channels=6, inner=16),
    Shape("long_halves", 3, 320, (320, 0, 320), channels=5, inner=64),
    Shape("odd_rows", 7, 33, (2, 5, 0), channels=3, inner=11),
    Shape("halves_of_channels", 101, 3, (3, 0, 3), channels=3),
    Shape("rows_of_vectors", 31, 24, (8, 16, 24), channels=24),
    Shape("all_alike", 4, 40, channels=5, inner=8),
    Shape("planes", 1, 3 * 5 * 32, channels=5, inner=32),
    Shape("odd_planes", 1, 3 * 3 * 49, channels=3, inner=49),
    Shape("long_planes", 1, 2 * 2 * 304, channels=2, inner=304),
    Shape("channels_last", 1, 20 * 24, channels=24),
    Shape("few_channels_last", 1, 167 * 3, channels=3),
    Shape("many_channels_last", 1, 2 * 600, channels=600),
)
BY_NAME = {shape.name: shape for shape in SHAPES}


@dataclass(frozen=True)
class Problem:
    shape: Shape
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (F32, F32, F32)
    transform: str = "softplus"
    beta: float = 0.0
    weights: str = ""  # bytes, numbers, fractions; halves: nothing of the first half counts; one; none
    full: bool = True
    eps: float = 1e-3
    negative_is_nan: bool = False

    def __str__(self) -> str:
        names = dict.fromkeys(str(d).removeprefix("torch.") for d in self.dtypes)
        parts = [self.shape.name, self.transform, f"beta{self.beta:g}", *names]
        return "-".join([*parts, self.weights] if self.weights else parts)

    def made(self) -> Tensors:
        return Tensors(self)


class Tensors:
    """What a problem's call is given and asked for.

    Attributes:
        mean, target, raw: Rows with what is between them.
        w: [outer, row] in fp64, each element's weight.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        shape = problem.shape
        outer, row = shape.outer, shape.row
        self.wide = F64 if F64 in problem.dtypes else F32
        self.positions = self._positions()
        e = torch.arange(outer * row)
        if self.positions is None:
            self.w = torch.ones(outer, row, dtype=F64)
        else:
            at = e // (shape.channels * shape.inner) * shape.inner + e % shape.inner
            self.w = self.positions.double()[at].view(outer, row)
        strides = [row + gap for gap in shape.gaps]
        self.rows = Rows(outer, row, *strides, row, row, channels=shape.channels, inner=shape.inner)
        values = [torch.randn(outer, row), torch.randn(outer, row), 3 * torch.randn(outer, row)]
        if problem.transform == "clamp" and not problem.negative_is_nan:
            values[2] = torch.where(torch.rand(outer, row) < 0.1, values[2], values[2].abs())
        elif problem.transform == "clamp":
            values[2] = values[2].abs()
        self.mean, self.target, self.raw = (
            self._rows(x, dtype, gap)
            for x, dtype, gap in zip(values, problem.dtypes, shape.gaps, strict=True)
        )
        self.call = HeteroscedasticCall(
            TRANSFORMS[problem.transform], 0.0 if problem.transform == "log_variance" else problem.eps, problem.beta,
            reduction="sum", full=problem.full, k=K, negative_is_nan=problem.negative_is_nan,
        )  # fmt: skip
        self.counts = None
        if self.positions is not None:
            self.counts = Counts(self.positions, torch.tensor([math.nan, K], dtype=F64))
            self.call = self.call._replace(k=math.nan)

    def _positions(self) -> Tensor | None:
        kind, shape = self.problem.weights, self.problem.shape
        if not kind:
            return None
        count = shape.outer * shape.row // shape.channels
        draw = torch.rand(count, dtype=F64)
        if kind == "bytes":
            return (draw < 0.4).to(torch.uint8) * 3
        if kind == "numbers":
            return (draw < 0.6).to(self.wide)
        if kind == "fractions":
            return torch.where(draw < 0.4, 0.0, draw).to(self.wide)
        w = torch.zeros(count, dtype=torch.uint8)
        if kind == "halves":
            w[count // 2 :] = 1
        elif kind == "one":
            w[-1] = 1
        return w

    def memory(self, dtype: torch.dtype, gap: int, fill: float) -> Tensor:
        """[outer, row + gap], where the problem's tensors are stored, or one as they are."""
        shape = self.problem.shape
        count = shape.outer * (shape.row + gap)
        whole = torch.full((count + shape.shift,), fill, dtype=dtype)
        return whole[shape.shift :].view(shape.outer, shape.row + gap)

    def _rows(self, values: Tensor, dtype: torch.dtype, gap: int) -> Tensor:
        there = self.memory(dtype, gap, math.nan)
        spoilt = NAN_OR_INF[torch.randint(3, values.shape)]
        there[:, : values.shape[1]] = torch.where(self.w != 0, values, spoilt)
        return there

    def dense(self, x: Tensor) -> Tensor:
        """Without what is between rows; where there is none x itself."""
        return x[:, : self.problem.shape.row]

    def given(self) -> tuple[Tensor, Tensor, Tensor, Rows, HeteroscedasticCall]:
        """What every method takes first."""
        return self.dense(self.mean), self.dense(self.target), self.dense(self.raw), self.rows, self.call

    def empty(self, like: Tensor) -> Tensor:
        """Memory for the gradient of that tensor."""
        return self.memory(like.dtype, 0, OUTSIDE)

    def check(
        self,
        loss: Tensor | None = None,
        grad_mean: Tensor | None = None,
        grad_target: Tensor | None = None,
        grad_raw: Tensor | None = None,
        g: float = 1.0,
        mean: Tensor | None = None,
        raw: Tensor | None = None,
    ) -> None:
        """What is given, against the oracle. mean and raw: as they were before a call in place."""
        problem, w = self.problem, self.w
        mean, raw = self.mean if mean is None else mean, self.raw if raw is None else raw
        given = [self.dense(x).double() for x in (mean, self.target, raw)]
        leaves = [x.clone().requires_grad_() for x in given]
        call = self.call._replace(weight=K)
        want = reference.nll(*leaves, call, Weights(w, None))
        exact = torch.autograd.grad(want, leaves)
        chosen = w != 0
        m, t, u = (torch.where(chosen, x, 0.0) for x in given)
        v, p = self._variance(u)
        f, ratio = K * w * v**problem.beta, (m - t) ** 2 / v
        relative = UNITS * torch.finfo(self.wide).eps
        more = torch.ones(())
        if problem.beta not in (0.0, 0.5, 1.0):  # exp of a rounded logarithm, times a rounded power
            more = 1 + 1.5 / UNITS * max(problem.beta, abs(problem.beta - 1)) * v.log().abs()
        constant = math.log(2 * math.pi) if problem.full else 0.0
        if loss is not None:
            size = (more * f / 2 * (v.log().abs() + ratio + constant)).sum()
            check_scalar("loss", loss, want.detach().numpy(), size.numpy(), RELATIVE[self.wide] + relative)
        for name, got, value, size in (
            ("mean", grad_mean, exact[0], exact[0].abs()),
            ("target", grad_target, exact[1], exact[1].abs()),
            ("raw", grad_raw, exact[2], f / 2 * (1 + ratio) * p),
        ):
            if got is not None:
                scaled = (abs(g) * more * size).numpy()
                check_scalar(f"d/d {name}", self.dense(got), g * value.numpy(), scaled, relative)
                assert not self.dense(got)[~chosen].count_nonzero(), f"d/d {name} where nothing counts"
                between = got[:, problem.shape.row :]
                assert bool((between == OUTSIDE).all() | between.isnan().all()), "written between rows"

    def _variance(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(v, dv/du / v) of what counts."""
        eps, transform = self.problem.eps, self.problem.transform
        if transform == "softplus":
            v = torch.logaddexp(u, torch.zeros(())) + eps
            return v, torch.sigmoid(u) / v
        if transform == "clamp":
            v = u.clamp(min=eps)
            return v, 1 / v
        v = u.exp() + (eps if transform == "exp" else 0.0)
        return v, u.exp() / v


def run_all(backend: Any, problem: Problem, g: float = G) -> None:
    """Every method, each output against the oracle."""
    x = problem.made()
    given = x.given()
    loss = torch.empty((), dtype=x.wide)
    backend.heteroscedastic_forward(*given, loss=loss, counts=x.counts)
    x.check(loss)
    loss.fill_(math.nan)
    grads = [x.empty(like) for like in (x.mean, x.target, x.raw)]
    backend.heteroscedastic_forward_grad(
        *given, loss=loss, grad_mean=grads[0], grad_raw=grads[2], counts=x.counts
    )
    x.check(loss, grads[0], None, grads[2])
    grads = [x.empty(like) for like in (x.mean, x.target, x.raw)]
    backend.heteroscedastic_backward(
        torch.tensor(g), *given, grad_mean=grads[0], grad_target=grads[1], grad_raw=grads[2], counts=x.counts
    )
    x.check(None, *grads, g=g)


def run_in_place(backend: Any, problem: Problem) -> None:
    """d/d mean over mean, and d/d raw over raw."""
    x = problem.made()
    loss = torch.empty((), dtype=x.wide)
    mean, raw = x.mean.clone(), x.raw.clone()
    if problem.shape.shift:
        mean, raw = (x.memory(y.dtype, 0, 0.0).copy_(y) for y in (mean, raw))
    before = mean.clone(), raw.clone()
    rows = x.rows._replace(grad_mean_stride=x.rows.mean_stride, grad_raw_stride=x.rows.raw_stride)
    m, t, u = x.dense(mean), x.dense(x.target), x.dense(raw)
    backend.heteroscedastic_forward_grad(
        m, t, u, rows, x.call, loss=loss, grad_mean=m, grad_raw=u, counts=x.counts
    )
    x.check(loss, mean, None, raw, mean=before[0], raw=before[1])
