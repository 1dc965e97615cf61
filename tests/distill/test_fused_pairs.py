"""A Distiller's Gaussian pairs on the CPU: regressor and loss in one go, with the numbers of both apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidfast import GaussianNLL
from vidfast import regressor as regressor_policy
from vidfast.distill import VID, Distiller, Infomax
from vidfast.head.way import head_nll


class Network(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, stride=2)
        self.classifier = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each Gaussian pair that could be, whether it was fused."""
    seen: list[bool] = []

    def counted(*args: Any, **options: Any) -> Tensor | None:
        loss = head_nll(*args, **options)
        seen.append(loss is not None)
        return loss

    monkeypatch.setattr(regressor_policy, "head_nll", counted)
    return seen


def distiller(term: VID | Infomax) -> tuple[Distiller, Tensor]:
    torch.manual_seed(2)
    images = torch.randn(6, 3, 10, 12)
    return Distiller(Network(5), Network(7), terms=[term], example=images).train(), images


def step(module: Distiller, images: Tensor, **options: Tensor) -> list[Tensor]:
    module.zero_grad(set_to_none=True)
    loss = module(images, torch.arange(6) % 4, **options).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


PAIRS = {"first": "first", "second": "second"}


@pytest.mark.parametrize("regressor", ["linear", "conv2", "conv3"])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_the_same_numbers(
    fused: list[bool], monkeypatch: pytest.MonkeyPatch, regressor: str, reduction: str
) -> None:
    module, images = distiller(VID(pairs=PAIRS, regressor=regressor, reduction=reduction, weight=0.3))
    ours = step(module, images)
    assert fused == [True, True]
    monkeypatch.setattr(regressor_policy, "head_nll", lambda *_, **__: None)
    apart = step(module, images)
    assert len(ours) == len(apart) > 8
    for x, y in zip(ours, apart, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("regressor", ["linear", "conv2", "conv3"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_the_same_numbers_with_a_mask(
    fused: list[bool], monkeypatch: pytest.MonkeyPatch, regressor: str, dtype: torch.dtype
) -> None:
    """Of the images' size, so that the second pair's is averaged down; and a factor on the device."""
    module, images = distiller(VID(pairs=PAIRS, regressor=regressor))
    mask = ((torch.rand(6, 10, 12) > 0.4) * (1 + torch.rand(6, 10, 12))).to(dtype)
    mask[1] = 0
    options = {"mask": mask, "scale": torch.tensor(0.7), "task_scale": torch.tensor(1.0)}
    ours = step(module, images, **options)
    assert fused == [True, True]
    monkeypatch.setattr(regressor_policy, "head_nll", lambda *_, **__: None)
    apart = step(module, images, **options)
    assert len(ours) == len(apart) > 8
    for x, y in zip(ours, apart, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


def test_infomax_too(fused: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where maps differ its regressor ends in an interpolation, which has to see the whole of its input."""
    step(*distiller(Infomax("second")))
    assert fused == []
    module, images = distiller(Infomax("first"))
    ours = step(module, images)
    assert fused == [True]
    monkeypatch.setattr(regressor_policy, "head_nll", lambda *_, **__: None)
    for x, y in zip(ours, step(module, images), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


def test_tokens_too(fused: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Features with the channels last have linear layers."""
    student, teacher = torch.randn(4, 9, 5), torch.randn(4, 9, 7)
    term = VID(pairs={"a": "a"}, channel_dim=-1)
    term.regressors, term.likelihoods = nn.ModuleList(), nn.ModuleList()
    term.build_pair(student, teacher)
    student.requires_grad_()
    inputs = [student, *term.parameters()]
    ours = torch.autograd.grad(term.pair_loss(0, student, teacher, 1.0), inputs)
    assert fused == [True]
    monkeypatch.setattr(regressor_policy, "head_nll", lambda *_, **__: None)
    apart = torch.autograd.grad(term.pair_loss(0, student, teacher, 1.0), inputs)
    for x, y in zip(ours, apart, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("where", ["regressor", "likelihood", "own forward", "transposed"])
def test_what_watches_sees_both_apart(fused: list[bool], where: str) -> None:
    seen: list[tuple[int, ...]] = []

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        seen.append(tuple(output.shape))

    module, images = distiller(VID(pairs={"second": "second"}, regressor="conv2"))
    term = module.terms["vid"]
    assert isinstance(term, VID)
    if where == "transposed":
        student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 7, 8, 8)
        term = VID(pairs={"a": "a"}, regressor="transposed")
        term.regressors, term.likelihoods = nn.ModuleList(), nn.ModuleList()
        term.build_pair(student.detach(), teacher)
        term.pair_loss(0, student, teacher, 1.0).backward()
        assert fused == []
        return
    if where == "own forward":
        plain = term.likelihoods[0].forward

        def own(mean: Tensor, target: Tensor) -> Tensor:
            seen.append(tuple(mean.shape))
            loss: Tensor = plain(mean, target)
            return loss

        term.likelihoods[0].forward = own  # type: ignore[method-assign]
    else:
        (term.regressors if where == "regressor" else term.likelihoods)[0].register_forward_hook(hook)
    step(module, images)
    assert not any(fused)
    assert seen == [() if where == "likelihood" else (6, 7, 5, 6)]


class _Counted(nn.Module):
    """A parametrization that counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, alpha: Tensor) -> Tensor:
        self.calls += 1
        return 2 * alpha


def test_a_computed_alpha_is_computed_once_a_step() -> None:
    module, images = distiller(VID(pairs={"second": "second"}, regressor="conv2"))
    term = module.terms["vid"]
    assert isinstance(term, VID)
    counted = _Counted()
    nn.utils.parametrize.register_parametrization(term.likelihoods[0], "alpha", counted)
    before = counted.calls
    module(images, torch.arange(6) % 4)
    assert counted.calls == before + 1


def test_a_step_leaves_what_is_set_on_a_likelihood() -> None:
    """Called as a module, it has the factor and the permission of that call, and then its own again."""
    module, images = distiller(VID(pairs={"second": "second"}, regressor="conv2", weight=0.5))
    term = module.terms["vid"]
    assert isinstance(term, VID)
    likelihood = term.likelihoods[0]
    assert isinstance(likelihood, GaussianNLL)
    seen: list[tuple[float, bool]] = []
    likelihood.register_forward_pre_hook(lambda m, _: seen.append((m.weight, m.inplace)))
    step(module, images)
    assert seen == [(0.5, True)]
    assert (likelihood.weight, likelihood.inplace) == (1.0, False)
    likelihood.weight = 3.0
    likelihood.eps = -1.0
    with pytest.raises(ValueError, match="eps must be positive"):
        step(module, images)
    assert (likelihood.weight, likelihood.inplace) == (3.0, False)


class _Doubled(GaussianNLL):
    def forward(self, mean: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(mean, target)


@pytest.mark.parametrize("what", ["full", "two_pass", "subclass"])
def test_what_else_a_likelihood_computes_is_computed(fused: list[bool], what: str) -> None:
    module, images = distiller(VID(pairs={"second": "second"}, regressor="conv2"))
    term = module.terms["vid"]
    assert isinstance(term, VID)
    likelihood = term.likelihoods[0]
    assert isinstance(likelihood, GaussianNLL)
    (plain,) = module(images, torch.arange(6) % 4).terms["vid"].reshape(1).tolist()
    assert fused == [True]
    if what == "full":
        likelihood.full = True
    elif what == "two_pass":
        likelihood.strategy = "two_pass"
    else:
        likelihood.__class__ = _Doubled
    (found,) = module(images, torch.arange(6) % 4).terms["vid"].reshape(1).tolist()
    assert fused == [True]
    wanted = {"full": plain + 0.5 * math.log(2 * math.pi), "two_pass": plain, "subclass": 2 * plain}
    assert found == pytest.approx(wanted[what], rel=1e-5)
