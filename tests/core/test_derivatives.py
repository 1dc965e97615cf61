"""First, second and third derivatives, checked numerically and against the reference's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bounds import RELATIVE, check_results, check_scalar
from gradients import STRATEGIES, leaves, scalar
from oracle import expected
from places import Place
from problems import FP32, FP64, Case, short
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import vidfast
from vidfast import reference

GRADCHECK = (
    Case("plane", "", (2, 3, 5)),
    Case("plane_36", "", (1, 2, 36)),
    Case("rows", "", (5, 3)),
    Case("channels_last", "", (2, 3, 2, 2), mean_layout="channels_last"),
    Case("front", "", (3, 4), channel_dim=0),
)


@pytest.mark.parametrize("case", GRADCHECK, ids=lambda c: c.name)
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradcheck(backend: Place, strategy: str, reduction: str, case: Case) -> None:
    if reduction == "batchmean" and case.channel_dim == 0:
        return
    m, t, a = (x.requires_grad_() for x in case.tensors(FP64, alpha_dtype=FP64, device=backend.device))

    def loss(mean: Tensor, alpha: Tensor, target: Tensor = t.detach()) -> Tensor:  # noqa: B008
        return backend.nll(
            mean,
            target,
            alpha,
            strategy=strategy,
            reduction=reduction,
            full=True,
            weight=1.5,
            channel_dim=case.channel_dim,
        )

    assert gradcheck(loss, (m, a))
    if strategy == "two_pass":
        assert gradcheck(loss, (m, a, t))
        assert gradgradcheck(loss, (m, a, t))
        assert gradgradcheck(loss, (m, a))
        assert gradgradcheck(lambda alpha: loss(m.detach(), alpha), (a,))
        assert gradgradcheck(lambda target: loss(m.detach(), a.detach(), target), (t,))


def test_gradcheck_in_place(backend: Place) -> None:
    m, t, a = (
        x.requires_grad_() for x in GRADCHECK[0].tensors(FP64, alpha_dtype=FP64, device=backend.device)
    )
    assert gradcheck(
        lambda mean, alpha: backend.nll(mean * 1, t.detach(), alpha, strategy="one_pass", inplace=True),
        (m, a),
    )


@pytest.mark.parametrize("wanted", [(0,), (2,), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum", "weight": -0.5, "full": True}, {"reduction": "batchmean", "eps": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=short)
def test_second_derivatives_are_the_references(
    backend: Place, dtype: torch.dtype, options: dict[str, Any], wanted: tuple[int, ...]
) -> None:
    """A gradient penalty: d/dx of sum |d loss/dx|^2, and of the loss's own factor g."""
    tensors = Case("", "", (3, 4, 5)).tensors(dtype, alpha_dtype=dtype, device=backend.device)

    def penalty(f: Any, dtype: torch.dtype) -> list[Tensor]:
        xs = [x.detach().to(dtype).requires_grad_(i in wanted) for i, x in enumerate(tensors)]
        factor = torch.tensor(1.5, dtype=dtype, device=backend.device, requires_grad=True)
        needed = [xs[i] for i in wanted]
        grads = torch.autograd.grad(f(*xs, **options) * factor, needed, create_graph=True)
        total = sum(
            (g.square().sum() for g in grads), start=torch.zeros((), dtype=dtype, device=backend.device)
        )
        return [*grads, *torch.autograd.grad(total, [*needed, factor])]

    got = penalty(lambda *xs, **o: backend.nll(*xs, strategy="two_pass", **o), dtype)
    want = penalty(reference.gaussian_nll, FP64)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == dtype
        rtol = 1e-4 if dtype is FP32 else 1e-11
        torch.testing.assert_close(x.double(), y, rtol=rtol, atol=rtol * y.abs().max().item())


def test_third_derivatives(backend: Place) -> None:
    m, t, a = (
        x.requires_grad_()
        for x in Case("", "", (2, 3, 2)).tensors(FP64, alpha_dtype=FP64, device=backend.device)
    )

    def third(f: Any) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(f(m, t, a), a, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), a, create_graph=True)
        return torch.autograd.grad(second.sum(), (m, t, a))

    for x, y in zip(
        third(lambda *xs: backend.nll(*xs, strategy="two_pass")), third(reference.gaussian_nll), strict=True
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("strategy", ["one_pass", "auto"])
@pytest.mark.parametrize("inplace", [False, True])
def test_one_pass_refuses_second_derivatives_and_says_what_to_do(
    backend: Place, strategy: str, inplace: bool
) -> None:
    m, t, a = leaves(backend)
    want = expected(m, t, a, 3.0)
    loss = backend.nll(m * 1 if inplace else m, t, a, strategy=strategy, inplace=inplace)
    grads = torch.autograd.grad(loss, (m, a), scalar(3.0, loss), create_graph=True)
    check_results(want, loss, grads[0].detach(), None, grads[1].detach(), g=3.0, one_pass=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="two_pass"):
            grad.square().sum().backward(retain_graph=True)


@pytest.mark.parametrize("which", [0, 1], ids=["mean", "alpha"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_second_derivative_through_one_pass_is_never_silently_dropped(
    backend: Place, which: int, beside: bool
) -> None:
    """autograd.grad walks only the paths to what it was asked for: the error must lie on one of them.

    beside: another loss reaches the same leaves, so that torch itself has nothing to complain about.
    """
    m, t, a = leaves(backend)
    loss = backend.nll(m * 1, t, a, strategy="one_pass")
    if beside:
        loss = loss + m.square().sum() + a.square().sum()
    grads = torch.autograd.grad(loss, (m, a), create_graph=True)
    with pytest.raises(RuntimeError, match="two_pass"):
        torch.autograd.grad(grads[which].square().sum(), (m, a)[which])


def test_hessian_by_reverse_over_reverse(backend: Place) -> None:
    m, t, a = Case("", "", (2, 3, 2)).tensors(FP64, alpha_dtype=FP64, device=backend.device)
    got, want = (
        torch.autograd.functional.hessian(lambda x, f=f: f(m, t, x), a)
        for f in (lambda *xs: backend.nll(*xs, strategy="two_pass"), reference.gaussian_nll)
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_first_derivative_under_create_graph_keeps_its_bounds(backend: Place, strategy: str) -> None:
    m, t, a = leaves(backend)
    want = expected(m, t, a, 3.0)
    loss = backend.nll(m, t, a, strategy=strategy)
    grad_mean, grad_alpha = torch.autograd.grad(loss, (m, a), scalar(3.0, loss), create_graph=True)
    check_scalar("d/d alpha", grad_alpha, want.grad_alpha, want.alpha_scale, RELATIVE[FP32])
    torch.testing.assert_close(
        grad_mean.detach().cpu().double(), torch.from_numpy(want.grad_mean), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    ("target_of", "alpha_of"),
    [
        (lambda m: m * 2, lambda m: torch.zeros(3, dtype=m.dtype)),
        (lambda m: torch.ones_like(m), lambda m: m.mean((0, 2))),
        (lambda m: m.sin(), lambda m: m.mean((0, 2))),
    ],
    ids=["target", "alpha", "both"],
)
def test_inputs_that_depend_on_each_other(backend, target_of, alpha_of, create_graph):
    """A path from mean to the loss through target or alpha counts once, also under create_graph."""
    x = torch.randn(2, 3, 4, dtype=torch.float64, device=backend.device, requires_grad=True)

    def derivative(name: str) -> list[torch.Tensor]:
        mean = x * 1
        loss = vidfast.gaussian_nll(
            mean,
            target_of(mean),
            alpha_of(mean).to(mean.device),
            strategy="two_pass" if name != "reference" else "auto",
            backend=name,
        )
        first = torch.autograd.grad(loss, x, create_graph=create_graph)[0]
        return [first, torch.autograd.grad(first.square().sum(), x)[0]] if create_graph else [first]

    for got, want in zip(derivative(backend.name), derivative("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
