"""ITRD against its formulas in loops of plain Python, and where they would be undefined."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from method_checks import assert_equals_formula, assert_finite_gradients, batch_of, built, gradcheck
from small_networks import SmallNet
from torch import Tensor

from vidfast.distill import ITRD, METHODS, Distiller

EPS = 1e-6


def features(batch: int = 6, dtype: torch.dtype = torch.float64, width: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, width, dtype=dtype).requires_grad_(), torch.randn(batch, 5, dtype=dtype)


def correlation(z: Tensor, t: Tensor, alpha: float) -> Tensor:
    """log2 of the sum over dimensions of |C_d - 1|^(2 alpha), dimension by dimension."""
    total = torch.zeros((), dtype=z.dtype)
    for d in range(z.shape[1]):
        columns = [
            (x[:, d] - sum(x[:, d]) / len(x)) / torch.sqrt(torch.var(x[:, d], unbiased=True) + EPS)
            for x in (z, t)
        ]
        c = sum(a * b for a, b in zip(*columns, strict=True)) / len(z)
        total = total + torch.exp(2 * alpha * torch.log(torch.abs(c - 1)))
    return torch.log(total) / math.log(2)


def mutual_information(z: Tensor, t: Tensor) -> Tensor:
    """||G_s||^2 - ||G_st||^2, entry by entry."""
    n = len(z)

    def entry(x: Tensor, i: int, j: int) -> Tensor:
        lengths = torch.sqrt(torch.dot(x[i], x[i]) + EPS) * torch.sqrt(torch.dot(x[j], x[j]) + EPS)
        return torch.dot(x[i], x[j]) / lengths

    s = [[entry(z, i, j) for j in range(n)] for i in range(n)]
    both = [[entry(z, i, j) * entry(t, i, j) for j in range(n)] for i in range(n)]
    trace_s, trace_both = (sum(g[i][i] for i in range(n)) + EPS for g in (s, both))
    total = torch.zeros((), dtype=z.dtype)
    for i in range(n):
        for j in range(n):
            total = total + (s[i][j] / trace_s) ** 2 - (both[i][j] / trace_both) ** 2
    return total


@pytest.mark.parametrize("weights", [(2.0, 1.0), (0.0, 0.7), (1.5, 0.0)])
@pytest.mark.parametrize("alpha", [0.8, 1.01, 1.5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [3, 5])
def test_equals_the_formula(weights: tuple[float, float], alpha: float, bias: bool, width: int) -> None:
    """As the authors' code: the student's own features inform where the widths are equal, the embedded ones else."""
    s, t = features(width=width)
    batch = batch_of({"pool": s}, {"fc": t})
    method = built(ITRD({"pool": "fc"}, l_corr=weights[0], l_mi=weights[1], alpha=alpha, bias=bias), batch)
    z = s
    if weights[0] or width != 5:
        linear = method.embeddings[0]
        z = s @ linear.weight.T + (linear.bias if bias else 0.0)
    information = mutual_information(s if width == 5 else z, t)
    formula = weights[0] * correlation(z, t, alpha) + weights[1] * information
    if weights[0] and width == 5 and bias:
        formula = formula + 0.0 * linear.bias.sum()  # standardising takes it away
    assert_equals_formula(method, batch, 1.7, 1.7 * formula)


@pytest.mark.parametrize("weights", [(2.0, 1.0), (0.0, 0.7), (1.5, 0.0)])
@pytest.mark.parametrize("width", [3, 5])
@pytest.mark.parametrize("embed", [True, False])
def test_information_is_of_the_embedded_student_or_of_its_own_features(
    weights: tuple[float, float], width: int, embed: bool
) -> None:
    s, t = features(width=width)
    batch = batch_of({"pool": s}, {"fc": t})
    method = built(
        ITRD({"pool": "fc"}, l_corr=weights[0], l_mi=weights[1], embed_information=embed, bias=False), batch
    )
    learns = weights[0] > 0 or embed
    z = s @ method.embeddings[0].weight.T if learns else s
    formula = weights[0] * correlation(z, t, 1.01) + weights[1] * mutual_information(z if embed else s, t)
    assert_equals_formula(method, batch, 1.7, 1.7 * formula)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("embed", [None, True, False])
@pytest.mark.parametrize("width", [3, 5])
def test_every_parameter_gets_a_gradient(
    weights: tuple[float, float], embed: bool | None, width: int
) -> None:
    """DistributedDataParallel waits for the gradient of every parameter that it was given."""
    s, t = features(width=width)
    batch = batch_of({"pool": s}, {"fc": t})
    method = built(ITRD({"pool": "fc"}, l_corr=weights[0], l_mi=weights[1], embed_information=embed), batch)
    method(batch, 1.0).backward()
    assert all(p.grad is not None for p in method.parameters())
    embedded = weights[0] > 0 or embed is True or (embed is None and width != 5)
    assert bool(list(method.parameters())) is embedded
    assert s.grad is not None


def test_what_a_run_was_tells_the_options_apart() -> None:
    """Resuming compares them."""
    seen = {repr(ITRD({"pool": "fc"}, embed_information=embed)) for embed in (None, True, False)}
    seen |= {repr(ITRD({"pool": "fc"}, **{name: 0.75})) for name in ("l_corr", "l_mi", "alpha", "eps")}
    seen |= {repr(ITRD({"pool": "fc"}, bias=False))}
    assert len(seen) == 8


def test_the_defaults_are_the_published_example() -> None:
    method = ITRD({"pool": "fc"})
    assert (method.l_corr, method.l_mi, method.alpha) == (2.0, 1.0, 1.01)
    assert METHODS["itrd"] is ITRD


@pytest.mark.parametrize("weights", [(2.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("width", [3, 5])
def test_gradcheck(weights: tuple[float, float], width: int) -> None:
    s, t = features(width=width)
    batch = batch_of({"pool": s}, {"fc": t})
    assert gradcheck(built(ITRD({"pool": "fc"}, l_corr=weights[0], l_mi=weights[1]), batch), batch)


def test_maps_are_averaged_over_positions_and_pairs_are_summed() -> None:
    s, t = features()
    maps = {"a": s[:, :, None, None] + torch.tensor([-1.0, 0.5, 0.5]).double(), "b": s}
    batch = batch_of(maps, {"x": t[:, :, None] + torch.tensor([-2.0, 2.0]).double(), "y": t})
    method = built(ITRD({"a": "x", "b": "y"}, channel_dim=1), batch)
    expected = torch.zeros((), dtype=torch.float64)
    for linear in method.embeddings:
        expected = expected + 2 * correlation(linear(s), t, 1.01) + mutual_information(linear(s), t)
    torch.testing.assert_close(method(batch, 1.0), expected, rtol=1e-10, atol=1e-10)


def identity(method: ITRD) -> None:
    with torch.no_grad():
        method.embeddings[0].weight.copy_(torch.eye(5))
        method.embeddings[0].bias.zero_()


@pytest.mark.parametrize("size", [2, 64, 4096])
@pytest.mark.parametrize("alpha", [0.51, 1.01, 4.0])
@pytest.mark.parametrize("level", [0.0, 1e3])
def test_perfect_correlation_is_finite(size: int, alpha: float, level: float) -> None:
    """The unbiased variance keeps C_d below 1 - 1/B, so the logarithm never sees 0."""
    t = torch.randn(size, 5) + level
    s = t.clone().requires_grad_()
    batch = batch_of({"pool": s}, {"fc": t})
    method = ITRD({"pool": "fc"}, l_mi=0.0, alpha=alpha)
    method.build(batch)
    identity(method)
    loss = method(batch, 1.0)
    expected = 2 * math.log2(5 * size ** (-2 * alpha))
    assert float(loss.detach()) == pytest.approx(expected, rel=0.01)
    assert_finite_gradients(method, loss, s)


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_constant_channels_are_finite(which: str, value: float) -> None:
    s, t = torch.randn(8, 5), torch.randn(8, 5)
    if which != "teacher":
        s[:, 1] = value
    if which != "student":
        t[:, 1] = value
    s.requires_grad_()
    batch = batch_of({"pool": s}, {"fc": t})
    method = ITRD({"pool": "fc"})
    method.build(batch)
    identity(method)
    assert_finite_gradients(method, method(batch, 1.0), s)
    only = ITRD({"pool": "fc"}, l_mi=0.0, l_corr=1.0)
    only.build(batch)
    identity(only)
    kept = [0, 2, 3, 4]
    rest = correlation(s[:, kept].detach().double(), t[:, kept].double(), 1.01)
    # The constant channel's correlation is 0, and it adds |0 - 1|.
    assert float(only(batch, 1.0).detach()) == pytest.approx(float(torch.log2(2**rest + 1)), abs=1e-4)


@pytest.mark.parametrize("which", ["all", "one"])
def test_rows_of_zeros_are_finite(which: str) -> None:
    """A ReLU that is dead for an image, or for all of them."""
    s, t = torch.randn(8, 5), torch.randn(8, 5)
    rows = slice(None) if which == "all" else slice(0, 1)
    s[rows] = 0
    t[rows] = 0
    s.requires_grad_()
    batch = batch_of({"pool": s}, {"fc": t})
    method = ITRD({"pool": "fc"})
    method.build(batch)
    identity(method)
    loss = method(batch, 1.0)
    assert_finite_gradients(method, loss, s)
    assert max(float(g.abs().max()) for g in torch.autograd.grad(method(batch, 1.0), [s])) < 1e4


def test_large_features_in_half_precision_do_not_overflow() -> None:
    s = (torch.randn(8, 5) * 1e3).half().requires_grad_()
    t = (torch.randn(8, 5) * 1e4).half()
    batch = batch_of({"pool": s}, {"fc": t})
    method = ITRD({"pool": "fc"})
    method.build(batch)
    assert_finite_gradients(method, method(batch, 1.0), s)


def test_under_autocast_only_the_embedding_is_in_bf16() -> None:
    s, t = torch.randn(16, 5), torch.randn(16, 5)
    batch = batch_of({"pool": s}, {"fc": t})
    method = ITRD({"pool": "fc"})
    method.build(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(batch, 1.0)
        z = method.embeddings[0](s)
    assert z.dtype is torch.bfloat16
    assert loss.dtype is torch.float32
    # Of one width, the student's own features inform, in fp32.
    exact = 2 * correlation(z.double(), t.double(), 1.01) + mutual_information(s.double(), t.double())
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), abs=1e-5)


def test_through_a_distiller() -> None:
    teacher = SmallNet(6)
    distiller = Distiller(
        SmallNet(4), teacher, [ITRD({"second": "second"}, weight=0.5)], example=torch.randn(2, 1, 8, 8)
    )
    groups = {g["name"]: g for g in distiller.parameter_groups(lr=0.1)}
    assert [p.shape for p in groups["itrd"]["params"]] == [(12, 8), (12,)]
    images, losses = torch.randn(8, 1, 8, 8), []
    optimizer = torch.optim.Adam(distiller.parameter_groups(lr=0.01))
    for _ in range(25):
        losses.append(distiller(images).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1.0
    assert all(p.grad is None for p in teacher.parameters())
    torch.testing.assert_close(distiller(images, scale=0.5).loss, 0.5 * distiller(images).loss)


def test_a_batch_of_one_is_refused() -> None:
    """But not as the probe, whose shapes alone are looked at."""
    s, t = features(1)
    method = ITRD({"pool": "fc"})
    batch = batch_of({"pool": s}, {"fc": t})
    method.build(batch)
    with pytest.raises(ValueError, match=r"pair 'pool' -> 'fc': wanted a batch of 2 or more .* got 1 and 1"):
        method(batch, 1.0)
    with pytest.raises(ValueError, match="got 2 and 3"):
        method(batch_of({"pool": features(2)[0]}, {"fc": features(3)[1]}), 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": {}}, "at least one pair"),
        ({"l_corr": -1.0}, "l_corr of 0 or more"),
        ({"l_mi": float("nan")}, "finite l_mi"),
        ({"l_corr": 0.0, "l_mi": 0.0}, "got 0 for both"),
        ({"alpha": 0.5}, "alpha above 0.5"),
        ({"alpha": float("inf")}, "finite alpha"),
        ({"eps": 0.0}, "eps above 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ITRD(**{"pairs": {"pool": "fc"}, **options})


@pytest.mark.parametrize("value", [1, 0.0, "auto"])
def test_embed_information_is_a_flag_or_none(value: Any) -> None:
    with pytest.raises(TypeError, match="wanted embed_information as True, False or None, got"):
        ITRD({"pool": "fc"}, embed_information=value)
