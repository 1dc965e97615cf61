"""Heads in parts in every precision, against fp64 and against the same layers one after the other."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from heads import (
    ARRANGEMENTS,
    KINDS,
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
from vidfast.head import function, parts, way

# torch.amp.GradScaler's first factor.
SCALER = 65536.0
# What a step may be farther from fp64 than the layers one after the other: rounding falls otherwise.
NO_FARTHER = 1.25


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(7)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans of the heads that were computed in parts."""
    seen: list[Any] = []
    run = parts.gradients

    def counted(*args: Any) -> Any:
        seen.append(args[6])
        return run(*args)

    monkeypatch.setattr(parts, "gradients", counted)
    return seen


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32(in_parts: list[Any], kind: str, depth: int, bias: bool, arrangement: str) -> None:
    widths = (5, *(8, 9)[: depth - 1], 6)
    regressor, alpha, dim = layers(kind, *widths, bias=bias), spread_alpha(6), channel_dim(kind)
    student, target = features(kind, 7, 5), features(kind, 7, 6)
    with stored(arrangement, samples_bytes=3000):
        found = gradients(regressor, alpha, student, target, dim)
    assert in_parts[0].arrangement.name == arrangement
    for ours, wanted in zip(found, exact(regressor, alpha, student, target, dim), strict=True):
        assert distance(ours, wanted) < 2e-6


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("fast", [True, False], ids=["16-bit products", "fp32 products"])
@pytest.mark.parametrize("whole", ["autocast", "autocast of 16-bit features", "modules"])
@pytest.mark.parametrize("kind", ["maps", "tokens"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=short)
def test_16_bits_are_no_farther_from_fp64_than_layer_by_layer(
    in_parts: list[Any], dtype: torch.dtype, kind: str, whole: str, fast: bool, arrangement: str
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
    assert in_parts[0].products is (dtype if fast else FP32)
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


def test_an_fp16_gradient_that_is_too_large_is_made_again_smaller(in_parts: list[Any]) -> None:
    """A residual of 30000 over a variance of 1/16, through weights of 4: beyond fp16 at any scale that a scaler has."""
    regressor = layers("maps", 4, 8, 8)
    with torch.no_grad():
        for parameter in regressor.parameters():
            parameter.uniform_(3.0, 4.0)
    alpha = nn.Parameter(torch.full((8,), -2.7))
    student, target = features("maps", 4, 4).abs(), torch.full((4, 8, 6, 7), -30000.0)
    wanted = exact(regressor, alpha, student, target, 1)
    with stored("planes", fast=False):
        found = gradients(regressor, alpha, student, target, 1, FP16, g=2.0**-8)
    assert len(in_parts) == 1
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
            alone = gradients_free_loss(regressor, alpha, student, target, amp)
    assert torch.equal(loss, alone)


def gradients_free_loss(
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
    assert function.InParts is not None
