"""Masks in vid_head and VIDLoss: in one pass, in parts and layer by layer, against the positions that count alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from problems import BF16, FP16, FP32, FP64, short
from torch import Tensor, nn
from torch.nn import functional as F

import vidfast
from vidfast.head import kernel
from vidfast.pooling import match_masked, without_unselected

SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "maps": ((3, -1, 6, 7), 1),
    "many positions": ((2, -1, 17, 19), 1),
    "tokens": ((3, 11, -1), -1),
    "vectors": ((13, -1), 1),
    "1-D": ((2, -1, 70), 1),
}
KINDS = (torch.bool, torch.int64, torch.float32)


class Problem:
    """Features with NaN where the mask is 0, the layers, and the exact loss over the positions that count."""

    def __init__(self, name: str, kind: torch.dtype, bias: bool = True, dtype: torch.dtype = FP32) -> None:
        shape, self.channel = SHAPES[name]
        random = torch.Generator().manual_seed(5)

        def made(*size: int) -> Tensor:
            return torch.randn(size, generator=random)

        at = self.channel % len(shape)
        positions = [n for n in shape if n >= 0]
        self.mask = (torch.rand(positions, generator=random) < 0.6).to(kind)
        if kind.is_floating_point:
            self.mask *= torch.rand(positions, generator=random).add(0.5)
        else:
            self.mask *= torch.randint(1, 2 if kind is torch.bool else 4, positions, generator=random).to(
                kind
            )
        unselected = (self.mask == 0).unsqueeze(at)
        self.student, self.target = (
            made(*[c if n < 0 else n for n in shape]).masked_fill(unselected, math.nan).to(dtype)
            for c in (5, 6)
        )
        self.student.requires_grad_()
        self.alpha = made(6).requires_grad_()
        self.weights = [made(8, 5).to(dtype), made(6, 8).to(dtype)]
        self.biases = [made(8).to(dtype), made(6).to(dtype)] if bias else [None, None]
        for x in self.inputs:
            x.requires_grad_()

    @property
    def inputs(self) -> list[Tensor]:
        return [self.student, self.alpha, *self.weights, *(b for b in self.biases if b is not None)]

    def run(self, **options: Any) -> list[Tensor]:
        options = {"mask": self.mask, "channel_dim": self.channel, **options}
        loss = vidfast.vid_head(self.student, self.target, self.alpha, self.weights, self.biases, **options)
        return [loss.detach(), *torch.autograd.grad(loss, self.inputs)]

    def exact(self, reduction: str = "mean") -> list[Tensor]:
        """In fp64 on the selected positions, by indexing."""
        inputs = [x.detach().double().requires_grad_() for x in self.inputs]
        student, alpha, *layers = inputs
        weights, biases = layers[:2], layers[2:] or [None, None]
        chosen = self.mask != 0
        w = self.mask[chosen].double()[:, None]
        x = student.movedim(self.channel, -1)[chosen]
        t = self.target.double().movedim(self.channel, -1)[chosen]
        mean = F.linear(F.relu(F.linear(x, weights[0], biases[0])), weights[1], biases[1])
        v = F.softplus(alpha) + 1e-5
        total = (w * 0.5 * (torch.log(v) + (t - mean).square() / v)).sum()
        divisor = {"mean": w.sum() * 6, "sum": 1, "batchmean": self.student.shape[0]}[reduction]
        loss = total / divisor
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def checked(found: Sequence[Tensor], wanted: Sequence[Tensor], relative: float) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert torch.isfinite(x).all()
        assert (x.double() - y).norm() <= relative * y.norm() + 1e-12


WAYS: dict[str, Callable[[pytest.MonkeyPatch], dict[str, Any]]] = {
    "kernel": lambda _: {},
    "parts": lambda patch: patch.setattr(kernel, "takes", lambda _: False) or {},  # type: ignore[func-returns-value]
    "layer by layer": lambda _: {"backend": "reference"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_a_head(monkeypatch: pytest.MonkeyPatch, name: str, kind: torch.dtype, bias: bool, way: str) -> None:
    problem = Problem(name, kind, bias)
    options = WAYS[way](monkeypatch)
    for reduction in ("mean", "sum", "batchmean"):
        checked(problem.run(reduction=reduction, **options), problem.exact(reduction), 2e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=short)
@pytest.mark.parametrize("name", ["maps", "tokens"])
def test_heads_of_16_bits(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, way: str) -> None:
    problem = Problem(name, FP32, dtype=dtype)
    checked(problem.run(**WAYS[way](monkeypatch)), problem.exact(), 0.1 if dtype is BF16 else 0.02)


@pytest.mark.parametrize("way", ["kernel", "parts"])
@pytest.mark.parametrize("size", [1e-10, 1e-4, 1e4, 1e10])
def test_fp16_heads_with_weights_of_any_size(monkeypatch: pytest.MonkeyPatch, size: float, way: str) -> None:
    """Of a mean only the ratios of weights count: nothing vanishes in fp16, and nothing overflows."""
    problem = Problem("maps", FP32, dtype=FP16)
    problem.mask *= size
    checked(problem.run(**WAYS[way](monkeypatch)), problem.exact(), 0.02)


@pytest.mark.parametrize("way", WAYS)
def test_masks_and_weights_of_inference_mode(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """As a teacher's confidence may be."""
    problem = Problem("maps", FP32)
    with torch.inference_mode():
        mask, weight = problem.mask.clone(), torch.tensor(0.5)
    options = WAYS[way](monkeypatch)
    want = [0.5 * x for x in problem.exact()]
    checked(problem.run(mask=mask, weight=weight, **options), want, 2e-5)
    with torch.inference_mode():
        fine = torch.rand(2, 8, 8)
    student, teacher = torch.randn(2, 5, 8, 8, requires_grad=True), torch.randn(2, 6, 4, 4)
    vidfast.VIDLoss(5, 8, 6)(student, teacher, mask=fine).backward()
    assert torch.isfinite(student.grad).all()


def test_a_head_in_fp64_and_a_target_with_gradient() -> None:
    problem = Problem("maps", FP64, dtype=FP64)
    problem.alpha = problem.alpha.detach().double().requires_grad_()
    checked(problem.run(), problem.exact(), 1e-10)
    target = problem.target.requires_grad_()
    loss = vidfast.vid_head(
        problem.student, target, problem.alpha, problem.weights, problem.biases, mask=problem.mask
    )
    (grad,) = torch.autograd.grad(loss, target)
    assert torch.isfinite(grad).all()
    assert not grad.movedim(1, -1)[problem.mask == 0].any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SHAPES)
def test_nothing_selected(monkeypatch: pytest.MonkeyPatch, name: str, way: str) -> None:
    problem = Problem(name, torch.bool)
    problem.student = torch.full_like(problem.student.detach(), math.nan).requires_grad_()
    problem.target = torch.full_like(problem.target, math.inf)
    options = WAYS[way](monkeypatch)
    for reduction in ("mean", "sum", "batchmean"):
        for x in problem.run(mask=torch.zeros_like(problem.mask), reduction=reduction, **options):
            assert not x.any()


@pytest.mark.parametrize("way", WAYS)
def test_one_sample_selected(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """The mask's other shapes: a weight a sample, and one that is broadcast."""
    problem = Problem("maps", FP32)
    options = WAYS[way](monkeypatch)
    for mask in (torch.tensor([0.0, 2.0, 0.0]), torch.tensor([0, 1, 0]).view(3, 1, 1, 1)):
        found = problem.run(mask=mask, **options)
        problem.student.data[1] = problem.student.data[1].nan_to_num(0.3)
        problem.target[1] = problem.target[1].nan_to_num(-0.2)
        found = problem.run(mask=mask, **options)
        wide = mask.reshape(3, 1, 1).expand(3, 6, 7)
        before, problem.mask = problem.mask, wide
        checked(found, problem.exact(), 2e-5)
        problem.mask = before


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_on_the_device(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    problem = Problem("tokens", torch.bool)
    options = WAYS[way](monkeypatch)
    want = [0.25 * x for x in problem.exact()]
    checked(problem.run(weight=torch.tensor(0.25), **options), want, 2e-5)


def test_large_heads_with_padding() -> None:
    """Several units and whole tiles without a position that counts, in the kernel."""
    random = torch.Generator().manual_seed(1)
    student = torch.randn(4, 900, 32, generator=random, requires_grad=True)
    target = torch.randn(4, 900, 48, generator=random)
    mask = torch.arange(900) < torch.tensor([[900], [333], [1], [0]])
    layers = [torch.randn(s, generator=random).mul_(0.1).requires_grad_() for s in ((64, 32), (48, 64))]
    alpha = torch.zeros(48, requires_grad=True)
    inputs = [student, alpha, *layers]
    with torch.no_grad():
        student[~mask] = math.nan
    loss = vidfast.vid_head(student, target, alpha, layers, channel_dim=-1, mask=mask)
    found = torch.autograd.grad(loss, inputs)
    few = student.detach()[mask].requires_grad_()
    want = vidfast.vid_head(few, target[mask], alpha, layers, backend="reference")
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    of_few, *rest = torch.autograd.grad(want, [few, alpha, *layers])
    torch.testing.assert_close(found[0][mask], of_few, rtol=1e-4, atol=1e-8)
    assert not found[0][~mask].any()
    for x, y in zip(found[1:], rest, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def pooled_by_hand(x: Tensor, mask: Tensor, size: int) -> Tensor:
    """Weighted means of equal windows."""
    b, c, n, _ = x.shape
    step = n // size
    w = mask.double().expand(b, 1, n, n)
    each = torch.where(w != 0, w * x.double(), 0.0).view(b, c, size, step, size, step).sum((3, 5))
    whole = w.reshape(b, 1, size, step, size, step).sum((3, 5))
    return torch.where(whole != 0, each / whole, 0.0)


@pytest.mark.parametrize("sizes", [(8, 4), (4, 8), (8, 8), (2, 8)], ids=str)
@pytest.mark.parametrize("of_mask", [8, 16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_pooled_maps(kind: torch.dtype, of_mask: int, sizes: tuple[int, int]) -> None:
    """Weighted means, and the mask averaged down with them; NaN under the mask is not used."""
    torch.manual_seed(0)
    mask = (torch.rand(3, of_mask, of_mask) < 0.5).to(kind)
    mask[0, :8] = 0  # whole windows of nothing
    fine = mask.double().unsqueeze(1)
    features = []
    for size, channels in zip(sizes, (5, 6), strict=True):
        weights = F.adaptive_avg_pool2d(fine, size)
        features.append(torch.randn(3, channels, size, size).masked_fill(weights == 0, math.nan))
    size = min(sizes)
    student, teacher, small = match_masked(*features, mask)
    want = F.adaptive_avg_pool2d(fine, size)
    torch.testing.assert_close(small.double(), want, rtol=1e-6, atol=1e-7)
    for got, x in zip((student, teacher), features, strict=True):
        exact = pooled_by_hand(x, F.adaptive_avg_pool2d(fine, x.shape[2]), size)
        torch.testing.assert_close(
            torch.where(want != 0, got.double(), 0.0),
            torch.where(want != 0, exact, 0.0),
            rtol=1e-5,
            atol=1e-6,
        )
    module = vidfast.VIDLoss(5, 8, 6)
    feature = features[0].requires_grad_()
    loss = module(feature, features[1], mask=mask)
    grads = torch.autograd.grad(loss, [feature, *module.parameters()])
    assert all(torch.isfinite(g).all() for g in grads)
    mean = module.regressor.double()(pooled_by_hand(features[0], F.adaptive_avg_pool2d(fine, sizes[0]), size))
    v = F.softplus(module.log_scale.double()).view(1, -1, 1, 1) + 1e-5
    t = pooled_by_hand(features[1], F.adaptive_avg_pool2d(fine, sizes[1]), size)
    nll = 0.5 * (torch.log(v) + (t - mean).square() / v)
    exact_loss = (want * torch.where(want != 0, nll, 0.0)).sum() / (want.sum() * 6)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-6)


def test_a_mask_of_the_pooled_size() -> None:
    torch.manual_seed(0)
    student, teacher, mask = torch.randn(2, 5, 8, 8), torch.randn(2, 6, 4, 4), torch.rand(2, 4, 4) < 0.5
    got = match_masked(student, teacher, mask)
    assert torch.equal(got[0], F.adaptive_avg_pool2d(student, 4))
    assert torch.equal(got[2], mask.unsqueeze(1))


@pytest.mark.parametrize(
    "shape", [(2, 6, 6), (2, 1, 6, 6), (3, 8, 8), (3,), (2, 5, 8, 8), (8, 8), (2, 1, 4, 16)], ids=str
)
def test_masks_that_fit_no_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"mask must be \(2, \*spatial\).*of size \(4, 4\) or of at least \(8, 8\)"
    ):
        vidfast.VIDLoss(5, 8, 6)(torch.randn(2, 5, 8, 8), torch.randn(2, 6, 4, 4), mask=torch.ones(shape))


@pytest.mark.parametrize("spatial", [(), (7,), (4, 5), (3, 4, 2)], ids=str)
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
def test_vid_loss_with_any_axes(amp: bool, inplace: bool, spatial: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = vidfast.VIDLoss(5, 8, 6, inplace=inplace, weight=torch.tensor(0.5))
    mask = torch.rand(4, *spatial) < 0.5
    mask.view(4, -1)[0, 0] = True
    student, teacher = (torch.randn(4, c, *spatial).masked_fill(~mask.unsqueeze(1), math.nan) for c in (5, 6))
    inputs = [student.requires_grad_(), *module.parameters()]
    with torch.autocast("cpu", BF16, enabled=amp):
        loss = module(student, teacher, mask=mask)
    found = [loss, *torch.autograd.grad(loss, inputs)]
    chosen = [x.detach().movedim(1, -1)[mask] for x in (student, teacher)]
    few = chosen[0].requires_grad_()
    with torch.autocast("cpu", BF16, enabled=amp):
        want = module(few, chosen[1])
    wanted = [want, *torch.autograd.grad(want, [few, *module.parameters()])]
    assert not found[1].movedim(1, -1)[~mask].any()
    found[1] = found[1].movedim(1, -1)[mask]
    for x, y in zip(found, wanted, strict=True):
        assert torch.isfinite(x).all()
        assert (x - y).norm() <= (0.05 if amp else 1e-5) * y.norm() + 1e-12


def test_a_regressor_of_ones_own_that_enlarges() -> None:
    """What goes into it is 0 where nothing that comes out of it counts."""
    module = vidfast.VIDLoss(5, 8, 6)
    module.regressor = nn.ConvTranspose2d(5, 6, 2, stride=2)
    mask = torch.ones(2, 8, 8, dtype=torch.bool)
    mask[:, :4] = False
    student, teacher = torch.randn(2, 5, 4, 4), torch.randn(2, 6, 8, 8)
    zeroed = without_unselected(student, mask.unsqueeze(1))
    assert not zeroed[:, :, :2].any()
    assert torch.equal(zeroed[:, :, 2:], student[:, :, 2:])
    student[:, :, :2] = math.nan
    fed = without_unselected(student, mask.unsqueeze(1)).requires_grad_()
    mean = module.regressor(fed)
    loss = vidfast.gaussian_nll(mean, teacher, module.log_scale, mask=mask)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, [fed, *module.parameters()]))
