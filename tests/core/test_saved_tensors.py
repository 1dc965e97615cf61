"""Tensors saved for backward come back in other hands' memory: equal, but laid out otherwise; or not equal at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bounds import check_results
from oracle import expected
from places import Place
from problems import BY_NAME, FP16, FP32, FP64
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import vidfast
from vidfast import raw

CASE = BY_NAME["plane_49"]


class Tagged(Tensor):
    """A subclass with torch's default behaviour."""


def a_column(x: Tensor) -> Tensor:
    """A column of a table in which something else is kept too."""
    table = x.new_full((*x.shape, 2), 1e9)
    table[..., 0] = x
    return table[..., 0]


def reversed_order(x: Tensor) -> Tensor:
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def shifted(x: Tensor) -> Tensor:
    whole = x.new_full((x.numel() + 3,), 1e9)
    return whole[3:].view(x.shape).copy_(x)


REPACKED: dict[str, Callable[[Tensor], Tensor]] = {
    "a column": a_column,
    "reversed": reversed_order,
    "shifted": shifted,
    "a copy": torch.clone,
    "a wider one, cut": lambda x: (
        torch.cat([x, torch.full_like(x, 1e9)], -1)[..., : x.shape[-1]] if x.dim() else x
    ),
    "a negative view": lambda x: torch._neg_view(-x),
    "negated twice": lambda x: (
        torch.complex(torch.zeros_like(x), -x).conj().imag if x.dtype in (FP32, FP64) else x
    ),
    "a parameter": lambda x: torch.nn.Parameter(x.clone(), requires_grad=False),
    "expanded": lambda x: x.clone().unsqueeze(0).expand(3, *x.shape)[1],
}


def test_where_no_thread_starts_nothing_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_: object) -> None:
        raise RuntimeError("can't start new thread")

    x, t, a = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6), torch.zeros(6)
    raw._unshared.cache_clear()
    monkeypatch.setattr("threading.Thread.start", refuses)
    try:
        assert raw._unshared() == 0
        vidfast.gaussian_nll(x, t, a, weight=3.0).backward()
        (wanted,) = torch.autograd.grad(vidfast.gaussian_nll(x, t, a, weight=3.0, backend="reference"), x)
        torch.testing.assert_close(x.grad, wanted)
    finally:
        raw._unshared.cache_clear()
    monkeypatch.undo()
    assert raw._unshared() > 1


@pytest.mark.parametrize("repacked", REPACKED)
@pytest.mark.parametrize("g", [1.0, -2.5])
@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
@pytest.mark.parametrize("name", ["plane_49", "rows_tail"])
def test_equal_tensors_in_another_layout(
    backend: Place, name: str, strategy: str, g: float, repacked: str
) -> None:
    m, t, a = BY_NAME[name].tensors(FP32, device=backend.device)
    want = expected(m, t, a, g)
    leaves = [x.requires_grad_() for x in ((m, a) if strategy == "one_pass" else (m, t, a))]
    with saved_tensors_hooks(lambda x: x.clone(), REPACKED[repacked]):
        loss = backend.nll(m, t, a, strategy=strategy)
    grads = torch.autograd.grad(loss, leaves, torch.full_like(loss, g))
    target = None if strategy == "one_pass" else grads[1]
    check_results(want, loss, grads[0], target, grads[-1], g=g, one_pass=strategy == "one_pass")


def test_alpha_alone(backend: Place) -> None:
    m, t, a = CASE.tensors(FP32, device=backend.device)
    want = expected(m, t, a, 3.0)
    with saved_tensors_hooks(lambda x: x.clone(), a_column):
        loss = backend.nll(m, t, a.requires_grad_())
    (grad,) = torch.autograd.grad(loss, a, torch.full_like(loss, 3.0))
    check_results(want, loss, None, None, grad, g=3.0)


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_what_a_hook_keeps_is_not_written_over(backend: Place, strategy: str) -> None:
    """A hook may give back its only copy, again and again: backward must neither scale it nor hand it out."""
    m, t, a = CASE.tensors(FP32, device=backend.device)
    m.requires_grad_()
    kept: list[tuple[Tensor, Tensor]] = []

    def pack(x: Tensor) -> int:
        kept.append((x.clone(), x.clone()))
        return len(kept) - 1

    with saved_tensors_hooks(pack, lambda i: kept[i][0]):
        loss = backend.nll(m, t, a, strategy=strategy)
    for g in (1.0, 7.0):
        (grad,) = torch.autograd.grad(loss, m, torch.full_like(loss, g), retain_graph=g == 1.0)
        assert all(torch.equal(x, before) for x, before in kept)
        assert all(grad.data_ptr() != x.data_ptr() for x, _ in kept)


def fused_or_not(place: Place, strategy: str, m: Tensor, t: Tensor, a: Tensor) -> Tensor:
    """By strategy, or by a VIDLoss whose regressor is one matrix product."""
    if strategy != "VIDLoss":
        return place.nll(m, t, a, strategy=strategy)
    torch.manual_seed(0)
    module = vidfast.VIDLoss(m.shape[1], 4, t.shape[1])
    return module(m, t)


HOLDERS = (
    "a cache of equal tensors",
    "what was packed",
    "a detached copy of it",
    "the node's saved tensors",
    "its own hooks",
)


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("strategy", ["one_pass", "two_pass", "VIDLoss"])
def test_what_anything_else_holds_is_neither_scaled_nor_handed_out(
    backend: Place, strategy: str, holder: str
) -> None:
    """A cache may give one memory for two losses: each gradient is right, and none of them is that memory."""
    if strategy == "VIDLoss" and backend.name != "cpu":
        pytest.skip("computed in parts on the CPU alone")
    m, t, a = CASE.tensors(FP32, device=backend.device)
    m.requires_grad_()
    (want,) = torch.autograd.grad(fused_or_not(backend, strategy, m, t, a), m)
    cache: dict[Any, Tensor] = {}

    def pack(x: Tensor) -> Any:
        key = (tuple(x.shape), x.dtype, x.detach().cpu().numpy().tobytes())
        if holder == "a cache of equal tensors":
            cache.setdefault(key, x)
            return key
        cache[len(cache)] = x
        return x.detach() if "detached" in holder else x

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else cache[packed]

    hooked = holder in HOLDERS[:3]
    with saved_tensors_hooks(pack, unpack) if hooked else contextlib.nullcontext():
        losses = [fused_or_not(backend, strategy, m, t, a) for _ in range(2)]
    for loss in losses if not hooked else ():
        node: Any = loss.grad_fn
        if holder == "its own hooks":
            for saved, x in zip(node._raw_saved_tensors, node.saved_tensors, strict=True):
                if x is not None:
                    saved.register_hooks(pack, unpack)
        else:
            cache |= {len(cache) + i: x for i, x in enumerate(node.saved_tensors) if x is not None}
    before = {key: x.detach().clone() for key, x in cache.items()}
    assert before
    for g, loss in zip((1.0, 3.0), losses, strict=True):
        (grad,) = torch.autograd.grad(loss, m, torch.full_like(loss, g))
        torch.testing.assert_close(grad, g * want, rtol=1e-6, atol=0)
        if holder != "the node's saved tensors" or g != 1.0:
            assert all(grad.data_ptr() != x.data_ptr() for x in cache.values() if x.numel())
    assert all(torch.equal(x, before[key]) for key, x in cache.items())


def test_a_gradient_that_nothing_else_holds_is_scaled_where_it_is(backend: Place) -> None:
    m, t, a = CASE.tensors(FP32, device=backend.device)
    loss = backend.nll(m.requires_grad_(), t, a, strategy="one_pass")
    node: Any = loss.grad_fn
    address = node.saved_tensors[0].data_ptr()
    (grad,) = torch.autograd.grad(loss, m, torch.full_like(loss, 3.0))
    assert grad.data_ptr() == address


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "narrower": lambda x: x.to(torch.float16),
    "wider or integers": lambda x: x.to(torch.float64 if x.dtype is not FP64 else torch.int64),
    "shorter": lambda x: x[..., :-1],
    "longer": lambda x: torch.cat([x, x], -1),
    "of another shape": lambda x: x.unsqueeze(0),
    "on no device": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "a subclass": lambda x: x.clone().as_subclass(Tagged),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_another_tensor_is_an_error_and_never_read(backend: Place, strategy: str, wrong: str) -> None:
    m, t, a = CASE.tensors(FP32, device=backend.device)
    with saved_tensors_hooks(lambda x: x, lambda x: WRONG[wrong](x) if x.numel() else x):
        loss = backend.nll(m.requires_grad_(), t, a.requires_grad_(), strategy=strategy)
    with pytest.raises(RuntimeError, match=r"saved-tensor hook must give back .* got"):
        torch.autograd.grad(loss, (m, a))


@pytest.mark.parametrize("which", range(5))
def test_each_saved_tensor_of_the_fused_pair_is_checked(which: int) -> None:
    torch.manual_seed(0)
    module = vidfast.VIDLoss(6, 8, 6)
    s, t = torch.randn(4, 6, 5, 5, requires_grad=True), torch.randn(4, 6, 5, 5)
    leaves = [s, *module.parameters()]
    want = torch.autograd.grad(module(s, t), leaves)
    with saved_tensors_hooks(lambda x: x.clone(), a_column):
        loss = module(s, t)
    for got, exact in zip(torch.autograd.grad(loss, leaves), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=0)
    seen: list[int] = []

    def unpack(x: Tensor) -> Tensor:
        seen.append(x.numel())
        return x[..., :-1] if len(seen) - 1 == which and x.numel() else x

    with saved_tensors_hooks(lambda x: x.clone(), unpack):
        loss = module(s, t)
    with pytest.raises(RuntimeError, match="saved-tensor hook"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_hooks_inside_a_checkpoint(backend: Place, strategy: str, reentrant: bool) -> None:
    m, t, a = CASE.tensors(FP32, device=backend.device)
    want = expected(m, t, a, 1.0)
    leaves = (m.requires_grad_(), a.requires_grad_())

    def run(m: Tensor, a: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda x: x.clone(), a_column):
            return backend.nll(m, t, a, strategy=strategy)

    loss = checkpoint(run, m, a, use_reentrant=reentrant)
    assert isinstance(loss, Tensor)
    loss.backward()
    check_results(want, loss.detach(), leaves[0].grad, None, leaves[1].grad)


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("strategy", ["auto", "one_pass", "two_pass"])
@pytest.mark.parametrize("which", ["target", "target and alpha"])
def test_tensors_made_in_inference_mode(
    backend: Place, which: str, strategy: str, dtype: torch.dtype
) -> None:
    m, t, a = CASE.tensors(dtype, alpha_dtype=FP32, device=backend.device)
    want = expected(m, t, a)
    with torch.inference_mode():
        t = t.clone()
        if "alpha" in which:
            a = a.clone()
    before = t.clone()
    loss = backend.nll(m.requires_grad_(), t, a, strategy=strategy)
    (grad,) = torch.autograd.grad(loss, m)
    check_results(want, loss, grad, None, None, one_pass=strategy == "one_pass")
    assert torch.equal(t, before)


@pytest.mark.parametrize(
    ("x", "count", "dtype"),
    [
        (torch.zeros(6), 7, FP32),
        (torch.zeros(6), 6, FP64),
        (torch.zeros(6, dtype=torch.int32), 6, None),
        (torch.zeros(6, device="meta"), 6, FP32),
    ],
    ids=["count", "dtype", "integers", "device"],
)
def test_the_boundary_refuses_what_a_kernel_would_misread(
    x: Tensor, count: int, dtype: torch.dtype | None
) -> None:
    with pytest.raises(RuntimeError, match=rf"sum_sq must be {count} .* on cpu, got Tensor"):
        raw.vector("sum_sq", x, count, torch.device("cpu"), dtype)


def test_the_boundary_copies_what_lies_apart_and_nothing_else() -> None:
    x = torch.randn(6)
    cpu = torch.device("cpu")
    assert raw.vector("x", x, 6, cpu, FP32) is x
    apart = a_column(x)
    found = raw.vector("x", apart, 6, cpu, FP32)
    assert found.is_contiguous()
    assert torch.equal(found, x)


BACKWARD: Any = torch.ops.vidfast.gaussian_nll_backward.default
FORWARD: Any = torch.ops.vidfast.gaussian_nll_two_pass_v2.default
OPTIONS = (1, 1e-5, "mean", False, 1.0, "auto")


def test_operators_called_by_hand_are_checked_too() -> None:
    m, t, a = CASE.tensors(FP32)
    _, sums = FORWARD(m, t, a, *OPTIONS)
    g, every = torch.ones(()), (True, True, True)
    want = BACKWARD(g, m, t, a, sums, m.shape, *OPTIONS, *every)
    for got, exact in zip(
        BACKWARD(g, m, t, a_column(a), a_column(sums), m.shape, *OPTIONS, *every), want, strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=0, atol=0)
    for bad in (sums.float(), sums[:-1], torch.cat([sums, sums])):
        with pytest.raises(RuntimeError, match="sum_sq must be"):
            BACKWARD(g, m, t, a, bad, m.shape, *OPTIONS, *every)
    with pytest.raises(RuntimeError, match="alpha must be"):
        BACKWARD(g, None, None, a[:-1], sums, m.shape, *OPTIONS, False, False, True)
    with pytest.raises(RuntimeError, match="g must be"):
        BACKWARD(torch.ones(3), m, t, a, sums, m.shape, *OPTIONS, *every)
    with pytest.raises(ValueError, match="same shape"):
        BACKWARD(g, m, t[:-1], a, sums, m.shape, *OPTIONS, *every)
    for wrong in ((m, t[:-1], a), (m, t, a[:-1])):
        with pytest.raises(ValueError, match="must have"):
            FORWARD(*wrong, *OPTIONS)
