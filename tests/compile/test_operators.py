"""The torch.library operators by themselves: schemas, fake kernels, strides, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import vidfast
from vidfast import backends, ops, primitive_ops

FORWARD = torch.ops.vidfast.gaussian_nll_two_pass_v2.default
ONE_PASS = torch.ops.vidfast.gaussian_nll_one_pass_v2.default
FORWARD_GRAD = torch.ops.vidfast.gaussian_nll_forward_grad.default
BACKWARD = torch.ops.vidfast.gaussian_nll_backward.default
SCALE = torch.ops.vidfast.scale.default
SCALE_ = torch.ops.vidfast.scale_.default

# How mean may lie in memory; a size of 1 leaves its stride to whoever allocates.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "batch_slice": lambda x: torch.cat([x, x])[::2],
    "channel_slice": lambda x: torch.cat([x, x], 1)[:, 1 : 1 + x.shape[1]],
    "spatial_slice": lambda x: torch.cat([x, x], 3)[..., 1 : 1 + x.shape[3]],
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "expanded": lambda x: x[:1].expand(x.shape),
}
SHAPES = ((3, 6, 5, 4), (1, 6, 5, 4), (3, 1, 5, 4), (3, 6, 1, 1))


def problem(
    shape: tuple[int, ...],
    layout: str = "contiguous",
    mean: torch.dtype = torch.float32,
    target: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    lay = LAYOUTS[layout]
    return (
        lay(torch.randn(shape).to(mean)),
        lay(torch.randn(shape).to(target or mean)),
        torch.randn(shape[1]),
    )


def options(reduction: str = "mean", full: bool = False, weight: float = 1.0) -> tuple[object, ...]:
    return 1, 1e-5, reduction, full, weight, "auto"


@pytest.mark.parametrize(
    "needs", [(False, False, False), (True, False, True), (False, False, True), (True, True, True)]
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channel_slice"])
def test_opcheck_forward(layout: str, needs: tuple[bool, bool, bool]) -> None:
    tensors = [x.requires_grad_(n) for x, n in zip(problem((3, 6, 5, 4), layout), needs, strict=True)]
    torch.library.opcheck(FORWARD, (*tensors, *options(full=True)))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.float64)])
@pytest.mark.parametrize("reduction", ["sum", "batchmean"])
def test_opcheck_dtypes_and_reductions(dtypes: tuple[torch.dtype, torch.dtype], reduction: str) -> None:
    mean, target, alpha = problem((3, 6, 5, 4), "contiguous", *dtypes)
    arguments = (mean.requires_grad_(), target, alpha.requires_grad_(), *options(reduction, weight=0.3))
    torch.library.opcheck(FORWARD, arguments)


@pytest.mark.parametrize("factor", [None, 0.3])
@pytest.mark.parametrize("needs", [(False, False), (True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channel_slice"])
def test_opcheck_one_pass(layout: str, needs: tuple[bool, bool], factor: float | None) -> None:
    mean, target, alpha = problem((3, 6, 5, 4), layout, torch.bfloat16, torch.float32)
    tensors = mean.requires_grad_(needs[0]), target, alpha.requires_grad_(needs[1])
    number = None if factor is None else torch.tensor(factor, dtype=torch.float64)
    torch.library.opcheck(ONE_PASS, (*tensors, number, *options("batchmean", full=True, weight=0.5)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channel_slice"])
def test_opcheck_primitives(layout: str) -> None:
    mean, target, alpha = problem((3, 6, 5, 4), layout)
    torch.library.opcheck(torch.ops.vidfast.gaussian_nll_forward.default, (mean, target, alpha, *options()))
    torch.library.opcheck(FORWARD_GRAD, (mean, target, alpha, None, *options()))
    for grad_alpha in (None, torch.randn(6, dtype=torch.float64)):
        arguments = (torch.tensor(2.5), grad_alpha, -3, torch.float16, "auto")
        torch.library.opcheck(SCALE, (mean, *arguments))
        torch.library.opcheck(SCALE_, (mean, *arguments))


@pytest.mark.parametrize("want", [(True, True, True), (False, True, False), (False, False, True)])
def test_opcheck_backward(want: tuple[bool, bool, bool]) -> None:
    mean, target, alpha = problem((3, 6, 5, 4), "channels_last")
    _, sum_sq = FORWARD(mean, target, alpha, *options())
    saved = (mean, target) if want[0] or want[1] else (None, None)
    arguments = (torch.tensor(2.5), *saved, alpha, sum_sq, mean.shape, *options(), *want)
    torch.library.opcheck(BACKWARD, arguments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_strides_equal_the_real_ones(layout: str, shape: tuple[int, ...]) -> None:
    mean, target, alpha = problem(shape, layout, torch.bfloat16, torch.float32)
    g, want = torch.tensor(1.0), (True, True, True)
    loss, sum_sq = FORWARD(mean, target, alpha, *options())
    real = [loss, sum_sq, *BACKWARD(g, mean, target, alpha, sum_sq, mean.shape, *options(), *want)]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        m, t, a = (mode.from_tensor(x) for x in (mean, target, alpha))
        loss, sum_sq = FORWARD(m, t, a, *options())
        fake = [loss, sum_sq, *BACKWARD(mode.from_tensor(g), m, t, a, sum_sq, m.shape, *options(), *want)]
        made = FORWARD_GRAD(m, t, a, None, *options())
        fake += [*made, *SCALE(made[1], mode.from_tensor(g), made[2], 1, torch.bfloat16, "auto")]
        fake += SCALE(m, mode.from_tensor(g), None, 1, torch.bfloat16, "auto")
    made = FORWARD_GRAD(mean, target, alpha, None, *options())
    real += [*made, *SCALE(made[1], g, made[2], 1, torch.bfloat16, "auto")]
    real += SCALE(mean, g, None, 1, torch.bfloat16, "auto")
    for x, y in zip(real, fake, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_the_operator_equals_the_eager_path(
    strategy: Any, reduction: Any, layout: str, shape: tuple[int, ...]
) -> None:
    mean, target, alpha = problem(shape, layout)
    found = []
    for by_operator in (True, False):
        m, t, a = (x.detach().clone().requires_grad_() for x in (mean, target, alpha))
        t.requires_grad_(strategy == "two_pass")
        # views carry the layout, leaves take the gradients
        given = (LAYOUTS[layout](m), LAYOUTS[layout](t), a)
        if not by_operator:
            loss = vidfast.gaussian_nll(
                *given, reduction=reduction, full=True, weight=-0.4, strategy=strategy
            )
        elif strategy == "one_pass":
            factor = torch.tensor(-0.2, dtype=torch.float64)
            loss = ONE_PASS(*given, factor, *options(reduction, full=True, weight=2.0))[0]
        else:
            loss = FORWARD(*given, *options(reduction, full=True, weight=-0.4))[0]
        wanted = [x for x in (m, t, a) if x.requires_grad]
        found.append((loss.detach(), *torch.autograd.grad(loss * 3, wanted)))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_the_sums_of_squares_are_not_differentiable() -> None:
    mean, target, alpha = problem((3, 6, 5, 4))
    loss, sum_sq = FORWARD(mean.requires_grad_(), target, alpha.requires_grad_(), *options())
    assert loss.requires_grad
    assert not sum_sq.requires_grad
    loss, *made = ONE_PASS(mean, target, alpha, None, *options())
    assert loss.requires_grad
    assert not any(x.requires_grad for x in made)


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_a_graph_that_is_kept_gives_the_same_numbers_again(strategy: str) -> None:
    mean, target, alpha = problem((3, 6, 5, 4))
    leaves = mean.requires_grad_(), alpha.requires_grad_()
    given = (mean, target, alpha, *((None,) if strategy == "one_pass" else ()), *options())
    loss = (ONE_PASS if strategy == "one_pass" else FORWARD)(*given)[0]
    first, second, third = (torch.autograd.grad(loss * f, leaves, retain_graph=True) for f in (3, 3, 1))
    for x, y, z in zip(first, second, third, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, 3 * z, rtol=1e-6, atol=0)


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_a_second_derivative_is_refused_and_not_zero(strategy: str) -> None:
    mean, target, alpha = problem((3, 6, 5, 4))
    leaves = mean.requires_grad_(), alpha.requires_grad_()
    given = (mean, target, alpha, *((None,) if strategy == "one_pass" else ()), *options())
    loss = (ONE_PASS if strategy == "one_pass" else FORWARD)(*given)[0]
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"only first derivatives: .* use backend='reference'"):
        torch.autograd.grad(grads[0].square().sum() + grads[1].sum(), leaves)


def test_what_one_pass_has_no_gradient_for_is_refused() -> None:
    mean, target, alpha = problem((3, 6, 5, 4))
    number = torch.ones((), dtype=torch.float64)
    for given in (
        (mean, target.clone().requires_grad_(), alpha.requires_grad_(), number),
        (mean, target, alpha, number.clone().requires_grad_()),
    ):
        with pytest.raises(ValueError, match="must not require grad in one pass"):
            ONE_PASS(*given, *options())
    for factor in (torch.ones(2), torch.ones((), dtype=torch.int64)):
        with pytest.raises(ValueError, match="factor must be one floating number on the CPU, got"):
            ONE_PASS(mean, target, alpha, factor, *options())
    with pytest.raises(ValueError, match="weight must be finite"):
        ONE_PASS(mean, target, alpha, torch.tensor(float("nan")), *options())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scaling_in_place_equals_scaling(layout: str) -> None:
    """Strides that no kernel walks are scaled too, and the caller's autograd hears of it."""
    grad, _, _ = problem((3, 6, 5, 4), layout)
    grad = grad.clone() if layout == "expanded" else grad  # nothing may write over that
    of_alpha, g = torch.randn(6, dtype=torch.float64), torch.tensor(-1.5)
    want = SCALE(grad, g, of_alpha, 1, torch.float32, "auto")
    torch.testing.assert_close(want[0], grad * g)
    version = grad._version
    found = SCALE_(grad, g, of_alpha, 1, torch.float32, "auto")
    assert torch.equal(grad, want[0])
    assert torch.equal(found, want[1])
    assert grad._version > version


def test_what_scaling_is_given_by_hand_has_to_fit() -> None:
    grad, g = torch.randn(3, 6), torch.ones(())
    for wrong, error, text in (
        ((grad.long(), g, None, 1, torch.float32, "auto"), TypeError, "grad must be"),
        ((grad, g, None, 2, torch.float32, "auto"), ValueError, "channel must be"),
        ((grad, g, None, 1, torch.int32, "auto"), TypeError, "alpha_dtype must be"),
        ((grad, torch.ones(2), None, 1, torch.float32, "auto"), RuntimeError, "g must be"),
        ((grad, g, torch.ones(6), 1, torch.float32, "auto"), RuntimeError, "grad_alpha must be"),
        ((grad, g, None, 1, torch.float32, "no such"), ValueError, "backend must be"),
    ):
        for operator in (SCALE, SCALE_):
            with pytest.raises(error, match=text):
                operator(*wrong)


def test_alpha_alone_keeps_no_activation() -> None:
    mean, target, alpha = problem((3, 6, 5, 4))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        FORWARD(mean, target, alpha.requires_grad_(), *options())
    assert max(kept) == 6


@pytest.mark.parametrize("want", [(True, True, True), (True, False, False), (False, False, True)])
def test_where_no_kernel_runs_the_reference_serves(
    monkeypatch: pytest.MonkeyPatch, want: tuple[bool, bool, bool]
) -> None:
    mean, target, alpha = problem((3, 6, 5, 4))
    g = torch.tensor(-2.0)
    found = []
    for choose in (backends.choose, lambda *_: backends.PLAIN):
        monkeypatch.setattr(primitive_ops.backends, "choose", choose)
        loss, sum_sq = FORWARD(mean, target, alpha, *options(full=True))
        saved = (mean, target) if want[0] or want[1] else (None, None)
        grads = BACKWARD(g, *saved, alpha, sum_sq, mean.shape, *options(full=True), *want)
        assert len(grads) == sum(want)
        made = ONE_PASS(mean, target, alpha, None, *options(full=True))
        scaled = SCALE(made[1], g, made[2], 1, torch.float32, "auto")
        found.append((loss, sum_sq, *grads, *made, *scaled))
    for x, y in zip(*found, strict=True):
        assert (x.dtype, x.stride()) == (y.dtype, y.stride())
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("option", "value"), [("eps", 0.0), ("eps", float("nan")), ("weight", float("inf"))])
def test_numbers_are_checked_when_the_operator_runs(option: str, value: float) -> None:
    given = {
        "channel_dim": 1,
        "eps": 1e-5,
        "reduction": "mean",
        "full": False,
        "weight": 1.0,
        "backend": "auto",
    }
    with pytest.raises(ValueError, match=option):
        FORWARD(*problem((3, 6, 5, 4)), *(given | {option: value}).values())


@pytest.mark.parametrize("backend", ["cpu", "auto", "reference"])
@pytest.mark.parametrize("reduction", ["none", "median"])
def test_a_reduction_to_no_scalar_is_refused(reduction: str, backend: str) -> None:
    mean, target, alpha = problem((3, 6, 5, 4))
    given = (1, 1e-5, reduction, False, 1.0, backend)
    with pytest.raises(ValueError, match=f"reduction must be one of .*, got '{reduction}'"):
        FORWARD(mean, target, alpha, *given)
    sum_sq = torch.zeros(6, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"reduction must be one of .*, got '{reduction}'"):
        BACKWARD(torch.tensor(1.0), mean, target, alpha, sum_sq, mean.shape, *given, True, True, True)


def test_what_backward_is_given_by_hand_has_to_fit() -> None:
    mean, target, alpha = problem((3, 6, 5, 4))
    g, sum_sq = torch.tensor(1.0), torch.zeros(6, dtype=torch.float64)
    with pytest.raises(
        ValueError, match="mean and target must be given where a gradient of theirs is wanted"
    ):
        BACKWARD(g, None, None, alpha, sum_sq, mean.shape, *options(), True, False, True)
    with pytest.raises(ValueError, match=r"shape must be that of mean, \(3, 6, 5, 4\), got \(4, 6, 5, 4\)"):
        BACKWARD(g, mean, target, alpha, sum_sq, (4, 6, 5, 4), *options(), True, False, True)
    wrong = (1, -1.0, "mean", False, 1.0, "auto")
    with pytest.raises(ValueError, match="eps must be positive"):
        BACKWARD(g, mean, target, alpha, sum_sq, mean.shape, *wrong, True, False, True)


@pytest.mark.parametrize("shape", [(0, 6), (4, 0, 3), (0, 3, 4)])
@pytest.mark.parametrize("backend", ["cpu", "auto", "reference"])
def test_nothing_to_score(backend: str, shape: tuple[int, ...]) -> None:
    mean, target, alpha = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape[1])
    given = (1, 1e-5, "mean", False, 2.0, backend)
    loss, sum_sq = FORWARD(mean, target, alpha, *given)
    assert loss.isnan()
    assert torch.equal(sum_sq, torch.zeros(shape[1], dtype=torch.float64))
    grads = BACKWARD(torch.tensor(1.0), mean, target, alpha, sum_sq, shape, *given, True, True, True)
    for found, wanted in zip(grads, (mean, target, alpha), strict=True):
        assert torch.equal(found, torch.zeros_like(wanted))
    loss, *made = ONE_PASS(mean, target, alpha, None, *given)
    assert loss.isnan()
    scaled = SCALE(made[0], torch.tensor(3.0), made[1], 1, torch.float32, backend)
    for found, wanted in zip((*made, *scaled), (mean, alpha.double(), mean, alpha), strict=True):
        assert torch.equal(found, torch.zeros_like(wanted))


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
def test_shapes_that_depend_on_data_are_traced(reduction: str) -> None:
    """No number is made of such a shape while torch traces it."""

    def positive(mean: Tensor, sign: Tensor, alpha: Tensor) -> Tensor:
        kept = mean[sign > 0]
        return vidfast.gaussian_nll(kept, 2 * kept, alpha, reduction=reduction, backend="reference")

    mean, alpha = torch.randn(4, 6), torch.zeros(6)
    some, others = torch.tensor([1, 0, 1, 1]), torch.tensor([0, 0, 1, 1])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        traced = make_fx(positive, tracing_mode="symbolic")(mean, some, alpha)
    torch.testing.assert_close(traced(mean, others, alpha), positive(mean, others, alpha))


def test_eager_calls_do_not_come_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: object) -> None:
        raise AssertionError("an eager call took the operator")

    monkeypatch.setattr(ops, "one_pass", called)
    monkeypatch.setattr(ops, "two_pass", called)
    monkeypatch.setattr(ops, "call_operator", called)
    mean, target, alpha = problem((3, 6, 5, 4))
    vidfast.gaussian_nll(mean.requires_grad_(), target, alpha.requires_grad_()).backward()
