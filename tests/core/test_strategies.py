"""What each strategy reads on the host (nothing) and what it keeps alive for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bounds import check_results
from gradients import STRATEGIES, big, kept, leaves, scalar
from oracle import expected
from places import Place
from problems import BF16, FP16, FP32, FP64
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.mark.parametrize("value", [1.0, -2.5])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("retain", [False, True])
def test_nothing_is_read_on_the_host(
    backend: Place, monkeypatch: pytest.MonkeyPatch, strategy: str, value: float, retain: bool
) -> None:
    m, t, a = leaves(backend)
    g = scalar(value, m)
    backend.nll(m, t, a, strategy=strategy).backward()  # whatever happens once has happened
    seen: list[str] = []

    def spy(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def spied(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, spied)

    names = "item tolist numpy cpu to __bool__ __float__ __int__ __index__ __eq__ __ne__ eq equal is_nonzero __array__"
    for name in names.split():
        spy(torch.Tensor, name)
    for name in ("equal", "allclose", "isclose", "is_nonzero", "all", "any"):
        spy(torch, name)
    if backend.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        loss = backend.nll(m, t, a, strategy=strategy)
        torch.autograd.grad(loss, (m, a), g, retain_graph=retain)
    finally:
        if backend.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        monkeypatch.undo()
    assert seen == []


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_backward_asks_torch_for_no_number(backend: Place, strategy: str) -> None:
    """As torch's dispatcher sees it: no `_local_scalar_dense`, whatever Python it came from."""
    m, t, a = leaves(backend)
    want = expected(m, t, a, -2.5)
    loss = backend.nll(m, t, a, strategy=strategy)
    with _Recorder() as recorder:
        grads = torch.autograd.grad(loss, (m, a), scalar(-2.5, loss))
    check_results(want, loss, grads[0], None, grads[1], g=-2.5, one_pass=strategy == "one_pass")
    assert not [op for op in recorder.seen if "_local_scalar" in op or "equal" in op or "nonzero" in op]
    with _Recorder() as proof:
        scalar(1.0, loss).item()
    assert any("_local_scalar" in op for op in proof.seen)


def test_one_pass_keeps_one_gradient(backend: Place) -> None:
    m, t, a = leaves(backend)
    _, saved = kept(lambda: backend.nll(m, t, a, strategy="one_pass"))
    (grad,) = big(saved, m.numel())
    assert grad.dtype == m.dtype
    assert grad.data_ptr() not in (m.data_ptr(), t.data_ptr())
    assert sum(x.numel() for x in saved) <= m.numel() + 4 * a.numel()


def test_one_pass_in_place_allocates_nothing_big(backend: Place) -> None:
    m, t, a = leaves(backend)
    fed = m * 1
    _, saved = kept(lambda: backend.nll(fed, t, a, strategy="one_pass", inplace=True))
    (grad,) = big(saved, m.numel())
    assert grad.data_ptr() == fed.data_ptr()


def test_two_pass_keeps_mean_and_target(backend: Place) -> None:
    m, t, a = leaves(backend)
    _, saved = kept(lambda: backend.nll(m, t, a, strategy="two_pass"))
    assert {x.data_ptr() for x in big(saved, m.numel())} == {m.data_ptr(), t.data_ptr()}


@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
def test_alpha_alone_keeps_no_activation(backend: Place, strategy: str) -> None:
    m, t, a = leaves(backend)
    loss, saved = kept(lambda: backend.nll(m.detach(), t, a, strategy=strategy))
    assert not big(saved, m.numel())
    want = expected(m, t, a)
    (grad,) = torch.autograd.grad(loss, a)
    check_results(want, loss, None, None, grad)


def test_nothing_is_kept_without_gradients(backend: Place) -> None:
    m, t, a = leaves(backend)
    with torch.no_grad():
        _, saved = kept(lambda: backend.nll(m, t, a))
    assert saved == []
    _, saved = kept(lambda: backend.nll(m.detach(), t, a.detach()))
    assert saved == []


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(FP32, "one_pass"), (BF16, "one_pass"), (FP64, "one_pass"), (FP16, "two_pass")],
    ids=str,
)
def test_auto_takes_the_strategy_of_the_dtype(backend: Place, dtype: torch.dtype, wanted: str) -> None:
    m, t, a = leaves(backend, dtype=dtype)
    _, saved = kept(lambda: backend.nll(m, t, a))
    assert len(big(saved, m.numel())) == {"one_pass": 1, "two_pass": 2}[wanted]


def test_auto_is_two_pass_where_target_requires_grad(backend: Place) -> None:
    m, t, a = leaves(backend, target=True)
    loss = backend.nll(m, t, a)
    want = expected(m, t, a)
    check_results(want, loss, *torch.autograd.grad(loss, (m, t, a)))
