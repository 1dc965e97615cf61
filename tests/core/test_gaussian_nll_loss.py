"""vidfast.GaussianNLLLoss beside the installed torch's: shapes, dtypes, gradients, errors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vidfast
from vidfast import functional

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
REDUCTIONS = ("mean", "sum", "none")
# (input, target, var); None is a number.
SHAPES: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]] = [
    ((4, 5), (4, 5), (4, 5)), ((4, 5), (4, 5), (4, 1)), ((4, 5), (4, 5), (4,)), ((4, 5), (4, 5), (1, 5)),
    ((4, 5), (4, 5), None), ((2, 3, 4, 5), (2, 3, 4, 5), (2, 1, 4, 5)), ((2, 3, 4, 5), (2, 3, 4, 5), (2, 3, 4)),
    ((6,), (6,), ()), ((6,), (6,), (1,)), ((), (), ()), ((1, 5), (1, 5), (1, 5)), ((4, 5), (1, 5), (4, 5)),
    ((4, 5), (5,), (4, 5)), ((1, 5), (4, 5), (1, 5)), ((4, 5), (), (4, 5)), ((1,), (1,), (1,)),
    ((0, 3), (0, 3), (0, 3)),
    ((3, 7, 11, 13), (3, 7, 11, 13), (3, 7, 11, 13)),
]  # fmt: skip
TOLERANCE = {FP16: 4e-3, BF16: 3e-2, FP32: 2e-5, FP64: 1e-12}


def made(shape: tuple[int, ...], dtype: torch.dtype, seed: int, positive: bool = False) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=random) * 2 + 0.05 if positive else torch.randn(shape, generator=random)
    return x.to(dtype).requires_grad_()


def both(x: Tensor, t: Tensor, v: Any, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(loss and gradients by torch, by us)."""
    leaves = [y for y in (x, t, v) if isinstance(y, Tensor) and y.requires_grad]
    found = []
    for loss in (F.gaussian_nll_loss, functional.gaussian_nll_loss):
        value = loss(x, t, v, **options)
        weights = (torch.arange(value.numel()) % 7 + 1).to(value.dtype).view(value.shape)
        found.append([value, *torch.autograd.grad((value * weights).sum(), leaves)])
    return found[0], found[1]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_as_torch_s(shapes: tuple[Any, Any, Any], dtype: torch.dtype, reduction: str) -> None:
    x, t = made(shapes[0], dtype, 0), made(shapes[1], dtype, 1)
    v: Any = 0.75 if shapes[2] is None else made(shapes[2], dtype, 2, positive=True)
    for full, eps in ((False, 1e-6), (True, 0.4)):
        theirs, ours = both(x, t, v, full=full, eps=eps, reduction=reduction)
        # of 16 bits torch rounds at every step
        wide = [y.detach().double().requires_grad_() if isinstance(y, Tensor) else y for y in (x, t, v)]
        exact, _ = both(*wide, full=full, eps=eps, reduction=reduction)
        for got, like, want in zip(ours, theirs, exact, strict=True):
            assert got.dtype == like.dtype
            assert got.shape == like.shape
            size = want.detach().abs().nan_to_num().max().item() if want.numel() else 0.0
            tolerance = TOLERANCE[dtype]
            assert torch.allclose(got.double(), want, rtol=tolerance, atol=tolerance * size, equal_nan=True)


@pytest.mark.parametrize("dtypes", list(itertools.product([BF16, FP32, FP64], repeat=3)), ids=str)
def test_mixed_dtypes_give_torch_s_dtype(dtypes: tuple[torch.dtype, ...]) -> None:
    x, t, v = (
        made((4, 5), dtypes[0], 0),
        made((4, 5), dtypes[1], 1),
        made((4, 5), dtypes[2], 2, positive=True),
    )
    theirs, ours = both(x, t, v)
    for got, want in zip(ours, theirs, strict=True):
        assert got.dtype == want.dtype
        assert torch.allclose(got.double(), want.double(), rtol=3e-2, atol=1e-2)
    for scalar in (t.detach()[0, 0], v.detach()[0, 0]):
        pair = (x, scalar, v) if scalar.dtype == dtypes[1] else (x, t, v)
        assert functional.gaussian_nll_loss(*pair).dtype == F.gaussian_nll_loss(*pair).dtype


def test_integers_as_targets_and_numbers_as_variances() -> None:
    x = made((4, 5), FP32, 0)
    t = torch.randint(0, 3, (4, 5))
    for v in (2.0, made((4, 5), FP32, 2, positive=True)):
        assert torch.allclose(functional.gaussian_nll_loss(x, t, v), F.gaussian_nll_loss(x, t, v))
    assert torch.allclose(functional.gaussian_nll_loss(x, t, 2), F.gaussian_nll_loss(x, t, 2.0))


def test_the_clamp_is_not_differentiated() -> None:
    x, t = made((50,), FP32, 0), made((50,), FP32, 1)
    v = torch.linspace(0, 0.2, 50).requires_grad_()
    theirs, ours = both(x, t, v, eps=0.1)
    assert torch.allclose(ours[3], theirs[3], rtol=1e-4)
    assert bool(ours[3][:10].all())
    theirs, ours = both(x, t, v, eps=0.0)  # 0 is a variance of torch's too
    assert ours[0].item() == theirs[0].item() or (math.isnan(theirs[0].item()) == math.isnan(ours[0].item()))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_negative_variances(name: Any, reduction: str) -> None:
    x, t = torch.zeros(1000), torch.zeros(1000)
    v = torch.ones(1000, requires_grad=True)
    bad = v.detach().clone()
    bad[777] = -1e-3
    for given in (bad, bad.clone().requires_grad_(), -0.5):
        with pytest.raises(ValueError, match="var has negative entry/entries"):
            functional.gaussian_nll_loss(x, t, given, reduction=reduction, backend=name)
    # NaN and -0.0 are not negative
    for value in (math.nan, -0.0):
        fine = v.detach().clone()
        fine[3] = value
        got = functional.gaussian_nll_loss(x, t, fine, reduction=reduction, backend=name)
        want = F.gaussian_nll_loss(x, t, fine, reduction=reduction)
        assert torch.allclose(got, want, equal_nan=True)


def test_on_a_device_that_is_not_waited_for_negative_variances_are_nan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a GPU's pass computes it; `check=True` looks first, as torch does."""
    from vidfast.heteroscedastic import torch_loss

    monkeypatch.setattr(torch_loss, "check_no_negative", lambda *_: None)
    x, t = torch.ones(40, requires_grad=True), torch.zeros(40)
    v = torch.ones(40)
    v[7] = -1
    v.requires_grad_()
    for backend in ("cpu", "reference"):
        loss = functional.gaussian_nll_loss(x, t, v, backend=backend)  # type: ignore[arg-type]
        grads = torch.autograd.grad(loss, (x, v))
        assert loss.isnan()
        for grad in grads:
            assert grad.isnan().nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize(
    ("shape", "var"),
    [((4, 5), (5,)), ((4, 5), (4, 5, 1)), ((4, 5), (1, 1)), ((4, 5), (2, 5)), ((2, 3, 4), (2, 1, 1))],
)
def test_variances_of_another_shape(shape: tuple[int, ...], var: tuple[int, ...]) -> None:
    x, v = torch.zeros(shape), torch.ones(var)
    with pytest.raises(ValueError, match="var is of incorrect size"):
        F.gaussian_nll_loss(x, x, v)
    with pytest.raises(ValueError, match=r"var is of incorrect size: it must have input.s shape"):
        functional.gaussian_nll_loss(x, x, v)


def test_bad_input() -> None:
    x = torch.zeros(3)
    for bad, text in (
        ({"reduction": "batchmean"}, "reduction must be one of"),
        ({"backend": "gpu"}, "backend must be"),
    ):
        with pytest.raises(ValueError, match=text):
            functional.gaussian_nll_loss(x, x, x, **bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=text):
            vidfast.GaussianNLLLoss(**bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="full must be True or False"):
        vidfast.GaussianNLLLoss(full=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="check must be True or False"):
        vidfast.GaussianNLLLoss(check=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="eps must be a number"):
        vidfast.GaussianNLLLoss(eps="small")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"target must be a torch\.Tensor, got float"):
        functional.gaussian_nll_loss(x, 1.0, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got torch\.complex64"):
        functional.gaussian_nll_loss(x, x.to(torch.complex64), x)


def test_the_module_stands_in_for_torch_s() -> None:
    theirs, ours = nn.GaussianNLLLoss(full=True, eps=0.1), vidfast.GaussianNLLLoss(full=True, eps=0.1)
    assert isinstance(ours, nn.GaussianNLLLoss)
    assert (ours.full, ours.eps, ours.reduction) == (theirs.full, theirs.eps, theirs.reduction)
    assert not ours.state_dict()
    x, t, v = made((4, 5), FP32, 0), made((4, 5), FP32, 1), made((4, 5), FP32, 2, positive=True)
    assert torch.allclose(ours(x, t, v), theirs(x, t, v))
    assert "check=False" in repr(ours)


class Tagged(Tensor):
    """A tensor subclass that means nothing by it."""


def test_a_subclass_is_torch_s_own_affair() -> None:
    x = torch.randn(4, 5).as_subclass(Tagged)
    got = functional.gaussian_nll_loss(x, torch.zeros(4, 5), torch.ones(4, 5))
    assert isinstance(got, Tagged)
    assert torch.allclose(got, F.gaussian_nll_loss(x, torch.zeros(4, 5), torch.ones(4, 5)))


def test_a_shared_variance_gets_one_gradient() -> None:
    """Many rows, one variance each, larger than a kernel's task."""
    x, t = made((64, 1031), FP32, 0), made((64, 1031), FP32, 1)
    theirs, ours = both(x, t, made((64, 1), FP32, 2, positive=True))
    for got, want in zip(ours, theirs, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6 * want.abs().max().item())


def test_transforms_of_torch_func_see_into_it() -> None:
    """As into torch's: a derivative of a function, forward mode."""
    x, t, v = torch.randn(7), torch.randn(7), torch.rand(7) + 0.1
    for differentiate in (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (torch.ones(7),))[1]):
        got, want = (
            differentiate(lambda x, loss=loss: loss(x, t, v))(x)
            for loss in (functional.gaussian_nll_loss, F.gaussian_nll_loss)
        )
        # the tangent of a scalar times a number is fp64 in torch
        assert torch.allclose(got.to(want.dtype), want, rtol=1e-5)


def test_numbers_alone() -> None:
    for shape in ((), (1,)):
        leaves = [torch.tensor(0.7).expand(shape).clone().requires_grad_() for _ in range(3)]
        loss = vidfast.heteroscedastic_nll(*leaves)
        want = vidfast.heteroscedastic_nll(*leaves, backend="reference")
        assert torch.allclose(loss, want)
        for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True):
            assert torch.allclose(a, b)
