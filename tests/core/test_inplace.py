"""inplace=True: when it writes, when it is ignored, when it refuses, and what autograd then knows."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from bounds import check_results
from oracle import expected
from places import Place
from problems import BY_NAME, FP16, FP32, Case
from torch import Tensor, nn

from vidfast import gaussian_nll

CASE = BY_NAME["plane_49"]


def tensors(backend: Place, case: Case = CASE, dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor, Tensor]:
    return case.tensors(dtype, device=backend.device)


@pytest.mark.parametrize("g", [1.0, -2.5])
def test_writes_the_gradient_over_mean(backend: Place, g: float) -> None:
    m, t, a = tensors(backend)
    leaf = m.requires_grad_()
    want = expected(m, t, a)
    mean = leaf * 1
    version = mean._version
    backend.nll(mean, t, a, inplace=True)
    assert mean._version > version
    check_results(want, torch.from_numpy(want.loss), mean, None, None, one_pass=True)


def test_touches_only_its_own_elements(backend: Place) -> None:
    """A slice of a bigger activation: what lies around it is left alone."""
    big = torch.full((6, 9, 5, 5), 7.0, device=backend.device, requires_grad=True) * 1
    kept = big.detach().clone()
    mean = big[1:5, 2:8]
    target = torch.randn(4, 6, 5, 5, device=backend.device)
    alpha = torch.zeros(6, device=backend.device)
    want = expected(mean, target, alpha)
    loss = backend.nll(mean, target, alpha, inplace=True)
    check_results(want, loss, mean, None, None, one_pass=True)
    inside = torch.zeros_like(kept, dtype=torch.bool)
    inside[1:5, 2:8] = True
    assert torch.equal(big.detach()[~inside], kept[~inside])


def _no_grad(backend: Place, m: Tensor, t: Tensor, a: Tensor) -> Tensor:
    with torch.no_grad():
        return backend.nll(m, t, a, inplace=True, strategy="one_pass")


IGNORED: dict[str, Callable[[Place, Tensor, Tensor, Tensor], Tensor]] = {
    "no_grad": _no_grad,
    "mean needs no gradient": lambda b, m, t, a: b.nll(m.detach(), t, a.requires_grad_(), inplace=True),
    "nothing needs a gradient": lambda b, m, t, a: b.nll(m.detach(), t, a, inplace=True),
    "two_pass": lambda b, m, t, a: b.nll(m, t, a, inplace=True, strategy="two_pass"),
    "target needs a gradient": lambda b, m, t, a: b.nll(m, t.requires_grad_(), a, inplace=True),
    "fp16": lambda b, m, t, a: b.nll(m.to(FP16), t, a, inplace=True),
    "reduction none": lambda b, m, t, a: gaussian_nll(m, t, a, inplace=True, reduction="none"),
    "the reference": lambda b, m, t, a: gaussian_nll(m, t, a, inplace=True, backend="reference"),
}


@pytest.mark.parametrize("why", IGNORED)
@pytest.mark.parametrize("leaf", [False, True])
def test_is_ignored(backend: Place, why: str, leaf: bool) -> None:
    m, t, a = tensors(backend)
    m.requires_grad_()
    fed = m if leaf else m * 1
    before = [x.detach().clone() for x in (fed, t, a)]
    version = fed._version
    loss = IGNORED[why](backend, fed, t, a)
    assert loss.isfinite().all()
    assert fed._version == version
    for x, old in zip((fed, t, a), before, strict=True):
        assert torch.equal(x.detach(), old)


def _leaf(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 6, 5, 5, device=device, requires_grad=True), torch.randn(4, 6, 5, 5, device=device)


def _view_of_leaf(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randn(8, 6, 5, 5, device=device, requires_grad=True)[::2], torch.randn(
        4, 6, 5, 5, device=device
    )


def _parameter(device: torch.device) -> tuple[Tensor, Tensor]:
    return nn.Parameter(torch.randn(4, 6, 5, 5, device=device)).view(4, 6, 5, 5), torch.randn(
        4, 6, 5, 5, device=device
    )


def _same_memory(device: torch.device) -> tuple[Tensor, Tensor]:
    mean = torch.randn(4, 6, 5, 5, device=device, requires_grad=True) * 1
    return mean, mean.detach()


def _overlap(device: torch.device) -> tuple[Tensor, Tensor]:
    both = torch.randn(7, 6, 5, 5, device=device, requires_grad=True) * 1
    return both[:4], both.detach()[3:]


def _other_dtype(device: torch.device) -> tuple[Tensor, Tensor]:
    mean = torch.randn(4, 6, 5, 5, device=device, requires_grad=True) * 1
    return mean, mean.detach().view(torch.bfloat16)[..., :5]


def _expanded(device: torch.device) -> tuple[Tensor, Tensor]:
    mean = (torch.randn(1, 6, 5, 5, device=device, requires_grad=True) * 1).expand(4, 6, 5, 5)
    return mean, torch.randn(4, 6, 5, 5, device=device)


def _expanded_channel(device: torch.device) -> tuple[Tensor, Tensor]:
    mean = (torch.randn(4, 1, 5, 5, device=device, requires_grad=True) * 1).expand(4, 6, 5, 5)
    return mean, torch.randn(4, 6, 5, 5, device=device)


def _cut_out(device: torch.device) -> tuple[Tensor, Tensor]:
    mean = (torch.randn(4, 6, 5, 9, device=device, requires_grad=True) * 1)[..., 2:7]
    return mean, torch.randn(4, 6, 5, 5, device=device)


def _overlapping_itself(device: torch.device) -> tuple[Tensor, Tensor]:
    mean = (torch.randn(200, device=device, requires_grad=True) * 1).as_strided((4, 6, 5, 5), (5, 25, 5, 1))
    return mean, torch.randn(4, 6, 5, 5, device=device)


@pytest.mark.parametrize(
    "make",
    [
        _leaf, _view_of_leaf, _parameter, _same_memory, _overlap, _other_dtype,
        _expanded, _expanded_channel, _cut_out, _overlapping_itself,
    ],
)  # fmt: skip
def test_refuses_what_somebody_else_holds(
    backend: Place, make: Callable[[torch.device], tuple[Tensor, Tensor]]
) -> None:
    mean, target = make(backend.device)
    alpha = torch.zeros(6, device=backend.device)
    before, version = mean.detach().clone(), mean._version
    with pytest.raises(RuntimeError, match="inplace"):
        backend.nll(mean, target, alpha, inplace=True)
    assert torch.equal(mean.detach(), before)
    assert mean._version == version
    # without it, the same tensors are fine
    want = expected(mean, target, alpha)
    (grad,) = torch.autograd.grad(backend.nll(mean, target, alpha), mean)
    check_results(want, torch.from_numpy(want.loss), grad, None, None, one_pass=True)


def test_target_laid_out_otherwise_is_copied_not_refused(backend: Place) -> None:
    m, t, a = BY_NAME["target_channels_last"].tensors(FP32, device=backend.device)
    leaf = m.requires_grad_()
    want = expected(m, t, a)
    before = t.clone()
    mean = leaf * 1
    loss = backend.nll(mean, t, a, inplace=True)
    check_results(want, loss, mean, None, None, one_pass=True)
    assert torch.equal(t, before)


def _conv(x: Tensor) -> Tensor:
    return nn.functional.conv2d(x, _weight(x, 6, 6, 1, 1))


def _weight(x: Tensor, *shape: int) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape), device=x.device, dtype=x.dtype).view(shape)


def _batch_norm(x: Tensor) -> Tensor:
    return nn.functional.batch_norm(x, None, None, training=True)


SAVE_THEIR_OUTPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu_": lambda x: torch.relu_(x * 1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softmax": lambda x: torch.softmax(x, 1),
    "exp": torch.exp,
    "sqrt": lambda x: torch.sqrt(x.abs() + 1),
    "relu then view": lambda x: torch.relu(x).view(4, 6, 25).unflatten(2, (5, 5)),
}
SAVE_THEIR_INPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "conv": _conv,
    "batch norm": _batch_norm,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "layer norm": lambda x: nn.functional.layer_norm(x, x.shape[1:]),
    "group norm": lambda x: nn.functional.group_norm(x, 3),
    "linear": lambda x: nn.functional.linear(x, _weight(x, 5, 5)),
    "transposed conv": lambda x: nn.functional.conv_transpose2d(x, _weight(x, 6, 6, 1, 1)),
    "addition": lambda x: x + 1,
    "max pool": lambda x: nn.functional.max_pool2d(x, 3, 1, 1),
    "average pool": lambda x: nn.functional.avg_pool2d(x, 3, 1, 1),
    "conv then channels": lambda x: _conv(x)[:, :6],
}


@pytest.mark.parametrize("name", SAVE_THEIR_OUTPUT)
def test_producers_that_saved_their_output_raise(backend: Place, name: str) -> None:
    x = torch.randn(4, 6, 5, 5, device=backend.device, requires_grad=True)
    mean = SAVE_THEIR_OUTPUT[name](x)
    loss = backend.nll(
        mean,
        torch.randn(4, 6, 5, 5, device=backend.device),
        torch.zeros(6, device=backend.device),
        inplace=True,
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", SAVE_THEIR_INPUT)
@pytest.mark.parametrize("g", [1.0, -2.5])
def test_other_producers_stay_right(backend: Place, name: str, g: float) -> None:
    x = torch.randn(4, 6, 5, 5, device=backend.device, requires_grad=True)
    target = torch.randn(4, 6, 5, 5, device=backend.device)
    grads = []
    for inplace in (False, True):
        alpha = torch.zeros(6, device=backend.device, requires_grad=True)
        loss = backend.nll(SAVE_THEIR_INPUT[name](x), target, alpha, inplace=inplace)
        grads.append(torch.autograd.grad(g * loss, (x, alpha)))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
    assert grads[0][0].abs().max() > 0


def test_retain_grad_on_mean(backend: Place) -> None:
    m, t, a = tensors(backend)
    want = expected(m, t, a, 3.0)
    mean = m.requires_grad_() * 1
    mean.retain_grad()
    loss = backend.nll(mean, t, a, inplace=True)
    (3 * loss).backward()
    check_results(want, loss, mean.grad, None, None, g=3.0, one_pass=True)
    check_results(want, loss, m.grad, None, None, g=3.0, one_pass=True)


def test_second_derivative_of_the_producer_is_refused(backend: Place) -> None:
    x = torch.randn(4, 6, 5, 5, device=backend.device, requires_grad=True)
    loss = backend.nll(_conv(x), torch.zeros_like(x), torch.zeros(6, device=backend.device), inplace=True)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="two_pass"):
        grad.square().sum().backward()


def test_alpha_in_means_memory_is_refused(backend: Place) -> None:
    mean = torch.randn(1, 4, 4, 1, device=backend.device, requires_grad=True) * 1
    alpha = mean.detach()[0, :, 0, 0]
    before = alpha.clone()
    with pytest.raises(RuntimeError, match="would overwrite alpha"):
        backend.nll(
            mean, torch.randn(1, 4, 4, 1, device=backend.device), alpha, inplace=True, strategy="one_pass"
        )
    assert torch.equal(alpha, before)
