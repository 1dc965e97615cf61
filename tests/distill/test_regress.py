"""Applying a regressor: in place where nobody looks, in the faster layout, and with the same numbers as calling it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from method_checks import batch_of
from torch import Tensor, nn

import vidfast.regressor
from vidfast.distill import REGRESSORS, VID, FitNet, Infomax, PointwiseStack
from vidfast.regressor import lay_out_for, regress

SHAPES = {
    "conv3": ((4, 3, 5, 6), (4, 7, 5, 6)),
    "conv2": ((4, 3), (4, 7)),
    "upsampled": ((4, 3, 2, 3), (4, 7, 4, 6)),
}
HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda *_: None),
    "forward pre": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "backward": lambda m: m.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
}


@contextmanager
def written_over() -> Iterator[list[bool]]:
    """Of each tensor that autograd saves in this block: whether it was written over, as initialised weights were."""
    found: list[bool] = []

    def pack(x: Tensor) -> Tensor:
        found.append(x._version > 0)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found


def value_and_gradients(call: Callable[[Tensor], Tensor], regressor: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    mean = call(x)
    weight = torch.randn(mean.shape, generator=torch.Generator().manual_seed(2))
    leaves = [x, *regressor.parameters()]
    return [mean.detach().clone(), *torch.autograd.grad((mean * weight).sum(), leaves)]


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("name", SHAPES)
def test_rectifiers_write_over_their_inputs_and_the_numbers_are_equal(name: str, autocast: bool) -> None:
    student, teacher = SHAPES[name]
    regressor, x = REGRESSORS[name](student, teacher), torch.randn(student)
    before, shown = x.clone(), repr(regressor)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        expected = value_and_gradients(regressor, regressor, x)
        with written_over() as of_a_plain_call:
            regressor(x)
        with written_over() as hidden:
            found = value_and_gradients(lambda s: regress(regressor, s, teacher), regressor, x)
    for mine, plain in zip(found, expected, strict=True):
        assert torch.equal(mine, plain)
    assert sum(hidden) > sum(of_a_plain_call)
    assert torch.equal(x, before)
    assert repr(regressor) == shown


@pytest.mark.parametrize("where", ["", "0", "1", "4"])
@pytest.mark.parametrize("kind", HOOKS)
def test_with_a_hook_nothing_is_written_over(kind: str, where: str) -> None:
    student, teacher = SHAPES["conv3"]
    regressor, x = REGRESSORS["conv3"](student, teacher), torch.randn(student)
    expected = value_and_gradients(regressor, regressor, x)
    handle = HOOKS[kind](regressor.get_submodule(where))
    with written_over() as watched:
        found = value_and_gradients(lambda s: regress(regressor, s, teacher), regressor, x)
    for mine, plain in zip(found, expected, strict=True):
        assert torch.equal(mine, plain)
    handle.remove()
    with written_over() as of_a_plain_call:
        value_and_gradients(regressor, regressor, x)
    with written_over() as hidden:
        value_and_gradients(lambda s: regress(regressor, s, teacher), regressor, x)
    assert sum(watched) == sum(of_a_plain_call) < sum(hidden)


class _Reading(nn.Sequential):
    """A stack whose forward reads what one of its layers gave."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self[0](x)
        out: Tensor = self[2](self[1](hidden))
        return out - hidden


def test_only_what_a_convolution_made_and_a_plain_sequential_holds_is_written_over() -> None:
    x = torch.randn(4, 7, 5, 6)
    first = nn.Sequential(nn.ReLU(), nn.Conv2d(7, 7, 1))
    saved = nn.Sequential(nn.Conv2d(7, 7, 1), nn.Sigmoid(), nn.ReLU(), nn.Conv2d(7, 7, 1))
    reading = _Reading(nn.Conv2d(7, 7, 1), nn.ReLU(), nn.Conv2d(7, 7, 1))
    for regressor in (first, saved, reading):
        before = x.clone()
        expected = value_and_gradients(regressor, regressor, x)
        found = value_and_gradients(lambda s, r=regressor: regress(r, s, x.shape), regressor, x)  # type: ignore[misc]
        assert all(torch.equal(mine, plain) for mine, plain in zip(found, expected, strict=True))
        assert torch.equal(x, before)


def test_one_that_is_in_place_already_stays_so_and_an_error_leaves_the_rest_as_it_was() -> None:
    own = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)
    )
    regress(own, torch.randn(1, 3, 2, 2), (1, 3, 2, 2))
    with pytest.raises(RuntimeError):
        regress(own, torch.randn(1, 4, 2, 2), (1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"the regressor gives \(1, 3, 2, 2\), wanted \(1, 4, 2, 2\)"):
        regress(own, torch.randn(1, 3, 2, 2), (1, 4, 2, 2))
    assert [own[1].inplace, own[3].inplace] == [True, False]


def test_a_regressor_that_gives_no_tensor_is_refused() -> None:
    recurrent = nn.LSTM(3, 5, batch_first=True)
    with pytest.raises(TypeError, match="wanted a regressor that returns a Tensor, got tuple"):
        regress(recurrent, torch.randn(2, 4, 3), (2, 4, 5))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every activation counts as one for which another layout is worth its while."""
    monkeypatch.setattr(vidfast.regressor, "_LARGE_ACTIVATION", 1)


@pytest.mark.usefixtures("large")
def test_a_stack_of_1x1_convolutions_gets_large_maps_in_channels_last() -> None:
    x = torch.randn(2, 3, 4, 5)
    for depth, last in ((1, False), (2, True), (3, True)):
        stack = PointwiseStack(depth)(x.shape, (2, 6, 4, 5))
        assert lay_out_for(stack, x).is_contiguous(memory_format=torch.channels_last) == last
        assert torch.equal(lay_out_for(stack, x), x)
    others = [nn.Conv2d(3, 6, 1), nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 1))]
    others.append(REGRESSORS["upsampled"](x.shape, (2, 6, 8, 10)))  # type: ignore[arg-type]
    assert all(lay_out_for(regressor, x) is x for regressor in others)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("method", [VID({"a": "x"}), Infomax("a"), FitNet({"a": "x"}, regressor="conv3")])
def test_value_and_gradients_do_not_depend_on_the_layout(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    s, t = torch.randn(4, 3, 5, 6, requires_grad=True), torch.randn(4, 7, 5, 6)
    batch = batch_of({"a": s}, {"x": t}, inputs=t)
    method.build(batch)
    seen: list[bool] = []
    handle = method.regressors[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last)) or None
    )
    leaves = [s, *method.parameters()]
    loss = method(batch, 1.7)
    gradients = torch.autograd.grad(loss, leaves)
    handle.remove()
    in_place = torch.autograd.grad(method(batch, 1.7), leaves)
    monkeypatch.setattr(vidfast.regressor, "_LARGE_ACTIVATION", 1 << 60)
    plain = method(batch, 1.7)
    expected = torch.autograd.grad(plain, leaves)
    # FitNet's error is a pass of torch over both: of one layout they are faster.
    assert seen == [not isinstance(method, FitNet)]
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(in_place, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("large")
def test_compiles_into_one_graph() -> None:
    """As in eager mode, whatever the layout; a compiler decides by itself what it writes over."""
    s, t = torch.randn(4, 3, 5, 6, requires_grad=True), torch.randn(4, 7, 5, 6)
    vid, batch = VID({"a": "x"}), batch_of({"a": s}, {"x": t})
    vid.build(batch)
    leaves = [s, *vid.parameters()]
    expected = torch.autograd.grad(vid(batch, 1.7), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: vid(batch_of({"a": x}, {"x": t}), 1.7), backend="aot_eager", fullgraph=True
    )
    for _ in range(2):
        found = torch.autograd.grad(compiled(s), leaves)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    torch._dynamo.reset()
