"""A regressor may be any module: what VIDLoss may write over or compute otherwise is judged at every call."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import vidfast
from vidfast.distill import VID, Distiller
from vidfast.head.function import Head
from vidfast.regressor import owns_its_output

Context = Callable[[vidfast.VIDLoss], contextlib.AbstractContextManager[object]]


class Match(nn.Module):
    """Projects only where widths differ, as distillation code often does."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(fan_in, fan_out, 1)
        self.needed = fan_in != fan_out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(x) if self.needed else x
        return out


class ViewOf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).view(x.shape)


class Keeps(nn.Module):
    """Has its output, as a cache or a visualisation would."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.last = nn.Conv2d(6, 6, 1), torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.convolution(x)
        return self.last


class KeepsConv(nn.Conv2d):
    last = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


def with_forward(module: nn.Module, part: str, made: Callable[[Any], Any]) -> nn.Module:
    """The module with the forward of a part replaced by `made(forward)`."""
    layer: Any = module.get_submodule(part)
    layer.forward = made(layer.forward)
    return module


def keeping(holder: nn.Module) -> Callable[[Any], Any]:
    """A forward that keeps its output in `holder.last`."""

    def made(forward: Any) -> Any:
        def call(x: Tensor) -> Tensor:
            holder.last = forward(x)
            return holder.last

        return call

    return made


def kept_by_a_forward(part: str) -> nn.Module:
    stack = nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
    return with_forward(stack, part, keeping(stack))


def shared_rectifier() -> nn.Module:
    rectifier = nn.ReLU()
    return nn.Sequential(rectifier, nn.Conv2d(6, 6, 3, padding=1), rectifier, nn.Conv2d(6, 6, 1))


def residual() -> nn.Module:
    stack = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))

    def forward(x: Tensor) -> Tensor:
        hidden = stack[0](x)
        out: Tensor = stack[2](stack[1](hidden) + hidden)
        return out

    return with_forward(stack, "", lambda _: forward)


OWN: dict[str, Callable[[], nn.Module]] = {
    "projects only where widths differ": lambda: Match(6, 6),
    "a view": ViewOf,
    "nothing": nn.Identity,
    "an empty Sequential": nn.Sequential,
    "dropout in eval": lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.Dropout()).eval(),
    "dropout of the feature in eval": lambda: nn.Sequential(nn.Dropout()).eval(),
    "flatten and back": lambda: nn.Sequential(nn.Flatten(1), nn.Unflatten(1, (6, 5, 5))),
    "a block whose last layer is a convolution": lambda: nn.Sequential(ViewOf(), nn.Conv2d(6, 6, 1)),
    "keeps its output": Keeps,
    "a convolution that keeps its output": lambda: nn.Sequential(KeepsConv(6, 6, 1)),
    "a ReLU that stands in two places": shared_rectifier,
    "the whole returns its input": lambda: with_forward(
        nn.Sequential(nn.Conv2d(6, 6, 3, padding=1)), "", lambda _: lambda x: x
    ),
    "the whole adds what it hid": residual,
    "the whole keeps its output": lambda: kept_by_a_forward(""),
    "the first convolution keeps its output": lambda: kept_by_a_forward("0"),
    "the rectifier keeps its output": lambda: kept_by_a_forward("1"),
    "the last convolution keeps its output": lambda: kept_by_a_forward("2"),
    "of one convolution": lambda: nn.Conv2d(6, 6, 1),
    "upsampling": lambda: nn.Upsample(5),
}


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("name", OWN)
def test_the_feature_and_what_a_regressor_keeps_stay_as_they_are(name: str, requires_grad: bool) -> None:
    torch.manual_seed(0)
    module = vidfast.VIDLoss(6, 8, 6)
    module.regressor = OWN[name]()  # type: ignore[assignment]
    feature = torch.randn(2, 6, 5, 5, requires_grad=requires_grad) * 1
    t, before = torch.randn(2, 6, 5, 5), feature.detach().clone()
    leaves = [*([feature] if requires_grad else []), *module.parameters()]
    mean = module.regressor(feature)
    kept = {part: part.last.detach().clone() for part in module.modules() if hasattr(part, "last")}
    want = vidfast.gaussian_nll(mean, t, module.log_scale, backend="reference")
    exact = torch.autograd.grad(want, leaves, allow_unused=True)
    loss = module(feature, t)
    assert torch.equal(feature.detach(), before)
    for part, value in kept.items():
        assert torch.equal(part.last.detach(), value)
    torch.testing.assert_close(loss, want)
    for got, right in zip(torch.autograd.grad(loss, leaves, allow_unused=True), exact, strict=True):
        torch.testing.assert_close(got, right)
    assert torch.equal(feature.detach(), before)


class Rounds(TorchFunctionMode):
    """Convolutions with rounded weights: simulated quantisation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.conv2d, torch.conv2d):
            args = (args[0], args[1].round(decimals=1), *args[2:])
        return func(*args, **(kwargs or {}))


class Passes(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def exchanged(holder: Any, name: str, made: Callable[[Any], Any]) -> Iterator[None]:
    own, original = name in vars(holder), getattr(holder, name)
    setattr(holder, name, made(original))
    try:
        yield
    finally:
        if own or not isinstance(holder, nn.Module):
            setattr(holder, name, original)
        else:
            delattr(holder, name)


def rounded(convolve: Any) -> Any:
    return lambda x, w, *rest, **options: convolve(x, w.round(decimals=1), *rest, **options)


def halved(call: Any) -> Any:
    return lambda *args, **options: call(*args, **options) * 0.5


def called(call: Any) -> Any:
    """As torch.fx's tracer and profilers put themselves between."""
    return lambda self, *args, **options: call(self, *args, **options)


CONTEXTS: dict[str, Context] = {
    "a function mode": lambda _: Rounds(),
    "F.conv2d": lambda _: exchanged(F, "conv2d", rounded),
    "F.relu": lambda _: exchanged(F, "relu", halved),
    "a layer's _conv_forward": lambda v: exchanged(v.regressor[0], "_conv_forward", rounded),
    "a layer's forward": lambda v: exchanged(v.regressor[2], "forward", halved),
    "a rectifier's forward": lambda v: exchanged(v.regressor[1], "forward", halved),
    "the regressor's forward": lambda v: exchanged(v.regressor, "forward", halved),
    "Conv2d.forward": lambda _: exchanged(nn.Conv2d, "forward", halved),
    "Conv2d._conv_forward": lambda _: exchanged(nn.Conv2d, "_conv_forward", halved),
    "torch.relu": lambda _: exchanged(torch, "relu", halved),
    "torch.relu_": lambda _: exchanged(torch, "relu_", halved),
    "torch.conv2d": lambda _: exchanged(torch, "conv2d", rounded),
    "ReLU.forward": lambda _: exchanged(nn.ReLU, "forward", halved),
    "Sequential.forward": lambda _: exchanged(nn.Sequential, "forward", halved),
    "Module.__call__": lambda _: exchanged(nn.Module, "__call__", called),
}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every call that is computed in parts."""
    calls: list[int] = []
    forward = Head.forward

    def counted(*args: Any) -> Any:
        calls.append(1)
        return forward(*args)

    monkeypatch.setattr(Head, "forward", staticmethod(counted))
    return calls


@pytest.mark.parametrize("name", CONTEXTS)
def test_what_changes_a_layer_is_noticed(name: str, fused: list[int]) -> None:
    torch.manual_seed(0)
    module = vidfast.VIDLoss(6, 8, 6)
    s, t = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5)
    plain = module(s, t)
    assert len(fused) == 1
    found = []
    for inplace in (True, False):
        module.inplace = inplace
        with CONTEXTS[name](module):
            found.append(module(s, t))
    assert len(fused) == 1
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)
    unchanged = ("Module.__call__", "torch.relu_", "torch.conv2d")  # which the modules do not go through
    assert name in unchanged or abs(found[0] - plain) > 1e-6, "nothing was changed"
    module.inplace = True
    assert torch.equal(module(s, t), plain)
    assert len(fused) == 2


@pytest.mark.parametrize("name", ["torch.nn.functional.conv2d", "torch.nn.Conv2d._conv_forward"])
def test_what_was_replaced_before_the_import_is_noticed_too(name: str) -> None:
    holder, attribute = name.rsplit(".", 1)
    code = f"""
import torch
original = {name}
{holder}.{attribute} = lambda *args, **options: 2 * original(*args, **options)
import vidfast
torch.manual_seed(0)
v, s, t = vidfast.VIDLoss(6, 8, 6), torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5)
want = vidfast.gaussian_nll(v.regressor(s), t, v.log_scale)
assert abs(v(s, t) - want) < 1e-6, (v(s, t), want)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]


def test_a_recording_student_keeps_what_it_recorded() -> None:
    """Its __torch_function__ sees every layer's output, as a mode would."""
    kept: list[Tensor] = []

    class Recording(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = super().__torch_function__(func, types, args, kwargs or {})
            if func in (F.conv2d, torch.conv2d):
                kept.append(out.as_subclass(Tensor))
                return kept[-1]
            return out

    module = vidfast.VIDLoss(6, 8, 6)
    module(torch.randn(4, 6, 5, 5).as_subclass(Recording), torch.randn(4, 6, 5, 5))
    assert float(kept[0].detach().min()) < 0


def test_a_default_device_is_no_mode_that_changes_anything(fused: list[int]) -> None:
    module = vidfast.VIDLoss(6, 8, 6)
    with torch.device("cpu"):
        module(torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5))
    assert len(fused) == 1


def test_a_regressor_that_was_replaced_is_judged_itself(fused: list[int]) -> None:
    module = vidfast.VIDLoss(6, 8, 6)
    s, t = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5)
    seen: list[Tensor] = []
    module.regressor = nn.Sequential(nn.Conv2d(6, 7, 1), nn.ReLU(), nn.Conv2d(7, 6, 1))
    module.regressor[0].register_forward_hook(lambda _m, _i, out: seen.append(out))
    loss = module(s, t)
    assert fused == []
    assert float(seen[0].detach().min()) < 0
    torch.testing.assert_close(loss, vidfast.gaussian_nll(module.regressor(s), t, module.log_scale))
    assert not module.regressor[1].inplace


@contextlib.contextmanager
def precision(backend: Any, value: str) -> Iterator[None]:
    before = backend.fp32_precision
    backend.fp32_precision = value
    try:
        yield
    finally:
        backend.fp32_precision = before


@contextlib.contextmanager
def matmul_precision(value: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("which", ["conv", "matmul", "mkldnn", "torch.set_float32_matmul_precision"])
def test_a_precision_of_convolutions_is_theirs(which: str, fused: list[int]) -> None:
    """Matrix products would follow another switch than the convolutions that they stand for."""
    module = vidfast.VIDLoss(6, 8, 6)
    s, t = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5)
    if which.startswith("torch"):
        lower: Any = matmul_precision("medium")
    else:
        switches = torch.backends.mkldnn
        place = switches if which == "mkldnn" else getattr(switches, which, None)
        if not hasattr(place, "fp32_precision"):
            pytest.skip(f"torch {torch.__version__} has no such switch")
        lower = precision(place, "bf16")
    with lower:
        found = module(s, t)
        module.inplace = False
        want = module(s, t)
    assert fused == []
    assert torch.equal(found, want)
    module.inplace = True
    module(s, t)
    assert len(fused) == 1


def policy(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    aten = torch.ops.aten
    saved = operator in (aten.convolution.default, aten.mm.default, aten.bmm.default, aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def selectively(function: Any, *args: Any) -> Any:
    return checkpoint(
        function, *args, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_checkpointing(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = vidfast.VIDLoss(6, 8, 6, dtype=dtype)
    s, t = torch.randn(4, 6, 5, 5, dtype=dtype, requires_grad=True), torch.randn(4, 6, 5, 5)
    leaves = [s, *module.parameters()]
    want = torch.autograd.grad(module(s, t), leaves)
    for got, right in zip(torch.autograd.grad(selectively(module, s, t), leaves), want, strict=True):
        torch.testing.assert_close(got, right, rtol=2e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-5)


def test_selective_checkpointing_of_a_distiller() -> None:
    torch.manual_seed(0)

    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))

    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    distiller = Distiller(network(), network(), terms=[VID({"0": "0"})], example=x)
    parameters = [p for p in distiller.parameters() if p.requires_grad]

    def loss(x: Tensor) -> Tensor:
        return distiller(x, y).loss

    want = torch.autograd.grad(loss(x), parameters)
    got = torch.autograd.grad(selectively(loss, x), parameters)
    for found, right in zip(got, want, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", [Rounds, Passes])
def test_under_a_mode_nothing_is_written_over(mode: Any) -> None:
    stack = nn.Sequential(nn.Conv2d(6, 6, 1))
    assert owns_its_output(stack)
    with mode():
        assert not owns_its_output(stack)
    assert owns_its_output(stack)


def value_of(x: Tensor) -> Tensor:
    return torch._from_functional_tensor(x) if torch._is_functional_tensor(x) else x


def test_a_functional_tensor_takes_the_reference() -> None:
    """Its Python type is Tensor, and its own memory is nothing."""
    m, t, a = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5), torch.zeros(6)
    want = vidfast.gaussian_nll(m, t, a)
    for which in range(3):
        given = [m, t, a]
        given[which] = torch._to_functional_tensor(given[which])
        loss = vidfast.gaussian_nll(*given)
        torch.testing.assert_close(value_of(loss), want)
        with pytest.raises(RuntimeError, match="functional tensor"):
            vidfast.gaussian_nll(*given, backend="cpu")
    module = vidfast.VIDLoss(6, 8, 6)
    loss = module(torch._to_functional_tensor(m), t)
    torch.testing.assert_close(value_of(loss), module(m, t))
