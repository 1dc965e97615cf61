"""Compiled, inside what training programs do around a loss: transforms, schedules, selections, wrappers of tensors."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import vidfast

COMPILERS = ("eager", "aot_eager", "inductor")
SHAPE = (2, 4, 3, 2)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE[1])


M, T, A = tensors()
V = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (V,))[1],
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "grad_and_value": lambda f, x: torch.func.grad_and_value(f)(x)[0],
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(()))[0],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
    "grad of grad": lambda f, x: torch.func.grad(lambda y: torch.func.grad(f)(y).square().sum())(x),
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (V,))[1],
}


def dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, V))).tangent


TRANSFORMS["a dual tensor"] = dual


@pytest.mark.parametrize(
    ("transform", "compiler"),
    [
        *((transform, compiler) for transform in TRANSFORMS for compiler in ("eager", "aot_eager")),
        *((transform, "inductor") for transform in ("jvp", "jacfwd", "a dual tensor")),
    ],
)
def test_transforms_inside_a_compiled_function(transform: str, compiler: str) -> None:
    """They see the reference there, which the compiler fuses. Once they gave 0 in silence."""
    apply = TRANSFORMS[transform]
    want = apply(lambda x: vidfast.gaussian_nll(x, T, A, backend="reference"), M)
    compiled = torch.compile(
        lambda x: apply(lambda y: vidfast.gaussian_nll(y, T, A), x), backend=compiler, fullgraph=True
    )
    torch.testing.assert_close(compiled(M), want)


@pytest.mark.parametrize("of", ["target", "alpha", "VIDLoss", "VIDLoss's parameters"])
def test_forward_mode_reaches_every_input(of: str) -> None:
    ours, reference = vidfast.VIDLoss(4, 5, 4), vidfast.VIDLoss(4, 5, 4, backend="reference")
    reference.load_state_dict(ours.state_dict())

    def derivative(backend: Any, module: vidfast.VIDLoss) -> Tensor:
        if of == "target":
            return torch.func.jvp(lambda t: vidfast.gaussian_nll(M, t, A, backend=backend), (T,), (V,))[1]
        if of == "alpha":
            return torch.func.jvp(lambda a: vidfast.gaussian_nll(M, T, a, backend=backend), (A,), (A,))[1]
        if of == "VIDLoss":
            return torch.func.jvp(lambda m: module(m, T), (M,), (V,))[1]
        parameters = dict(module.named_parameters())
        return torch.func.jvp(
            lambda p: torch.func.functional_call(module, p, (M, T)), (parameters,), (parameters,)
        )[1]

    want = derivative("reference", reference)
    assert abs(float(want)) > 1e-6
    got = torch.compile(lambda: derivative("auto", ours), backend="aot_eager")()
    torch.testing.assert_close(got, want)


def test_a_kernel_asked_for_by_name_has_no_derivative_of_that_kind() -> None:
    def derivative() -> Tensor:
        return torch.func.jvp(lambda m: vidfast.gaussian_nll(m, T, A, backend="cpu"), (M,), (V,))[1]

    with pytest.raises(Exception):  # noqa: B017, PT011 (dynamo's own, which says where; before 2.7 not why)
        torch.compile(derivative, backend="eager", fullgraph=True)()
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.compile(derivative, backend="eager")()


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_graph_that_is_there_already_refuses_a_dual_tensor(compiler: str) -> None:
    compiled = torch.compile(lambda m: vidfast.gaussian_nll(m, T, A), backend=compiler)
    compiled(M)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        compiled(forward_ad.make_dual(M, V))
    assert compiled(M) == pytest.approx(float(vidfast.gaussian_nll(M, T, A)), rel=1e-6)


def test_the_operator_called_by_hand_refuses_a_dual_tensor() -> None:
    operator: Any = torch.ops.vidfast.gaussian_nll_two_pass_v2.default
    with forward_ad.dual_level():
        for which in range(3):
            given = [M, T, A]
            given[which] = forward_ad.make_dual(given[which], torch.ones_like(given[which]))
            with pytest.raises(RuntimeError, match="forward-mode"):
                operator(*given, 1, 1e-5, "mean", False, 1.0, "auto")


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("where", ["module", "function", "VIDLoss"])
def test_a_weight_on_a_schedule_is_no_new_graph(where: str, fullgraph: bool) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    m = M.clone().requires_grad_()
    module: Any = vidfast.VIDLoss(4, 5, 4) if where == "VIDLoss" else vidfast.GaussianNLL(4)
    if where == "function":
        compiled: Any = torch.compile(
            lambda w: vidfast.gaussian_nll(m, T, module.alpha, weight=w), backend=counter, fullgraph=fullgraph
        )
    else:
        compiled = torch.compile(module, backend=counter, fullgraph=fullgraph)
    # beginning with 0 and 1, which a compiler likes to take for constants
    for weight in (0.0, 1.0, *(0.1 + 0.05 * step for step in range(24)), *np.linspace(0, 1, 5)):
        if where == "function":
            weight = float(weight)
        if where == "function":
            loss = compiled(weight)
        else:
            module.weight = weight
            loss = compiled(m, T)
        (grad,) = torch.autograd.grad(loss, m)
        module.weight = weight
        want = module(m, T)
        (exact,) = torch.autograd.grad(want, m)
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-9)
    assert counter.frame_count <= 5


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_selection_whose_size_only_the_data_knows(backend: Any, compiler: str) -> None:
    torch.manual_seed(0)
    m, t, a = (
        torch.randn(4, 7, 6, requires_grad=True),
        torch.randn(4, 7, 6),
        torch.zeros(6, requires_grad=True),
    )

    def loss(mask: Tensor, reduction: Any = "mean") -> Tensor:
        return vidfast.gaussian_nll(m[mask], t[mask], a, channel_dim=-1, reduction=reduction, backend=backend)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(loss, backend=compiler, fullgraph=True)
        for share in (0.4, 0.8):
            mask = torch.rand(4, 7) > share
            got, want = (torch.autograd.grad(f(mask), (m, a)) for f in (compiled, loss))
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_an_empty_batch(compiler: str, reduction: Any) -> None:
    compiled = torch.compile(
        lambda m, t, a: vidfast.gaussian_nll(m, t, a, reduction=reduction), backend=compiler, dynamic=True
    )
    for size in (3, 0, 2):
        m, t, a = (
            torch.ones(size, 4, 2, requires_grad=True),
            torch.zeros(size, 4, 2),
            torch.zeros(4, requires_grad=True),
        )
        want = vidfast.gaussian_nll(m, t, a, reduction=reduction)
        got = compiled(m, t, a)
        torch.testing.assert_close(got, want, equal_nan=True)
        for x, y in zip(torch.autograd.grad(got, (m, a)), torch.autograd.grad(want, (m, a)), strict=True):
            torch.testing.assert_close(x, y)
            assert x.isfinite().all()


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "a slice": lambda t: t[:1],
    "a crop": lambda t: t[:, :, 1:, :1],
    "float": lambda t: t.float(),
    "a function": lambda t: torch.permute(t, (0, 1, 3, 2)),
    "a chunk": lambda t: t.chunk(2)[0],
    "tokens": lambda t: t.flatten(2).transpose(1, 2)[:, 1:].transpose(1, 2).reshape(2, 4, -1),
    "data": lambda t: t.data,
}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_of_a_teacher_in_inference_mode(view: str, compiler: str) -> None:
    with torch.inference_mode():
        t = T.clone()
    mean = VIEWS[view](M).contiguous().requires_grad_()
    want = torch.autograd.grad(vidfast.gaussian_nll(mean, VIEWS[view](T), A), mean)[0]
    compiled = torch.compile(
        lambda m, t: vidfast.gaussian_nll(m, VIEWS[view](t), A), backend=compiler, fullgraph=True
    )
    torch.testing.assert_close(torch.autograd.grad(compiled(mean, t), mean)[0], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("pooled", [False, True])
def test_a_teacher_in_inference_mode(compiler: str, dtype: torch.dtype, pooled: bool) -> None:
    """Autograd saves no such tensor, and a compiled graph saves its inputs."""
    nll, vid = vidfast.GaussianNLL(4), vidfast.VIDLoss(4, 5, 4, dtype=dtype)
    with torch.inference_mode():
        t = T.to(dtype)
        large = torch.nn.functional.interpolate(t, scale_factor=2)
    m = M.to(dtype).requires_grad_()
    for module, target in ((nll, t), (vid, large if pooled else t)):
        torch._dynamo.reset()
        compiled = torch.compile(module, backend=compiler, dynamic=False)
        want = torch.autograd.grad(module(m, target.clone()), m)[0]
        for given in (target, target.clone(), target):
            torch.testing.assert_close(torch.autograd.grad(compiled(m, given), m)[0], want)


# Inductor's graphs assert the strides of what they saved, and say so.
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_repacked_saved_tensors(compiler: str) -> None:
    def a_column(x: Tensor) -> Tensor:
        table = x.new_full((*x.shape, 2), 1e9)
        table[..., 0] = x
        return table[..., 0]

    leaves = [x.clone().requires_grad_() for x in (M, T, A)]
    want = torch.autograd.grad(vidfast.gaussian_nll(*leaves), leaves)
    compiled = torch.compile(vidfast.gaussian_nll, backend=compiler)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), a_column):
        loss = compiled(*leaves)
    for got, exact in zip(torch.autograd.grad(loss, leaves), want, strict=True):
        torch.testing.assert_close(got, exact)


def test_a_checkpoint_inside() -> None:
    module = vidfast.VIDLoss(4, 5, 4)
    m = M.clone().requires_grad_()
    leaves = [m, *module.parameters()]
    want = torch.autograd.grad(module(m, T), leaves)
    compiled = torch.compile(lambda m: checkpoint(module, m, T, use_reentrant=False), backend="aot_eager")
    for got, exact in zip(torch.autograd.grad(compiled(m), leaves), want, strict=True):
        torch.testing.assert_close(got, exact)


def test_alpha_in_a_shape_that_broadcasts() -> None:
    compiled = torch.compile(vidfast.gaussian_nll, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(M, T, A.view(1, -1, 1, 1)), vidfast.gaussian_nll(M, T, A))


@pytest.mark.parametrize("loss", ["one_pass", "two_pass", "VIDLoss"])
def test_compiled_autograd_traces_the_backward(loss: Any) -> None:
    """There are no addresses while it does."""
    compiled_autograd: Any = importlib.import_module("torch._dynamo.compiled_autograd")
    enable = getattr(compiled_autograd, "_enable", None) or compiled_autograd.enable
    vid = vidfast.VIDLoss(4, 5, 4)

    def run(m: Tensor, t: Tensor, a: Tensor) -> Tensor:
        return vid(m, t) if loss == "VIDLoss" else vidfast.gaussian_nll(m, t, a, strategy=loss)

    for batch in (2, 2, 3, 5):
        m, t, a = (
            torch.randn(batch, 4, 3, requires_grad=True),
            torch.randn(batch, 4, 3),
            A.clone().requires_grad_(),
        )
        (want,) = torch.autograd.grad(run(m, t, a), m)
        with enable(lambda graph: torch.compile(graph, backend="eager")):
            run(m, t, a).backward()
        assert m.grad is not None
        torch.testing.assert_close(m.grad, want)


IN_PROCESS_GROUP = """
    import sys
    import torch, torch.distributed as dist
    import vidfast
    store = dist.FileStore(sys.argv[1], 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    torch.manual_seed(0)
    m, t, a = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5), torch.randn(6)
"""
PROGRAMS = {
    "compiled DTensors": """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor
        mesh = init_device_mesh("cpu", (1,))
        m.requires_grad_()
        (want,) = torch.autograd.grad(vidfast.gaussian_nll(m, t, a), m)
        md, td = (distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_(x is m) for x in (m, t))
        ad = distribute_tensor(a, mesh, [Replicate()])
        for compiler in ("eager", "aot_eager"):
            torch._dynamo.reset()
            loss = torch.compile(lambda m: vidfast.gaussian_nll(m, td, ad), backend=compiler)(md)
            (grad,) = torch.autograd.grad(loss, md)
            torch.testing.assert_close(grad.full_tensor(), want)
        try:
            torch.compile(lambda m: vidfast.gaussian_nll(m, td, ad, backend="cpu"), backend="eager")(md)
        except RuntimeError as error:
            assert "tensor subclass" in str(error)
        else:
            raise AssertionError("backend='cpu' took a DTensor")
    """,
    "FSDP1": """
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.conv, self.loss = torch.nn.Conv2d(6, 6, 1), vidfast.VIDLoss(6, 8, 6)
            def forward(self, x, t):
                return self.loss(self.conv(x), t)
        want = Net()(m, t)
        cpu = torch.device("cpu")
        for flat in (True, False):
            for wrapped in (None, "loss", "regressor"):
                net = Net()
                if wrapped == "loss":
                    net.loss = FSDP(net.loss, device_id=cpu, use_orig_params=not flat)
                if wrapped == "regressor":
                    net.loss.regressor = FSDP(net.loss.regressor, device_id=cpu, use_orig_params=not flat)
                net = FSDP(net, device_id=cpu, use_orig_params=not flat)
                loss = net(m, t)
                loss.backward()
                torch.testing.assert_close(loss, want)
                assert all(p.grad is not None for p in net.parameters())
        with torch.device("meta"):
            net = Net()
        FSDP(net, device_id=cpu, use_orig_params=True)
        torch.testing.assert_close(net.loss.variance.detach(), torch.full((6,), 5.0))
    """,
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_in_a_process_group(program: str, tmp_path: Path) -> None:
    # gloo's threads do not always outlive the interpreter's end
    code = (
        textwrap.dedent(IN_PROCESS_GROUP) + textwrap.dedent(PROGRAMS[program]) + "\nimport os; os._exit(0)\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "store")],
        env={"GLOO_SOCKET_IFNAME": "lo", **os.environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
