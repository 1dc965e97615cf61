"""What the interpreter's instructions give, against numpy, torch and exact arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from small_programs import elementwise
from torch import Tensor

F32, F64, I32, I64 = torch.float32, torch.float64, torch.int32, torch.int64
COUNT = 4096


def numbers(dtype: torch.dtype, seed: int) -> Tensor:
    """Of every size, and special ones."""
    random = np.random.default_rng(seed)
    bits = {F32: np.uint32, F64: np.uint64}[dtype]
    x = torch.from_numpy(random.integers(0, np.iinfo(bits).max, COUNT, bits, endpoint=True)).view(dtype)
    x[: COUNT // 2] = torch.from_numpy(random.standard_normal(COUNT // 2)).to(dtype)
    info = torch.finfo(dtype)
    special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        float("inf"),
        -float("inf"),
        float("nan"),
        info.tiny,
        info.max,
        info.tiny * info.eps,
    ]
    x[: len(special)] = torch.tensor(special, dtype=F64).to(dtype)
    return x[torch.from_numpy(random.permutation(COUNT))]


def integers(dtype: torch.dtype, seed: int) -> Tensor:
    info = np.iinfo({I32: np.int32, I64: np.int64}[dtype])
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.integers(info.min, info.max, COUNT, info.dtype, endpoint=True))
    x[:200] = torch.from_numpy(random.integers(-3, 4, 200)).to(dtype)
    x[200:204] = torch.tensor([info.min, info.max, 0, -1], dtype=dtype)
    return x


def same(got: Tensor, want: Tensor) -> None:
    """To the bit, but for the bits of NaN."""
    assert got.dtype == want.dtype
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    equal = got.view(kind) == want.view(kind)
    if got.is_floating_point():
        equal |= got.isnan() & want.isnan()
    assert equal.all(), (got[~equal][:5], want[~equal][:5])


def exact(a: float, b: float, c: float) -> Fraction | None:
    if not all(np.isfinite((a, b, c))):
        return None
    return Fraction(a) * Fraction(b) + Fraction(c)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_fma_rounds_once(dtype: torch.dtype) -> None:
    a, b, c = (numbers(dtype, i) for i in range(3))
    # sums that nearly cancel, and ones that lie halfway between two numbers
    c[:1000] = -(a * b)[:1000] * (1 + torch.finfo(dtype).eps * torch.randint(-1, 2, (1000,)))
    one = torch.finfo(dtype).eps
    a[1000:1100], b[1000:1100] = 1 + one, 1 + one * torch.arange(100).to(dtype)
    c[1000:1100] = 2.0 ** torch.arange(100).to(dtype)
    kind = "f32" if dtype is F32 else "f64"
    got = elementwise(f"fma.rn.{kind} {{0}}, {{1}}, {{2}}, {{3}};", (a, b, c), torch.empty_like(a))
    finite = 0
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        value = exact(x, y, z)
        if value is None or not np.isfinite(result):
            continue
        finite += 1
        # nearer than its neighbours, or as near and even
        own = Fraction(result)
        number = np.float32(result) if dtype is F32 else np.float64(result)
        for towards in (-np.inf, np.inf):
            with np.errstate(over="ignore"):
                neighbour = np.nextafter(number, number.dtype.type(towards))
            if np.isfinite(neighbour):
                off, other = abs(own - value), abs(Fraction(float(neighbour)) - value)
                even = int(number.view(np.uint32 if dtype is F32 else np.uint64)) % 2 == 0
                assert off < other or (off == other and even), (x, y, z, result)
    assert finite > COUNT // 2


@pytest.mark.parametrize("name", ["fma.rm", "add.rz"])
def test_directed_rounding(name: str) -> None:
    """Of the two neighbours of the exact value the lower one, and the one nearer to 0."""
    a, b, c = (numbers(F32, i) for i in range(5, 8))
    c[:1000] = -(a * b)[:1000] * (1 + 2**-23 * torch.randint(-1, 2, (1000,)))
    b[1000:1500], a[1000:1500] = a[1000:1500] * 2.0 ** torch.randint(-30, 30, (500,)), 1.0
    inputs, operands = ((a, b, c), "{1}, {2}, {3}") if name == "fma.rm" else ((b, c), "{1}, {2}")
    got = elementwise(f"{name}.f32 {{0}}, {operands};", inputs, torch.empty_like(a))
    finite = 0
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        value = exact(x, y, z) if name == "fma.rm" else exact(1.0, y, z)
        if value is None or not np.isfinite(result):
            continue
        finite += 1
        other = np.inf if name == "fma.rm" else math.copysign(np.inf, value)
        with np.errstate(over="ignore"):
            neighbour = float(np.nextafter(np.float32(result), np.float32(other)))
        size = abs if name == "add.rz" else (lambda v: v)
        assert size(Fraction(result)) <= size(value), (x, y, z, result)
        assert not np.isfinite(neighbour) or size(Fraction(neighbour)) > size(value), (x, y, z, result)
    assert finite > COUNT // 3


def test_saturation() -> None:
    a = torch.tensor([-math.inf, -1.0, -0.0, 0.0, 0.25, 1.0, 1.5, math.inf, math.nan] * 32)[:256]
    got = elementwise("cvt.sat.f32.f32 {0}, {1};", (a,), torch.empty_like(a))
    same(got, torch.tensor([0.0, 0.0, 0.0, 0.0, 0.25, 1.0, 1.0, 1.0, 0.0] * 32)[:256])


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    "name", ["add", "sub", "mul", "div.rn", "min", "max", "neg", "abs", "sqrt.rn", "rcp.rn"]
)
def test_floating_point(name: str, dtype: torch.dtype) -> None:
    a, b = numbers(dtype, 3), numbers(dtype, 4)
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div.rn": torch.div,
        "min": lambda a, b: torch.where(b.isnan() | (a < b), a, b),
        "max": lambda a, b: torch.where(b.isnan() | (a > b), a, b),
        "neg": lambda a, b: -a, "abs": lambda a, b: a.abs(), "rcp.rn": lambda a, b: 1 / a,
        "sqrt.rn": lambda a, b: torch.tensor([math.nan if x < 0 else math.sqrt(x) for x in a.tolist()], dtype=dtype),
    }  # fmt: skip
    kind = "f32" if dtype is F32 else "f64"
    second = ", {2}" if name in ("add", "sub", "mul", "div.rn", "min", "max") else ""
    got = elementwise(f"{name}.{kind} {{0}}, {{1}}{second};", (a, b), torch.empty_like(a))
    want = functions[name](a, b)
    if name in ("min", "max"):  # of zeros below
        got, want = got + 0.0, want + 0.0
    same(got, want)


def test_the_lesser_zero_is_the_negative_one() -> None:
    a, b = torch.tensor([0.0, -0.0] * 16), torch.tensor([-0.0, 0.0] * 16)
    assert torch.signbit(elementwise("min.f32 {0}, {1}, {2};", (a, b), torch.empty_like(a))).all()
    assert not torch.signbit(elementwise("max.f32 {0}, {1}, {2};", (a, b), torch.empty_like(a))).any()


def test_flush_to_zero() -> None:
    a = torch.tensor([1e-40, -1e-40, 1.5, 2.0**-126] * 8)
    got = elementwise("add.ftz.f32 {0}, {1}, {1};", (a,), torch.empty_like(a))
    same(got, torch.tensor([0.0, -0.0, 3.0, 2.0**-125] * 8))
    same(elementwise("add.f32 {0}, {1}, {1};", (a,), torch.empty_like(a)), a + a)


def test_the_rough_reciprocal_has_the_upper_half_of_the_bits() -> None:
    a = numbers(F64, 5)
    got = elementwise("rcp.approx.ftz.f64 {0}, {1};", (a,), torch.empty_like(a))
    assert (got.view(I64) & 0xFFFFFFFF == 0).all()
    usual = (a.abs() > 1e-300) & (a.abs() < 1e300)
    assert ((got * a)[usual] - 1).abs().max() < 2**-20


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_16_bits(to: torch.dtype) -> None:
    """To nearest, ties to even; NaN is one NaN."""
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[to]
    a = numbers(F32, 6)
    a[:1000] = torch.arange(1000).to(F32) * 2.0**-9 + 1  # ties among them
    got = elementwise(f"cvt.rn.{name}.f32 {{0}}, {{1}};", (a,), torch.empty(COUNT, dtype=to))
    same(got, a.to(to))
    assert (got.view(torch.int16)[a.isnan()] == 0x7FFF).all()
    same(elementwise(f"cvt.f32.{name} {{0}}, {{1}};", (got,), torch.empty(COUNT)), got.float())
    pair = elementwise(
        f"cvt.rn.{name}x2.f32 {{0}}, {{1}}, {{2}};", (a, a.flip(0)), torch.empty(COUNT, dtype=I32)
    )
    same(pair.view(to).view(-1, 2)[:, 1].contiguous(), got)
    same(pair.view(to).view(-1, 2)[:, 0].contiguous(), got.flip(0))


def test_bf16() -> None:
    """Signs and comparisons, one by one and of two at once: the lower halves' comparison is the first."""
    a, b = (numbers(F32, i).to(torch.bfloat16) for i in (17, 18))
    b[:500] = a[:500]
    pairs = [x.view(I32) for x in (a, b)]
    for name, want in (("neg", -a), ("abs", a.abs())):
        same(elementwise(f"{name}.bf16 {{0}}, {{1}};", (a,), torch.empty_like(a)), want)
        two = elementwise(f"{name}.bf16x2 {{0}}, {{1}};", pairs[:1], torch.empty_like(pairs[0]))
        same(two.view(torch.bfloat16), want)
    for name, wanted in (("le", a <= b), ("gt", a > b), ("neu", a != b)):
        if name == "neu":
            wanted = wanted | a.isnan() | b.isnan()
        body = f"setp.{name}.bf16 {{p}}, {{1}}, {{2}};\n selp.b32 {{0}}, 1, 0, {{p}};"
        got = elementwise(body, (a, b), torch.empty(COUNT, dtype=I32))
        assert got.tolist() == wanted.int().tolist()
        body = (
            f"setp.{name}.bf16x2 %p2|%p3, {{1}}, {{2}};\n selp.b32 %r20, 1, 0, %p2;\n selp.b32 %r21, 2, 0, %p3;\n"
            "or.b32 {0}, %r20, %r21;"
        )
        got = elementwise(body, pairs, torch.empty_like(pairs[0]))
        assert got.tolist() == (wanted[::2].int() + 2 * wanted[1::2].int()).tolist()


@pytest.mark.parametrize(
    ("name", "source", "to"),
    [("rn.f32.f64", F64, F32), ("f64.f32", F32, F64), ("rn.f64.s64", I64, F64), ("rn.f32.s32", I32, F32),
     ("s64.s32", I32, I64), ("u32.u64", I64, I32)],
)  # fmt: skip
def test_conversions(name: str, source: torch.dtype, to: torch.dtype) -> None:
    x = numbers(source, 7) if source.is_floating_point else integers(source, 7)
    same(elementwise(f"cvt.{name} {{0}}, {{1}};", (x,), torch.empty(COUNT, dtype=to)), x.to(to))


def test_conversions_to_integers_saturate() -> None:
    x = torch.tensor([1.5, 2.5, -1.5, -2.5, 3e9, -3e9, float("nan"), float("inf")] * 4)
    out = torch.empty(32, dtype=I32)
    low, high = -(2**31), 2**31 - 1
    for name, want in (
        ("rni.s32.f32", [2, 2, -2, -2, high, low, 0, high]),
        ("rzi.s32.f32", [1, 2, -1, -2, high, low, 0, high]),
        ("rmi.s32.f32", [1, 2, -2, -3, high, low, 0, high]),
        ("rzi.u32.f32", [1, 2, 0, 0, 3000000000 - 2**32, 0, 0, -1]),
    ):
        assert elementwise(f"cvt.{name} {{0}}, {{1}};", (x,), out.clone()).tolist() == want * 4, name


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("signed", [True, False])
def test_products_of_integers(bits: int, signed: bool) -> None:
    dtype = I32 if bits == 32 else I64
    kind = f"{'s' if signed else 'u'}{bits}"
    a, b = integers(dtype, 8), integers(dtype, 9)
    whole = [x % 2**bits if not signed else x for x in a.tolist()]
    other = [x % 2**bits if not signed else x for x in b.tolist()]

    def wrapped(x: int, n: int) -> int:
        half: int = 2 ** (n - 1)
        return (x + half) % (2 * half) - half

    products = [x * y for x, y in zip(whole, other, strict=True)]
    for name, shift in (("lo", 0), ("hi", bits)):
        got = elementwise(f"mul.{name}.{kind} {{0}}, {{1}}, {{2}};", (a, b), torch.empty_like(a))
        assert got.tolist() == [wrapped(p >> shift, bits) for p in products], name
        got = elementwise(f"mad.{name}.{kind} {{0}}, {{1}}, {{2}}, {{2}};", (a, b), torch.empty_like(a))
        sums = [(p >> shift) + y for p, y in zip(products, other, strict=True)]
        assert got.tolist() == [wrapped(x, bits) for x in sums], name
    if bits == 32:
        c = integers(I64, 10)
        got = elementwise(f"mad.wide.{kind} {{0}}, {{1}}, {{2}}, {{3}};", (a, b, c), torch.empty_like(c))
        assert got.tolist() == [wrapped(p + z, 64) for p, z in zip(products, c.tolist(), strict=True)]


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_division_of_integers_goes_towards_zero(kind: str) -> None:
    dtype, bits = (I32, 32) if "32" in kind else (I64, 64)
    a, b = integers(dtype, 11), integers(dtype, 12)
    b[b == 0], b[b == -1] = 7, 3
    values = [
        (x, y) if kind[0] == "s" else (x % 2**bits, y % 2**bits)
        for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    quotients = [abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in values]
    got = elementwise(f"div.{kind} {{0}}, {{1}}, {{2}};", (a, b), torch.empty_like(a))
    rest = elementwise(f"rem.{kind} {{0}}, {{1}}, {{2}};", (a, b), torch.empty_like(a))
    assert [x % 2**bits for x in got.tolist()] == [x % 2**bits for x in quotients]
    assert [x % 2**bits for x in rest.tolist()] == [
        (x - y * q) % 2**bits for (x, y), q in zip(values, quotients, strict=True)
    ]


def test_bits() -> None:
    a, b = integers(I32, 13), integers(I32, 14)
    x, y = (t.numpy().view(np.uint32).astype(np.uint64) for t in (a, b))
    by = b & 63
    for instruction, want in (
        ("shl.b32 {0}, {1}, {2};", [(v << s) % 2**32 for v, s in zip(x.tolist(), by.tolist(), strict=True)]),
        ("shr.u32 {0}, {1}, {2};", [v >> s for v, s in zip(x.tolist(), by.tolist(), strict=True)]),
        ("shr.s32 {0}, {1}, {2};", [(v >> s) % 2**32 for v, s in zip(a.tolist(), by.tolist(), strict=True)]),
    ):
        got = elementwise(instruction, (a, by), torch.empty_like(a))
        assert [v % 2**32 for v in got.tolist()] == want, instruction
    for instruction, expected in (
        ("lop3.b32 {0}, {1}, {2}, {1}, 0x96;", x ^ y ^ x),
        ("prmt.b32 {0}, {1}, {2}, 0x7610;", (x & 0xFFFF) | ((y >> 16) << 16)),
        ("shf.l.wrap.b32 {0}, {1}, {2}, 8;", ((y << 8) | (x >> 24)) & 0xFFFFFFFF),
        ("bfe.u32 {0}, {1}, 5, 9;", (x >> 5) & 511),
        ("bfe.u32 {0}, {1}, 32, 9;", x & 0),
        ("bfi.b32 {0}, {1}, {2}, 4, 8;", (y & ~np.uint64(0xFF0)) | ((x & 0xFF) << 4)),
        ("popc.b32 {0}, {1};", np.array([v.bit_count() for v in x.tolist()])),
        ("clz.b32 {0}, {1};", np.array([32 - v.bit_length() for v in x.tolist()])),
        ("brev.b32 {0}, {1};", np.array([int(f"{v:032b}"[::-1], 2) for v in x.tolist()])),
        ("not.b32 {0}, {1};", x ^ 0xFFFFFFFF),
    ):
        got = elementwise(instruction, (a, b), torch.empty_like(a))
        assert [v % 2**32 for v in got.tolist()] == [int(v) for v in expected], instruction
    field = elementwise("bfe.s32 {0}, {1}, 28, 3;", (a,), torch.empty_like(a))
    assert field.tolist() == [((v >> 28) & 7) - 8 * ((v >> 30) & 1) for v in a.tolist()]


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons_with_nan(name: str) -> None:
    a, b = numbers(F32, 15), numbers(F32, 16)
    b[:500] = a[:500]
    nan = a.isnan() | b.isnan()
    plain = getattr(torch, name)(a, b)
    for suffix, want in (("", plain & ~nan), ("u", plain | nan)):
        text = f"setp.{name}{suffix}.f32 {{p}}, {{1}}, {{2}};\n selp.b32 {{0}}, 1, 0, {{p}};"
        assert torch.equal(elementwise(text, (a, b), torch.empty(COUNT, dtype=I32)), want.int())


def test_predicates() -> None:
    a = torch.arange(32, dtype=I32)
    text = """setp.gt.s32 %p2, {1}, 7;
    setp.lt.and.s32 {p}|%p3, {1}, 20, %p2;
    not.pred %p4, %p2;
    or.pred %p5, %p3, %p4;
    mov.u32 {0}, 0;
    @{p} add.u32 {0}, {0}, 1;
    @!%p2 add.u32 {0}, {0}, 2;
    @%p5 add.u32 {0}, {0}, 4;"""
    want = [(7 < i < 20) + 2 * (i <= 7) + 4 * ((i > 7 and i >= 20) or i <= 7) for i in range(32)]
    assert elementwise(text, (a,), torch.empty_like(a)).tolist() == want


def test_packing_and_scopes() -> None:
    a = integers(I64, 17)
    text = """{{ .reg .b32 %low; .reg .b32 %high;
    mov.b64 {{%low, %high}}, {1};
    {{ .reg .b64 %low; mov.b64 %low, 5; }}
    mov.b64 {0}, {{%high, %low}}; }}"""
    want = [((v >> 32) & 0xFFFFFFFF) | ((v & 0xFFFFFFFF) << 32) for v in a.tolist()]
    assert [v % 2**64 for v in elementwise(text, (a,), torch.empty_like(a)).tolist()] == want
