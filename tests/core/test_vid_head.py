"""vidfast.vid_head: the head as a function of its tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heads import KINDS, Ways, channel_dim, exact, features, layers, spread_alpha, tensors_of
from problems import BF16, FP16, FP32, FP64, short
from torch import Tensor, nn

import vidfast
from vidfast import vid_head
from vidfast.head import kernel, way


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(3)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The students' shapes of the heads that were computed in parts."""
    seen: list[str] = []
    run = way._in_one_pass

    def counted(stack: Any, student: Tensor, *rest: Any) -> Tensor:
        seen.append("x".join(map(str, student.shape)))
        return run(stack, student, *rest)

    monkeypatch.setattr(way, "_in_one_pass", counted)
    return seen


def checked(loss: Tensor, inputs: list[Tensor], wanted: list[Tensor], rtol: float = 2e-5) -> None:
    found = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(loss.detach().double(), wanted[0], rtol=rtol, atol=rtol)
    for x, ours, right in zip(inputs, found, wanted[1:], strict=True):
        assert (ours.shape, ours.dtype) == (x.shape, x.dtype)
        torch.testing.assert_close(ours.double(), right, rtol=rtol, atol=rtol * right.abs().max().item())


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=short)
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_formula(
    in_parts: list[str], kind: str, depth: int, dtype: torch.dtype, bias: bool
) -> None:
    """fp64 is what is computed layer by layer."""
    regressor = layers(kind, 5, *(8, 9)[: depth - 1], 6, bias=bias).to(dtype)
    alpha, dim = spread_alpha(6), channel_dim(kind)
    student, target = features(kind, 7, 5).to(dtype).requires_grad_(), features(kind, 7, 6).to(dtype)
    weights, biases = tensors_of(regressor)
    loss = vid_head(student, target, alpha, weights, biases if bias else None, channel_dim=dim)
    assert loss.dtype is dtype
    checked(loss, [student, alpha, *regressor.parameters()], exact(regressor, alpha, student, target, dim))
    assert bool(in_parts) == (dtype is FP32)


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize("weight", [1.0, -0.25])
@pytest.mark.parametrize("chosen", ["auto", "reference"])
def test_options_are_those_of_gaussian_nll(reduction: Any, weight: float, chosen: Any) -> None:
    regressor, alpha = layers("maps", 5, 8, 6), spread_alpha(6)
    student, target = features("maps", 7, 5), features("maps", 7, 6)
    options: dict[str, Any] = {"reduction": reduction, "weight": weight, "eps": 0.1}
    ours = vid_head(student, target, alpha, tensors_of(regressor)[0], backend=chosen, **options)
    torch.testing.assert_close(ours, vidfast.gaussian_nll(regressor(student), target, alpha, **options))


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2])
def test_any_dimension_is_the_channels(in_parts: list[str], dim: int) -> None:
    student, target = torch.randn(4, 5, 6, 3), torch.randn(4, 5, 6, 3)
    student, target = (x.movedim(1, dim).contiguous() for x in (student, target))
    weight, bias, alpha = torch.randn(5, 5), torch.randn(5), torch.randn(5)
    mean = torch.tensordot(student.movedim(dim, -1), weight.t(), 1) + bias
    want = vidfast.gaussian_nll(mean.movedim(-1, dim), target, alpha, channel_dim=dim)
    torch.testing.assert_close(vid_head(student, target, alpha, weight, bias, channel_dim=dim), want)
    assert len(in_parts) == 1


def test_weights_of_a_convolution_where_the_channels_are_last() -> None:
    """(out, in, 1, 1) mixes channels wherever they are."""
    convolution, alpha = nn.Conv2d(5, 6, 1), torch.randn(6)
    student, target = torch.randn(3, 4, 7, 5), torch.randn(3, 4, 7, 6)
    want = vidfast.gaussian_nll(convolution(student.movedim(-1, 1)), target.movedim(-1, 1), alpha)
    for chosen in ("auto", "reference"):
        loss = vid_head(
            student, target, alpha, convolution.weight, convolution.bias, channel_dim=-1, backend=chosen
        )
        torch.testing.assert_close(loss, want)


def test_features_that_are_slices_or_expanded(in_parts: list[str]) -> None:
    weight, alpha = torch.randn(6, 5), torch.randn(6)
    student, target = torch.randn(4, 9, 6, 8)[:, 2:7], torch.randn(8, 6, 6, 16)[::2, :, :, ::2]
    for s in (
        student,
        student[:1].expand(4, 5, 6, 8),
        student.flip(3),
        torch.randn(4, 5, 1, 1).expand(4, 5, 6, 8),
    ):
        mean = torch.einsum("oc,bchw->bohw", weight, s)
        torch.testing.assert_close(
            vid_head(s, target, alpha, weight), vidfast.gaussian_nll(mean, target, alpha)
        )
    assert len(in_parts) == 4


def test_tokens_are_cut_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single sequence is no part by itself: what lies between is not stored for the whole of it."""
    plans = Ways(monkeypatch).plans
    monkeypatch.setattr(kernel, "takes", lambda *_: False)
    weights, alpha = [torch.randn(512, 5), torch.randn(6, 512)], torch.randn(6)
    student, target = torch.randn(1, 4096, 5, requires_grad=True), torch.randn(1, 4096, 6)
    loss = vid_head(student, target, alpha, weights, channel_dim=-1)
    assert plans[0].samples <= 4096 // 10
    mean = torch.relu(student @ weights[0].t()) @ weights[1].t()
    want = vidfast.gaussian_nll(mean, target, alpha, channel_dim=-1)
    torch.testing.assert_close(loss, want)
    found, wanted = (torch.autograd.grad(x, student)[0] for x in (loss, want))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    # another layout of the target: whole sequences
    assert len(plans) == 1
    vid_head(student, target.transpose(1, 2).contiguous().transpose(1, 2), alpha, weights, channel_dim=-1)
    assert plans[1].samples == 1


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=short)
def test_the_teacher_may_have_another_type(in_parts: list[str], dtype: torch.dtype) -> None:
    weight, alpha = torch.randn(6, 5), torch.randn(6, dtype=dtype)
    student, target = torch.randn(4, 5, 6), torch.randn(4, 6, 6, dtype=dtype)
    mean = torch.einsum("oc,bcp->bop", weight, student)
    torch.testing.assert_close(
        vid_head(student, target, alpha, weight), vidfast.gaussian_nll(mean, target, alpha)
    )
    assert in_parts


def test_a_target_that_requires_grad_gets_one(in_parts: list[str]) -> None:
    weight, alpha = torch.randn(6, 5), torch.randn(6)
    student, target = torch.randn(4, 5, 6, requires_grad=True), torch.randn(4, 6, 6, requires_grad=True)
    found = torch.autograd.grad(vid_head(student, target, alpha, weight), [student, target])
    mean = torch.einsum("oc,bcp->bop", weight, student)
    wanted = torch.autograd.grad(vidfast.gaussian_nll(mean, target, alpha), [student, target])
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)
    assert not in_parts


def test_second_derivatives_by_the_reference() -> None:
    weight, alpha = torch.randn(6, 5), torch.randn(6)
    student, target = torch.randn(4, 5, 6, requires_grad=True), torch.randn(4, 6, 6)

    def first(chosen: Any) -> Tensor:
        loss = vid_head(student, target, alpha, weight, backend=chosen)
        return torch.autograd.grad(loss, student, create_graph=True)[0]

    torch.testing.assert_close(first("auto"), first("reference"))
    with pytest.raises(RuntimeError, match="first derivative"):
        first("auto").square().sum().backward()
    first("reference").square().sum().backward()
    assert student.grad is not None
    assert bool((student.grad != 0).any())


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 5, 0)])
def test_nothing_to_score(shape: tuple[int, ...]) -> None:
    student = torch.randn(shape, requires_grad=True)
    target = torch.randn(shape[0], 6, *shape[2:])
    weight, alpha = torch.randn(6, 5, requires_grad=True), torch.zeros(6, requires_grad=True)
    loss = vid_head(student, target, alpha, weight, reduction="sum")
    loss.backward()
    assert float(loss) == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    regressor, alpha = layers("tokens", 5, 8, 6, bias=True), spread_alpha(6)
    student, target = features("tokens", 8, 5), features("tokens", 8, 6)
    weights, biases = tensors_of(regressor)
    inputs = [alpha, *regressor.parameters()]
    whole = torch.autograd.grad(vid_head(student, target, alpha, weights, biases, channel_dim=-1), inputs)
    for half in (slice(0, 4), slice(4, 8)):
        loss = vid_head(student[half], target[half], alpha, weights, biases, channel_dim=-1, weight=0.5)
        loss.backward()
    for x, want in zip(inputs, whole, strict=True):
        torch.testing.assert_close(x.grad, want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_a_checkpoint(reentrant: bool) -> None:
    regressor, alpha = layers("maps", 5, 8, 6, bias=True), spread_alpha(6)
    student, target = features("maps", 4, 5).requires_grad_(), features("maps", 4, 6)
    weights, biases = tensors_of(regressor)
    inputs = [student, alpha, *regressor.parameters()]
    vid_head(student, target, alpha, weights, biases).backward()
    wanted = [x.grad for x in inputs]
    for x in inputs:
        x.grad = None
    torch.utils.checkpoint.checkpoint(
        vid_head, student, target, alpha, weights, biases, use_reentrant=reentrant
    ).backward()
    if reentrant:  # which sees no tensors in lists: only what it was given by itself
        assert torch.equal(student.grad, wanted[0])
        return
    for x, want in zip(inputs, wanted, strict=True):
        assert torch.equal(x.grad, want)


def test_a_hook_on_a_parameter_sees_its_gradient() -> None:
    weight, alpha = torch.randn(6, 5, requires_grad=True), torch.randn(6)
    weight.register_hook(lambda g: 2 * g)
    student, target = torch.randn(4, 5, 6), torch.randn(4, 6, 6)
    vid_head(student, target, alpha, weight).backward()
    mean = torch.einsum("oc,bcp->bop", weight, student)
    (want,) = torch.autograd.grad(vidfast.gaussian_nll(mean, target, alpha), weight)
    torch.testing.assert_close(weight.grad, want, rtol=1e-4, atol=1e-6)


GOOD: dict[str, Any] = {
    "student": torch.zeros(2, 5, 3),
    "target": torch.zeros(2, 6, 3),
    "alpha": torch.zeros(6),
    "weights": [torch.zeros(8, 5), torch.zeros(6, 8)],
    "biases": [None, torch.zeros(6)],
}
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "student": ({"student": 1.0}, TypeError, r"student must be a torch\.Tensor, got float"),
    "integer student": (
        {"student": torch.zeros(2, 5, 3, dtype=torch.int64)},
        TypeError,
        "student must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "positions": (
        {"student": torch.zeros(2, 5, 4)},
        ValueError,
        r"same shape but for their channels.*\(2, 5, 4\)",
    ),
    "batch": (
        {"student": torch.zeros(3, 5, 3)},
        ValueError,
        r"same shape but for their channels.*\(3, 5, 3\)",
    ),
    "axes": ({"student": torch.zeros(2, 5, 3, 1)}, ValueError, "same shape but for their channels"),
    "a vector": (
        {"student": torch.zeros(6), "target": torch.zeros(6), "channel_dim": 0},
        ValueError,
        "two or more dimensions",
    ),
    "target": ({"target": None}, TypeError, "must be a torch.Tensor, got NoneType"),
    "alpha": ({"alpha": torch.zeros(5)}, ValueError, r"alpha must have shape \(6,\)"),
    "no layer": (
        {"weights": [], "biases": None},
        ValueError,
        "weights must be one or more tensors, got none",
    ),
    "a module": (
        {"weights": [nn.Linear(5, 8), torch.zeros(6, 8)]},
        TypeError,
        r"weights\[0\] must be a torch\.Tensor, got Linear",
    ),
    "a first layer of other channels": (
        {"weights": [torch.zeros(8, 4), torch.zeros(6, 8)]},
        ValueError,
        r"weights\[0\] must be \(out, 5\).*got \(8, 4\)",
    ),
    "layers that do not meet": (
        {"weights": [torch.zeros(8, 5), torch.zeros(6, 7)]},
        ValueError,
        r"weights\[1\] must be \(out, 8\).*got \(6, 7\)",
    ),
    "another end": (
        {"weights": [torch.zeros(8, 5), torch.zeros(7, 8)], "biases": None},
        ValueError,
        r"weights\[1\] must lead to target's 6 channels, got 7",
    ),
    "a kernel of 3": (
        {"weights": [torch.zeros(8, 5, 3), torch.zeros(6, 8)]},
        ValueError,
        "of a 1x1 convolution",
    ),
    "biases": ({"biases": [None]}, ValueError, "biases must be as many as weights, 2, got 1"),
    "a bias of other channels": (
        {"biases": [None, torch.zeros(8)]},
        ValueError,
        r"biases\[1\] must be \(6,\)",
    ),
    "a bias that is a number": (
        {"biases": [0.0, None]},
        TypeError,
        r"biases\[0\] must be a torch\.Tensor or None",
    ),
    "another dtype": (
        {"weights": [torch.zeros(8, 5), torch.zeros(6, 8, dtype=BF16)]},
        TypeError,
        r"weights\[1\] must have student's dtype, torch\.float32, outside of autocast, got torch\.bfloat16",
    ),
    "another device": (
        {"weights": [torch.zeros(8, 5), torch.zeros(6, 8, device="meta")]},
        ValueError,
        r"weights\[1\] must be on student's device, cpu, got meta",
    ),
    "reduction none": ({"reduction": "none"}, ValueError, "reduction must be one of"),
    "eps": ({"eps": 0.0}, ValueError, "eps must be positive"),
    "weight": ({"weight": float("nan")}, ValueError, "weight must be finite"),
    "backend": ({"backend": "fast"}, ValueError, "backend must be one of"),
    "channel_dim": ({"channel_dim": 3}, ValueError, "channel_dim=3 is out of range"),
    "no batch": (
        {
            "student": torch.zeros(5, 3),
            "target": torch.zeros(6, 3),
            "channel_dim": 0,
            "reduction": "batchmean",
        },
        ValueError,
        "needs a batch in dimension 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changed, kind, text = BAD[name]
    vid_head(**GOOD)
    with pytest.raises(kind, match=text):
        vid_head(**{**GOOD, **changed})


def test_types_may_differ_under_autocast(in_parts: list[str]) -> None:
    weights = [GOOD["weights"][0].to(BF16), GOOD["weights"][1]]
    with torch.autocast("cpu", BF16):
        vid_head(**{**GOOD, "weights": weights})
    assert in_parts
    with torch.autocast("cpu", BF16), pytest.raises(TypeError, match="dtype"):
        vid_head(**{**GOOD, "weights": [weights[0].double(), weights[1]]})


def test_a_parameter_list_is_a_list() -> None:
    weights = nn.ParameterList([torch.randn(8, 5), torch.randn(6, 8)])
    biases = nn.ParameterList([torch.randn(8), torch.randn(6)])
    student, target, alpha = torch.randn(3, 5, 4), torch.randn(3, 6, 4), torch.zeros(6)
    loss = vid_head(student, target, alpha, weights, biases)
    assert torch.equal(loss, vid_head(student, target, alpha, [*weights], [*biases]))


def test_why_nothing_is_computed_in_one_pass_of_no_element(caplog: pytest.LogCaptureFixture) -> None:
    way._logged.clear()
    with caplog.at_level("DEBUG", logger="vidfast"):
        vid_head(torch.randn(0, 5, 4), torch.randn(0, 6, 4), torch.zeros(6), torch.randn(6, 5))
        vid_head(torch.randn(2, 5, 4), torch.randn(2, 6, 4), torch.zeros(6), torch.randn(6, 5))
        vid_head(torch.randn(2, 5, 4), torch.randn(2, 6, 4), torch.zeros(6), torch.randn(6, 5))
    said = [record.message for record in caplog.records if "regressor" in record.message]
    assert said == [
        "a regressor is computed layer by layer: there is no element",
        "a regressor and its loss are computed in one pass, by the back end cpu",
    ]
