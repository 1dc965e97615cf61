"""One variance an element under torch.compile and torch.export: one graph, one pass, the same numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vidfast
from vidfast import functional
from vidfast.heteroscedastic import operators

ONE_PASS = torch.ops.vidfast.heteroscedastic_nll_one_pass_v1.default
TWO_PASS = torch.ops.vidfast.heteroscedastic_nll_two_pass_v1.default
SHAPE = (3, 6, 5, 4)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def problem(dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> tuple[Tensor, Tensor, Tensor]:
    tensors = [torch.randn(SHAPE).to(dtype) for _ in range(3)]
    if layout == "channels_last":
        tensors = [x.contiguous(memory_format=torch.channels_last) for x in tensors]
    if layout == "halves":
        tensors[0], tensors[2] = torch.randn(3, 12, 5, 4).to(dtype).chunk(2, 1)
    return tensors[0], tensors[1], tensors[2]


def options(reduction: str = "mean", **more: Any) -> tuple[object, ...]:
    known = {"transform": 0, "eps": 1e-3, "beta": 0.0, "channel": None, "reduction": reduction, "full": True,
             "weight": 0.5, "backend": "auto", "negative_is_nan": False}  # fmt: skip
    return tuple({**known, **more}.values())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "halves"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_opcheck(layout: str, needs: tuple[bool, bool]) -> None:
    mean, target, raw = (x.detach() for x in problem(torch.bfloat16, layout))
    mean.requires_grad_(needs[0])
    raw.requires_grad_(needs[1])
    mask = torch.rand(SHAPE) > 0.5
    torch.library.opcheck(ONE_PASS, (mean, target, raw, *needs, None, None, *options()))
    torch.library.opcheck(
        ONE_PASS, (mean, target, raw, *needs, mask, torch.ones(1), *options("sum", transform=1))
    )
    target = target.float().requires_grad_(needs[0])
    torch.library.opcheck(TWO_PASS, (mean, target, raw, None, None, *options("batchmean", beta=0.5)))
    torch.library.opcheck(TWO_PASS, (mean, target, raw, mask, None, *options(transform=3)))


def test_operators_by_hand_check_what_they_read() -> None:
    mean, target, raw = problem()
    with pytest.raises(ValueError, match="same shape"):
        TWO_PASS(mean, target[:1], raw, None, None, *options())
    with pytest.raises(ValueError, match="transform must be 0"):
        TWO_PASS(mean, target, raw, None, None, *options(transform=7))
    with pytest.raises(ValueError, match="channel must be a dimension"):
        TWO_PASS(mean, target, raw, None, None, *options(channel=4))
    with pytest.raises(ValueError, match="target must not require grad in one pass"):
        ONE_PASS(
            mean.requires_grad_(), target.clone().requires_grad_(), raw, True, False, None, None, *options()
        )


KWARGS: list[dict[str, Any]] = [
    {}, {"transform": "exp", "eps": 0.0, "reduction": "sum"}, {"beta": 0.5, "full": True}, {"transform": "identity"},
    {"strategy": "two_pass", "reduction": "batchmean"}, {"channel_dim": 1, "weight": 0.25},
]  # fmt: skip


@pytest.mark.parametrize("kwargs", KWARGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_as_eager(compiler: str, dtype: torch.dtype, kwargs: dict[str, Any]) -> None:
    if compiler == "inductor" and (dtype is torch.float16 or "beta" in kwargs):
        pytest.skip("inductor runs the others")
    mask = torch.rand(3, 5, 4) > 0.3 if "channel_dim" in kwargs else None

    def loss(y: Tensor, target: Tensor) -> Tensor:
        mean, raw = (1.5 * y).chunk(2, 1)
        return vidfast.heteroscedastic_nll(mean, target, raw.abs() + 0.1, mask=mask, **kwargs)

    y, target = torch.randn(3, 12, 5, 4).to(dtype).requires_grad_(), torch.randn(SHAPE).to(dtype)
    compiled = torch.compile(loss, backend=compiler, fullgraph=True)
    for g in (1.0, -2.0):
        found = [torch.autograd.grad(g * f(y, target), y)[0] for f in (loss, compiled)]
        tolerance = 2e-2 if dtype is not torch.float32 else 1e-5  # inductor rounds what is between less often
        assert torch.allclose(*found, rtol=tolerance, atol=tolerance * found[0].abs().max().item())
    assert torch.allclose(loss(y, target), compiled(y, target), rtol=1e-2)


def test_one_pass_is_one_pass_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward is one operator that makes both gradients; backward only scales."""
    seen = list[str]()

    class Backend:
        def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
            seen.extend(str(node.target) for node in graph.graph.nodes if "vidfast" in str(node.target))
            return graph

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(
        lambda m, t, u: vidfast.heteroscedastic_nll(m * 1.5, t, u * 1.5),
        backend=aot_autograd(fw_compiler=Backend(), bw_compiler=Backend()),
        fullgraph=True,
    )
    mean, target, raw = problem()
    compiled(mean.requires_grad_(), target, raw.requires_grad_()).backward()
    assert [name.split(".")[1] for name in seen] == ["heteroscedastic_nll_forward_grad", "scale", "scale"]


def test_dynamic_shapes_and_a_changing_weight_are_few_graphs() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def loss(m: Tensor, t: Tensor, u: Tensor, weight: float) -> Tensor:
        return vidfast.heteroscedastic_nll(m, t, u, weight=weight)

    for batch, weight in itertools.product((2, 3, 5, 8), (1.0, 0.5, 0.25, 0.125)):
        m, t, u = (torch.randn(batch, 6, 5) for _ in range(3))
        got = loss(m.requires_grad_(), t, u, weight)
        want = vidfast.heteroscedastic_nll(m, t, u, weight=weight)
        assert torch.allclose(got, want, rtol=1e-5)
    assert counter.frame_count <= 4


@pytest.mark.parametrize("kind", ["full", "shared", "number", "bf16"])
def test_gaussian_nll_loss_compiles_whole(kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    x, t = torch.randn(4, 6).to(dtype).requires_grad_(), torch.randn(4, 6).to(dtype)
    v: Any = 0.5 if kind == "number" else (torch.rand(4, 1 if kind == "shared" else 6) + 0.1).to(dtype)
    if kind != "number":
        v.requires_grad_()
    leaves = [x] if kind == "number" else [x, v]
    found = []
    for loss in (functional.gaussian_nll_loss, torch.compile(functional.gaussian_nll_loss, fullgraph=True)):
        value = loss(x, t, v)
        found.append([value, *torch.autograd.grad(value, leaves)])
    for got, want in zip(found[1], found[0], strict=True):
        assert got.dtype == want.dtype
        assert torch.allclose(got, want, rtol=2e-2 if kind == "bf16" else 1e-5, atol=1e-3)


def test_a_negative_variance_in_a_graph_is_an_error_on_the_cpu() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    v = torch.ones(4, 6)
    compiled = torch.compile(vidfast.GaussianNLLLoss(), backend="aot_eager", fullgraph=True)
    compiled(x, torch.zeros(4, 6), v)
    v[1, 2] = -1
    with pytest.raises(ValueError, match="var has negative entry"):
        compiled(x, torch.zeros(4, 6), v)


def test_export() -> None:
    class Program(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Conv2d(3, 8, 1)
            self.loss = vidfast.HeteroscedasticNLL(beta=0.5)

        def forward(self, images: Tensor, target: Tensor) -> Tensor:
            mean, raw = self.net(images).chunk(2, 1)
            return self.loss(mean, target, raw)

    program, images, target = Program(), torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5)
    exported = torch.export.export(program, (images, target))
    assert any("heteroscedastic_nll" in str(node.target) for node in exported.graph.nodes)
    assert torch.allclose(exported.module()(images, target), program(images, target), rtol=1e-5)


def test_autocast_in_a_graph() -> None:
    net = nn.Linear(5, 8)

    def loss(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mean, raw = net(x).chunk(2, -1)
            return vidfast.heteroscedastic_nll(mean, t, raw)

    x, t = torch.randn(7, 5), torch.randn(7, 4)
    want = loss(x, t)
    got = torch.compile(loss, backend="aot_eager", fullgraph=True)(x, t)
    assert want.dtype is got.dtype is torch.float32
    assert torch.allclose(got, want, rtol=1e-3)


def test_a_second_derivative_says_what_to_do() -> None:
    mean, target, raw = problem()
    value = operators.one_pass(mean.requires_grad_(), target, raw, True, False, None, None, *options())[0]
    (grad,) = torch.autograd.grad(value, mean, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(grad.sum(), mean)
