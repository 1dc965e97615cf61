"""Weights of positions, by the interpreted kernels: test_positions.py runs this file, in a process of its own.

The shared suite has masks too (tests/core/test_masks.py). Here every way through the kernels is taken, in tiles so
small that each has several, by the back end's methods as they are. The formula is in fp64, and written independently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from bounds import RELATIVE, check_gradient, check_scalar, ulps_allowed
from torch import Tensor

from vidfast import memory
from vidfast.arguments import Call
from vidfast.backends.triton import TritonBackend
from vidfast.backends.triton.plan import RULE, Tuning
from vidfast.layout import Layout
from vidfast.positions import Counts

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
BACKEND = TritonBackend()
assert BACKEND.unavailable() is None, BACKEND.unavailable()
SMALL_TILES = RULE._replace(warps=1, vectors=1, smallest_chunk=512)
EPS, K, G = 1e-5, 0.37, -2.5


@dataclass(frozen=True)
class Shape:
    """[outer, C, inner], and what is between two rows of mean and of target."""

    name: str
    outer: int
    channels: int
    inner: int
    gap: int = 0

    def __str__(self) -> str:
        return self.name


SHAPES = (
    Shape("planes", 2, 2, 300),
    Shape("planes_of_vectors", 2, 2, 512),
    Shape("a_plane_of_chunks", 1, 1, 3002),
    Shape("short_planes", 9, 2, 128),
    Shape("one_channel_with_a_tail", 3, 1, 503),
    Shape("strided_planes", 3, 1, 256, gap=16),
    Shape("small_planes", 17, 9, 49),
    Shape("small_planes_of_vectors", 17, 8, 16),
    Shape("channels_last", 37, 24, 1),
    Shape("many_rows", 200, 16, 1),
    Shape("no_vectors", 17, 131, 1, gap=2),
    Shape("odd_planes", 2, 2, 301),
    Shape("odd_small_planes", 17, 3, 7, gap=2),
    Shape("two_channels", 1, 2, 1500),
    Shape("joined_rows", 103, 10, 1),
    Shape("joined_small_planes", 35, 5, 4),
    Shape("strided_rows", 21, 24, 1, gap=8),
    Shape("one_value", 1, 1, 1),
)
PAIRS = ((F32, F32), (BF16, BF16), (F16, F32), (F32, F64))
KINDS = ("bytes", "numbers", "fractions", "halves", "one", "none")
NAN_OR_INF = (math.nan, math.inf, -math.inf)


def weights(kind: str, shape: Shape, wide: torch.dtype) -> Tensor:
    """[outer, inner]. halves: nothing of the first half is selected, so that whole tiles are not."""
    draw = torch.rand(shape.outer, shape.inner, dtype=F64)
    if kind == "bytes":
        return (draw < 0.3).to(torch.uint8) * 3
    if kind == "numbers":
        return (draw < 0.6).to(wide)
    if kind == "fractions":
        return torch.where(draw < 0.3, 0.0, draw).to(wide)
    w = torch.zeros(draw.numel(), dtype=torch.uint8)
    if kind == "halves":
        w[w.numel() // 2 :] = 1
    elif kind == "one":
        w[-1] = 1
    return w.view(draw.shape)


class Problem:
    """Tensors of a call. Values that no position's weight selects are NaN or infinite."""

    def __init__(self, shape: Shape, kind: str, mean: torch.dtype, target: torch.dtype) -> None:
        o, c, i = shape.outer, shape.channels, shape.inner
        width, stride = c * i, c * i + shape.gap
        self.wide = F64 if F64 in (mean, target) else F32
        self.w = weights(kind, shape, self.wide)
        self.layout = Layout(o, c, i, stride, stride)
        self.alpha = torch.randn(c)
        self.call = Call(channel=1, eps=EPS, full=True, k=K)
        self.rows: list[Tensor] = []
        for dtype in (mean, target):
            rows = torch.full((o, stride), 7.0, dtype=dtype)
            values = torch.randn(o, c, i)
            at_random = torch.tensor(NAN_OR_INF)[torch.randint(3, (o, c, i))]
            rows[:, :width] = torch.where(self.w[:, None] != 0, values, at_random).reshape(o, width)
            self.rows.append(rows)
        self.mean, self.target = self.rows

    def totals(self) -> Tensor:
        found = torch.empty(2, dtype=F64)
        BACKEND.total(self.w, None, self.w.numel(), K, self.layout.channels, totals=found)
        return found

    def dense(self, rows: Tensor) -> Tensor:
        o, c, i = self.layout[:3]
        return rows[:, : c * i].reshape(o, c, i)

    def check(
        self,
        loss: Tensor | None,
        sum_sq: Tensor | None,
        grad_mean: Tensor | None,
        grad_target: Tensor | None,
        grad_alpha: Tensor | None,
        g: float = 1.0,
    ) -> None:
        """What is given, against the formula."""
        w = self.w.double()[:, None]
        m, c = w.sum(), self.layout.channels
        k = float(K / (m * c)) if m > 0 else 0.0
        residual = torch.where(w != 0, self.dense(self.mean).double() - self.dense(self.target).double(), 0.0)
        v = torch.logaddexp(self.alpha.double(), torch.zeros(())) + EPS
        s = (w * residual**2).sum((0, 2))
        relative = RELATIVE[self.wide]
        if loss is not None:
            terms = 0.5 * (m * v.log() + s / v)
            size = k * 0.5 * (m * v.log().abs() + s / v).sum()
            want = k * (terms.sum() + 0.5 * m * c * math.log(2 * math.pi))
            check_scalar("loss", loss, want.numpy(), size.numpy() + k * float(m) * c, relative)
        if sum_sq is not None:
            check_scalar("S", sum_sq, s.numpy(), s.numpy(), relative)
        if grad_alpha is not None:
            slope = torch.sigmoid(self.alpha.double())
            want = g * k * (m / (2 * v) - s / (2 * v**2)) * slope
            size = abs(g) * k * (m / (2 * v) + s / (2 * v**2)) * slope
            check_scalar("d/d alpha", grad_alpha, want.numpy(), size.numpy(), relative)
        exact = g * k * w * residual / v[:, None]
        for name, grad, sign in (("mean", grad_mean, 1), ("target", grad_target, -1)):
            if grad is None:
                continue
            fractional = bool((self.w > 1).any() or (self.w.double() % 1).any())
            ulps = ulps_allowed(grad.dtype, False, True, fractional)
            check_gradient(f"d/d {name}", grad, (sign * exact).numpy(), ulps)
            assert not grad[(w == 0).expand(grad.shape)].count_nonzero(), "a gradient where nothing counts"


def outputs(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    o, c, i = p.layout[:3]
    return (
        torch.empty((), dtype=p.wide),
        torch.empty(c, dtype=F64),
        torch.empty(o, c, i, dtype=p.mean.dtype),
        torch.empty(o, c, i, dtype=p.target.dtype),
        torch.empty(c, dtype=F64),
    )


def run_all(p: Problem, g: float = G) -> None:
    """Every primitive, each against the formula."""
    counts = Counts(p.w, p.totals())
    loss, sum_sq, grad_mean, grad_target, grad_alpha = outputs(p)
    BACKEND.forward(p.mean, p.target, p.alpha, p.layout, p.call, loss=loss, sum_sq=sum_sq, counts=counts)
    p.check(loss, sum_sq, None, None, None)
    loss.fill_(math.nan)
    BACKEND.forward_grad(
        p.mean, p.target, p.alpha, p.layout, p.call,
        loss=loss, grad_mean=grad_mean, grad_alpha=grad_alpha, counts=counts,
    )  # fmt: skip
    p.check(loss, None, grad_mean, None, grad_alpha)
    for x in (grad_mean, grad_target, grad_alpha):
        x.fill_(math.nan)
    rounded = torch.empty_like(p.alpha)
    BACKEND.backward(
        torch.tensor(g), p.mean, p.target, p.alpha, sum_sq, p.layout, p.call,
        grad_mean=grad_mean, grad_target=grad_target, grad_alpha=rounded, counts=counts,
    )  # fmt: skip
    p.check(None, None, grad_mean, grad_target, rounded, g)


@pytest.fixture(autouse=True)
def _start(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(BACKEND, "rule", SMALL_TILES)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["bytes", "fractions", "halves"])
def test_every_way_through_the_kernels(shape: Shape, kind: str) -> None:
    run_all(Problem(shape, kind, F32, F32))


SOME = ("planes_of_vectors", "short_planes", "small_planes", "channels_last", "joined_rows")


def some(name: str) -> Shape:
    return next(shape for shape in SHAPES if shape.name == name)


@pytest.mark.parametrize("dtypes", PAIRS[1:], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_dtypes(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for kind in ("bytes", "fractions"):
        run_all(Problem(some(name), kind, *dtypes))


@pytest.mark.parametrize("kind", ["numbers", "one", "none"])
@pytest.mark.parametrize("name", SOME)
def test_few_positions_and_none(name: str, kind: str) -> None:
    run_all(Problem(some(name), kind, F32, BF16))


@pytest.mark.parametrize("rule", [RULE, SMALL_TILES._replace(ahead=0)], ids=["as_chosen", "behind"])
@pytest.mark.parametrize("name", SOME)
def test_other_free_numbers(monkeypatch: pytest.MonkeyPatch, name: str, rule: Tuning) -> None:
    monkeypatch.setattr(BACKEND, "rule", rule)
    run_all(Problem(some(name), "bytes", F32, F32))


@pytest.mark.parametrize("name", ["strided_planes", "strided_rows", "planes", "joined_rows"])
def test_in_place(name: str) -> None:
    p = Problem(some(name), "bytes", F32, BF16)
    loss, _, _, _, grad_alpha = outputs(p)
    mean = p.mean.clone()
    BACKEND.forward_grad(
        mean, p.target, p.alpha, p.layout, p.call._replace(inplace=True),
        loss=loss, grad_mean=mean, grad_alpha=grad_alpha, counts=Counts(p.w, p.totals()),
    )  # fmt: skip
    p.check(loss, None, p.dense(mean), None, grad_alpha)
    assert bool((mean[:, p.layout.channels * p.layout.inner :] == 7).all()), "written between rows"


@pytest.mark.parametrize("g", [math.inf, math.nan])
@pytest.mark.parametrize("name", SOME)
def test_gradients_are_0_where_nothing_counts_whatever_arrives(name: str, g: float) -> None:
    """A loss scaler's factor may be infinite."""
    p = Problem(some(name), "bytes", F32, F32)
    _, sum_sq, grad_mean, grad_target, _ = outputs(p)
    BACKEND.backward(
        torch.tensor(g), p.mean, p.target, p.alpha, sum_sq, p.layout, p.call,
        grad_mean=grad_mean, grad_target=grad_target, grad_alpha=None, counts=Counts(p.w, p.totals()),
    )  # fmt: skip
    chosen = (p.w != 0)[:, None].expand(grad_mean.shape)
    for grad in (grad_mean, grad_target):
        assert not grad[~chosen].count_nonzero()
        assert not grad[chosen].isfinite().any()


@pytest.mark.parametrize("want", [(True, False), (False, True)], ids=["mean", "target"])
@pytest.mark.parametrize("name", SOME)
def test_one_gradient(name: str, want: tuple[bool, bool]) -> None:
    p = Problem(some(name), "fractions", F32, F32)
    _, sum_sq, grad_mean, grad_target, _ = outputs(p)
    BACKEND.backward(
        torch.tensor(G, dtype=BF16), p.mean, p.target, p.alpha, sum_sq, p.layout, p.call,
        grad_mean=grad_mean if want[0] else None, grad_target=grad_target if want[1] else None, grad_alpha=None,
        counts=Counts(p.w, p.totals()),
    )  # fmt: skip
    p.check(None, None, grad_mean if want[0] else None, grad_target if want[1] else None, None, G)


@pytest.mark.parametrize("name", SOME)
def test_totals_without_positions(name: str) -> None:
    """A weight on the device: M and k are read there, everything else is as without."""
    p = Problem(some(name), "bytes", F32, F32)
    p.w = torch.ones_like(p.w)
    for rows in p.rows:
        rows.copy_(torch.randn(rows.shape))
    m, c = p.w.numel(), p.layout.channels
    k = 0.25 * 3.0 / (m * c)
    totals = torch.full((2,), math.nan, dtype=F64)
    BACKEND.total(None, torch.full((1,), 3.0, dtype=F16), m, 0.25, c, totals=totals)
    assert totals.tolist() == [m, pytest.approx(k, rel=1e-15)]
    found = []
    for counts, call in ((None, p.call._replace(k=k)), (Counts(None, totals), p.call._replace(k=math.nan))):
        loss, sum_sq, grad_mean, grad_target, grad_alpha = outputs(p)
        alone, beside = torch.empty(c), torch.empty(c)
        BACKEND.forward(p.mean, p.target, p.alpha, p.layout, call, loss=loss, sum_sq=sum_sq, counts=counts)
        found += [loss.clone(), sum_sq]
        BACKEND.forward_grad(
            p.mean, p.target, p.alpha, p.layout, call,
            loss=loss, grad_mean=grad_mean, grad_alpha=grad_alpha, counts=counts,
        )  # fmt: skip
        found += [loss, grad_mean.clone(), grad_alpha]
        BACKEND.backward(
            torch.tensor(G), p.mean, p.target, p.alpha, sum_sq, p.layout, call,
            grad_mean=grad_mean, grad_target=grad_target, grad_alpha=beside, counts=counts,
        )  # fmt: skip
        BACKEND.backward(
            torch.tensor(G), None, None, p.alpha, sum_sq, p.layout, call,
            grad_mean=None, grad_target=None, grad_alpha=alone, counts=counts,
        )  # fmt: skip
        found += [grad_mean, grad_target, beside, alone]
    for without, read in zip(found[:9], found[9:], strict=True):
        torch.testing.assert_close(read, without, rtol=1e-15, atol=0)


COUNTS = [1, 1000, (1 << 17) - 1, (1 << 17) + 1, 300_001]


def total(w: Tensor | None, factor: Tensor | None, count: int, k: float, channels: int) -> list[float]:
    totals = torch.full((2,), math.nan, dtype=F64)
    BACKEND.total(w, factor, count, k, channels, totals=totals)
    m, found = totals.tolist()
    return [m, found]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["u8", "f32", "f64"])
def test_the_sum_of_positions(kind: str, count: int) -> None:
    if kind == "u8":
        w = torch.randint(0, 256, (count,), dtype=torch.uint8)
        want, tolerance = float(w.sum(dtype=torch.int64)), 0.0
    else:
        w = torch.rand(count, dtype=F32 if kind == "f32" else F64)
        want, tolerance = math.fsum(w.tolist()), 1e-15 * count**0.5
    m, k = total(w, None, count, 0.3, 0)
    assert m == pytest.approx(want, rel=tolerance, abs=0)
    assert k == 0.3
    m, k = total(w, None, count, 0.3, 7)
    assert k == pytest.approx(0.3 / (m * 7), rel=1e-15)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_the_factor(dtype: torch.dtype) -> None:
    factor = torch.tensor(1 / 3, dtype=dtype)
    w = torch.tensor([0.5, 0.0, 2.0])
    assert total(w, factor, 3, 0.3, 0) == [2.5, 0.3 * float(factor)]
    assert total(w, factor, 3, 0.3, 2)[1] == pytest.approx(0.3 * float(factor) / 5, rel=1e-15)
    assert total(None, factor, 1 << 40, 0.3, 0) == [float(1 << 40), 0.3 * float(factor)]


@pytest.mark.parametrize("count", COUNTS)
def test_nothing_selected(count: int) -> None:
    assert total(torch.zeros(count), torch.tensor(2.0), count, 0.3, 5) == [0.0, 0.0]
    assert total(torch.zeros(count, dtype=torch.uint8), None, count, 0.3, 0) == [0.0, 0.0]


def test_what_is_no_number_stays_so() -> None:
    m, k = total(torch.tensor([1.0, math.nan]), None, 2, 0.3, 5)
    assert math.isnan(m)
    assert math.isnan(k)
    m, k = total(torch.ones(2), torch.tensor(math.nan), 2, 0.3, 5)
    assert m == 2
    assert math.isnan(k)


def test_many_positions_are_two_launches_and_few_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def workspace(count: int, like: Tensor) -> Tensor:
        asked.append(count)
        return memory.workspace(count, like)

    monkeypatch.setattr("vidfast.backends.triton.launch.workspace", workspace)
    total(torch.ones(1 << 17), None, 1 << 17, 1.0, 0)
    assert asked == []
    total(torch.ones((1 << 17) + 1), None, (1 << 17) + 1, 1.0, 0)
    assert asked == [5]
