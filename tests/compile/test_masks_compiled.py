"""Masks, and weights that are tensors, in compiled and exported graphs: equal to eager, one graph, one compilation."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import vidfast

ONE_PASS = torch.ops.vidfast.gaussian_nll_one_pass_v2.default
TWO_PASS = torch.ops.vidfast.gaussian_nll_two_pass_v2.default
FORWARD = torch.ops.vidfast.gaussian_nll_forward.default
FORWARD_GRAD = torch.ops.vidfast.gaussian_nll_forward_grad.default
BACKWARD = torch.ops.vidfast.gaussian_nll_backward.default
HEAD = torch.ops.vidfast.vid_head_v2.default
OPTIONS = (1, 1e-5, "mean", True, 0.5, "auto")
SHAPE = (3, 6, 5, 4)
KINDS = (torch.bool, torch.int64, torch.float32)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def problem(kind: torch.dtype = torch.bool, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, ...]:
    """mean, target, alpha and a mask (B, 1, ...); NaN where that is 0."""
    mask = (torch.rand(shape[0], 1, *shape[2:]) < 0.6).to(kind)
    if kind.is_floating_point:
        mask = mask * torch.rand_like(mask).add(0.5)
    mean, target = (torch.randn(shape).masked_fill(mask == 0, math.nan) for _ in range(2))
    return mean, target, torch.randn(shape[1]), mask


def grads_of(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def close(found: Any, wanted: Any) -> None:
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("factor", [None, 0.25])
def test_opcheck(kind: torch.dtype, factor: float | None) -> None:
    mean, target, alpha, mask = problem(kind)
    number = None if factor is None else torch.tensor(factor, dtype=torch.float64)
    m, a = mean.requires_grad_(), alpha.requires_grad_()
    torch.library.opcheck(ONE_PASS, (m, target, a, number, *OPTIONS, mask))
    torch.library.opcheck(TWO_PASS, (m, target, a, *OPTIONS, mask, number))
    plain = mean.detach(), target, alpha.detach()
    torch.library.opcheck(FORWARD, (*plain, *OPTIONS, mask, number))
    torch.library.opcheck(FORWARD_GRAD, (*plain, number, *OPTIONS, mask))
    _, sums = TWO_PASS(*plain, *OPTIONS, mask, number)
    g = torch.tensor(2.5)
    every = (g, *plain, sums, mean.shape, *OPTIONS, True, True, True, mask, number)
    torch.library.opcheck(BACKWARD, every)
    alone = (g, None, None, plain[2], sums, mean.shape, *OPTIONS, False, False, True, mask, number)
    torch.library.opcheck(BACKWARD, alone)
    torch.testing.assert_close(BACKWARD(*alone)[0], BACKWARD(*every)[2])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_opcheck_of_heads(kind: torch.dtype) -> None:
    mask = (torch.rand(2, 1, 7) < 0.6).to(kind)
    student, target = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 6, 7)
    layers = [torch.randn(8, 5, requires_grad=True), torch.randn(6, 8, requires_grad=True)]
    given = (student, target, torch.randn(6, requires_grad=True), layers, [None, None], None)
    torch.library.opcheck(HEAD, (*given, False, 1e-5, "mean", 1.0, torch.float32, "auto", mask))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_the_function(strategy: Any, compiler: str) -> None:
    for kind in (torch.bool, torch.float32):
        mean, target, alpha, mask = problem(kind)
        m, a = mean.requires_grad_(), alpha.requires_grad_()

        def loss(m: Tensor, t: Tensor, a: Tensor, mask: Tensor) -> Tensor:
            return vidfast.gaussian_nll(
                m * 1, t, a, mask=mask, strategy=strategy, reduction="mean", weight=0.5
            )

        compiled = torch.compile(loss, backend=compiler, fullgraph=True)
        for given in (mask, mask.squeeze(1), torch.zeros_like(mask)):
            wanted = grads_of(loss(m, target, a, given), m, a)
            close(grads_of(compiled(m, target, a, given), m, a), wanted)
            assert all(torch.isfinite(x).all() for x in wanted)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_weight_on_the_device(compiler: str) -> None:
    """Its values are no other graphs."""
    counter = CompileCounterWithBackend(compiler)
    mean, target, alpha, mask = problem()
    m, a = mean.requires_grad_(), alpha.requires_grad_()
    for strategy in ("one_pass", "two_pass"):

        def loss(m: Tensor, weight: Tensor, strategy: Any = strategy) -> Tensor:
            return vidfast.gaussian_nll(
                m * 1, target, a, mask=mask, weight=weight, reduction="sum", strategy=strategy
            )

        compiled = torch.compile(loss, backend=counter, fullgraph=True)
        for value in (1.0, 0.25, -3.0):
            weight = torch.tensor(value)
            close(grads_of(compiled(m, weight), m, a), grads_of(loss(m, weight), m, a))
    assert counter.frame_count == 2


class Model(nn.Module):
    """A convolution, and a loss over the positions that count."""

    def __init__(self, head: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 1)
        self.loss: Callable[..., Tensor] = vidfast.VIDLoss(5, 8, 6) if head else vidfast.GaussianNLL(5)

    def forward(self, x: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return self.loss(self.first(x), target, mask=mask)


@pytest.mark.parametrize("head", [False, True], ids=["GaussianNLL", "VIDLoss"])
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
def test_modules_over_several_batches(amp: bool, head: bool) -> None:
    model = Model(head)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    compiled_once = None
    for size in (2, 5, 3):
        x, target = torch.randn(size, 3, 8, 8), torch.randn(size, 6 if head else 5, 8, 8)
        mask = torch.rand(size, 8, 8) < 0.5
        found = []
        for one in (compiled, model):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = one(x, target, mask)
            found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        close(*found)
        compiled_once = compiled_once or counter.frame_count
    assert counter.frame_count == compiled_once


def test_pooled_maps() -> None:
    module = vidfast.VIDLoss(5, 8, 6)
    student, target = torch.randn(2, 5, 8, 8, requires_grad=True), torch.randn(2, 6, 4, 4)
    mask = torch.rand(2, 16, 16) < 0.4
    inputs = [student, *module.parameters()]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    close(
        grads_of(compiled(student, target, mask), *inputs), grads_of(module(student, target, mask), *inputs)
    )


def test_tokens_in_one_pass() -> None:
    """A head stays one operator."""
    student, target = torch.randn(3, 7, 5, requires_grad=True), torch.randn(3, 7, 6)
    layers = [torch.randn(8, 5, requires_grad=True), torch.randn(6, 8, requires_grad=True)]
    alpha = torch.randn(6, requires_grad=True)
    mask = torch.arange(7)[None] < torch.tensor([[7], [3], [0]])
    student.data[~mask] = math.nan
    names: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def loss(student: Tensor, mask: Tensor) -> Tensor:
        return vidfast.vid_head(student, target, alpha, layers, channel_dim=-1, mask=mask)

    inputs = (student, alpha, *layers)
    wanted = grads_of(loss(student, mask), *inputs)
    assert all(torch.isfinite(x).all() for x in wanted)
    close(grads_of(torch.compile(loss, backend=backend, fullgraph=True)(student, mask), *inputs), wanted)
    assert any("vid_head" in name for name in names)


def test_exported_and_loaded() -> None:
    model = Model(False)
    batch = torch.export.Dim("batch", min=2, max=64)
    x, target, mask = torch.randn(3, 3, 8, 8), torch.randn(3, 5, 8, 8), torch.rand(3, 8, 8) < 0.5
    program = torch.export.export(
        model, (x, target, mask), dynamic_shapes=({0: batch}, {0: batch}, {0: batch})
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    more = torch.randn(7, 3, 8, 8), torch.randn(7, 5, 8, 8), torch.rand(7, 8, 8) < 0.5
    torch.testing.assert_close(loaded(*more), model(*more))


def test_a_mask_that_requires_grad_is_refused_by_hand_too() -> None:
    mean, target, alpha, mask = problem(torch.float32)
    with pytest.raises(ValueError, match="mask must not require grad"):
        ONE_PASS(mean.requires_grad_(), target, alpha, None, *OPTIONS, mask.requires_grad_())


def test_masks_are_checked_when_the_operator_runs() -> None:
    mean, target, alpha, mask = problem(torch.float32)
    for wrong, text in (
        (mask[:, :, 1:], "mask must have the activations' shape"),
        (-mask, "must not be negative"),
    ):
        with pytest.raises(ValueError, match=text):
            TWO_PASS(mean, target, alpha, *OPTIONS, wrong, None)


def test_a_second_derivative_is_an_error() -> None:
    mean, target, alpha, mask = problem()
    m = mean.requires_grad_()
    loss = TWO_PASS(m, target, alpha, *OPTIONS, mask, None)[0]
    grad = torch.autograd.grad(loss, m, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="only first derivatives"):
        torch.autograd.grad(grad.nansum(), m)
