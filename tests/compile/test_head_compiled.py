"""A head inside torch.compile and torch.export: one operator, the numbers of the eager one, one compilation."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import vidfast
from vidfast import memory
from vidfast.distill import VID
from vidfast.head import operator

pytestmark = pytest.mark.skipif(memory._C is None, reason="the extension is not built")
SCALER = 65536.0
AMP = [None, torch.bfloat16, torch.float16]
names = ["fp32", "bf16", "fp16"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_of_map(module: vidfast.VIDLoss, amp: torch.dtype | None) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(student: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=amp or torch.bfloat16, enabled=amp is not None):
            found: Tensor = module(student, target)
        return found

    return loss


def pair(batch: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 5, 10, 11).to(dtype).requires_grad_(), torch.randn(batch, 6, 10, 11).to(dtype)


def step(call: Callable[..., Tensor], inputs: list[Tensor], *data: Tensor, g: float = 1.0) -> list[Tensor]:
    loss = call(*data)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, torch.tensor(g))]


def operators_of(call: Callable[..., Tensor], *data: Tensor) -> list[str]:
    """What stands in the forward and backward graphs once torch has differentiated them."""
    found: list[str] = []
    common: Any = importlib.import_module("torch._dynamo.backends.common")

    def seen(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(call, backend=common.aot_autograd(fw_compiler=seen), fullgraph=True)
    compiled(*data).backward()
    return found


@pytest.mark.parametrize("amp", AMP, ids=names)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_vid_loss_is_one_operator_with_the_eager_numbers(compiler: str, amp: torch.dtype | None) -> None:
    module = vidfast.VIDLoss(5, 8, 6)
    student, target = pair()
    inputs = [student, *module.parameters()]
    g = SCALER if amp is torch.float16 else 1.0
    plain = loss_of_map(module, amp)
    eager = step(plain, inputs, student, target, g=g)
    compiled = step(torch.compile(plain, backend=compiler, fullgraph=True), inputs, student, target, g=g)
    for x, y in zip(compiled, eager, strict=True):
        assert x.dtype is y.dtype
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0)
    torch._dynamo.reset()
    found = operators_of(plain, student, target)
    assert found.count("vidfast.vid_head_forward_grad.default") == 1
    assert not [name for name in found if "conv" in name or "mm" in name or "gaussian_nll" in name]


@pytest.mark.parametrize("amp", AMP, ids=names)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_tokens(amp: torch.dtype | None, bias: bool) -> None:
    layers = nn.Sequential(nn.Linear(5, 8, bias=bias), nn.ReLU(), nn.Linear(8, 6, bias=bias))
    alpha = nn.Parameter(torch.randn(6))
    student, target = torch.randn(3, 7, 5, requires_grad=True), torch.randn(3, 7, 6)
    linear: list[Any] = [layers[0], layers[2]]

    def loss(student: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=amp or torch.bfloat16, enabled=amp is not None):
            return vidfast.vid_head(
                student, target, alpha, [x.weight for x in linear], [x.bias for x in linear], channel_dim=-1
            )

    inputs = [student, alpha, *layers.parameters()]
    g = SCALER if amp is torch.float16 else 1.0
    eager = step(loss, inputs, student, target, g=g)
    compiled = step(torch.compile(loss, backend="aot_eager", fullgraph=True), inputs, student, target, g=g)
    for x, y in zip(compiled, eager, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0)
    torch._dynamo.reset()
    assert "vidfast.vid_head_forward_grad.default" in operators_of(loss, student, target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_modules_of_16_bits(dtype: torch.dtype) -> None:
    module = vidfast.VIDLoss(5, 8, 6).to(dtype)
    student, target = pair(dtype=dtype)
    inputs = [student, *module.parameters()]
    eager = step(module, inputs, student, target, g=256.0)
    compiled = step(
        torch.compile(module, backend="aot_eager", fullgraph=True), inputs, student, target, g=256.0
    )
    for x, y in zip(compiled, eager, strict=True):
        assert x.dtype is y.dtype
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0)


def test_an_fp16_student_under_bf16_autocast() -> None:
    """Its gradient is stored without k, though the layers' type needs no such thing."""
    module = vidfast.VIDLoss(5, 8, 6, weight=2.0**-12)
    student, target = pair(dtype=torch.float16)
    plain = loss_of_map(module, torch.bfloat16)
    inputs = [student, *module.parameters()]
    eager = step(plain, inputs, student, target, g=SCALER)
    compiled = step(
        torch.compile(plain, backend="aot_eager", fullgraph=True), inputs, student, target, g=SCALER
    )
    assert bool((eager[1] != 0).all())
    for x, y in zip(compiled, eager, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0)


def test_a_pair_of_the_distillers_vid() -> None:
    student, teacher = torch.randn(4, 9, 5), torch.randn(4, 9, 7)
    term = VID(pairs={"a": "a"}, channel_dim=-1, regressor="conv2")
    term.regressors, term.likelihoods = nn.ModuleList(), nn.ModuleList()
    term.build_pair(student, teacher)
    student.requires_grad_()
    found = operators_of(lambda s, t: term.pair_loss(0, s, t, 0.5), student, teacher)
    assert found.count("vidfast.vid_head_forward_grad.default") == 1


def test_without_gradients_none_is_made() -> None:
    module = vidfast.VIDLoss(5, 8, 6).requires_grad_(False)
    student, target = pair()
    student = student.detach()
    counter = CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        loss = torch.compile(module, backend=counter, fullgraph=True)(student, target)
    torch.testing.assert_close(loss, module(student, target))
    assert [str(n.target) for g in counter.graphs for n in g.graph.nodes if "vid_head" in str(n.target)]


@pytest.mark.parametrize("wanted", range(1, 16))
def test_any_part_of_the_gradients(wanted: int) -> None:
    """Of the student, log_scale, a weight and a bias."""
    module = vidfast.VIDLoss(5, 8, 6)
    module.regressor[2] = nn.Conv2d(8, 8, 1)
    student, target = pair()
    chosen = [student, module.log_scale, module.regressor[0].weight, module.regressor[2].bias]
    module.requires_grad_(False)
    for index, x in enumerate(chosen):
        x.requires_grad_(bool(wanted >> index & 1))
    inputs = [x for x in chosen if x.requires_grad]
    eager = step(module, inputs, student, target)
    compiled = step(torch.compile(module, backend="aot_eager", fullgraph=True), inputs, student, target)
    for x, y in zip(compiled, eager, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("amp", [None, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_retained_graph_gives_the_same_again(compiler: str, amp: torch.dtype | None) -> None:
    config: Any = importlib.import_module("torch._functorch.config")
    module = vidfast.VIDLoss(5, 8, 6)
    student, target = pair(dtype=amp or torch.float32)
    inputs = [student, *module.parameters()]
    plain = loss_of_map(module, amp)
    wanted = step(plain, inputs, student, target, g=SCALER)
    with config.patch(donated_buffer=False):
        loss = torch.compile(plain, backend=compiler, fullgraph=True)(student, target)
        for factor in (1.0, 0.5, 1.0):
            found = torch.autograd.grad(loss, inputs, torch.tensor(factor * SCALER), retain_graph=True)
            for x, y in zip(found, wanted[1:], strict=True):
                torch.testing.assert_close(x, y * factor, rtol=2e-3 if amp else 1e-6, atol=0)


def test_batches_of_any_size_are_one_compilation() -> None:
    module = vidfast.VIDLoss(5, 8, 6, reduction="batchmean")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    frames: list[int] = []
    for batch in (4, 6, 9, 3, 8):
        student, target = pair(batch)
        inputs = [student, *module.parameters()]
        for x, y in zip(
            step(compiled, inputs, student, target), step(module, inputs, student, target), strict=True
        ):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-9)
        frames.append(counter.frame_count)
    assert frames == [frames[0]] * len(frames)


def test_a_weight_on_a_schedule_compiles_twice() -> None:
    module = vidfast.VIDLoss(5, 8, 6)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    student, target = pair()
    inputs = [student, *module.parameters()]
    for weight in (1.0, 0.7, 0.35, 0.1, -2.5):
        module.weight = weight
        for x, y in zip(
            step(compiled, inputs, student, target), step(module, inputs, student, target), strict=True
        ):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=0)
    assert counter.frame_count <= 2


def test_a_default_device_changes_no_weight_on_a_schedule() -> None:
    module, (student, target) = vidfast.VIDLoss(5, 8, 6), pair()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for weight in (1.0, 0.7, 0.3):
        module.weight = weight
        want = module(student, target)
        with torch.device("meta"):
            found = compiled(student, target)
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("training", [True, False])
def test_export(training: bool) -> None:
    module = vidfast.VIDLoss(5, 8, 6).requires_grad_(training)
    student, target = pair()
    student = student.detach()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(module, (student, target), dynamic_shapes=({0: batch}, {0: batch}))
    assert [n for n in exported.graph.nodes if "vid_head" in str(n.target)]
    for size in (4, 7):
        student, target = pair(size)
        torch.testing.assert_close(exported.module()(student, target), module(student, target))


def test_a_second_derivative_is_an_error_and_never_zero() -> None:
    module = vidfast.VIDLoss(5, 8, 6)
    student, target = pair()
    found = torch.compile(module, backend="eager", fullgraph=True)(student, target)
    (first,) = torch.autograd.grad(found, student, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative"):
        first.square().sum().backward()


def test_a_target_that_requires_grad_goes_layer_by_layer() -> None:
    alpha, weight = torch.randn(6), torch.randn(6, 5, requires_grad=True)
    student, target = pair()
    target.requires_grad_()

    def loss(student: Tensor, target: Tensor) -> Tensor:
        return vidfast.vid_head(student, target, alpha, weight)

    found = operators_of(loss, student, target)
    assert not [name for name in found if "vid_head" in name]
    assert target.grad is not None
    want = torch.autograd.grad(loss(student, target), target)[0]
    torch.testing.assert_close(target.grad, want)


def test_hooks_are_seen_in_a_graph_too() -> None:
    module = vidfast.VIDLoss(5, 8, 6)
    student, target = pair()
    want = module(student, target)
    module.regressor[2].register_forward_hook(lambda _m, _i, out: 2 * out)
    found = torch.compile(module, backend="aot_eager")(student, target)
    assert not torch.allclose(found, want)
    torch.testing.assert_close(found, module(student, target))


@pytest.mark.parametrize("requires_grad", [True, False])
def test_an_empty_batch(requires_grad: bool) -> None:
    module = vidfast.VIDLoss(5, 8, 6, reduction="sum")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
    student, target = pair(0)
    student = student.detach().requires_grad_(requires_grad)
    found = compiled(student, target)
    found.backward()
    assert float(found) == 0
    assert not module.regressor[0].weight.grad.any()


def samples(amp: torch.dtype, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Arguments of the operators; of the second the student's memory has another order."""
    found = []
    for last in (False, True):
        student, target = torch.randn(3, 5, 8).to(dtype), torch.randn(3, 6, 8)
        if last:
            student = student.transpose(1, 2).contiguous().transpose(1, 2)
        weights = [torch.randn(8, 5, dtype=dtype), torch.randn(6, 8, dtype=dtype)]
        biases = [None, torch.randn(6, dtype=dtype)]
        factor = torch.tensor(0.5, dtype=torch.float64) if last else None
        leaves = [student, *weights, biases[1]]
        for x in leaves:
            assert x is not None
            x.requires_grad_()
        alpha = torch.randn(6, requires_grad=True)
        options = (True, 1e-5, "mean", 1.0, amp, "auto")
        found.append((student, target, alpha, weights, biases, factor, *options))
    return found


@pytest.mark.parametrize("amp", [torch.float32, torch.bfloat16, torch.float16], ids=names)
def test_opcheck(amp: torch.dtype) -> None:
    for arguments in samples(amp, torch.float32):
        torch.library.opcheck(operator.head, arguments)
        plain = tuple(
            [y if y is None else y.detach() for y in x]
            if isinstance(x, list)
            else x.detach()
            if isinstance(x, Tensor)
            else x
            for x in arguments
        )
        torch.library.opcheck(operator.forward, plain)
        for wanted in ([True] * 5, [False, True, False, False, True], [True, False, False, False, False]):
            wanted[3] = False
            torch.library.opcheck(operator.forward_grad, (*plain, wanted))


def test_by_hand_an_operator_checks_what_it_reads() -> None:
    student, target, alpha, weights, biases, factor, *options = samples(torch.float32, torch.float32)[0]
    bad: list[tuple[Any, ...]] = [
        (student[0], target, alpha, weights, biases, factor, *options),
        (student, target[:, :, :4], alpha, weights, biases, factor, *options),
        (student, target, alpha[:3], weights, biases, factor, *options),
        (student, target, alpha, weights[:1], biases[:1], factor, *options),
        (student, target, alpha, weights, biases, torch.zeros(3), *options),
        (student, target, alpha, weights, biases, factor, True, -1.0, *options[2:]),
        (student, target, alpha, weights, biases, factor, *options[:2], "none", *options[3:]),
        (student, target, alpha, weights, biases, factor, *options[:4], torch.float64, "auto"),
        (student.double(), target, alpha, weights, biases, factor, *options),
    ]
    for arguments in bad:
        with torch.no_grad(), pytest.raises((ValueError, TypeError), match="must be"):
            operator.forward(*arguments)
