"""What a call with one variance an element is refused for, and what `variance_of` and the module are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from variances import TRANSFORMS

import vidfast

X = torch.zeros(2, 3, 4)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"transform": "log"}, ValueError, "transform must be one of"),
    ({"eps": 0.0}, ValueError, "eps must be positive and finite, or 0 where transform='exp'"),
    ({"eps": -1e-3}, ValueError, "eps must be positive"),
    ({"eps": math.inf}, ValueError, "eps must be positive"),
    ({"eps": "x"}, TypeError, "eps must be a number"),
    ({"eps": 0.0, "transform": "identity"}, ValueError, "eps must be positive"),
    ({"beta": -0.5}, ValueError, "beta must be 0 or more and finite"),
    ({"beta": math.nan}, ValueError, "beta must be 0 or more"),
    ({"beta": None}, TypeError, "beta must be a number"),
    ({"channel_dim": 3}, ValueError, "channel_dim=3 is out of range"),
    ({"channel_dim": 1.0}, TypeError, "channel_dim must be an int"),
    ({"reduction": "avg"}, ValueError, "reduction must be one of"),
    ({"reduction": "batchmean", "channel_dim": 0}, ValueError, "needs a batch in dimension 0"),
    ({"full": 1}, TypeError, "full must be True or False"),
    ({"inplace": 0}, TypeError, "inplace must be True or False"),
    ({"weight": math.inf}, ValueError, "weight must be finite"),
    ({"weight": torch.ones(2)}, ValueError, "weight must be a number or a tensor of one element"),
    ({"strategy": "none"}, ValueError, "strategy must be one of"),
    ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ({"reduction": "none", "backend": "cpu"}, ValueError, "reduction='none' has no fused kernel"),
    ({"mask": torch.ones(5, 3, 4)}, ValueError, "mask must have mean's shape"),
    ({"mask": torch.ones(2, 4), "channel_dim": 2}, ValueError, "mask must have the activations' shape without"),
    ({"mask": -torch.ones(2, 3, 4)}, ValueError, "mask must not be negative"),
    ({"mask": torch.ones(2, 3, 4, requires_grad=True)}, ValueError, "mask must not require grad"),
    ({"target": torch.zeros(2, 3, 5)}, ValueError, "mean, target and raw must have the same shape"),
    ({"raw": torch.zeros(2, 3, 4, dtype=torch.int32)}, TypeError, "raw must be float16"),
    ({"raw": torch.zeros(2, 3, 4).to_sparse()}, ValueError, "raw must be a dense"),
    ({"mean": None}, TypeError, "mean must be a torch.Tensor"),
    ({"target": torch.zeros(2, 3, 4, device="meta")}, ValueError, "must be on one device"),
    ({"target": torch.zeros(2, 3, 4, requires_grad=True), "strategy": "one_pass"}, ValueError, "gradient for target"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "error", "text"), BAD, ids=[f"{list(b[0])}-{i}" for i, b in enumerate(BAD)]
)
def test_bad_input(given: dict[str, Any], error: type[Exception], text: str) -> None:
    call = {"mean": X, "target": X, "raw": X, **given}
    with pytest.raises(error, match=text):
        vidfast.heteroscedastic_nll(call.pop("mean"), call.pop("target"), call.pop("raw"), **call)


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_variance_of(kind: str) -> None:
    raw = torch.tensor([-1e4, -5.0, 0.0, 0.01, 3.0, 1e4], dtype=torch.float64, requires_grad=True)
    eps = TRANSFORMS[kind]["eps"]
    v = vidfast.variance_of(raw, **TRANSFORMS[kind])
    u = raw.detach()
    want = {
        "softplus": torch.logaddexp(u, torch.zeros_like(u)) + eps,
        "exp": u.exp() + eps,
        "log_variance": u.exp(),
        "identity": u.clamp(min=eps),
    }[kind]
    assert torch.allclose(v, want)
    assert torch.autograd.grad(v[1:5].sum(), raw)[0].shape == raw.shape
    assert vidfast.variance_of(u.bfloat16(), **TRANSFORMS[kind]).dtype is torch.bfloat16
    with pytest.raises(ValueError, match="transform must be"):
        vidfast.variance_of(u, transform="square")  # type: ignore[arg-type]


def test_the_module() -> None:
    loss = vidfast.HeteroscedasticNLL(
        transform="exp", eps=0, beta=0.5, channel_dim=-1, reduction="sum", weight=2.0
    )
    mean, target, raw = (torch.randn(2, 3, 4) for _ in range(3))
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    want = vidfast.heteroscedastic_nll(
        mean,
        target,
        raw,
        transform="exp",
        eps=0,
        beta=0.5,
        channel_dim=-1,
        reduction="sum",
        weight=2.0,
        mask=mask,
    )
    assert torch.equal(loss(mean, target, raw, mask), want)
    assert torch.allclose(loss.variance(raw), raw.exp())
    assert "transform='exp'" in repr(loss)
    loss.weight = 4.0
    assert torch.allclose(loss(mean, target, raw, mask), 2 * want)
    for bad in ({"eps": 0}, {"beta": -1}, {"transform": "x"}, {"backend": "x"}, {"reduction": "x"}):
        with pytest.raises(ValueError, match="must be"):
            vidfast.HeteroscedasticNLL(**bad)  # type: ignore[arg-type]


def test_per_element_values() -> None:
    mean, target, raw = (torch.randn(3, 5, dtype=torch.float64) for _ in range(3))
    each = vidfast.heteroscedastic_nll(mean, target, raw, full=True, reduction="none")
    v = vidfast.variance_of(raw)
    want = -torch.distributions.Normal(mean, v.sqrt()).log_prob(target)
    assert torch.allclose(each, want)
    assert torch.allclose(each.mean(), vidfast.heteroscedastic_nll(mean, target, raw, full=True))


def test_beta_weighs_each_element_by_its_variance() -> None:
    """beta = 1 gives d/d mean the residual itself (Seitzer et al., ICLR 2022, sec. 4)."""
    mean, raw = (torch.randn(50, dtype=torch.float64, requires_grad=True) for _ in range(2))
    target = torch.randn(50, dtype=torch.float64)
    loss = vidfast.heteroscedastic_nll(mean, target, raw, beta=1.0, reduction="sum")
    assert torch.allclose(torch.autograd.grad(loss, mean)[0], (mean - target).detach())
