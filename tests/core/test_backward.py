"""Backward: scaled in place or not, run again, through saved-tensor hooks and checkpoints, with odd gradients."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch
from bounds import check_results
from gradients import CASE, STRATEGIES, big, kept, leaves, scalar
from oracle import expected
from places import Place
from problems import BF16, BY_NAME, FP16, FP32, FP64, short
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("g", [1.0, 3.0])
@pytest.mark.parametrize("retain", [False, True])
def test_in_place_only_when_the_graph_is_not_retained(backend: Place, g: float, retain: bool) -> None:
    m, t, a = leaves(backend)
    loss = backend.nll(m, t, a, strategy="one_pass")
    node: Any = loss.grad_fn
    # what is held here would be somewhere else's too, and then be left alone: addresses alone are kept
    address, alpha_address = (x.data_ptr() for x in node.saved_tensors[:2])
    before = [x.clone() for x in node.saved_tensors[:2]]
    grad_mean, grad_alpha = torch.autograd.grad(loss, (m, a), scalar(g, loss), retain_graph=retain)
    if retain:
        assert grad_mean.data_ptr() != address
        for x, old in zip(node.saved_tensors, before, strict=False):
            assert torch.equal(x, old)
    else:
        assert grad_mean.data_ptr() == address, "a gradient that nothing else needs was copied"
        assert torch.equal(grad_mean, before[0] * g)
    assert grad_alpha.data_ptr() != alpha_address  # d/d alpha always goes to a fresh buffer


@pytest.mark.parametrize("factors", list(itertools.product([1.0, 3.0], repeat=3)), ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_backward_gives_the_firsts_numbers(
    backend: Place, strategy: str, inplace: bool, factors: tuple[float, ...]
) -> None:
    m, t, a = leaves(backend)
    fed = m * 1 if inplace else m
    wants = {g: expected(m, t, a, g) for g in factors}
    loss = backend.nll(fed, t, a, strategy=strategy, inplace=inplace)
    first: dict[float, tuple[Tensor, ...]] = {}
    for i, g in enumerate(factors):
        grads = torch.autograd.grad(loss, (m, a), scalar(g, loss), retain_graph=i < 2)
        check_results(wants[g], loss, grads[0], None, grads[1], g=g, one_pass=strategy == "one_pass")
        copy = tuple(x.clone() for x in grads)
        for x, y in zip(first.setdefault(g, copy), copy, strict=True):
            assert torch.equal(x, y)
        for x in grads:
            x.fill_(-7.0)  # what was given away must not be what is kept
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (m, a))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accumulating_through_a_retained_graph(backend: Place, strategy: str) -> None:
    """`.grad` is written in place by the second backward: it must not be the buffer that is kept."""
    m, t, a = leaves(backend)
    want = expected(m, t, a)
    loss = backend.nll(m, t, a, strategy=strategy)
    for count in (1, 2, 3):
        loss.backward(retain_graph=count < 3)
        torch.testing.assert_close(
            m.grad.cpu().double(), torch.from_numpy(count * want.grad_mean), rtol=1e-6, atol=0
        )
        torch.testing.assert_close(
            a.grad.cpu().double(), torch.from_numpy(count * want.grad_alpha), rtol=1e-5, atol=1e-8
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_one_at_a_time(backend: Place, strategy: str) -> None:
    m, t, a = leaves(backend)
    want = expected(m, t, a, 2.0)
    loss = backend.nll(m, t, a, strategy=strategy)
    (grad_alpha,) = torch.autograd.grad(loss, a, scalar(2.0, loss), retain_graph=True)
    (grad_mean,) = torch.autograd.grad(loss, m, scalar(2.0, loss))
    check_results(want, loss, grad_mean, None, grad_alpha, g=2.0, one_pass=strategy == "one_pass")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_that_is_not_used(backend: Place, strategy: str) -> None:
    m, t, a = leaves(backend)
    loss = backend.nll(m, t, a, strategy=strategy)
    other = (m * 0).sum()
    assert torch.autograd.grad(torch.stack([loss, other])[1], (m, a), allow_unused=True)[0].abs().max() == 0


def test_gradients_of_zero_incoming_gradient_are_zero(backend: Place) -> None:
    for strategy in STRATEGIES:
        m, t, a = leaves(backend)
        for grad in torch.autograd.grad(backend.nll(m, t, a, strategy=strategy), (m, a), scalar(0.0, m)):
            assert grad.abs().max() == 0


def test_memory_is_freed_after_backward(backend: Place) -> None:
    m, t, a = leaves(backend)
    loss, saved = kept(lambda: backend.nll(m, t, a, strategy="one_pass"))
    gone = weakref.ref(big(saved, m.numel())[0])
    saved.clear()
    torch.autograd.grad(loss, a)
    assert gone() is None


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("g", [1.0, -2.5])
@pytest.mark.parametrize("inplace", [False, True])
def test_save_on_cpu(backend: Place, strategy: str, g: float, inplace: bool) -> None:
    m, t, a = leaves(backend)
    want = expected(m, t, a, g)
    with torch.autograd.graph.save_on_cpu():
        loss = backend.nll(m * 1 if inplace else m, t, a, strategy=strategy, inplace=inplace)
    for retain in (True, False):
        grads = torch.autograd.grad(loss, (m, a), scalar(g, loss), retain_graph=retain)
        check_results(want, loss, grads[0], None, grads[1], g=g, one_pass=strategy == "one_pass")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", ["plane_49", "channels_last", "channel_slice"])
@pytest.mark.parametrize("relaid", ["contiguous", "reversed", "padded"])
def test_hooks_may_give_tensors_back_laid_out_otherwise(
    backend: Place, strategy: str, case: str, relaid: str
) -> None:
    def unpack(x: Tensor) -> Tensor:
        dims = tuple(reversed(range(x.dim())))
        if relaid == "reversed":
            return x.permute(dims).contiguous().permute(dims)
        if relaid == "padded":
            return x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)[..., 1:-2].copy_(x)
        return x.contiguous()

    m, t, a = leaves(backend, BY_NAME[case], target=strategy == "two_pass")
    want = expected(m, t, a, 3.0)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), unpack):
        loss = backend.nll(m, t, a, strategy=strategy)
    wanted = (m, t, a) if strategy == "two_pass" else (m, a)
    grads = torch.autograd.grad(loss, wanted, scalar(3.0, loss))
    target = grads[1] if strategy == "two_pass" else None
    check_results(want, loss, grads[0], target, grads[-1], g=3.0, one_pass=strategy == "one_pass")


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    ("strategy", "inplace"), [("one_pass", False), ("one_pass", True), ("two_pass", False)]
)
@pytest.mark.parametrize("g", [1.0, 3.0])
def test_activation_checkpointing(
    backend: Place, strategy: str, inplace: bool, use_reentrant: bool, g: float
) -> None:
    m, t, a = leaves(backend)
    want = expected(m, t, a, g)

    def step(x: Tensor, alpha: Tensor) -> Tensor:
        return backend.nll(x * 1, t, alpha, strategy=strategy, inplace=inplace)

    loss = checkpoint(step, m, a, use_reentrant=use_reentrant)
    loss.backward(scalar(g, loss))
    check_results(want, loss, m.grad, None, a.grad, g=g, one_pass=strategy == "one_pass")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_leaf_changed_between_forward_and_backward_is_found(backend: Place, strategy: str) -> None:
    """two_pass reads mean again, so autograd must notice; one_pass does not."""
    m, t, a = leaves(backend)
    want = expected(m, t, a)
    loss = backend.nll(m, t, a, strategy=strategy)
    with torch.no_grad():
        m.add_(1)
    if strategy == "two_pass":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        (grad,) = torch.autograd.grad(loss, m)
        check_results(want, loss, grad, None, None, one_pass=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_lazily_negated_incoming_gradient(backend: Place, strategy: str) -> None:
    m, t, a = leaves(backend)
    g = torch.complex(scalar(0.0, m), scalar(2.5, m)).conj().imag
    assert g.is_neg()
    want = expected(m, t, a, -2.5)
    loss = backend.nll(m, t, a, strategy=strategy)
    grads = torch.autograd.grad(loss, (m, a), g)
    check_results(want, loss, grads[0], None, grads[1], g=-2.5, one_pass=strategy == "one_pass")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [FP16, BF16, FP64], ids=short)
def test_an_incoming_gradient_of_another_dtype(backend: Place, strategy: str, dtype: torch.dtype) -> None:
    m, t, a = leaves(backend)
    want = expected(m, t, a, -2.5)
    loss = backend.nll(m, t, a, strategy=strategy)
    grads = torch.autograd.grad(
        loss.to(dtype), (m, a), torch.tensor(-2.5, dtype=dtype, device=backend.device)
    )
    check_results(want, loss, grads[0], None, grads[1], g=-2.5, one_pass=strategy == "one_pass")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_that_is_a_slice(backend: Place, strategy: str) -> None:
    """g is read at its own address, not at its memory's."""
    m, t, a = leaves(backend)
    want = expected(m, t, a, 3.0)
    loss = backend.nll(m, t, a, strategy=strategy)
    weights = torch.tensor([9.0, 3.0, 9.0], device=backend.device)
    grads = torch.autograd.grad((loss.expand(3) * weights)[1], (m, a), retain_graph=True)
    check_results(want, loss, grads[0], None, grads[1], g=3.0, one_pass=strategy == "one_pass")
    grads = torch.autograd.grad(loss, (m, a), weights[1])
    check_results(want, loss, grads[0], None, grads[1], g=3.0, one_pass=strategy == "one_pass")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_backward_in_another_thread(backend: Place, strategy: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def step(seed: int) -> tuple[Any, ...]:
        m, t, a = CASE.tensors(FP32, device=backend.device, seed=seed)
        m, a = m.requires_grad_(), a.requires_grad_()
        loss = backend.nll(m, t, a, strategy=strategy)
        return (m, t, a, loss, *torch.autograd.grad(loss, (m, a), scalar(2.0, loss)))

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(step, range(32)))
    for m, t, a, loss, grad_mean, grad_alpha in results:
        want = expected(m, t, a, 2.0)
        check_results(want, loss, grad_mean, None, grad_alpha, g=2.0, one_pass=strategy == "one_pass")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_output_is_written(backend: Place, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """torch fills uninitialised memory with NaN in its deterministic mode: none of it may come out."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        for name in ("plane_49", "rows_tail", "channels_last_slice", "strange"):
            m, t, a = leaves(backend, BY_NAME[name], target=strategy == "two_pass")
            want = expected(m, t, a, 3.0)
            loss = backend.nll(m, t, a, strategy=strategy)
            wanted = (m, t, a) if strategy == "two_pass" else (m, a)
            grads = torch.autograd.grad(loss, wanted, scalar(3.0, loss))
            target = grads[1] if strategy == "two_pass" else None
            check_results(want, loss, grads[0], target, grads[-1], g=3.0, one_pass=strategy == "one_pass")
    finally:
        torch.use_deterministic_algorithms(False)
