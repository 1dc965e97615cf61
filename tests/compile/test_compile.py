"""torch.compile and torch.export of modules that contain the loss: equal to eager, one graph, one compilation."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import vidfast

# aot_eager traces forward and backward as the real compiler does, and runs them without building C++.
TRACER = "aot_eager"


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Student(nn.Module):
    """A convolution whose output is the loss's mean."""

    def __init__(self, reduction: str = "mean", strategy: str = "auto", **options: Any) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 1)
        self.nll = vidfast.GaussianNLL(6, reduction=reduction, weight=0.3, strategy=strategy, **options)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.nll(self.layer(x), target)
        return loss


class Scaled(nn.Module):
    """The loss without a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(6, 1, 1))
        self.nll = vidfast.GaussianNLL(6, reduction="batchmean")

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.nll(self.factor * x[:, :1], target)
        return loss


def batch(size: int, channels_last: bool = False) -> tuple[Tensor, Tensor]:
    x, target = torch.randn(size, 3, 8, 9), torch.randn(size, 6, 8, 9)
    if channels_last:
        x, target = (y.contiguous(memory_format=torch.channels_last) for y in (x, target))
    return x, target


def step(model: nn.Module, call: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The loss and the gradients of every parameter."""
    model.zero_grad()
    loss = call(*inputs)
    (loss * 1.5).backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_equal(compiled: list[Tensor], eager: list[Tensor]) -> None:
    assert len(compiled) == len(eager)
    for x, y in zip(compiled, eager, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def operators(call: Callable[..., Any], *inputs: Tensor) -> list[str]:
    """The names of the operators in the forward graph that Dynamo makes."""
    found = []

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(call, backend=note, fullgraph=True)(*inputs)
    return found


@pytest.mark.parametrize("strategy", ["auto", "one_pass", "two_pass"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_module_equals_eager(channels_last: bool, reduction: str, strategy: str) -> None:
    model = Student(reduction, strategy, inplace=True, full=True)
    inputs = batch(4, channels_last)
    compiled = step(model, torch.compile(model, fullgraph=True, backend=TRACER), *inputs)
    assert_equal(compiled, step(model, model, *inputs))


def test_inductor_equals_eager() -> None:
    model = Student()
    inputs = batch(4)
    compiled = step(model, torch.compile(model, fullgraph=True, dynamic=True), *inputs)
    assert_equal(compiled, step(model, model, *inputs))


@pytest.mark.parametrize("teacher_size", [8, 4], ids=["same_size", "pooled"])
def test_vid_loss_equals_eager(teacher_size: int) -> None:
    loss = vidfast.VIDLoss(3, 8, 5, weight=0.7)
    inputs = torch.randn(4, 3, 8, 8), torch.randn(4, 5, teacher_size, teacher_size)
    compiled = step(loss, torch.compile(loss, fullgraph=True, backend=TRACER), *inputs)
    assert_equal(compiled, step(loss, loss, *inputs))


@pytest.mark.parametrize(
    ("make", "sizes"),
    # torch's own convolution on the CPU guards its batch at 16
    [(Scaled, (2, 7, 33, 128)), (Student, (2, 7, 12)), (lambda: vidfast.VIDLoss(3, 8, 6), (2, 7, 12))],
    ids=["alone", "GaussianNLL", "VIDLoss"],
)
def test_one_compilation_serves_every_batch_size(
    make: Callable[[], nn.Module], sizes: tuple[int, ...]
) -> None:
    """No Python number is made from a shape, so that nothing but the batch's symbol changes."""
    model = make()
    compiled = torch.compile(model, fullgraph=True, backend=TRACER, dynamic=True)
    step(model, compiled, *batch(5))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 1
    for size in sizes:
        inputs = batch(size)
        assert_equal(step(model, compiled, *inputs), step(model, model, *inputs))
    assert counters["stats"]["unique_graphs"] == graphs


def test_another_weight_is_another_loss() -> None:
    """A float may become a symbol, a constant or a new graph; it must not stay what it was."""
    model = Student()
    compiled = torch.compile(model, fullgraph=True, backend=TRACER)
    inputs = batch(3)
    for weight in (0.3, 2.0, -1.0):
        model.nll.weight = weight
        assert_equal(step(model, compiled, *inputs), step(model, model, *inputs))


def test_the_graph_holds_the_operator() -> None:
    model = Student()
    assert "vidfast.gaussian_nll_one_pass_v2.default" in operators(model, *batch(3))


@pytest.mark.parametrize("options", [{"backend": "reference"}, {"reduction": "none"}], ids=str)
def test_the_reference_is_traced_as_it_is(options: dict[str, Any]) -> None:
    """Plain PyTorch is the compiler's to fuse."""
    model = Student(**options)
    inputs = batch(3)
    assert not any("vidfast" in name for name in operators(model, *inputs))
    compiled = torch.compile(model, fullgraph=True, backend=TRACER)(*inputs)
    torch.testing.assert_close(compiled, model(*inputs))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [{"backend": "reference"}, {"reduction": "none"}], ids=str)
def test_no_question_about_autocast_is_traced(
    options: dict[str, Any], autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo of torch 2.6 to 2.11 cannot trace these; and what it was told while tracing may not be so later."""
    for module, name in ((torch.amp, "is_autocast_available"), (torch, "is_autocast_enabled")):
        untraceable = torch._dynamo.disable(getattr(module, name))
        monkeypatch.setattr(module, name, untraceable)
    x, target, alpha = torch.randn(4, 6, 5), torch.randn(4, 6, 5), torch.randn(6)

    def loss(x: Tensor) -> Tensor:
        return vidfast.gaussian_nll(x, target, alpha, **options).sum()

    compiled = torch.compile(loss, fullgraph=True, backend=TRACER)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(compiled(x), loss(x), rtol=1e-6, atol=0)


def test_inplace_leaves_mean_alone() -> None:
    def loss_and_mean(x: Tensor, target: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        mean = x * 2
        return vidfast.gaussian_nll(mean, target, alpha, inplace=True), mean

    x, target, alpha = torch.randn(4, 6, 5, requires_grad=True), torch.randn(4, 6, 5), torch.randn(6)
    _, mean = torch.compile(loss_and_mean, fullgraph=True, backend=TRACER)(x, target, alpha)
    torch.testing.assert_close(mean, x * 2)


@pytest.mark.parametrize(
    "needs", [(True, False), (False, True), (True, True)], ids=["mean", "target", "both"]
)
def test_gradients_of_mean_and_target(needs: tuple[bool, bool]) -> None:
    x, target = torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    x, target = x.requires_grad_(needs[0]), target.requires_grad_(needs[1])
    alpha = torch.randn(6, requires_grad=True)
    wanted = [y for y in (x, target, alpha) if y.requires_grad]

    def loss(x: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
        return vidfast.gaussian_nll(x, target, alpha)

    compiled = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend=TRACER)(x, target, alpha), wanted
    )
    for found, expected in zip(compiled, torch.autograd.grad(loss(x, target, alpha), wanted), strict=True):
        torch.testing.assert_close(found, expected)


def test_without_gradients() -> None:
    model = Student()
    inputs = batch(3)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=TRACER)(*inputs)
        torch.testing.assert_close(compiled, model(*inputs))
    assert not compiled.requires_grad


def test_autocast() -> None:
    model = Student()
    inputs = batch(3)

    def under_autocast(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss: Tensor = model(*inputs)
        return loss

    compiled = step(model, torch.compile(under_autocast, fullgraph=True, backend=TRACER), *inputs)
    for x, y in zip(compiled, step(model, under_autocast, *inputs), strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-3)


def test_wrong_shapes_say_so() -> None:
    compiled = torch.compile(Student(), backend=TRACER)
    x, target = batch(3)
    with pytest.raises(ValueError, match="same shape"):
        compiled(x, target[:, :, 1:])


def test_an_unknown_strategy_says_so() -> None:
    def loss(x: Tensor) -> Tensor:
        return vidfast.gaussian_nll(x, x, x[0], strategy="three_pass")

    with pytest.raises(Exception, match="three_pass"):
        torch.compile(loss, fullgraph=True, backend=TRACER)(torch.ones(4, 6))


@pytest.mark.parametrize("make", [Student, lambda: vidfast.VIDLoss(3, 8, 6)], ids=["GaussianNLL", "VIDLoss"])
def test_export(make: Callable[[], nn.Module]) -> None:
    """An exported program takes any batch size, and is loaded where vidfast is imported."""
    model = make()
    size = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, batch(4), dynamic_shapes=({0: size}, {0: size}))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for inputs in (batch(4), batch(9)):
        torch.testing.assert_close(loaded(*inputs), model(*inputs))
