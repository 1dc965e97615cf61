"""The regressor and its loss, a few samples at a time: the same numbers, nothing stored, and only where it may be."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from heads import ARRANGEMENTS, has_kernel
from problems import BF16, FP16, FP32, short
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from vid_formula import check, formula, small_module

import vidfast.regressor as policy
from bench.memory import peak_extra_bytes
from vidfast import VIDLoss, gaussian_nll
from vidfast.head import kernel, plan
from vidfast.head.stack import Stack
from vidfast.head.way import head_nll


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The students' shapes of the calls that were fused."""
    seen: list[tuple[int, ...]] = []

    def counted(stack: Stack, student: Tensor, *rest: Any) -> Tensor | None:
        loss = head_nll(stack, student, *rest)
        if loss is not None:
            seen.append(tuple(student.shape))
        return loss

    monkeypatch.setattr(policy, "head_nll", counted)
    return seen


@pytest.fixture
def module() -> VIDLoss:
    return small_module(5)


@pytest.fixture(params=ARRANGEMENTS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By the kernel, or in parts and how a part's activations are stored."""
    name = str(request.param)
    monkeypatch.setattr(kernel, "takes", lambda head: name == "kernel" and has_kernel(head))
    monkeypatch.setattr(plan, "FEWEST_POSITIONS", 10**9 if name == "rows" else 0)
    monkeypatch.setattr(plan, "MOST_CHANNELS", 0 if name == "columns" else 10**9)
    return name


@pytest.mark.parametrize("samples", [1, 2, 4, 7], ids="{} of 7 at once".format)
@pytest.mark.parametrize("layouts", ["contiguous", "channels_last", "student last", "teacher last"])
@pytest.mark.parametrize("teacher", [FP32, BF16, FP16], ids=short)
def test_any_part_of_the_batch(
    module: VIDLoss,
    calls: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    order: str,
    samples: int,
    layouts: str,
    teacher: torch.dtype,
) -> None:
    del order
    bytes_of_samples = samples * 4 * 8 * 42 + 3
    monkeypatch.setattr(plan, "PART_BYTES", dict.fromkeys(plan.PART_BYTES, bytes_of_samples))
    s, t = torch.randn(7, 5, 6, 7), torch.randn(7, 6, 6, 7).to(teacher)
    if layouts in ("channels_last", "student last"):
        s = s.contiguous(memory_format=torch.channels_last)
    if layouts in ("channels_last", "teacher last"):
        t = t.contiguous(memory_format=torch.channels_last)
    check(module, s, t)
    assert calls == [(7, 5, 6, 7)]


@pytest.mark.parametrize(
    ("batch", "most", "samples"),
    [
        (7, 1, 1),
        (7, 2, 2),
        (7, 3, 4),
        (7, 6, 4),
        (7, 9, 7),
        (8, 5, 4),
        (32, 20, 16),
        (1, 9, 1),
        (128, 1000, 128),
    ],
)
def test_parts_are_even(batch: int, most: int, samples: int) -> None:
    assert plan.evenly(batch, most) == samples


def test_features_that_are_slices(module: VIDLoss, calls: list[tuple[int, ...]]) -> None:
    s, t = torch.randn(4, 9, 6, 8)[:, 2:7], torch.randn(8, 6, 6, 16)[::2, :, :, ::2]
    check(module, s, t)
    check(module, torch.randn(4, 5, 1, 1).expand(4, 5, 6, 8), t)
    assert len(calls) == 2


@pytest.mark.parametrize("wanted", range(1, 32))
def test_any_set_of_gradients(module: VIDLoss, order: str, wanted: int) -> None:
    """Student, log_scale and three weights, each wanted or not."""
    del order
    s, t = torch.randn(3, 5, 4, 5), torch.randn(3, 6, 4, 5)
    inputs = [x for bit, x in enumerate([s, *module.parameters()]) if wanted >> bit & 1]
    module.requires_grad_(False)
    for x in inputs:
        x.requires_grad_()
    wanted_gradients = torch.autograd.grad(formula(module, s, t), inputs)
    for x, exact in zip(torch.autograd.grad(module(s, t), inputs), wanted_gradients, strict=True):
        assert x.shape == exact.shape
        torch.testing.assert_close(
            x.double(), exact.double(), rtol=2e-5, atol=2e-5 * exact.abs().max().item()
        )


def test_the_students_gradient_lies_as_the_student(module: VIDLoss, order: str) -> None:
    del order
    t = torch.randn(3, 6, 4, 5)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        s = torch.randn(3, 5, 4, 5).contiguous(memory_format=memory_format).requires_grad_()
        (gradient,) = torch.autograd.grad(module(s, t), s)
        assert gradient.is_contiguous(memory_format=memory_format)


def test_backward_again_and_by_another_factor(module: VIDLoss, order: str) -> None:
    del order
    s, t = torch.randn(3, 5, 4, 5, requires_grad=True), torch.randn(3, 6, 4, 5)
    inputs = [s, *module.parameters()]
    loss = module(s, t)
    once = [x.clone() for x in torch.autograd.grad(loss, inputs, retain_graph=True)]
    half = torch.autograd.grad(loss, inputs, torch.tensor(0.5), retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    for x, y, z in zip(once, half, again, strict=True):
        assert torch.equal(x, z)
        torch.testing.assert_close(2 * y, x)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)


def test_a_second_derivative_is_an_error_and_never_zero(module: VIDLoss) -> None:
    s, t = torch.randn(3, 5, 4, 5, requires_grad=True), torch.randn(3, 6, 4, 5)
    (first,) = torch.autograd.grad(module(s, t), s, create_graph=True)
    (plain,) = torch.autograd.grad(formula(module, s, t), s)
    torch.testing.assert_close(first.detach(), plain, rtol=1e-4, atol=1e-7)
    with pytest.raises(RuntimeError, match="first derivative"):
        first.square().sum().backward()


def test_forward_mode_is_an_error_and_never_zero(module: VIDLoss) -> None:
    s, t = torch.randn(3, 5, 4, 5), torch.randn(3, 6, 4, 5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(s, torch.ones_like(s))
        with pytest.raises(RuntimeError, match="forward-mode"):
            module(dual, t)


def test_an_optimizer_step_between_forward_and_backward(module: VIDLoss) -> None:
    """Gradients are made in forward: they are those of the weights that made the loss."""
    s, t = torch.randn(3, 5, 4, 5, requires_grad=True), torch.randn(3, 6, 4, 5)
    (want,) = torch.autograd.grad(formula(module, s, t), s)
    loss = module(s, t)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(1.0)
    torch.testing.assert_close(torch.autograd.grad(loss, s)[0], want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("default", ["float64", "meta"])
def test_defaults_of_the_user_change_nothing(module: VIDLoss, order: str, default: str) -> None:
    del order
    s, t = torch.randn(3, 5, 4, 5, requires_grad=True), torch.randn(3, 6, 4, 5)
    want = torch.autograd.grad(module(s, t), [s, *module.parameters()])
    before = torch.get_default_dtype()
    try:
        if default == "float64":
            torch.set_default_dtype(torch.float64)
        with torch.device("meta") if default == "meta" else nullcontext():
            loss = module(s, t)
        got = torch.autograd.grad(loss, [s, *module.parameters()])
    finally:
        torch.set_default_dtype(before)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def test_hidden_activations_are_never_stored() -> None:
    module = VIDLoss(4, 64, 8)
    s, t = torch.randn(256, 4, 32, 32, requires_grad=True), torch.randn(256, 8, 32, 32)
    hidden = 4 * 64 * 256 * 32 * 32

    def step() -> object:
        return torch.autograd.grad(module(s, t), [s, *module.parameters()])

    step()
    fused_peak = peak_extra_bytes(step, "cpu")
    module.inplace = False  # module by module
    assert fused_peak < hidden / 2 < 2 * hidden < peak_extra_bytes(step, "cpu")


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def with_own_forward(m: VIDLoss) -> None:
    plain = m.regressor[0].forward
    m.regressor[0].forward = lambda x: 2 * plain(x)


def frozen_but_for_alpha(m: VIDLoss) -> None:
    m.regressor.requires_grad_(False)


def global_hook(_: VIDLoss) -> Any:
    return nn.modules.module.register_module_forward_hook(lambda *_: None)


ELSEWHERE: dict[str, Callable[[VIDLoss], Any]] = {
    "forward hook": lambda m: m.regressor[2].register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda m: m.regressor[2].register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda m: m.regressor[2].register_full_backward_hook(lambda *_: None),
    "hook on the whole": lambda m: m.regressor.register_forward_hook(lambda *_: None),
    "hook on all modules": global_hook,
    "inplace=False": lambda m: setattr(m, "inplace", False),
    "reference": lambda m: setattr(m, "backend", "reference"),
    "another activation": lambda m: m.regressor.__setitem__(1, nn.GELU()),
    "3x3": lambda m: m.regressor.__setitem__(2, nn.Conv2d(8, 8, 3, padding=1, bias=False)),
    "groups": lambda m: m.regressor.__setitem__(2, nn.Conv2d(8, 8, 1, groups=2, bias=False)),
    "another part": lambda m: m.regressor.append(Doubled()),
    "own forward": with_own_forward,
    "parametrization": lambda m: parametrizations.weight_norm(m.regressor[2]),
    "fp64": lambda m: m.double(),
    "only alpha": frozen_but_for_alpha,
    "compiled in place": lambda m: m.regressor[2].compile(backend="eager"),
}


@pytest.mark.parametrize(
    "odd",
    [
        nn.Conv2d(8, 8, 1, padding=1, bias=False),
        nn.Conv2d(8, 8, 1, stride=2, bias=False),
        nn.Conv2d(8, 8, (1, 3), padding=(0, 2), bias=False),
    ],
    ids=["padding", "stride", "another kernel"],
)
def test_a_convolution_that_changes_the_size_is_not_computed_as_if_it_did_not(
    module: VIDLoss, calls: list[tuple[int, ...]], odd: nn.Conv2d
) -> None:
    module.regressor[2] = odd
    with pytest.raises(ValueError, match="the regressor gives"):
        module(torch.randn(3, 5, 4, 5), torch.randn(3, 6, 4, 5))
    assert calls == []


def test_a_kernel_exchanged_for_a_larger_one_goes_module_by_module(
    module: VIDLoss, calls: list[tuple[int, ...]]
) -> None:
    convolution = module.regressor[2]
    convolution.padding = "same"
    convolution.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
    s, t = torch.randn(3, 5, 4, 5), torch.randn(3, 6, 4, 5)
    torch.testing.assert_close(module(s, t), gaussian_nll(module.regressor(s), t, module.log_scale))
    assert calls == []


@pytest.mark.parametrize("name", ELSEWHERE)
def test_anything_else_goes_module_by_module(
    module: VIDLoss, calls: list[tuple[int, ...]], name: str
) -> None:
    handle = ELSEWHERE[name](module)
    s, t = torch.randn(3, 5, 4, 5), torch.randn(3, 6, 4, 5)
    try:
        loss = module(s, t)
        loss.backward()
    finally:
        if name == "hook on all modules":
            handle.remove()
    assert calls == []
    with torch.no_grad():
        mean = module.regressor(s.to(module.regressor[0].weight.dtype) if name == "fp64" else s)
        v = module.variance.double().view(1, -1, 1, 1)
        want = (0.5 * (v.log() + (t.double() - mean.double()) ** 2 / v)).mean()
    torch.testing.assert_close(loss.detach().double(), want, rtol=1e-5, atol=1e-6)


def test_a_plain_module_is_fused(module: VIDLoss, calls: list[tuple[int, ...]]) -> None:
    """The table above means nothing if this does not hold."""
    module(torch.randn(3, 5, 4, 5), torch.randn(3, 6, 4, 5)).backward()
    assert calls == [(3, 5, 4, 5)]
    with torch.no_grad():
        module(torch.randn(3, 5), torch.randn(3, 6))
    assert calls == [(3, 5, 4, 5), (3, 5)]


def test_transforms_go_module_by_module(module: VIDLoss, calls: list[tuple[int, ...]]) -> None:
    s, t = torch.randn(3, 5, 4, 5), torch.randn(3, 6, 4, 5)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda x: module(x, t))(s)
    module.backend = "reference"
    assert torch.isfinite(torch.func.grad(lambda x: module(x, t))(s)).all()
    assert calls == []


@pytest.mark.parametrize("inplace", [True, False])
def test_traced_for_other_data(module: VIDLoss, calls: list[tuple[int, ...]], inplace: bool) -> None:
    """torch.jit.trace sees operators alone: of a kernel's loss it would keep this batch's value."""
    module.inplace = inplace
    s, t = torch.randn(3, 5, 4, 5), torch.randn(3, 6, 4, 5)
    traced = torch.jit.trace(module, (s, t), check_trace=False)
    assert calls == []
    s, t = 3 * s, t - 1
    torch.testing.assert_close(traced(s, t), module(s, t), rtol=1e-5, atol=1e-6)


def test_gradients_of_channels_last_weights_lie_as_they(module: VIDLoss, order: str) -> None:
    del order
    s, t = torch.randn(3, 5, 4, 5), torch.randn(3, 6, 4, 5)
    module(s, t).backward()
    want = [p.grad for p in module.parameters()]
    module.zero_grad()
    module.to(memory_format=torch.channels_last)
    module(s, t).backward()
    for parameter, gradient in zip(module.parameters(), want, strict=True):
        assert parameter.grad.stride() == parameter.stride()
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["student", "teacher", "weight", "log_scale"])
def test_what_is_not_finite_shows_as_it_does_module_by_module(
    module: VIDLoss, where: str, value: float
) -> None:
    s, t = torch.randn(3, 5, 4, 5), torch.randn(3, 6, 4, 5)
    places = {"student": s, "teacher": t, "weight": module.regressor[2].weight, "log_scale": module.log_scale}
    with torch.no_grad():
        places[where].view(-1)[1] = value
    s.requires_grad_()
    results = []
    for inplace in (True, False):
        module.inplace = inplace
        loss = module(s, t)
        results.append([loss.detach(), *torch.autograd.grad(loss, [s, *module.parameters()])])
    for ours, apart in zip(*results, strict=True):
        torch.testing.assert_close(ours, apart, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_saved_on_the_cpu_and_laid_out_otherwise(module: VIDLoss) -> None:
    s, t = torch.randn(3, 5, 4, 5, requires_grad=True), torch.randn(3, 6, 4, 5)
    inputs = [s, *module.parameters()]
    want = torch.autograd.grad(module(s, t), inputs)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.transpose(0, -1).contiguous() if x.dim() > 1 else x,
        lambda x: x.transpose(0, -1) if x.dim() > 1 else x,
    )
    for context in (torch.autograd.graph.save_on_cpu(), hooks):
        with context:
            loss = module(s, t)
        for x, y in zip(torch.autograd.grad(loss, inputs, torch.tensor(2.0)), want, strict=True):
            torch.testing.assert_close(x, 2 * y)


def test_several_times_in_one_graph(module: VIDLoss) -> None:
    s, t = torch.randn(3, 5, 4, 5, requires_grad=True), torch.randn(3, 6, 4, 5)
    inputs = [s, *module.parameters()]
    once = torch.autograd.grad(module(s, t), inputs)
    thrice = torch.autograd.grad(module(s, t) + 2 * module(s, t), inputs)
    for x, y in zip(thrice, once, strict=True):
        torch.testing.assert_close(x, 3 * y)


def test_channels_that_do_not_fit_are_the_convolutions_error(module: VIDLoss) -> None:
    module.regressor[2] = nn.Conv2d(7, 8, 1, bias=False)
    with pytest.raises(RuntimeError, match="channels"):
        module(torch.randn(3, 5, 4, 5), torch.randn(3, 6, 4, 5))
