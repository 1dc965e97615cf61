"""Heads in parts in every precision, against fp64 and against the same layers one after the other."""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import Any

import pytest
import torch
from heads import (
    ARRANGEMENTS,
    KINDS,
    Ways,
    channel_dim,
    distance,
    exact,
    features,
    gradients,
    layer_by_layer,
    layers,
    spread_alpha,
    stored,
)
from problems import BF16, FP16, FP32, short
from torch import Tensor, nn

import vidfast
from vidfast.head import parts, plan, way
from vidfast.head.arrangement import Planes

# torch.amp.GradScaler's first factor.
SCALER = 65536.0
# What a step may be farther from fp64 than the layers one after the other: rounding falls otherwise.
NO_FARTHER = 1.25


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(7)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    return Ways(monkeypatch)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32(ways: Ways, kind: str, depth: int, bias: bool, arrangement: str) -> None:
    widths = (5, *(8, 9)[: depth - 1], 6)
    regressor, alpha, dim = layers(kind, *widths, bias=bias), spread_alpha(6), channel_dim(kind)
    student, target = features(kind, 7, 5), features(kind, 7, 6)
    with stored(arrangement, samples_bytes=3000):
        found = gradients(regressor, alpha, student, target, dim)
    assert ways.names == [arrangement]
    for ours, wanted in zip(found, exact(regressor, alpha, student, target, dim), strict=True):
        assert distance(ours, wanted) < 2e-6


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("fast", [True, False], ids=["16-bit products", "fp32 products"])
@pytest.mark.parametrize("whole", ["autocast", "autocast of 16-bit features", "modules"])
@pytest.mark.parametrize("kind", ["maps", "tokens"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=short)
def test_16_bits_are_no_farther_from_fp64_than_layer_by_layer(
    ways: Ways, dtype: torch.dtype, kind: str, whole: str, fast: bool, arrangement: str
) -> None:
    regressor, alpha, dim = layers(kind, 24, 48, 32, bias=True), spread_alpha(32), channel_dim(kind)
    student, target = features(kind, 12, 24), features(kind, 12, 32)
    # What comes to the ReLU is exact in either type: one that decides otherwise would outweigh all rounding.
    with torch.no_grad():
        student = (2 * student).round().clamp(-4, 4) / 2
        regressor[0].weight.copy_(torch.randint(-2, 3, (48, 24)).view_as(regressor[0].weight) / 4)
        regressor[0].bias.zero_()
    if whole != "autocast":
        student, target = student.to(dtype), target.to(dtype)
    if whole == "modules":
        regressor, alpha = regressor.to(dtype), alpha
    amp, g = None if whole == "modules" else dtype, SCALER if dtype is FP16 else 1.0
    wanted = exact(regressor, alpha, student, target, dim)
    with stored(arrangement, samples_bytes=50_000, fast=fast):
        ours = gradients(regressor, alpha, student, target, dim, amp, g)
    assert set(ways.names) == {arrangement}
    for made in ways.plans:
        assert made.products is (dtype if fast else FP32)
    with layer_by_layer():
        apart = gradients(regressor, alpha, student, target, dim, amp, g)
    unit = torch.finfo(dtype).eps
    for found, theirs, right in zip(ours, apart, wanted, strict=True):
        # of a few numbers, as a bias's, chance decides: below a fraction of the type's precision none is farther
        assert distance(found, right) <= max(NO_FARTHER * distance(theirs, right), 0.8 * unit)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=short)
@pytest.mark.parametrize("fast", [True, False], ids=["16-bit products", "fp32 products"])
def test_16_bits_have_no_bias(dtype: torch.dtype, fast: bool) -> None:
    """Errors of many parts average out: neither all weights' gradients nor the student's are drawn to one side."""
    regressor, alpha = layers("maps", 24, 48, 32), spread_alpha(32)
    student, target = features("maps", 40, 24, 10), features("maps", 40, 32, 10)
    wanted = exact(regressor, alpha, student, target, 1)
    with stored("planes", samples_bytes=40_000, fast=fast):
        found = gradients(regressor, alpha, student, target, 1, dtype, SCALER if dtype is FP16 else 1.0)
    for ours, right in zip(found[1:], wanted[1:], strict=True):
        slope = float((ours * right).sum() / right.square().sum())
        assert abs(slope - 1) < 0.3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("fast", [True, False], ids=["16-bit products", "fp32 products"])
@pytest.mark.parametrize("weight", [1.0, -0.37, 2.0**-12], ids="weight {}".format)
@pytest.mark.parametrize("lowest", [-2.0, -11.0], ids="log_scale from {}".format)
def test_in_fp16_nothing_vanishes_and_nothing_overflows(fast: bool, weight: float, lowest: float) -> None:
    """k is weight / N: its gradients at g = 1 are below fp16's smallest number, and 1 / v_c near its largest."""
    regressor = layers("maps", 8, 16, 16).half()
    alpha = nn.Parameter(torch.linspace(lowest, 3.0, 16))
    student, target = features("maps", 32, 8, 30).half(), features("maps", 32, 16, 30).half()
    wanted = exact(regressor, alpha, student, target, 1, weight)
    with stored("planes", fast=fast):
        # as a scaler would have it: gradients of up to 300 are beyond fp16 with its first factor
        g = SCALER if lowest > -3 else SCALER / 1024
        found = gradients(regressor, alpha, student, target, 1, g=g, weight=weight)
    for ours, right in zip(found, wanted, strict=True):
        assert distance(ours, right) < 4e-3


def test_fp16_at_seventeen_million_elements_with_a_scaler() -> None:
    regressor, alpha = layers("maps", 4, 64), spread_alpha(64)
    student = torch.randn(64, 4, 64, 66)
    target = torch.randn(64, 64, 64, 66).half()
    assert target.numel() > 17e6
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD([*regressor.parameters(), alpha], lr=1.0)
    student.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        loss = vidfast.vid_head(student, target, alpha, regressor[0].weight)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert student.grad is not None
    student.grad /= scaler.get_scale()
    # the first samples speak for the student's gradient: it has nothing of the others
    some = slice(0, 2)
    wanted = exact(regressor, alpha, student[some], target[some], 1, 2 / 64)
    assert distance(student.grad[some], wanted[1]) < 2e-3
    weight = regressor[0].weight.grad
    assert weight is not None
    assert bool(weight.isfinite().all())
    assert bool((weight != 0).all())
    before = regressor[0].weight.detach().clone()
    scaler.step(optimizer)
    assert not torch.equal(before, regressor[0].weight)


@pytest.mark.parametrize("arrangement", ["kernel", "planes"])
def test_an_fp16_gradient_that_is_too_large_is_made_again_smaller(ways: Ways, arrangement: str) -> None:
    """A residual of 30000 over a variance of 1/16, through weights of 4: beyond fp16 at any scale that a scaler has."""
    regressor = layers("maps", 4, 8, 8)
    with torch.no_grad():
        for parameter in regressor.parameters():
            parameter.uniform_(3.0, 4.0)
    alpha = nn.Parameter(torch.full((8,), -2.7))
    student, target = features("maps", 4, 4).abs(), torch.full((4, 8, 6, 7), -30000.0)
    wanted = exact(regressor, alpha, student, target, 1)
    with stored(arrangement, fast=False):
        found = gradients(regressor, alpha, student, target, 1, FP16, g=2.0**-8)
    assert len(ways.names) == 2
    for ours, right in zip(found, wanted, strict=True):
        assert distance(ours, right) < 4e-3


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=short)
def test_weights_are_cast_once_a_step(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    casts: list[int] = []
    cast = parts._Layers._as_products

    def counted(self: Any, weight: Tensor) -> Tensor:
        casts.append(weight.numel())
        return cast(self, weight)

    monkeypatch.setattr(parts._Layers, "_as_products", counted)
    regressor, alpha = layers("maps", 5, 8, 6, bias=True), spread_alpha(6)
    with stored("planes", samples_bytes=1):
        gradients(regressor, alpha, features("maps", 7, 5), features("maps", 7, 6), 1, dtype, SCALER)
    assert casts == [40, 48, 8, 6]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=short)
@pytest.mark.parametrize("fast", [True, False], ids=["16-bit products", "fp32 products"])
def test_without_gradients_the_loss_is_the_same(dtype: torch.dtype, fast: bool) -> None:
    regressor, alpha = layers("maps", 5, 8, 6, bias=True), spread_alpha(6)
    student, target = features("maps", 7, 5), features("maps", 7, 6)
    amp = None if dtype is FP32 else dtype
    with stored("rows", samples_bytes=3000, fast=fast):
        loss = gradients(regressor, alpha, student, target, 1, amp)[0]
        with torch.no_grad():
            alone = loss_without_gradients(regressor, alpha, student, target, amp)
    assert torch.equal(loss, alone)


def loss_without_gradients(
    regressor: nn.Sequential, alpha: Tensor, student: Tensor, target: Tensor, amp: torch.dtype | None
) -> Tensor:
    from vidfast.regressor import regressed_nll

    with torch.autocast("cpu", dtype=amp or BF16, enabled=amp is not None):
        return regressed_nll(regressor, student, target, alpha, eps=1e-5)


@pytest.mark.parametrize("amp", [None, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("wanted", [*itertools.product((False, True), repeat=4)][1:])
def test_any_part_of_the_gradients(wanted: tuple[bool, ...], amp: torch.dtype | None) -> None:
    """Of the student, the variance, a weight and a bias: what is asked for is what it is together with all others."""
    regressor, alpha = layers("maps", 5, 8, 6, bias=True), spread_alpha(6)
    student, target = features("maps", 7, 5).requires_grad_(), features("maps", 7, 6)
    inputs = [student, alpha, regressor[2].weight, regressor[0].bias]
    g = torch.tensor(SCALER if amp is FP16 else 1.0)

    def found() -> list[Tensor]:
        chosen = [x for x in inputs if x.requires_grad]
        with torch.autocast("cpu", dtype=amp or BF16, enabled=amp is not None):
            loss = vidfast.vid_head(
                student, target, alpha, [regressor[0].weight, regressor[2].weight], [regressor[0].bias, None]
            )
        return list(torch.autograd.grad(loss, chosen, g))

    regressor.requires_grad_(False)
    for x in inputs:
        x.requires_grad_(True)
    everything = found()
    for x, want in zip(inputs, wanted, strict=True):
        x.requires_grad_(want)
    some = found()
    chosen = [x for x, want in zip(everything, wanted, strict=True) if want]
    for ours, right in zip(some, chosen, strict=True):
        torch.testing.assert_close(ours, right, rtol=2e-3 if amp else 1e-5, atol=1e-6 * float(g))


@pytest.mark.parametrize("amp", [None, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_backward_again_gives_the_same_bits(amp: torch.dtype | None) -> None:
    regressor, alpha = layers("maps", 5, 8, 6), spread_alpha(6)
    student = features("maps", 7, 5)
    if amp is not None:
        student = student.to(amp)
    student.requires_grad_()
    with torch.autocast("cpu", dtype=amp or BF16, enabled=amp is not None):
        loss = vidfast.vid_head(
            student, features("maps", 7, 6), alpha, [regressor[0].weight, regressor[2].weight]
        )
    inputs = [student, alpha, *regressor.parameters()]
    g = torch.tensor(SCALER)
    once = [x.clone() for x in torch.autograd.grad(loss, inputs, g, retain_graph=True)]
    twice = torch.autograd.grad(loss, inputs, g, retain_graph=True)
    again = torch.autograd.grad(loss, inputs, g)
    for x, y, z in zip(once, twice, again, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


@pytest.mark.parametrize("amp", [BF16, FP16], ids=short)
def test_the_order_of_the_parts_alone_decides_the_bits(amp: torch.dtype) -> None:
    regressor, alpha = layers("maps", 5, 8, 6), spread_alpha(6)
    student, target = features("maps", 9, 5), features("maps", 9, 6)
    first, second = (gradients(regressor, alpha, student, target, 1, amp, SCALER) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


def test_why_a_head_is_computed_layer_by_layer_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    way._logged.clear()
    regressor, alpha = layers("maps", 5, 6), spread_alpha(6)
    student, target = features("maps", 3, 5), features("maps", 3, 6).requires_grad_()
    with caplog.at_level("DEBUG", logger="vidfast"):
        for _ in range(2):
            vidfast.vid_head(student, target, alpha, regressor[0].weight).backward()
    said = [record.message for record in caplog.records if "layer by layer" in record.message]
    assert said == ["a regressor is computed layer by layer: the target requires grad"]
    assert target.grad is not None


def test_a_saved_tensor_hook_sees_the_gradients_and_may_move_them() -> None:
    regressor, alpha = layers("maps", 5, 8, 6), spread_alpha(6)
    student, target = features("maps", 7, 5).half().requires_grad_(), features("maps", 7, 6)
    inputs = [student, alpha, *regressor.parameters()]

    def step() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.float16):
            loss = vidfast.vid_head(student, target, alpha, [regressor[0].weight, regressor[2].weight])
        return torch.autograd.grad(loss, inputs, torch.tensor(SCALER))

    plain = step()
    with torch.autograd.graph.save_on_cpu():
        moved = step()
    for x, y in zip(plain, moved, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("fast", [True, False], ids=["16-bit products", "fp32 products"])
def test_each_value_is_rounded_where_a_layer_would(fast: bool, arrangement: str) -> None:
    one, alpha = torch.ones(2, 1, 4), torch.zeros(1)
    variance = math.log(2.0) + 1e-5
    floor = torch.tensor(0.5 * math.log(variance))

    def loss(student: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        with stored(arrangement, fast=fast), torch.autocast("cpu", BF16):
            return vidfast.vid_head(student, target, alpha, weight, [bias])

    # the mean: 257 is 256 in bf16
    torch.testing.assert_close(loss(one.expand(2, 2, 4), 256 * one, torch.tensor([[256.0, 1.0]])), floor)
    # the student: 1 + 2^-9 is 1
    student = torch.cat([(1 + 2**-9) * one, -one], 1)
    torch.testing.assert_close(loss(student, 0 * one, torch.full((1, 2), 512.0)), floor)
    # d mean, which a bias's gradient adds up
    bias = torch.zeros(1, requires_grad=True)
    loss(one, (2 + 2**-7) * one, torch.ones(1, 1), bias).backward()
    element = torch.tensor(-(1 + 2**-7) / variance / 8, dtype=torch.float64).float()
    assert element.to(BF16).float() != element
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, 8 * element.to(BF16).float()[None], rtol=1e-6, atol=0)


def test_a_share_of_a_weights_gradient_that_is_too_large_is_made_again() -> None:
    regressor = layers("maps", 4, 4).half()
    with torch.no_grad():
        regressor[0].weight.fill_(0.01)
    alpha = nn.Parameter(torch.full((4,), -2.7))
    student, target = torch.full((4, 4, 6, 7), 60.0).half(), torch.full((4, 4, 6, 7), -200.0).half()
    wanted = exact(regressor, alpha, student, target, 1)
    with stored("planes", fast=True):
        found = gradients(regressor, alpha, student, target, 1, g=2.0**-8)
    for ours, right in zip(found, wanted, strict=True):
        assert distance(ours, right) < 4e-3


def test_a_students_gradient_alone_that_is_too_large_is_made_again() -> None:
    weight = torch.full((4, 4), 200.0).half()
    alpha = torch.full((4,), -2.7)
    student = torch.full((4, 4, 42), 0.01).half().requires_grad_()
    target = torch.full((4, 4, 42), -200.0).half()
    loss = vidfast.vid_head(student, target, alpha, weight)
    (found,) = torch.autograd.grad(loss, student, torch.tensor(2.0**-8))
    wide = student.detach().double().requires_grad_()
    mean = torch.einsum("oc,bcp->bop", weight.double(), wide)
    want = vidfast.gaussian_nll(mean, target.double(), alpha, backend="reference")
    (right,) = torch.autograd.grad(want, wide)
    assert distance(found * 2.0**8, right) < 4e-3


def test_a_gradient_that_is_never_finite_ends() -> None:
    """The loss is finite, and a gradient is NaN at any scale."""
    first = torch.full((8, 5), -1.0).half()
    first[0, 0] = -float("inf")
    first.requires_grad_()
    student = torch.rand(3, 5, 12).half().add(0.1).requires_grad_()
    weights = [first, torch.randn(6, 8).half()]
    loss = vidfast.vid_head(student, torch.randn(3, 6, 12), torch.zeros(6), weights)
    loss.backward()
    assert student.grad is not None
    assert loss.isfinite()
    assert student.grad.isnan().any()


def test_planes_add_up_in_fp32() -> None:
    """257 is not a number in bf16."""
    g = torch.ones(257, 1, 1, dtype=BF16)
    assert Planes.over_channels(g).item() == 257
    total = torch.zeros(1, 1)
    Planes.add_outer(total, g, g, torch.empty(257, 1, 1, dtype=BF16))
    assert total.item() == 257


@pytest.mark.parametrize("fast", [True, False], ids=["16-bit products", "fp32 products"])
def test_a_student_wider_than_all_layers(fast: bool) -> None:
    regressor, alpha = layers("maps", 32, 8, 6), spread_alpha(6)
    student, target = features("maps", 7, 32), features("maps", 7, 6)
    for arrangement in ARRANGEMENTS:
        for amp in (None, BF16):
            with stored(arrangement, samples_bytes=9000, fast=fast):
                found = gradients(regressor, alpha, student, target, 1, amp)
            for ours, right in zip(found, exact(regressor, alpha, student, target, 1), strict=True):
                assert distance(ours, right) < (0.2 if amp else 2e-6)


@pytest.mark.parametrize("amp", [None, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_a_variance_that_is_a_slice(amp: torch.dtype | None) -> None:
    regressor, alpha = layers("maps", 5, 6), torch.randn(12, requires_grad=True)
    student, target = features("maps", 3, 5), features("maps", 3, 6)
    with torch.autocast("cpu", dtype=amp or BF16, enabled=amp is not None):
        found, wanted = (
            vidfast.vid_head(student, target, a, regressor[0].weight)
            for a in (alpha[::2], alpha[::2].detach().clone())
        )
    assert torch.equal(found, wanted)


PAPERS = [((128, 32, 256), 128), ((128, 16, 1024), 64), ((128, 64, 64), 256), ((32, 256, 196), 512)]


@pytest.mark.parametrize(
    ("module", "fast", "wanted"),
    [
        (FP32, False, [("planes", 10), ("planes", 10), ("rows", 10), ("rows", 2)]),
        (BF16, False, [("planes", 10), ("planes", 10), ("rows", 10), ("rows", 2)]),
        (BF16, True, [("planes", 10), ("planes", 8), ("rows", 16), ("columns", 2)]),
    ],
    ids=["fp32", "bf16 in fp32", "bf16"],
)
def test_plans_of_the_papers_pairs(module: torch.dtype, fast: bool, wanted: list[tuple[str, int]]) -> None:
    """docs/kernel-notes.md says why; a student in channels_last is taken as it is stored."""
    found = []
    for shape, widest in PAPERS:
        with stored(None, fast=fast):
            made = plan.plan_for(torch.empty(shape), [widest], module)
        found.append((made.arrangement.name, made.samples))
    assert found == wanted
    last = torch.empty(4, 1024, 16).transpose(1, 2)
    assert plan.plan_for(last, [64], module).arrangement.name == "rows"


@pytest.mark.parametrize("amp", [BF16, FP16], ids=short)
@pytest.mark.parametrize("fast", [True, False], ids=["16-bit products", "fp32 products"])
def test_an_fp16_students_gradient_survives_under_any_autocast(amp: torch.dtype, fast: bool) -> None:
    """It is stored before a scaler's factor arrives: without k, whatever the layers give."""
    regressor, alpha = layers("maps", 8, 16), spread_alpha(16)
    student, target = features("maps", 16, 8, 24).half(), features("maps", 16, 16, 24)
    wanted = exact(regressor, alpha, student, target, 1, 2.0**-8)
    with stored("planes", fast=fast):
        found = gradients(regressor, alpha, student, target, 1, amp, SCALER, weight=2.0**-8)
    assert distance(found[1], wanted[1]) < 2 * torch.finfo(amp).eps


@pytest.mark.parametrize("level", [1e5, 1e2, -30.0, -1000.0], ids="alpha {}".format)
@pytest.mark.parametrize("eps", [1e-5, 1e-320, 1e4], ids="eps {}".format)
def test_any_size_of_the_variances_in_fp16(level: float, eps: float) -> None:
    """As near to fp64 as layer by layer, where those give numbers at all."""
    regressor = layers("maps", 6, 8, 8).half()
    alpha = torch.full((8,), level, requires_grad=True)
    student, target = features("maps", 4, 6).half().requires_grad_(), features("maps", 4, 8)
    weights = [regressor[0].weight, regressor[2].weight]
    results = []
    for together in (True, False):
        with contextlib.nullcontext() if together else layer_by_layer():
            loss = vidfast.vid_head(student, target, alpha, weights, eps=eps, reduction="sum")
        results.append(
            [x.double() for x in torch.autograd.grad(loss, [student, *weights], torch.tensor(1.0))]
        )
    for ours, apart in zip(*results, strict=True):
        if bool(apart.isfinite().all()) and float(apart.abs().max()) > 1e-3:
            assert distance(ours, apart) < 1e-2
