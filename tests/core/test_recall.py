"""A call like one before is not checked again, and nothing that differs is taken for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import vidfast
from vidfast import _torch, backends, recall
from vidfast.backends.cpu import BACKEND, CpuBackend
from vidfast.backends.plain import PlainBackend

pytestmark = pytest.mark.skipif(
    BACKEND.unavailable() is not None or _torch._guards is None,
    reason="no kernels here, or torch has no such check",
)
SHAPE = (3, 4, 5, 5)


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mean, target = (torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(2))
    return mean.requires_grad_(), target, torch.randn(4, generator=generator).requires_grad_()


@pytest.fixture(autouse=True)
def nothing_is_known() -> Iterator[None]:
    recall._remembered.clear()
    yield
    recall._remembered.clear()


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that are checked."""
    noted: list[Any] = []
    right = recall.check_call

    def note(*args: Any) -> Any:
        noted.append(args)
        return right(*args)

    monkeypatch.setattr(recall, "check_call", note)
    return noted


def results(*given: Tensor, **options: Any) -> list[Tensor]:
    loss = vidfast.gaussian_nll(*given, **options)
    return [loss.detach(), *torch.autograd.grad(loss, [x for x in given if x.requires_grad])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", ["auto", "one_pass", "two_pass"])
@pytest.mark.parametrize("last", [False, True])
def test_the_second_call_is_not_checked_and_gives_the_same_bits(
    dtype: torch.dtype, strategy: str, last: bool, checked: list[Any]
) -> None:
    mean, target, alpha = tensors(dtype)
    if last:
        mean, target = (
            x.detach().to(memory_format=torch.channels_last).requires_grad_(x.requires_grad)
            for x in (mean, target)
        )
    first = results(mean, target, alpha, strategy=strategy)
    again = results(mean, target, alpha, strategy=strategy)
    assert len(checked) == 1
    assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(first, again, strict=True))
    elsewhere = [x.detach().clone().requires_grad_(x.requires_grad) for x in (mean, target, alpha)]
    assert all(torch.equal(x, y) for x, y in zip(first, results(*elsewhere, strategy=strategy), strict=True))
    assert len(checked) == 1


def test_a_weight_that_changes_is_no_other_call(checked: list[Any]) -> None:
    mean, target, alpha = tensors()
    for weight in (1.0, 0.5, 3.25, 1.0, 0.0):
        found = results(mean, target, alpha, weight=weight)
        recall._remembered.clear()
        wanted = results(mean, target, alpha, weight=weight)
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    assert len(checked) == 6, "the first, and one after everything was forgotten, five times"
    for weight, error in (
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (True, TypeError),
        ("1", TypeError),
    ):
        with pytest.raises(error, match="weight must be"):
            vidfast.gaussian_nll(mean, target, alpha, weight=weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_masks_are_recalled_by_shape_and_dtype_and_never_by_value(strategy: str, checked: list[Any]) -> None:
    mean, target, alpha = tensors()
    masks = [torch.rand(3, 5, 5) < 0.5 for _ in range(3)]
    others = [masks[0].float(), masks[0].unsqueeze(1), torch.tensor([1, 0, 2]), None]
    wanted = [
        results(mean, target, alpha, strategy=strategy, mask=x, backend="reference") for x in masks + others
    ]
    checked.clear()
    for _ in range(2):
        found = [results(mean, target, alpha, strategy=strategy, mask=x) for x in masks + others]
        for some, exact in zip(found, wanted, strict=True):
            for x, y in zip(some, exact, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
    assert len(checked) == 1 + len(others)
    weight = torch.tensor(2.0)
    for _ in range(3):
        results(mean, target, alpha, strategy=strategy, mask=masks[0], weight=weight)
        results(mean, target, alpha, strategy=strategy, weight=weight)
    assert len(checked) == 3 + len(others)
    weight.requires_grad_()
    with pytest.raises(ValueError, match="must not require grad"):
        results(mean, target, alpha, strategy=strategy, weight=weight)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_graph_traced_after_calls_alike_computes_what_they_do(mode: str) -> None:
    """A tracer records torch's operators: what a kernel writes it would not see."""
    mean, target, alpha = (x.detach() for x in tensors())

    def loss(mean: Tensor, mask: Tensor) -> Tensor:
        return vidfast.gaussian_nll(mean, target, alpha, mask=mask)

    mask = torch.rand(3, 5, 5)
    want = [loss(mean, mask) for _ in range(3)][-1]
    traced = make_fx(loss, tracing_mode=mode, _allow_non_fake_inputs=True)(mean, mask)
    torch.testing.assert_close(traced(mean, mask), want)


def channels_last(x: Tensor) -> Tensor:
    return x.detach().to(memory_format=torch.channels_last).requires_grad_(x.requires_grad)


DIFFERENT: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Any, ...]]] = {
    "fewer samples": lambda m, t, a: (m[:2], t[:2], a),
    "other strides of both": lambda m, t, a: (channels_last(m), channels_last(t), a),
    "other strides of the target": lambda m, t, a: (m, channels_last(t), a),
    "a slice of a batch": lambda m, t, a: (torch.cat([m, m], 1)[:, :4], t, a),
    "another dtype of mean": lambda m, t, a: (m.double(), t, a),
    "another dtype of the target": lambda m, t, a: (m, t.half(), a),
    "another dtype of alpha": lambda m, t, a: (m, t, a.double()),
    "a mean without gradient": lambda m, t, a: (m.detach(), t, a),
    "a target with gradient": lambda m, t, a: (m, t.clone().requires_grad_(), a),
    "an alpha that is broadcast": lambda m, t, a: (m, t, a.view(1, 4, 1, 1)),
    "a negated view": lambda m, t, a: (m, torch._neg_view(t), a),
    "a zero tensor": lambda m, t, a: (m, torch._efficientzerotensor(SHAPE), a),
    "a target from inference mode": lambda m, t, a: (m, torch.inference_mode()(lambda: t.clone())(), a),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_checked(name: str, checked: list[Any]) -> None:
    given = tensors()
    results(*given)
    other = DIFFERENT[name](*given)
    found = results(*other)
    assert len(checked) == 2, "it was taken for the call before"
    wanted = results(*other, backend="reference")
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3)


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "around",
    [Nothing, forward_ad.dual_level, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["dispatch mode", "forward mode", "autocast"],
)
def test_inside_of_modes_it_is_checked(around: Callable[[], Any], checked: list[Any]) -> None:
    given = tensors()
    first = results(*given)
    with around():
        again = results(*given)
    assert len(checked) == 2
    assert all(torch.allclose(x, y, rtol=1e-4) for x, y in zip(first, again, strict=True))


def test_transforms_and_tracers_are_seen(checked: list[Any]) -> None:
    mean, target, alpha = (x.detach() for x in tensors())
    vidfast.gaussian_nll(mean, target, alpha)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(lambda m: vidfast.gaussian_nll(m, target, alpha))(torch.stack([mean, mean]))
    traced = torch.jit.trace(lambda m: vidfast.gaussian_nll(m, target, alpha), (mean,))
    torch.testing.assert_close(traced(2 * mean), vidfast.gaussian_nll(2 * mean, target, alpha))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        vidfast.gaussian_nll(forward_ad.make_dual(mean, mean), target, alpha)
    assert len(checked) >= 4, "the first, the transform's, the tracer's and the derivative's"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"channel_dim": True}, TypeError),
        ({"channel_dim": 1.0}, TypeError),
        ({"full": 0}, TypeError),
        ({"inplace": 0}, TypeError),
        ({"strategy": ["auto"]}, ValueError),
    ],
    ids=str,
)
def test_what_is_equal_to_an_option_is_not_one(options: dict[str, Any], error: type[Exception]) -> None:
    mean, target, alpha = tensors()
    vidfast.gaussian_nll(mean, target, alpha)
    with pytest.raises(error, match="must be"):
        vidfast.gaussian_nll(mean, target, alpha, **options)


@pytest.mark.parametrize("which", range(3))
def test_what_is_no_tensor_is_an_error_as_before(which: int) -> None:
    given: list[Any] = list(tensors())
    vidfast.gaussian_nll(*given)
    given[which] = given[which].detach().numpy()
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got ndarray"):
        vidfast.gaussian_nll(*given)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("kind", ["nested", "sparse", "meta"])
def test_tensors_without_strides_or_values_are_errors_as_before(which: int, kind: str) -> None:
    """torch's check of strides would end the process."""
    given = [x.detach() for x in tensors()]
    vidfast.gaussian_nll(*given)
    x = given[which]
    given[which] = {
        "nested": lambda: torch.nested.nested_tensor(list(x) if x.dim() > 1 else [x]),
        "sparse": x.to_sparse,
        "meta": lambda: x.to("meta"),
    }[kind]()
    with pytest.raises(ValueError, match=r"must be a dense|must be on one device"):
        vidfast.gaussian_nll(*given)


def test_a_call_that_cannot_be_recalled_is_not_kept_again_and_again() -> None:
    mean, target, alpha = tensors()
    vidfast.gaussian_nll(mean, target, alpha)
    for weight in (2, 2.0, 3):
        for _ in range(3):
            vidfast.gaussian_nll(mean, target, alpha, weight=weight)
    with forward_ad.dual_level():
        vidfast.gaussian_nll(mean, target, alpha)
    ((_, (only,)),) = [(key, kept) for key, kept in recall._remembered.items()]
    assert only[1].call.weight == 1.0


def test_the_sign_of_a_weight_that_is_zero() -> None:
    mean, target, alpha = (x.detach() for x in tensors())
    for weight in (0.0, -0.0, 1.0, -0.0, 0.0):
        loss = vidfast.gaussian_nll(mean, target, alpha, weight=weight)
        want = vidfast.gaussian_nll(mean, target, alpha, weight=weight, backend="reference")
        assert torch.signbit(loss) == torch.signbit(want)


def test_one_pass_has_no_gradient_of_a_target_that_was_made_without_grad() -> None:
    mean, target, alpha = tensors()
    target.requires_grad_()
    with torch.no_grad():
        vidfast.gaussian_nll(mean, target, alpha, strategy="one_pass")
    with pytest.raises(ValueError, match="one_pass"):
        vidfast.gaussian_nll(mean, target, alpha, strategy="one_pass")


def test_another_back_end_of_the_name_is_asked_anew(
    monkeypatch: pytest.MonkeyPatch, checked: list[Any]
) -> None:
    given = tensors()
    results(*given)
    other = CpuBackend()
    monkeypatch.setitem(backends._loaded, "cpu", other)
    results(*given)
    results(*given)
    assert len(checked) == 2
    monkeypatch.setattr(CpuBackend, "supports", lambda *_: "it does not")
    with pytest.raises(RuntimeError, match="it does not"):
        results(*given, backend="cpu")
    assert vidfast.gaussian_nll(*given).grad_fn is not None, "auto goes on to the reference"
    recall._remembered.clear()
    with pytest.raises(RuntimeError, match="it does not"):
        results(*given, backend="cpu")


def test_what_a_transform_left_behind_is_computed_as_ever(checked: list[Any]) -> None:
    """A tensor that leaked from torch.func.grad stands for another; torch's own `apply` unwraps it."""
    mean, target, alpha = tensors()
    leaked: list[Tensor] = []

    def leak(x: Tensor) -> Tensor:
        leaked.append(2 * x)
        return x.sum()

    torch.func.grad(leak)(mean.detach())
    want = results(2 * mean.detach(), target, alpha)
    checked.clear()
    for strategy in ("one_pass", "two_pass") * 2:
        loss = vidfast.gaussian_nll(leaked[0], target, alpha, strategy=strategy)
        torch.testing.assert_close([loss.detach(), *torch.autograd.grad(loss, alpha)], want)
    assert len(checked) == 4, "none of them is remembered"


def test_plain_tensors_inside_of_a_transform_are_refused_in_words() -> None:
    mean, target, alpha = tensors()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="functorch transforms"):
            torch.func.vmap(lambda x: x * vidfast.gaussian_nll(mean, target, alpha))(torch.ones(2))
        results(mean, target, alpha)


def test_a_back_end_that_does_not_walk_gets_no_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes tensors as they are: none is copied for it."""
    other = PlainBackend()
    other.name = "cpu"
    monkeypatch.setitem(backends._loaded, "cpu", other)
    mean, target, alpha = tensors()
    target = channels_last(target)
    seen: list[Tensor] = []
    right = PlainBackend.forward_grad

    def forward_grad(self: Any, mean: Tensor, target: Tensor, *rest: Any, **outputs: Any) -> None:
        seen.append(target)
        right(self, mean, target, *rest, **outputs)

    monkeypatch.setattr(PlainBackend, "forward_grad", forward_grad)
    for _ in range(2):
        results(mean, target, alpha)
    assert all(x is target for x in seen), "it was copied"
    assert len(seen) == 2


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "MOST", 3)
    mean, target, alpha = tensors()
    for eps in range(1, 9):
        vidfast.gaussian_nll(mean, target, alpha, eps=float(eps))
        assert len(recall._remembered) <= 3
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        for other in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
            vidfast.gaussian_nll(mean.to(dtype), target.to(other), alpha)
    assert max(map(len, recall._remembered.values())) == recall.MOST_ALIKE


def test_without_torchs_check_every_call_is_checked(
    monkeypatch: pytest.MonkeyPatch, checked: list[Any]
) -> None:
    for stand_in in (None, _raises):
        monkeypatch.setattr(_torch, "_guards", stand_in)
        checked.clear()
        given = tensors()
        first, again = results(*given), results(*given)
        assert len(checked) == 2
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def _raises(*_: Any, **__: Any) -> Any:
    raise TypeError("other arguments are wanted")
