"""Methods with a mask against themselves without one, on the positions that count, each as often as it counts.

Under a weight of 0 both features are NaN, in every test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from method_checks import built
from torch import Tensor, nn

from vidfast.distill import (
    KD,
    METHODS,
    VID,
    VIDLP,
    Activations,
    Batch,
    FitNet,
    HeteroscedasticVID,
    Infomax,
    LwF,
    Method,
    MixtureVID,
    StudentTVID,
    TransposedStack,
    UpsampledStack,
)

BACKEND: Any = "auto"
PAIRED: dict[str, Callable[..., Method]] = {
    "vid": lambda **o: VID({"a": "x"}, backend=BACKEND, **o),
    "vid_heteroscedastic": lambda **o: HeteroscedasticVID({"a": "x"}, **o),
    "vid_student_t": lambda **o: StudentTVID({"a": "x"}, learn_nu=True, **o),
    "vid_mixture": lambda **o: MixtureVID({"a": "x"}, **o),
    "fitnet": lambda **o: FitNet({"a": "x"}, **o),
}
REDUCTIONS = ["mean", "batchmean", "sum"]
FACTOR = 1.7


class Shape(NamedTuple):
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    channel_dim: int = 1

    @property
    def places(self) -> tuple[int, ...]:
        channel = self.channel_dim % len(self.teacher)
        return tuple(n for d, n in enumerate(self.teacher) if d != channel)


SHAPES = {
    "maps": Shape((3, 2, 4, 5), (3, 6, 4, 5)),
    "tokens": Shape((3, 7, 2), (3, 7, 4), -1),
    "vectors": Shape((5, 3), (5, 4)),
    "1-D": Shape((3, 2, 6), (3, 4, 6)),
    "maps, channels last": Shape((2, 3, 4, 2), (2, 3, 4, 5), -1),
}


def counts(*shape: int) -> Tensor:
    """How often each position counts: 0 to 3, at least one of them 0 and one not."""
    found = torch.randint(0, 4, shape)
    found.view(-1)[:2] = torch.tensor([0, 2])
    return found


def feature(shape: tuple[int, ...], often: Tensor, channel_dim: int, grad: bool = False) -> Tensor:
    """Random, NaN where nothing counts."""
    x = torch.randn(shape, dtype=torch.float64)
    return x.masked_fill(often.unsqueeze(channel_dim) == 0, math.nan).requires_grad_(grad)


def chosen(x: Tensor, often: Tensor, channel_dim: int) -> Tensor:
    """(positions, C, 1 ...) or (positions, ..., C): each position a sample, as often as it counts."""
    rows = x.movedim(channel_dim, -1).flatten(0, -2).repeat_interleave(often.flatten(), 0)
    ones = [1] * (x.dim() - 2)
    return rows.reshape(len(rows), *ones, -1) if channel_dim == -1 else rows.reshape(len(rows), -1, *ones)


def batch_of(student: Tensor, teacher: Tensor, mask: Tensor | None = None, inputs: Any = None) -> Batch:
    """One pair of layers, which are the logits too."""
    return Batch(
        inputs, None, Activations({"a": student}, student), Activations({"x": teacher}, teacher), mask
    )


def assert_same(found: Tensor, formula: Tensor, leaves: list[Tensor], tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, formula, rtol=tolerance, atol=tolerance)
    assert found.dtype is torch.float64
    theirs = torch.autograd.grad(formula, leaves, retain_graph=True)
    for gradient, expected in zip(torch.autograd.grad(found, leaves), theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)
    assert all(g.isfinite().all() and bool(g.abs().sum() > 0) for g in theirs)


def share(reduction: str, often: Tensor) -> float:
    """A sum over positions that are samples is divided by the number of these, not by that of the samples."""
    return float(often.sum()) / len(often) if reduction == "batchmean" else 1.0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PAIRED)
def test_pairs_are_those_of_the_positions_that_count(name: str, shape: str, reduction: str) -> None:
    size = SHAPES[shape]
    often = counts(*size.places)
    s = feature(size.student, often, size.channel_dim, grad=True)
    t = feature(size.teacher, often, size.channel_dim)
    method = PAIRED[name](reduction=reduction, channel_dim=size.channel_dim)
    built(method, batch_of(s, t))
    fewer = batch_of(chosen(s, often, size.channel_dim), chosen(t, often, size.channel_dim))
    formula = method(fewer, FACTOR) * share(reduction, often)
    leaves = [s, *method.parameters()]
    assert_same(method(batch_of(s, t, often), FACTOR), formula, leaves)
    # Weights count by their ratios in a mean, and by themselves in a sum.
    part = 1.0 if reduction == "mean" else 0.25
    formula = method(fewer, FACTOR * part) * share(reduction, often)
    assert_same(method(batch_of(s, t, 0.25 * often), FACTOR), formula, leaves)
    # A factor that is a tensor is a factor.
    factor = torch.tensor(FACTOR * part, dtype=torch.float64)
    assert_same(method(batch_of(s, t, often), factor), formula, leaves)
    assert factor == FACTOR * part


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32])
@pytest.mark.parametrize("name", PAIRED)
def test_masks_of_every_dtype(name: str, dtype: torch.dtype) -> None:
    size = SHAPES["maps"]
    often = counts(*size.places).clamp(max=1)
    s, t = feature(size.student, often, 1, grad=True), feature(size.teacher, often, 1)
    method = built(PAIRED[name](), batch_of(s, t))
    formula = method(batch_of(chosen(s, often, 1), chosen(t, often, 1)), FACTOR)
    for mask in (often.to(dtype), often.to(dtype)[:, None]):
        assert_same(method(batch_of(s, t, mask), FACTOR), formula, [s, *method.parameters()])


@pytest.mark.parametrize("name", PAIRED)
def test_a_weight_a_sample_and_a_mean_over_tokens_for_what_has_none(name: str) -> None:
    often = torch.tensor([0, 2, 1])
    for size in (SHAPES["maps"], SHAPES["vectors"]._replace(student=(3, 3), teacher=(3, 4))):
        everywhere = often.reshape(-1, *[1] * (len(size.places) - 1)).expand(size.places)
        s, t = feature(size.student, everywhere, 1, grad=True), feature(size.teacher, everywhere, 1)
        method = built(PAIRED[name](reduction="sum"), batch_of(s, t))
        formula = method(batch_of(chosen(s, everywhere, 1), chosen(t, everywhere, 1)), FACTOR)
        leaves = [s, *method.parameters()]
        assert_same(method(batch_of(s, t, often), FACTOR), formula, leaves)
        if s.dim() == 2:
            tokens = torch.tensor([[0, 0, 0, 0], [3, 3, 0, 2], [1, 0, 2, 1]])
            assert_same(method(batch_of(s, t, tokens), FACTOR), formula, leaves)
            pixels = tokens.reshape(3, 1, 2, 2)
            assert_same(method(batch_of(s, t, pixels), FACTOR), formula, leaves)


@pytest.mark.parametrize("places", [(), (1, 1)], ids=["vectors", "1x1"])
def test_maps_and_what_has_one_position_with_a_mask_of_tokens(places: tuple[int, ...]) -> None:
    """A pair of which one side is pooled to one position weighs samples, the other side by its own positions."""
    s, t = torch.randn(3, 2, 1, 1, dtype=torch.float64), torch.randn(3, 4, 2, 2, dtype=torch.float64)
    if not places:
        s, t = s[..., 0, 0], t.mean((2, 3))
    method = built(VID({"a": "x"}, backend=BACKEND), batch_of(s, t))
    tokens = torch.tensor([[0, 0, 0, 0], [3, 3, 0, 2], [1, 0, 2, 1]])
    expected = method(batch_of(s, t, torch.tensor([0.0, 2.0, 1.0])), 1.0)
    torch.testing.assert_close(method(batch_of(s, t, tokens), 1.0), expected)
    if places:
        pixels = torch.tensor([[[0, 0], [0, 0]], [[3, 0], [0, 0]], [[0, 1], [0, 1]]])
        by_hand = torch.stack([t[0].mean((1, 2)), t[1, :, 0, 0], t[2, :, :, 1].mean(1)])[..., None, None]
        weights = torch.tensor([0.0, 0.75, 0.5])
        found = method(batch_of(s, t, pixels), 1.0)
        torch.testing.assert_close(found, method(batch_of(s, by_hand, weights), 1.0))


@pytest.mark.parametrize("larger", ["student", "teacher", "neither, but the mask"])
@pytest.mark.parametrize("name", PAIRED)
def test_pooled_values_are_weighted_means_and_weigh_what_they_are_made_of(name: str, larger: str) -> None:
    fine, coarse = (3, 2, 8, 6), (3, 2, 4, 3)
    often = counts(3, 8, 6).clamp(max=1)
    often[0, :2, :2] = often[2] = 0  # a place of the pooled map, and a sample
    blocks = often.reshape(3, 4, 2, 3, 2)
    counted = blocks.sum((2, 4))

    def pooled(x: Tensor) -> Tensor:
        cells = x.nan_to_num().reshape(3, 2, 4, 2, 3, 2) * blocks[:, None]
        return cells.sum((3, 5)) / counted[:, None].clamp(min=1)

    s = feature(fine if larger == "student" else coarse, often if larger == "student" else counted, 1, True)
    t = feature(fine if larger == "teacher" else coarse, often if larger == "teacher" else counted, 1)
    method = built(PAIRED[name](), batch_of(s, t))
    small = [pooled(x) if x.shape == fine else x for x in (s, t)]
    formula = method(batch_of(*(chosen(x, counted, 1) for x in small)), FACTOR)
    assert_same(method(batch_of(s, t, often), FACTOR), formula, [s, *method.parameters()])


REGRESSORS = {
    "from vectors": (TransposedStack(), (3, 6)),
    "from small maps": (UpsampledStack(), (3, 6, 2, 2)),
}


@pytest.mark.parametrize("regressor", REGRESSORS)
@pytest.mark.parametrize("name", ["vid", "fitnet"])
def test_a_regressor_that_changes_the_resolution(name: str, regressor: str) -> None:
    """The mask is at the teacher's positions; a student's place of which nothing counts is 0 to the regressor."""
    make, shape = REGRESSORS[regressor]
    weight = torch.rand(3, 4, 4, dtype=torch.float64) + 0.5
    weight[0, :2] = weight[1] = 0
    s, t = torch.randn(shape, dtype=torch.float64), torch.randn(3, 5, 4, 4, dtype=torch.float64)
    method = built(PAIRED[name](regressor=make), batch_of(s, t))
    places = weight.reshape(3, 2, 2, 2, 2).sum((2, 4)) if s.dim() == 4 else weight.flatten(1).sum(1)
    spoilt, zeroed = (s.masked_fill(places.unsqueeze(1) == 0, x).requires_grad_() for x in (math.nan, 0))
    residual = method.regressors[0](zeroed) - t
    each = residual.square() / 2
    if name == "vid":
        variance = (nn.functional.softplus(method.likelihoods[0].alpha) + 1e-5)[:, None, None]
        each = variance.log() / 2 + each / variance
    formula = FACTOR * (weight[:, None] * each).sum() / (5 * weight.sum())
    found = method(batch_of(spoilt, t.masked_fill(weight[:, None] == 0, math.nan), weight), FACTOR)
    torch.testing.assert_close(found, formula, rtol=1e-10, atol=1e-10)
    theirs = torch.autograd.grad(formula, [zeroed, *method.parameters()])
    gradients = torch.autograd.grad(found, [spoilt, *method.parameters()])
    expected = [theirs[0].masked_fill(places.unsqueeze(1) == 0, 0), *theirs[1:]]
    torch.testing.assert_close(list(gradients), expected, rtol=1e-10, atol=1e-10)


LOGITS = {
    "classifier": Shape((6, 4), (6, 4)),
    "segmentation": Shape((2, 4, 3, 5), (2, 4, 3, 5)),
    "language model": Shape((2, 7, 4), (2, 7, 4), -1),
}


@pytest.mark.parametrize("shape", LOGITS)
def test_kd_is_over_the_positions_that_count(shape: str) -> None:
    size = LOGITS[shape]
    often = counts(*size.places)
    s, t = (
        feature(size.student, often, size.channel_dim, True),
        feature(size.teacher, often, size.channel_dim),
    )
    method = KD(class_dim=size.channel_dim)
    formula = method(batch_of(chosen(s, often, size.channel_dim), chosen(t, often, size.channel_dim)), FACTOR)
    for mask in (often, 0.25 * often):
        assert_same(method(batch_of(s, t, mask), FACTOR), formula, [s])
    factor = torch.tensor(FACTOR, dtype=torch.float64)
    assert_same(method(batch_of(s, t, often), factor), formula, [s])


def test_kd_of_a_classifier_weighs_samples_by_their_tokens() -> None:
    often = torch.tensor([0, 2, 1])
    s, t = feature((3, 4), often, 1, True), feature((3, 4), often, 1)
    formula = KD()(batch_of(chosen(s, often, 1), chosen(t, often, 1)), FACTOR)
    tokens = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]], dtype=torch.bool)
    assert_same(KD()(batch_of(s, t, tokens), FACTOR), formula, [s])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["vid_lp", "lwf", "softened"])
def test_methods_on_last_features_weigh_samples(name: str, reduction: Any) -> None:
    often = torch.tensor([0, 2, 1, 3])
    s, t = feature((4, 3), often, 1, True), feature((4, 5), often, 1)
    methods: dict[str, Callable[[], Method]] = {
        "vid_lp": lambda: VIDLP("a", reduction=reduction, backend=BACKEND),
        "lwf": lambda: LwF("a", reduction=reduction),
        "softened": lambda: LwF("a", "softened", reduction=reduction),
    }
    method = built(methods[name](), batch_of(s, t))
    formula = method(batch_of(chosen(s, often, 1), chosen(t, often, 1)), FACTOR) * share(reduction, often)
    leaves = [s, *method.parameters()]
    assert_same(method(batch_of(s, t, often), FACTOR), formula, leaves)
    assert_same(method(batch_of(s, t, often[:, None].expand(4, 6)), FACTOR), formula, leaves)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_infomax_predicts_the_pixels_that_count(reduction: Any) -> None:
    often = counts(3, 4, 5)
    s, x = feature((3, 2, 4, 5), often, 1, True), feature((3, 3, 4, 5), often, 1)
    method = built(
        Infomax("a", regressor="conv2", backend=BACKEND, reduction=reduction), batch_of(s, s, inputs=x)
    )
    few = chosen(s, often, 1)
    formula = method(batch_of(few, few, inputs=chosen(x, often, 1)), FACTOR) * share(reduction, often)
    found = method(batch_of(s, s, often, inputs=x), FACTOR)
    assert_same(found, formula, [s, *method.parameters()])


def test_infomax_from_a_smaller_map() -> None:
    """A place of the student's whose pixels all count nothing is 0 for the decoder."""
    mask = torch.ones(2, 8, 8)
    mask[0, :4] = mask[1, 6:, 6:] = 0
    s = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    gone = mask.reshape(2, 4, 2, 4, 2).sum((2, 4))[:, None] == 0
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    method = built(Infomax("a", backend=BACKEND), batch_of(s, s, inputs=x))
    found = method(
        batch_of(s.masked_fill(gone, math.nan), s, mask, inputs=x.masked_fill(mask[:, None] == 0, math.nan)),
        1.0,
    )
    expected = method(batch_of(s.masked_fill(gone, 0), s, mask, inputs=x), 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    parameters = list(method.parameters())
    theirs = torch.autograd.grad(expected, parameters)
    torch.testing.assert_close(torch.autograd.grad(found, parameters), theirs, rtol=1e-10, atol=1e-10)


MASKED: dict[str, Callable[[], Method]] = {
    **{name: (lambda made=made: made()) for name, made in PAIRED.items()},
    "kd": KD,
    "vid_lp": lambda: VIDLP("a", backend=BACKEND),
    "lwf": lambda: LwF("a"),
    "softened": lambda: LwF("a", "softened"),
    "infomax": lambda: Infomax("a", regressor="conv2", backend=BACKEND),
}


def test_every_method_that_takes_masks_is_here() -> None:
    takes = {name for name in METHODS if METHODS[name].takes_mask}
    assert takes == set(MASKED) - {"softened"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MASKED)
def test_nothing_selected_is_0_with_zero_gradients(name: str, dtype: torch.dtype) -> None:
    nothing = torch.zeros(4, dtype=torch.bool)
    s, t = (torch.full((4, 3), math.nan, dtype=dtype) for _ in range(2))
    s.requires_grad_()
    method = MASKED[name]()
    method.build(batch_of(torch.randn(4, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype), inputs=t))
    loss = method(batch_of(s, t, nothing, inputs=t), FACTOR)
    assert loss == 0
    assert loss.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    loss.backward()
    for leaf in (s, *method.parameters()):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf.grad))


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_of_ones_is_none(name: str) -> None:
    s, t = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    method = MASKED[name]()
    method.build(batch_of(s, t, inputs=t))
    leaves = [s, *method.parameters()]
    losses = [method(batch_of(s, t, mask, inputs=t), FACTOR) for mask in (None, torch.ones(4))]
    torch.testing.assert_close(losses[0], losses[1])
    gradients = [torch.autograd.grad(loss, leaves) for loss in losses]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PAIRED)
def test_under_autocast(name: str) -> None:
    """Pooled, with NaN, in bf16: near fp32's."""
    torch.manual_seed(0)
    s, t = torch.randn(3, 4, 8, 8, requires_grad=True), torch.randn(3, 5, 4, 4)
    mask = torch.rand(3, 8, 8) > 0.3
    mask[0, :4] = False
    method = PAIRED[name]()
    method.build(batch_of(s, t))
    expected = method(batch_of(s, t, mask), 1.0)
    spoilt = s.masked_fill(~mask[:, None], math.nan)
    with torch.autocast("cpu", torch.bfloat16):
        found = method(batch_of(spoilt, t, mask), 1.0)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.01)
    for g in torch.autograd.grad(found, [s, *method.parameters()]):
        assert g.isfinite().all()


def test_a_regressor_of_ones_own_that_averages_over_positions() -> None:
    """Its positions that count nothing are 0 to it; the target is a vector, which weighs its sample."""

    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.linear(x.mean((2, 3)))
            return found

    mask = torch.tensor([[[1, 0], [0, 0]], [[0, 0], [0, 0]]], dtype=torch.bool)
    s = torch.randn(2, 2, 2, 2, dtype=torch.float64)
    t = torch.randn(2, 4, dtype=torch.float64)
    method = built(VID({"a": "x"}, regressor=lambda *_: Pool(), backend=BACKEND), batch_of(s, t))
    zeroed, spoilt = (s.masked_fill(~mask[:, None], value) for value in (0, math.nan))
    expected = method(batch_of(zeroed[:1], t[:1]), 1.0)
    t[1] = math.nan
    torch.testing.assert_close(method(batch_of(spoilt, t, mask), 1.0), expected)
