"""GaussianNLL, the module: its parameter, what is saved, copied and moved, and that it is the function."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from bounds import check_results
from oracle import Options, expected
from places import Place
from problems import BF16, FP16, FP32, FP64, short
from torch import nn

from vidfast import GaussianNLL, gaussian_nll, reference


@pytest.mark.parametrize(
    ("init_var", "eps"),
    [
        (5.0, 1e-5),
        (1.0, 1e-5),
        (1e-4, 1e-5),
        (1.1e-5, 1e-5),
        (100.0, 1e-5),
        (1e4, 1e-3),
        (1.5, 1.0),
        (1e30, 1e-5),
        (2, 1e-5),
    ],
)
def test_initial_variance(init_var: float, eps: float) -> None:
    """softplus(alpha) + eps is init_var, to the precision that an fp32 alpha allows; no overflow at 89."""
    module = GaussianNLL(7, init_var=init_var, eps=eps)
    assert module.alpha.shape == (7,)
    assert module.alpha.dtype == FP32
    assert isinstance(module.alpha, nn.Parameter)
    assert module.alpha.requires_grad
    assert module.alpha.isfinite().all()
    got = reference.variance(module.alpha.double(), eps)
    # d v / v = sigmoid(alpha) |alpha| / v * 2^-24
    alpha = abs(module.alpha[0].item())
    allowed = (init_var - eps) * max(alpha, 1.0) * 2**-23 if init_var < 1 else max(alpha, 1.0) * 2**-23
    assert (got - init_var).abs().max() <= allowed
    assert module.variance.shape == (7,)
    torch.testing.assert_close(
        module.variance.double(), torch.full((7,), float(init_var), dtype=FP64), rtol=2e-6, atol=0
    )


def test_variance_is_differentiable() -> None:
    module = GaussianNLL(3, init_var=0.7)
    module.variance.sum().backward()
    torch.testing.assert_close(module.alpha.grad, module.alpha.detach().sigmoid())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum", "weight": -2.0, "full": True},
        {"reduction": "batchmean", "eps": 0.1, "init_var": 0.5},
        {"channel_dim": -1, "strategy": "two_pass"},
        {"strategy": "one_pass"},
    ],
    ids=str,
)  # fmt: skip
def test_is_the_function(backend: Place, options: dict[str, object]) -> None:
    torch.manual_seed(1)
    shape = (4, 6, 5, 6)
    module = GaussianNLL(6, backend=backend.name, **options).to(backend.device)  # type: ignore[arg-type]
    mean = torch.randn(shape, device=backend.device, requires_grad=True)
    target = torch.randn(shape, device=backend.device)
    keys = ("channel_dim", "eps", "reduction", "full", "weight")
    want = expected(
        mean, target, module.alpha, 1.0, Options(**{k: v for k, v in options.items() if k in keys})
    )  # type: ignore[arg-type]
    loss = module(mean, target)
    loss.backward()
    check_results(want, loss, mean.grad, None, module.alpha.grad)


def test_inplace_is_passed_on(backend: Place) -> None:
    module = GaussianNLL(6, inplace=True, backend=backend.name).to(backend.device)
    mean = torch.randn(4, 6, 5, device=backend.device, requires_grad=True) * 1
    before = mean.detach().clone()
    module(mean, torch.zeros(4, 6, 5, device=backend.device))
    assert not torch.equal(mean.detach(), before)


def test_state_dict() -> None:
    module = GaussianNLL(4, init_var=2.0)
    assert list(module.state_dict()) == ["alpha"]
    with torch.no_grad():
        module.alpha.copy_(torch.arange(4.0))
    memory = io.BytesIO()
    torch.save(module.state_dict(), memory)
    memory.seek(0)
    other = GaussianNLL(4)
    other.load_state_dict(torch.load(memory, weights_only=True))
    assert torch.equal(other.alpha, module.alpha)
    with pytest.raises(RuntimeError, match="size mismatch"):
        GaussianNLL(5).load_state_dict(module.state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how: str) -> None:
    module = GaussianNLL(
        4,
        channel_dim=-1,
        init_var=2.0,
        eps=1e-3,
        reduction="sum",
        full=True,
        weight=0.5,
        inplace=True,
        strategy="two_pass",
        backend="reference",
    )
    with torch.no_grad():
        module.alpha.add_(torch.arange(4.0))
    mean, target = torch.randn(3, 4), torch.randn(3, 4)
    module(mean.requires_grad_(), target).backward()  # after use
    if how == "deepcopy":
        other = copy.deepcopy(module)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        memory = io.BytesIO()
        torch.save(module, memory)
        memory.seek(0)
        other = torch.load(memory, weights_only=False)
    assert torch.equal(other.alpha, module.alpha)
    assert other.alpha is not module.alpha
    assert repr(other) == repr(module)
    assert torch.equal(other(mean, target), module(mean, target))


@pytest.mark.parametrize("dtype", [FP16, BF16, FP64], ids=short)
def test_to_dtype(backend: Place, dtype: torch.dtype) -> None:
    module = GaussianNLL(4, backend=backend.name).to(backend.device, dtype)
    assert module.alpha.dtype == dtype
    mean, target = (torch.randn(3, 4, 5, device=backend.device) for _ in range(2))
    want = expected(mean, target, module.alpha)
    loss = module(mean.requires_grad_(), target)
    loss.backward()
    assert loss.dtype == FP32
    check_results(want, loss, mean.grad, None, module.alpha.grad)
    assert module.variance.dtype == dtype


def test_to_empty_and_meta() -> None:
    with torch.device("meta"):
        module = GaussianNLL(4)
    assert module.alpha.is_meta
    module.to_empty(device="cpu").load_state_dict(GaussianNLL(4).state_dict())
    torch.testing.assert_close(module.variance, torch.full((4,), 5.0))


def test_repr_names_the_options() -> None:
    text = repr(
        GaussianNLL(
            4,
            channel_dim=-1,
            init_var=2.0,
            reduction="sum",
            full=True,
            weight=0.5,
            inplace=True,
            strategy="one_pass",
            backend="cpu",
        )
    )
    for word in (
        "4",
        "channel_dim=-1",
        "init_var=2.0",
        "reduction='sum'",
        "full=True",
        "weight=0.5",
        "inplace=True",
        "strategy='one_pass'",
        "backend='cpu'",
    ):
        assert word in text, word


def test_training_finds_the_variance(backend: Place) -> None:
    """Minimised over alpha, softplus(alpha) + eps is the mean square of the residual, channel by channel."""
    torch.manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 3.0], device=backend.device)
    mean = torch.zeros(64, 3, 16, device=backend.device)
    target = torch.randn(64, 3, 16, device=backend.device) * scale[:, None]
    module = GaussianNLL(3, init_var=1.0, backend=backend.name).to(backend.device)
    optimizer = torch.optim.LBFGS(
        module.parameters(),
        max_iter=100,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 100 * module(mean, target)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(module.variance.detach(), target.square().mean((0, 2)), rtol=1e-2, atol=0)


def test_the_function_equals_torchs_own_loss(backend: Place) -> None:
    """torch.nn.GaussianNLLLoss with the same variance: another implementation of the same formula."""
    mean, target = (torch.randn(4, 6, 5, device=backend.device) for _ in range(2))
    alpha = torch.randn(6, device=backend.device)
    v = torch.nn.functional.softplus(alpha) + 1e-5
    for full in (False, True):
        want = nn.GaussianNLLLoss(full=full, eps=1e-9)(mean, target, v.view(1, 6, 1).expand_as(mean))
        assert math.isclose(backend.nll(mean, target, alpha, full=full).item(), want.item(), rel_tol=1e-5)
    assert gaussian_nll(mean, target, alpha).shape == ()
