"""One pass stays one pass in a compiled graph: which operator runs, what is scaled where, and never twice."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import vidfast
from vidfast import _torch, autograd, primitive_ops, primitives, recall, tracing

COMPILERS = ("eager", "aot_eager", "inductor")
SHAPE = (3, 6, 5, 4)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(SHAPE).to(dtype), torch.randn(SHAPE).to(dtype), torch.randn(SHAPE[1])


def loss_of(x: Tensor, t: Tensor, a: Tensor, **options: Any) -> Tensor:
    """The loss of a mean that the graph computes, as a regressor does."""
    return vidfast.gaussian_nll(x * 1.25, t, a, **options)


def no_caches() -> Any:
    """For tests that read the compiler's code, or what it was told."""
    inductor_config: Any = importlib.import_module("torch._inductor.config")
    return inductor_config.patch(force_disable_caches=True)


def donating(on: bool) -> Any:
    functorch_config: Any = importlib.import_module("torch._functorch.config")
    return functorch_config.patch(donated_buffer=on)


# ---- which operator


@pytest.mark.parametrize("strategy", ["auto", "one_pass", "two_pass"])
@pytest.mark.parametrize("needs", ["", "m", "a", "t", "ma", "mt", "mta"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16], ids=str
)  # the rule knows fp16 and all others
@pytest.mark.parametrize("grad_mode", [True, False])
def test_a_graph_takes_the_strategy_that_an_eager_call_takes(
    grad_mode: bool, dtype: torch.dtype, needs: str, strategy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if strategy == "one_pass" and "t" in needs:
        pytest.skip("refused before")
    m, t, a = (x.requires_grad_(name in needs) for name, x in zip("mta", problem(dtype), strict=True))
    names, eager = [], []

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    right = autograd.OnePass.apply
    monkeypatch.setattr(autograd.OnePass, "apply", lambda *args: eager.append("one_pass") or right(*args))
    recall._remembered.clear()  # a recalled call does not come by `apply`
    with torch.set_grad_enabled(grad_mode):
        torch.compile(vidfast.gaussian_nll, backend=note, fullgraph=True)(m, t, a, strategy=strategy)
        vidfast.gaussian_nll(m, t, a, strategy=strategy)
    found = [name.split(".")[1] for name in names if name.startswith("vidfast.")]
    assert found == ["gaussian_nll_one_pass_v2" if eager else "gaussian_nll_two_pass_v2"]


def test_a_graph_without_gradients_makes_none() -> None:
    """One that torch has differentiated calls the primitive alone; without gradients, the one that writes nothing."""
    m, t, a = problem()
    for needs, want in ((True, "gaussian_nll_forward_grad"), (False, "gaussian_nll_forward")):
        names = []

        def note(graph: torch.fx.GraphModule, _: Any) -> Any:
            names.extend(str(node.target) for node in graph.graph.nodes)  # noqa: B023
            return torch._dynamo.backends.common.aot_autograd(fw_compiler=seen)(graph, _)

        def seen(graph: torch.fx.GraphModule, _: Any) -> Any:
            names.extend(str(node.target) for node in graph.graph.nodes)  # noqa: B023
            return graph

        import torch._dynamo.backends.common

        torch._dynamo.reset()
        torch.compile(loss_of, backend=note, fullgraph=True)(m.requires_grad_(needs), t, a)
        assert f"vidfast.{want}.default" in names


# ---- values


LAID_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channel_slice": lambda x: torch.cat([x, x], 1)[:, 1 : 1 + x.shape[1]],
    "spatial_slice": lambda x: torch.cat([x, x], 3)[..., 1 : 1 + x.shape[3]],
    "expanded": lambda x: x[:1].expand(x.shape),
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("layout", LAID_OUT)
@pytest.mark.parametrize(
    ("needs", "channel_dim", "dtype"),
    [
        ("ma", 1, torch.float32),
        ("ma", -1, torch.bfloat16),
        ("m", 1, torch.float64),
        ("a", -1, torch.float32),
        ("m", -1, torch.float16),
    ],
    ids=str,
)
def test_any_set_of_gradients_of_any_layout(
    needs: str, channel_dim: int, dtype: torch.dtype, layout: str
) -> None:
    m, t, _ = problem(dtype)
    a = torch.randn(SHAPE[channel_dim])
    inputs = (
        LAID_OUT[layout](m).requires_grad_("m" in needs),
        LAID_OUT[layout](t),
        a.requires_grad_("a" in needs),
    )
    wanted = [x for x in inputs if x.requires_grad]

    def loss(m: Tensor, t: Tensor, a: Tensor) -> Tensor:
        return vidfast.gaussian_nll(m, t, a, channel_dim=channel_dim, reduction="sum", weight=0.7, full=True)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for factor in (1.0, -2.5):
        found, want = (torch.autograd.grad(f(*inputs) * factor, wanted) for f in (compiled, loss))
        for x, y in zip(found, want, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "spatial_slice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_over_several_batches(dtype: torch.dtype, layout: str) -> None:
    """Each gradient is scaled once, step after step, whatever arrives."""
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True)
    for batch, factor in ((3, 1.0), (2, -2.5), (3, 1.0), (5, 3.0)):
        m, t, a = problem(dtype)
        m, t = (LAID_OUT[layout](x.repeat(2, 1, 1, 1)[:batch]) for x in (m, t))
        found, want = [], []
        for f, grads in ((compiled, found), (loss_of, want)):
            leaves = m.detach().requires_grad_(), a.detach().requires_grad_()
            for weight in (1, 2):  # accumulates into the same leaves
                (f(leaves[0], t, leaves[1], reduction="batchmean") * factor * weight).backward()
            grads.extend(x.grad for x in leaves)
        for x, y in zip(found, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6 if dtype is torch.float32 else 2e-2, atol=1e-6)


# ---- what is scaled where


class Scalings:
    """What was made in forward, and what was scaled in backward: addresses, g, whether in place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[int] = []
        self.scaled: list[tuple[int, float, bool]] = []
        forward_grad, scale = primitives.forward_grad, primitives.scale

        def seen_forward(*args: Any, **counts: Any) -> Any:
            found = forward_grad(*args, **counts)
            self.made.append(found[1].data_ptr())
            return found

        def seen_scale(backend: Any, g: Tensor, grad: Tensor, *rest: Any) -> Any:
            self.scaled.append((grad.data_ptr(), g.item(), rest[-1]))
            return scale(backend, g, grad, *rest)

        monkeypatch.setattr(primitives, "forward_grad", seen_forward)
        monkeypatch.setattr(primitives, "scale", seen_scale)


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_copies_no_gradient(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What forward wrote is scaled where it is stored, by the kernel that does nothing at g = 1."""
    seen = Scalings(monkeypatch)
    m, t, a = problem()
    leaves = m.requires_grad_(), a.requires_grad_()
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=dynamic)

    def step() -> None:
        compiled(m, t, a).backward()

    with no_caches(), donating(True):
        _, code = run_and_get_code(step)
        found = [x.grad for x in leaves]
    assert "vidfast.scale_.default(" in code[-1]
    assert "clone" not in code[-1]
    assert seen.scaled == [(seen.made[0], 1.0, True)]
    want = torch.autograd.grad(loss_of(m, t, a), leaves)
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("donated", [True, False])
def test_a_graph_that_is_kept_is_never_scaled_twice(donated: bool, compiler: str) -> None:
    m, t, a = problem()
    leaves = m.requires_grad_(), a.requires_grad_()
    want = torch.autograd.grad(loss_of(m, t, a) * 3, leaves)
    with no_caches(), donating(donated):
        compiled = torch.compile(loss_of, backend=compiler, fullgraph=True)
        loss = compiled(m, t, a) * 3
        for _ in range(3):  # where the first backward pass is to be kept, torch donates nothing
            found = torch.autograd.grad(loss, leaves, retain_graph=True)
            for x, y in zip(found, want, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-6, atol=0)
        torch._dynamo.reset()
        compiled = torch.compile(loss_of, backend=compiler, fullgraph=True)
        torch.autograd.grad(compiled(m, t, a), leaves)
        loss = compiled(m, t, a) * 3
        for _ in range(2):
            if donated and compiler != "eager":  # torch refuses, and so nothing is read twice
                with pytest.raises(RuntimeError, match="donated"):
                    torch.autograd.grad(loss, leaves, retain_graph=True)
                continue
            found = torch.autograd.grad(loss, leaves, retain_graph=True)
            for x, y in zip(found, want, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-6, atol=0)


class _ReadTwice(torch.autograd.Function):
    """A backward that scales what was saved by g, and again by 2 g."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, t: Tensor, a: Tensor) -> Tensor:
        loss, of_mean, of_alpha = primitive_ops.forward_grad(
            m, t, a, None, 1, 1e-5, "mean", False, 1.0, "auto"
        )
        ctx.save_for_backward(of_mean, of_alpha)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        of_mean, of_alpha = ctx.saved_tensors
        options = (of_alpha, 1, torch.float32, "auto")
        once, twice = (primitive_ops.scale(of_mean, f * g, *options)[0] for f in (1, 2))
        return once + twice, None, None


def test_what_something_else_reads_is_not_scaled_in_place() -> None:
    m, t, a = problem()
    m.requires_grad_()
    (want,) = torch.autograd.grad(loss_of(m, t, a) * 9, m)

    def loss(m: Tensor) -> Tensor:
        return _ReadTwice.apply(m * 1.25, t, a) * 3  # type: ignore[no-any-return, no-untyped-call]

    def step() -> Tensor:
        (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(m), m)
        return found

    with no_caches():
        found, code = run_and_get_code(step)
    assert "vidfast.scale.default(" in code[-1]
    assert "vidfast.scale_" not in code[-1]
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


def test_without_inductors_names_it_is_scaled_out_of_place(monkeypatch: pytest.MonkeyPatch) -> None:
    lowering: Any = importlib.import_module("torch._inductor.lowering")
    monkeypatch.delitem(lowering.lowerings, primitive_ops.scale, raising=False)
    monkeypatch.setattr(_torch, "_mutated_by_inductor", {primitive_ops.scale})
    m, t, a = problem()
    m.requires_grad_()

    def step() -> Tensor:
        (found,) = torch.autograd.grad(torch.compile(loss_of, fullgraph=True)(m, t, a) * 3, m)
        return found

    with no_caches():
        found, code = run_and_get_code(step)
    lowering.lowerings.pop(primitive_ops.scale)  # a fallback, which Inductor registered for itself
    assert "vidfast.scale.default(" in code[-1]
    torch.testing.assert_close(found, torch.autograd.grad(loss_of(m, t, a) * 3, m)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_autograd_scales_a_compiled_forward_once(compiler: str) -> None:
    compiled_autograd: Any = importlib.import_module("torch._dynamo.compiled_autograd")
    enable = getattr(compiled_autograd, "_enable", None) or compiled_autograd.enable
    compiled = torch.compile(loss_of, backend=compiler)
    for _ in range(3):
        m, t, a = problem()
        leaves = m.requires_grad_(), a.requires_grad_()
        want = torch.autograd.grad(loss_of(m, t, a) * 3, leaves)
        with enable(lambda graph: torch.compile(graph, backend="aot_eager")):
            (compiled(m, t, a) * 3).backward()
        for x, y in zip(leaves, want, strict=True):
            assert x.grad is not None
            torch.testing.assert_close(x.grad, y, rtol=1e-6, atol=0)


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_second_derivative_is_an_error(compiler: str, strategy: Any) -> None:
    """And not 0: torch takes a compiled backward's results for constants where nothing that it reads requires grad."""
    m, t, a = problem()
    leaves = m.requires_grad_(), a.requires_grad_()
    loss = torch.compile(loss_of, backend=compiler)(m, t, a, strategy=strategy)
    (grad, _) = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backend='reference'|double backward"):
        torch.autograd.grad(grad.square().sum(), leaves)


# ---- the weight


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_any_weight_leaves_nothing_to_scale(
    dynamic: bool | None, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A constant or a schedule's is folded in, so that backward is given exactly 1; the loss is eager's to the bit."""
    from torch._dynamo.testing import CompileCounterWithBackend

    seen = Scalings(monkeypatch)
    counter = CompileCounterWithBackend(compiler)
    m, t, a = problem()
    leaves = m.requires_grad_(), a.requires_grad_()
    nll = vidfast.GaussianNLL(6, weight=1.0)
    nll.alpha.data = a.detach()
    compiled = torch.compile(lambda m, t: nll(m * 1.25, t), backend=counter, fullgraph=True, dynamic=dynamic)
    for weight in (1.0, 0.0, 0.3, 1.0, 1 / 3, -2.0, 1e-3):
        nll.weight = weight
        loss = compiled(m, t)
        (found,) = torch.autograd.grad(loss, m)
        assert seen.scaled.pop()[1] == 1.0
        exact = loss_of(m, t, a, weight=weight)
        assert torch.equal(loss, exact)
        torch.testing.assert_close(found, torch.autograd.grad(exact, m)[0], rtol=1e-6, atol=0)
    assert counter.frame_count <= 3
    assert leaves[1].grad is None


def test_elsewhere_than_on_the_cpu_a_schedule_multiplies_the_loss() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    def weighted(x: Tensor, weight: float) -> Tensor:
        inside, factor, outside = tracing.weight_in_graph(weight, on_cpu=False)
        assert factor is None
        return x.sin() * inside if outside is None else outside * x.sin()

    compiled = torch.compile(weighted, backend=counter, fullgraph=True)
    x = torch.randn(4)
    for weight in (1.0, 0.5, 0.0, 1.0, 0.3, 1 / 3):
        torch.testing.assert_close(compiled(x, weight), weight * x.sin(), rtol=1e-6, atol=0)
    assert counter.frame_count <= 3


# ---- programs


def test_an_exported_program_is_trained() -> None:
    torch.manual_seed(0)
    module = vidfast.VIDLoss(3, 8, 6, weight=0.3, inplace=False)  # layer by layer: the loss by itself
    size = torch.export.Dim("batch", min=2)
    x, t = torch.randn(4, 3, 5, 5), torch.randn(4, 6, 5, 5)
    program = torch.export.export(module, (x, t), dynamic_shapes=({0: size}, {0: size}))
    names = [str(node.target) for node in program.graph.nodes]
    assert "vidfast.gaussian_nll_one_pass_v2.default" in names
    loaded = program.module()
    for batch in (4, 9):
        x, t = torch.randn(batch, 3, 5, 5), torch.randn(batch, 6, 5, 5)
        loss, want = loaded(x, t) * 2, module(x, t) * 2
        torch.testing.assert_close(loss, want)
        for got, exact in zip(
            torch.autograd.grad(loss, list(loaded.parameters())),
            torch.autograd.grad(want, list(module.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-8)


def test_a_program_exported_without_gradients_makes_none() -> None:
    module = vidfast.GaussianNLL(6)
    m, t, _ = problem()
    with torch.no_grad():
        program = torch.export.export(module, (m, t))
    for found in (program, program.run_decompositions()):
        names = [str(node.target).split(".") for node in found.graph.nodes if "vidfast" in str(node.target)]
        assert [name[1] for name in names] in (["gaussian_nll_two_pass_v2"], ["gaussian_nll_forward"])
        torch.testing.assert_close(found.module()(m, t), module(m, t))


CACHED = """
    import sys, torch, vidfast
    from torch._dynamo.utils import counters
    torch.manual_seed(0)
    x, t = torch.randn(4, 6, 5, 5, requires_grad=True), torch.randn(4, 6, 5, 5)
    nll = vidfast.GaussianNLL(6, weight=0.3)
    compiled = torch.compile(lambda x: nll(x * 1.25, t), fullgraph=True)
    for factor in (1.0, 3.0, 3.0):
        (got,) = torch.autograd.grad(compiled(x) * factor, x)
        (want,) = torch.autograd.grad(nll(x * 1.25, t) * factor, x)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    print("hits", counters["aot_autograd"]["autograd_cache_hit"])
"""


def test_graphs_from_the_disk_cache(tmp_path: Path) -> None:
    """The first process fills the cache, the second is served from it."""
    hits = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(CACHED)],
            env={
                **os.environ,
                "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
                "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        hits.append(int(run.stdout.split("hits")[1]))
    assert hits[0] == 0
    if hits[1] == 0:
        pytest.skip(f"torch {torch.__version__} kept no such graph")


def test_a_default_device_changes_no_weight_on_a_schedule() -> None:
    m, t, a = problem()
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    for weight in (1.0, 0.7, 0.3):
        want = loss_of(m, t, a, weight=weight)
        with torch.device("meta"):
            found = compiled(m, t, a, weight=weight)
        torch.testing.assert_close(found, want)
