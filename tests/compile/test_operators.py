"""The torch.library operators by themselves: schemas, fake kernels, strides, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import vidfast
from vidfast import backends, ops

FORWARD = torch.ops.vidfast.gaussian_nll.default
BACKWARD = torch.ops.vidfast.gaussian_nll_backward.default

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
    for x, y in zip(real, fake, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_the_operator_equals_the_eager_path(reduction: str, layout: str, shape: tuple[int, ...]) -> None:
    mean, target, alpha = problem(shape, layout)
    found = []
    for by_operator in (True, False):
        m, t, a = (x.detach().clone().requires_grad_() for x in (mean, target, alpha))
        # views carry the layout, leaves take the gradients
        given = (LAYOUTS[layout](m), LAYOUTS[layout](t), a)
        if by_operator:
            loss = FORWARD(*given, *options(reduction, full=True, weight=-0.4))[0]
        else:
            loss = vidfast.gaussian_nll(
                *given, reduction=reduction, full=True, weight=-0.4, strategy="two_pass"
            )
        found.append((loss.detach(), *torch.autograd.grad(loss * 3, (m, t, a))))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_the_sums_of_squares_are_not_differentiable() -> None:
    mean, target, alpha = problem((3, 6, 5, 4))
    loss, sum_sq = FORWARD(mean.requires_grad_(), target, alpha.requires_grad_(), *options())
    assert loss.requires_grad
    assert not sum_sq.requires_grad


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
        monkeypatch.setattr(ops.backends, "choose", choose)
        loss, sum_sq = FORWARD(mean, target, alpha, *options(full=True))
        saved = (mean, target) if want[0] or want[1] else (None, None)
        grads = BACKWARD(g, *saved, alpha, sum_sq, mean.shape, *options(full=True), *want)
        assert len(grads) == sum(want)
        found.append((loss, sum_sq, *grads))
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

    monkeypatch.setattr(ops, "forward", called)
    monkeypatch.setattr(ops, "call_operator", called)
    mean, target, alpha = problem((3, 6, 5, 4))
    vidfast.gaussian_nll(mean.requires_grad_(), target, alpha.requires_grad_()).backward()
