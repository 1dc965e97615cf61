"""The contract of raw addresses: only plain strided memory reaches native code, the rest the reference or an error."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import check_results
from oracle import Options, expected
from places import Place
from problems import BY_NAME, FP32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import vidfast

CASE = BY_NAME["plane_49"]
STRATEGIES = ("one_pass", "two_pass")


class Tagged(Tensor):
    """A subclass with torch's default behaviour."""


class Doubled(Tensor):
    """A wrapper whose values are twice those of the memory it has, so that reading the memory is found out."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Doubled:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def real(x: Any) -> Any:
            return x.inner * 2 if isinstance(x, Doubled) else x

        return func(
            *torch.utils._pytree.tree_map(real, args), **torch.utils._pytree.tree_map(real, kwargs or {})
        )


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def negated(x: Tensor) -> Tensor:
    """The same values as a lazily negated view: its memory holds their opposites."""
    out = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert out.is_neg()
    assert torch.equal(out, x)
    return out


def tensors(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    m, t, a = CASE.tensors(FP32, device=device)
    return m, t, a


ODD = {
    "a subclass": lambda x: x.as_subclass(Tagged),
    "a subclass of Parameter": lambda x: nn.Parameter(x).as_subclass(Tagged),
    "a wrapper": lambda x: Doubled(x / 2),
    "a negated view": negated,
}


@pytest.mark.parametrize("which", [0, 1, 2], ids=["mean", "target", "alpha"])
@pytest.mark.parametrize("odd", ODD)
def test_odd_tensors_take_the_reference(backend: Place, odd: str, which: int) -> None:
    xs = list(tensors(backend.device))
    want = expected(*xs)
    xs[which] = ODD[odd](xs[which])
    loss = vidfast.gaussian_nll(*xs)
    assert float(loss) == pytest.approx(float(want.loss), rel=1e-5)
    with pytest.raises(RuntimeError, match=rf"backend='{backend.name}' cannot run"):
        backend.nll(*xs)


@pytest.mark.parametrize("which", ["mask", "weight"])
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_odd_masks_and_weights_take_the_reference(
    backend: Place, strategy: str, odd: str, which: str
) -> None:
    """After a call with plain ones, which nothing odd is taken for."""
    m, t, a = tensors(backend.device)
    given = {
        "mask": torch.rand(5, 1, 7, 7).to(backend.device),
        "weight": torch.tensor(0.5).to(backend.device),
    }
    want = expected(m, t, a, 1.0, Options(**given))
    for _ in range(2):
        assert float(vidfast.gaussian_nll(m, t, a, strategy=strategy, **given)) == pytest.approx(
            float(want.loss), rel=1e-5
        )
    strange = ODD[odd](given[which])
    given[which] = strange.detach() if strange.requires_grad else strange
    if type(given[which]) is Tensor and not given[which].is_neg():
        pytest.skip("detached it is plain")
    loss = vidfast.gaussian_nll(m, t, a, strategy=strategy, **given)
    assert float(loss) == pytest.approx(float(want.loss), rel=1e-5)
    with pytest.raises(RuntimeError, match=rf"backend='{backend.name}' cannot run"):
        backend.nll(m, t, a, strategy=strategy, **given)


def test_parameters_are_plain(backend: Place) -> None:
    m, t, a = tensors(backend.device)
    want = expected(m, t, a)
    m, a = nn.Parameter(m), nn.Parameter(a)
    loss = backend.nll(m, t, a)
    check_results(want, loss, *torch.autograd.grad(loss, m), None, None, one_pass=True)


def test_gradients_of_a_negated_mean(backend: Place) -> None:
    m, t, a = tensors(backend.device)
    want = expected(m, t, a)
    leaf = m.clone().requires_grad_()
    loss = vidfast.gaussian_nll(torch.complex(torch.zeros_like(leaf), -leaf).conj().imag, t, a)
    (grad,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(grad.cpu().double(), torch.from_numpy(want.grad_mean), rtol=1e-5, atol=0)


def test_a_dispatch_mode_takes_the_reference(backend: Place) -> None:
    m, t, a = tensors(backend.device)
    want = expected(m, t, a)
    with Passing():
        loss = vidfast.gaussian_nll(m, t, a)
        with pytest.raises(RuntimeError, match="mode"):
            backend.nll(m, t, a)
    assert float(loss) == pytest.approx(float(want.loss), rel=1e-5)
    assert backend.nll(m, t, a).isfinite()


def test_fake_tensors(backend: Place) -> None:
    with FakeTensorMode() as mode:
        m, t, a = (torch.empty(s, device=backend.device) for s in ((4, 6, 5, 5), (4, 6, 5, 5), (6,)))
        m.requires_grad_()
        with pytest.raises(RuntimeError, match=f"backend='{backend.name}' cannot run"):
            backend.nll(m, t, a)
        loss = vidfast.gaussian_nll(m, t, a)
        (grad,) = torch.autograd.grad(loss, m)
    assert mode is not None
    assert loss.shape == ()
    assert loss.dtype == FP32
    assert grad.shape == m.shape
    outside = vidfast.gaussian_nll(m, t, a)  # fake tensors outlive their mode
    assert type(outside).__name__ == "FakeTensor"


@pytest.mark.parametrize("which", [0, 1, 2], ids=["mean", "target", "alpha"])
def test_meta_tensors_are_an_error(which: int) -> None:
    xs = list(tensors())
    xs[which] = xs[which].to("meta")
    with pytest.raises(ValueError, match="meta"):
        vidfast.gaussian_nll(*xs)
    with pytest.raises(ValueError, match="meta"):
        vidfast.gaussian_nll(*(x.to("meta") for x in tensors()))


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x.expand(3, *x.shape)),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(())),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
}


@pytest.mark.parametrize(
    ("which", "named"),
    [(0, False), (1, False), (2, False), (0, True)],
    ids=["mean", "target", "alpha", "named"],
)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functorch_is_a_clear_error(backend: Place, transform: str, which: int, named: bool) -> None:
    """The memory of a wrapped tensor is not its own. backend="reference" does what is asked."""
    if backend.device.type != "cpu":
        pytest.skip("the transforms are torch's, and the same on every device")
    xs = list(tensors())

    def loss(x: Tensor, backend_name: str) -> Tensor:
        return vidfast.gaussian_nll(*xs[:which], x, *xs[which + 1 :], backend=backend_name)

    before = [x.clone() for x in xs]
    with pytest.raises(RuntimeError, match=r"torch\.func|forward-mode|backend='reference'"):
        TRANSFORMS[transform](lambda x: loss(x, backend.name if named else "auto"), xs[which])
    for x, old in zip(xs, before, strict=True):
        assert torch.equal(x, old)
    result = TRANSFORMS[transform](lambda x: loss(x, "reference"), xs[which])
    assert all(bool(x.isfinite().all()) for x in torch.utils._pytree.tree_leaves(result))


def test_functorch_grad_of_the_reference_is_right() -> None:
    m, t, a = tensors()
    want = expected(m, t, a)
    got = torch.func.grad(lambda x: vidfast.gaussian_nll(x, t, a, backend="reference"))(m)
    torch.testing.assert_close(got.double(), torch.from_numpy(want.grad_mean), rtol=1e-5, atol=0)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["mean", "target", "alpha"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("strategy", ["auto", "two_pass"])
def test_forward_mode_is_a_clear_error(backend: Place, which: int, grad: bool, strategy: str) -> None:
    """The tangent would be dropped in silence."""
    xs = list(tensors(backend.device))
    with forward_ad.dual_level():
        if grad:
            xs = [x.requires_grad_(i != 1) for i, x in enumerate(xs)]
        xs[which] = forward_ad.make_dual(xs[which], torch.ones_like(xs[which]))
        with pytest.raises(RuntimeError, match="forward-mode"):
            backend.nll(*xs, strategy=strategy)
        out = vidfast.gaussian_nll(*xs, backend="reference")
        assert forward_ad.unpack_dual(out).tangent is not None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batched_incoming_gradients_are_a_clear_error(backend: Place, strategy: str) -> None:
    """is_grads_batched runs backward under vmap: g has no memory of its own."""
    m, t, a = tensors(backend.device)
    loss = backend.nll(m.requires_grad_(), t, a, strategy=strategy)
    with pytest.raises(RuntimeError, match=r"vidfast|vmap|batch"):
        torch.autograd.grad(loss, m, torch.ones(3, device=backend.device), is_grads_batched=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_incoming_gradient_of_a_subclass(backend: Place, strategy: str) -> None:
    m, t, a = tensors(backend.device)
    want = expected(m, t, a, 3.0)
    loss = backend.nll(m.requires_grad_(), t, a, strategy=strategy)
    (grad,) = torch.autograd.grad(loss, m, torch.tensor(3.0, device=backend.device).as_subclass(Tagged))
    check_results(want, loss, grad, None, None, g=3.0, one_pass=strategy == "one_pass")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_backward_under_a_dispatch_mode(backend: Place, strategy: str) -> None:
    m, t, a = tensors(backend.device)
    want = expected(m, t, a, 3.0)
    loss = backend.nll(m.requires_grad_(), t, a, strategy=strategy)
    with Passing():
        (grad,) = torch.autograd.grad(loss, m, torch.tensor(3.0, device=backend.device))
    check_results(want, loss, grad, None, None, g=3.0, one_pass=strategy == "one_pass")


def run_apart(code: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: what goes wrong here writes through a wild address."""
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent,
    )  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_default_device(backend: Place, strategy: str) -> None:
    """torch.set_default_device decides where `torch.empty` lies: never where our tensors do."""
    done = run_apart(
        f"""
        import torch, vidfast
        m, t, a = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5), torch.zeros(6)
        m, t, a = (x.to("{backend.device}") for x in (m, t, a))
        m.requires_grad_(); a.requires_grad_()
        want = vidfast.gaussian_nll(m, t, a, backend="reference")
        want_grads = torch.autograd.grad(want, (m, a), create_graph=True)
        with torch.device("meta"):
            loss = vidfast.gaussian_nll(m, t, a, strategy="{strategy}", backend="{backend.name}")
            for create in (False, True):
                grads = torch.autograd.grad(loss, (m, a), create_graph=create, retain_graph=True)
                for x, y in zip((loss, *grads), (want, *want_grads)):
                    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
            with torch.no_grad():
                torch.testing.assert_close(vidfast.gaussian_nll(m, t, a, backend="{backend.name}"), want.detach())
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fake_tensors_reaching_backward(backend: Place, strategy: str) -> None:
    """Real tensors in forward, a fake g or a fake mode in backward: an error or a right result, no wild address."""
    done = run_apart(
        f"""
        import contextlib, torch, vidfast
        from torch._subclasses.fake_tensor import FakeTensorMode
        m, t, a = (torch.ones(s, device="{backend.device}") for s in ((4, 6, 5, 5), (4, 6, 5, 5), (6,)))
        m.requires_grad_()
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        g = torch.tensor(3.0, device="{backend.device}")
        (want,) = torch.autograd.grad(vidfast.gaussian_nll(m * 2, t, a, backend="reference"), m, g)
        for what, given in (("mode", g), ("meta g", g.to("meta")), ("fake g", mode.from_tensor(g))):
            print(what, flush=True)
            loss = vidfast.gaussian_nll(m * 2, t, a, strategy="{strategy}", backend="{backend.name}")
            try:
                with mode if what == "mode" else contextlib.nullcontext():
                    (grad,) = torch.autograd.grad(loss, m, given)
            except (RuntimeError, ValueError, TypeError, AssertionError) as error:
                print("refused:", error)
                continue
            if type(grad) is torch.Tensor and not grad.is_meta:
                assert what == "mode", "a number came out of a tensor that has none"
                torch.testing.assert_close(grad, want)
        """
    )
    assert done.returncode == 0, f"{done.returncode} after {done.stdout.split(chr(10))}: {done.stderr}"


def test_compiling_takes_what_torch_can_trace(backend: Place) -> None:
    """is_compiling: no raw address is baked into a graph."""
    m, t, a = tensors(backend.device)
    want = expected(m, t, a)
    m = m.requires_grad_()
    step = torch.compile(lambda x: vidfast.gaussian_nll(x, t, a), backend="aot_eager", fullgraph=True)
    loss = step(m)
    (grad,) = torch.autograd.grad(loss, m)
    assert float(loss) == pytest.approx(float(want.loss), rel=1e-5)
    torch.testing.assert_close(grad.cpu().double(), torch.from_numpy(want.grad_mean), rtol=1e-5, atol=0)


def test_zero_tensors_have_no_memory_to_read(backend):
    """They are backed by no storage: the inputs take the reference, an incoming gradient is made real."""
    zero = torch._efficientzerotensor((4, 3, 5, 5), device=backend.device)
    target = torch.randn(4, 3, 5, 5, device=backend.device)
    alpha = torch.zeros(3, device=backend.device)
    got = vidfast.gaussian_nll(zero, target, alpha)
    torch.testing.assert_close(got, vidfast.gaussian_nll(torch.zeros_like(target), target, alpha))
    with pytest.raises(RuntimeError, match="zero tensor"):
        vidfast.gaussian_nll(zero, target, alpha, backend=backend.name)
    mean = torch.randn_like(target, requires_grad=True)
    loss = vidfast.gaussian_nll(mean, target, alpha, backend=backend.name)
    g = torch._efficientzerotensor((), device=backend.device)
    assert torch.autograd.grad(loss, mean, g)[0].abs().sum() == 0


class _Losses(torch.utils.data.Dataset[float]):
    """Each item runs the kernel in the worker that makes it."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        mean = torch.full((64, 8, 16, 16), float(index))
        return vidfast.gaussian_nll(mean, torch.zeros_like(mean), torch.zeros(8)).item()


def test_worker_processes_after_use():
    """A forked worker has none of its parent's threads; torch gives it one, and so do we."""
    here = [_Losses()[i] for i in range(4)]
    context = "fork" if sys.platform == "linux" else None
    loader = torch.utils.data.DataLoader(
        _Losses(), num_workers=2, batch_size=None, multiprocessing_context=context
    )
    assert list(loader) == here
