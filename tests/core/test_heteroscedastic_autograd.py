"""What autograd sees of a call with one variance an element: halves and hooks, derivatives, retained graphs."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from places import Place
from problems import BY_NAME, FP16, FP32, FP64
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from variances import TRANSFORMS, tensors_of

import vidfast
from vidfast.heteroscedastic import autograd as strategies


def whole_and_halves(dim: int = 1, dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    whole = torch.randn(3, 8, 5, 6, dtype=dtype, requires_grad=True)
    mean, raw = whole.chunk(2, dim)
    return whole, mean, raw, torch.randn(mean.shape, dtype=dtype)


def by_reference(whole: Tensor, target: Tensor, take: Any) -> Tensor:
    leaf = whole.detach().clone().requires_grad_()
    mean, raw = take(leaf)
    loss = vidfast.heteroscedastic_nll(mean, target, raw, backend="reference")
    return torch.autograd.grad(loss, leaf)[0]


class Routes:
    """Which way the gradients of a backward pass took."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.to_whole: list[bool] = []
        known = strategies._returned

        def noted(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            found = known(ctx, *grads)
            self.to_whole.append(found[3] is not None)
            return found

        monkeypatch.setattr(strategies, "_returned", noted)


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> Routes:
    return Routes(monkeypatch)


TAKES = {
    "chunk": lambda y: y.chunk(2, 1),
    "split": lambda y: y.split(4, 1),
    "split with sizes": lambda y: y.split([4, 4], 1),
    "slices": lambda y: (y[:, :4], y[:, 4:]),
    "the other way round": lambda y: (y[:, 4:], y[:, :4]),
    "along the batch": lambda y: y[:2].chunk(2, 0),
    "the last dimension": lambda y: y.chunk(2, -1),
    "pairs": lambda y: y.view(3, 4, 2, 5, 6).unbind(2),
    "every other": lambda y: (y[..., 0::2], y[..., 1::2]),
}
# Of these the whole's gradient is one tensor that nothing copies.
DIRECT = (
    "chunk", "split", "split with sizes", "slices", "the other way round", "the last dimension", "every other",
)  # fmt: skip


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
@pytest.mark.parametrize("how", TAKES)
def test_halves_however_taken(routes: Routes, how: str, strategy: str) -> None:
    whole = torch.randn(3, 8, 5, 6, requires_grad=True)
    mean, raw = TAKES[how](whole)
    target = torch.randn(mean.shape)
    vidfast.heteroscedastic_nll(mean, target, raw, strategy=strategy).backward()
    assert whole.grad is not None
    assert torch.allclose(whole.grad, by_reference(whole, target, TAKES[how]), rtol=1e-5, atol=1e-9)
    assert routes.to_whole == [how in DIRECT]


def test_the_halves_of_a_network_s_output(routes: Routes) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 1))
    images, target = torch.randn(2, 3, 9, 9), torch.randn(2, 6, 7, 7)
    mean, raw = network(images).chunk(2, 1)
    vidfast.heteroscedastic_nll(mean, target, raw).backward()
    found = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    assert routes.to_whole == [True]
    network.zero_grad()
    mean, raw = network(images).chunk(2, 1)
    vidfast.heteroscedastic_nll(mean, target, raw, backend="reference").backward()
    for got, p in zip(found, network.parameters(), strict=True):
        assert torch.allclose(got, p.grad, rtol=1e-4, atol=1e-7)


def test_what_else_uses_a_half_adds_to_it() -> None:
    whole, mean, raw, target = whole_and_halves()
    (
        vidfast.heteroscedastic_nll(mean, target, raw) + mean.square().sum() + 3 * raw.sum() + whole.sum()
    ).backward()
    want = by_reference(whole, target, TAKES["chunk"]) + torch.cat(
        [2 * mean + 1, torch.full_like(raw, 4.0)], 1
    )
    assert torch.allclose(whole.grad, want.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("kind", ["hook", "retain_grad"])
def test_a_half_that_is_watched_gets_its_gradient(routes: Routes, kind: str, which: int, when: str) -> None:
    whole, mean, raw, target = whole_and_halves()
    watched, seen = (mean, raw)[which], list[Tensor]()

    def watch() -> None:
        if kind == "hook":
            watched.register_hook(lambda g: seen.append(g.clone()))
        else:
            watched.retain_grad()

    if when == "before":
        watch()
    loss = vidfast.heteroscedastic_nll(mean, target, raw)
    if when == "after":
        watch()
    loss.backward()
    want = by_reference(whole, target, TAKES["chunk"])
    got = seen[0] if kind == "hook" else watched.grad
    assert got is not None
    assert torch.allclose(got, want.chunk(2, 1)[which], rtol=1e-5, atol=1e-9)
    assert torch.allclose(whole.grad, want, rtol=1e-5, atol=1e-9)
    assert not any(routes.to_whole)


def test_a_hook_that_changes_a_half_s_gradient_does() -> None:
    whole, mean, raw, target = whole_and_halves()
    loss = vidfast.heteroscedastic_nll(mean, target, raw)
    mean.register_hook(lambda g: 2 * g)
    loss.backward()
    want = by_reference(whole, target, TAKES["chunk"])
    want[:, :4] *= 2
    assert torch.allclose(whole.grad, want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_gradients_that_are_asked_for_by_name(strategy: str) -> None:
    whole, mean, raw, target = whole_and_halves()
    want = by_reference(whole, target, TAKES["chunk"])
    parts = want.chunk(2, 1)

    def loss() -> Tensor:
        return vidfast.heteroscedastic_nll(mean, target, raw, strategy=strategy)

    for got, exact in zip(torch.autograd.grad(loss(), (mean, raw)), parts, strict=True):
        assert torch.allclose(got, exact, rtol=1e-5, atol=1e-9)
    (got,) = torch.autograd.grad(loss(), raw)
    assert torch.allclose(got, parts[1], rtol=1e-5, atol=1e-9)
    for got, exact in zip(torch.autograd.grad(loss(), (whole, mean)), (want, parts[0]), strict=True):
        assert torch.allclose(got, exact, rtol=1e-5, atol=1e-9)
    loss().backward(inputs=[whole])
    assert torch.allclose(whole.grad, want, rtol=1e-5, atol=1e-9)


class Reversed(torch.autograd.Function):
    """A gradient that is turned round, as domain adaptation does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


def test_what_stands_between_a_half_and_the_whole_is_not_left_out() -> None:
    whole, mean, raw, target = whole_and_halves()
    vidfast.heteroscedastic_nll(Reversed.apply(mean), target, raw).backward()
    want = by_reference(whole, target, TAKES["chunk"])
    want[:, :4] *= -1
    assert torch.allclose(whole.grad, want, rtol=1e-5, atol=1e-9)
    whole.grad = None
    mean, raw = whole.chunk(2, 1)
    vidfast.heteroscedastic_nll(mean, target, raw.detach()).backward()
    assert not whole.grad[:, 4:].any()


def test_nothing_keeps_the_whole_alive() -> None:
    """One pass needs neither mean nor raw once the loss is there."""

    class Gone:
        count = 0

    whole = torch.randn(3, 8, 5, 6, requires_grad=True) * 1
    import weakref

    weakref.finalize(whole.untyped_storage(), lambda: setattr(Gone, "count", 1))
    mean, raw = whole.chunk(2, 1)
    loss = vidfast.heteroscedastic_nll(mean, torch.randn(mean.shape), raw)
    before = whole.untyped_storage().data_ptr()
    assert before
    del mean, raw, whole
    gc.collect()
    loss.backward()


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_gradcheck(backend: Place, kind: str) -> None:
    tensors = tensors_of(BY_NAME["small_3x3"], kind, FP64, device=backend.device)
    leaves = [x[:2, :2].clone() for x in tensors]
    if kind == "identity":  # where the clamp holds the derivative is not the function's
        leaves[2] += 0.1
    leaves = [x.requires_grad_() for x in leaves]
    mask = torch.rand(leaves[0].shape, device=backend.device) > 0.3
    for options in ({}, {"mask": mask, "reduction": "sum", "full": True}):
        for strategy, wanted in (("two_pass", leaves), ("one_pass", leaves[::2])):

            def loss(*given: Tensor, strategy: str = strategy, options: Any = options) -> Tensor:
                mean, target, raw = given if len(given) == 3 else (given[0], leaves[1].detach(), given[1])
                return vidfast.heteroscedastic_nll(
                    mean, target, raw, strategy=strategy, backend=backend.name, **options, **TRANSFORMS[kind]
                )

            assert gradcheck(loss, wanted, eps=1e-6, atol=1e-7)
            if strategy == "two_pass":
                assert gradgradcheck(loss, wanted, eps=1e-6, atol=1e-6)


def test_a_second_derivative_of_one_pass_says_what_to_do(backend: Place) -> None:
    leaves = [x.requires_grad_() for x in tensors_of(BY_NAME["plane_49"], device=backend.device)]
    loss = vidfast.heteroscedastic_nll(
        leaves[0], leaves[1].detach(), leaves[2], strategy="one_pass", backend=backend.name
    )
    grads = torch.autograd.grad(loss, leaves[::2], create_graph=True)
    with pytest.raises(RuntimeError, match="two_pass"):
        torch.autograd.grad(grads[0].sum(), leaves[0])


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_backward_gives_the_first_s_numbers(backend: Place, strategy: str, inplace: bool) -> None:
    start = torch.randn(3, 8, 5, 6, device=backend.device, requires_grad=True)
    base = start * 1
    mean, raw = base.chunk(2, 1)
    target = torch.randn(mean.shape, device=backend.device)
    loss = vidfast.heteroscedastic_nll(
        mean, target, raw, strategy=strategy, inplace=inplace, backend=backend.name
    )
    (3 * loss).backward(retain_graph=True)
    first = start.grad.clone()
    start.grad = None
    (3 * loss).backward(retain_graph=True)
    assert torch.equal(start.grad, first)
    start.grad = None
    loss.backward()
    assert torch.allclose(3 * start.grad, first, rtol=1e-5)


def test_a_saved_tensor_hook_may_lay_gradients_out_anew(backend: Place) -> None:
    def pack(x: Tensor) -> Tensor:
        return x.detach().clone(memory_format=torch.contiguous_format)

    tensors = tensors_of(BY_NAME["channels_last"], device=backend.device)
    for strategy in ("one_pass", "two_pass"):
        found = []
        for hooked in (False, True):
            mean, raw = (x.detach().requires_grad_() for x in tensors[::2])
            with torch.autograd.graph.saved_tensors_hooks(pack if hooked else lambda x: x, lambda x: x):
                loss = vidfast.heteroscedastic_nll(
                    mean, tensors[1], raw, strategy=strategy, backend=backend.name
                )
            found.append(torch.autograd.grad(2 * loss, (mean, raw)))
        for got, want in zip(found[1], found[0], strict=True):
            assert torch.allclose(got, want, rtol=1e-6, atol=0)


def test_threads_and_repetition_change_no_bit() -> None:
    mean, target, raw = (torch.randn(7, 64, 41, 13) for _ in range(3))
    for dtype in (FP32, FP16):
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            m, u = mean.to(dtype).requires_grad_(), raw.to(dtype).requires_grad_()
            loss = vidfast.heteroscedastic_nll(m, target, u, strategy="one_pass", beta=0.5)
            results.append([loss.detach(), *torch.autograd.grad(loss, (m, u))])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)


def test_in_place_only_where_nothing_is_destroyed() -> None:
    whole, mean, raw, target = whole_and_halves()
    with pytest.raises(RuntimeError, match="the tensor that mean is a view of, a leaf"):
        vidfast.heteroscedastic_nll(mean, target, raw, inplace=True)
    leaf = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="would overwrite mean, a leaf"):
        vidfast.heteroscedastic_nll(leaf, torch.zeros(3, 4), leaf * 1, inplace=True)
    base = whole * 1
    mean, raw = base.chunk(2, 1)
    with pytest.raises(RuntimeError, match="would overwrite target, which shares memory with mean"):
        vidfast.heteroscedastic_nll(mean, mean.detach(), raw, inplace=True)
    one = leaf * 1
    with pytest.raises(RuntimeError, match="would overwrite raw, which shares memory with mean"):
        vidfast.heteroscedastic_nll(one, torch.zeros(3, 4), one[:], inplace=True)
    with pytest.raises(RuntimeError, match="would overwrite raw, which shares memory with mean"):
        vidfast.heteroscedastic_nll(one, torch.zeros(3, 4), one, inplace=True)
    spread = (torch.randn(3, 4, 5, requires_grad=True) * 1)[:, :, ::2]
    with pytest.raises(RuntimeError, match="a mean that is walked where it is stored"):
        vidfast.heteroscedastic_nll(
            spread.transpose(0, 1)[:, 1:], torch.zeros(4, 2, 3), torch.zeros(4, 2, 3), inplace=True
        )
    # a producer that needs its output in backward finds it changed
    active = torch.sigmoid(torch.randn(3, 4, requires_grad=True))
    loss = vidfast.heteroscedastic_nll(active, torch.zeros(3, 4), torch.zeros(3, 4), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode_and_no_grad() -> None:
    mean, target, raw = tensors_of(BY_NAME["plane_49"])
    want = vidfast.heteroscedastic_nll(mean, target, raw, backend="reference")
    with torch.inference_mode():
        assert torch.allclose(vidfast.heteroscedastic_nll(mean, target, raw), want)
        made = target.clone()
    m = mean.clone().requires_grad_()
    loss = vidfast.heteroscedastic_nll(m, made, raw, strategy="two_pass")
    assert torch.autograd.grad(loss, m)[0].shape == m.shape
    with torch.no_grad():
        assert not vidfast.heteroscedastic_nll(m, target, raw).requires_grad


def test_transforms_of_torch_func() -> None:
    mean, target, raw = (torch.randn(3, 4, dtype=FP64) for _ in range(3))

    def loss(m: Tensor, backend: Any = "reference") -> Tensor:
        return vidfast.heteroscedastic_nll(m, target, raw, backend=backend)

    got = torch.func.grad(loss)(mean)
    leaf = mean.clone().requires_grad_()
    assert torch.allclose(got, torch.autograd.grad(loss(leaf, "auto"), leaf)[0])
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.func.grad(lambda m: loss(m, "auto"))(mean)


def test_autocast_changes_nothing() -> None:
    mean, target, raw = (torch.randn(3, 4).bfloat16() for _ in range(3))
    for backend in ("auto", "reference"):
        plain = vidfast.heteroscedastic_nll(mean, target, raw, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = vidfast.heteroscedastic_nll(mean, target, raw, backend=backend)
        assert cast.dtype is FP32
        assert torch.equal(plain, cast)


def test_fp16_takes_two_passes_by_itself() -> None:
    """A loss scaler's factor comes before the gradients are rounded."""
    mean, target, raw = (torch.zeros(4096, dtype=FP16, requires_grad=True) for _ in range(3))
    loss = vidfast.heteroscedastic_nll(mean, target.detach() + 1e-3, raw)
    (grad,) = torch.autograd.grad(65536.0 * loss, mean)
    assert math.isclose(grad[0].item(), -65536 * 1e-3 / 4096 / (math.log(2) + 1e-5), rel_tol=2e-3)
