"""KD of large logits in parts: the formula and its gradient, no copy of all logits in fp32; and labels ignored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidfast.distill import KD, Activations, Batch, Distiller, divergence

SHAPES = {
    "tokens": ((3, 5, 11), 2),
    "tokens, classes first": ((3, 11, 5), 1),
    "map": ((3, 7, 4, 5), 1),
    "map, classes last": ((3, 4, 5, 7), 3),
    "one sample": ((1, 9, 11), 2),
    "vectors": ((6, 11), 1),
    "volume": ((2, 5, 2, 3, 4), 1),
}


def batch_of(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
) -> Batch:
    return Batch(None, labels, Activations({}, student), Activations({}, teacher), mask)


def formula(
    student: Tensor, teacher: Tensor, dim: int, temperature: float, weights: Tensor | None = None
) -> Tensor:
    s, t = (z.double().movedim(dim, -1).flatten(0, -2) / temperature for z in (student, teacher))
    if weights is not None:
        flat = weights.flatten().double()
        s, t, flat = s[flat != 0], t[flat != 0], flat[flat != 0]
    values = (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1)
    return temperature**2 * (values.mean() if weights is None else (values * flat).sum() / flat.sum())


@pytest.mark.parametrize("part", [1, 13, 40, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_are_the_whole(shape: str, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "PART", part)
    size, dim = SHAPES[shape]
    s, t = (
        torch.randn(size, dtype=torch.float64, requires_grad=True),
        3 * torch.randn(size, dtype=torch.float64),
    )
    for weights in (None, torch.randint(0, 3, [n for d, n in enumerate(size) if d != dim])):
        if weights is not None:
            weights.view(-1)[:2] = torch.tensor([0, 2])
        kd = KD(2.5, class_dim=dim)
        found, expected = kd(batch_of(s, t, mask=weights), 1.7), 1.7 * formula(s, t, dim, 2.5, weights)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        gradients = (torch.autograd.grad(x, s)[0] for x in (found, expected))
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_gradcheck_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "PART", 12)
    teacher, weights = (
        torch.randn(2, 3, 4, dtype=torch.float64),
        torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 1.0]]),
    )
    student = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: KD(class_dim=-1)(batch_of(z, teacher, mask=weights), 1.0), student
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_in_any_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gradient is rounded once, after the incoming gradient: a loss scaler keeps fp16 from underflow."""
    monkeypatch.setattr(divergence, "PART", 64)
    s, t = torch.randn(4, 8, 32).to(dtype).requires_grad_(), torch.randn(4, 8, 32).to(dtype)
    loss = KD(1.0, class_dim=-1)(batch_of(s, t), 1e-4)
    assert loss.dtype == torch.float32
    scale = 2.0**16
    (gradient,) = torch.autograd.grad(loss * scale, s)
    x = s.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(formula(x, t, 2, 1.0) * 1e-4 * scale, x)
    assert gradient.dtype == dtype
    bound = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(gradient.double(), expected, rtol=bound, atol=1e-6)
    assert (gradient != 0).all()


class Largest(TorchDispatchMode):
    """The most elements of a floating-point tensor in fp32 or wider that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.is_floating_point() and x.element_size() >= 4:
                self.found = max(self.found, x.numel())
        return out


@pytest.mark.parametrize("masked", [False, True])
def test_no_copy_of_all_logits_in_fp32_is_made(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    monkeypatch.setattr(divergence, "PART", 512)
    s, t = torch.randn(8, 16, 100).bfloat16().requires_grad_(), torch.randn(8, 16, 100).bfloat16()
    mask = torch.rand(8, 16) if masked else None
    with Largest() as seen:
        KD(class_dim=-1)(batch_of(s, t, mask=mask), 1.0).backward()
    assert 0 < seen.found <= 512
    monkeypatch.setattr(divergence, "PART", s.numel())
    with Largest() as seen:
        KD(class_dim=-1)(batch_of(s, t, mask=mask), 1.0).backward()
    assert seen.found == s.numel()  # what is looked for is seen


def test_second_derivatives_are_there_in_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """And never silently 0: an incoming gradient that needs none itself is the usual one."""
    s, t = (
        torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 3, 4, dtype=torch.float64),
    )
    weights = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 1.0]])
    found = []
    for part in (100, 4):
        monkeypatch.setattr(divergence, "PART", part)
        loss = KD(class_dim=-1)(batch_of(s, t, mask=weights), 1.0)
        (gradient,) = torch.autograd.grad(loss, s, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), s)[0])
    torch.testing.assert_close(*found)
    assert found[0].abs().max() > 1e-6
    assert torch.autograd.gradgradcheck(lambda z: KD(class_dim=-1)(batch_of(z, t, mask=weights), 1.0), s)


def test_a_compiled_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "PART", 64)
    torch._dynamo.reset()
    student, teacher = (nn.Sequential(nn.Embedding(30, d), nn.Linear(d, 30)) for d in (4, 8))
    ids = torch.randint(0, 30, (3, 7))
    distiller = Distiller(student, teacher, [KD(class_dim=-1)], example=ids)
    expected = distiller(ids).loss
    found = torch.compile(distiller, backend="eager", fullgraph=True)(ids).loss
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("part", [8, 10_000])
@pytest.mark.parametrize(
    ("shape", "class_dim", "ignored"), [((4, 6, 9), -1, -100), ((3, 5, 4, 6), None, 255), ((8, 5), None, 2)]
)
def test_ignored_labels_are_left_out(
    shape: tuple[int, ...], class_dim: int | None, ignored: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN where a label is ignored, in both logits."""
    monkeypatch.setattr(divergence, "PART", part)
    dim = 1 if class_dim is None else class_dim % len(shape)
    labels = torch.randint(0, 2, [n for d, n in enumerate(shape) if d != dim])
    labels.view(-1)[::3] = ignored
    s, t = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    s, t = (z.masked_fill((labels == ignored).unsqueeze(dim), math.nan) for z in (s, t))
    s.requires_grad_()
    kd = KD(3.0, class_dim=class_dim, ignore_index=ignored)
    expected = formula(s, t, dim, 3.0, labels != ignored)
    found = kd(batch_of(s, t, labels), 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(found, s)
    assert gradient.isfinite().all()
    assert not gradient.movedim(dim, -1)[labels == ignored].any()
    # as well as what a mask leaves out
    mask = torch.rand(labels.shape)
    both = kd(batch_of(s, t, labels, mask), 1.0)
    torch.testing.assert_close(both, formula(s, t, dim, 3.0, mask.double() * (labels != ignored)))
    # nothing counts: 0 with zero gradients
    none = kd(batch_of(s, t, torch.full_like(labels, ignored)), 1.0)
    (gradient,) = torch.autograd.grad(none, s)
    assert none == 0
    assert not gradient.any()


def test_a_batch_without_labels_counts_whole() -> None:
    s, t = torch.randn(4, 5), torch.randn(4, 5)
    assert torch.equal(KD(ignore_index=0)(batch_of(s, t), 1.0), KD()(batch_of(s, t), 1.0))


def test_labels_that_do_not_fit_are_refused() -> None:
    s, t = torch.randn(4, 6, 9), torch.randn(4, 6, 9)
    for labels in (torch.zeros(4, 9).long(), torch.zeros(4).long(), torch.zeros(4, 6)):
        with pytest.raises(ValueError, match=r"wanted labels \(4, 6\) of classes.*ignore_index=-100.*mask="):
            KD(class_dim=-1, ignore_index=-100)(batch_of(s, t, labels), 1.0)
    with pytest.raises(TypeError, match="wanted ignore_index as a whole number, or None"):
        KD(ignore_index=1.5)  # type: ignore[arg-type]
    assert "ignore_index=255" in repr(KD(ignore_index=255))


def test_a_language_model_with_padding_and_shifted_labels() -> None:
    """What a loop computes by hand over the tokens that count."""
    student, teacher = (nn.Sequential(nn.Embedding(30, d), nn.Linear(d, 30)) for d in (4, 8))
    ids = torch.randint(0, 30, (3, 7))
    labels = ids.roll(-1, 1)
    labels[:, -1] = labels[1, 4:] = -100

    def task(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    kd = KD(2.0, class_dim=-1, ignore_index=-100, weight=1.0)
    losses = Distiller(student, teacher, [kd], example=ids, task_loss=task)(ids, labels)
    kept = labels != -100
    with torch.no_grad():
        expected = formula(student(ids)[kept], teacher(ids)[kept], 1, 2.0)
    torch.testing.assert_close(losses.terms["kd"], expected.float())
