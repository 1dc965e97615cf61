"""Masks and weights that a call does not take: an error in words, before anything is launched or written."""

from __future__ import annotations

import pytest
import torch
from places import Place

import vidfast


def test_nested_masks_and_weights_are_errors_in_words() -> None:
    mean, target, alpha = torch.randn(4, 6, 5), torch.randn(4, 6, 5), torch.zeros(6)
    for nested in (
        torch.nested.nested_tensor([torch.ones(5)] * 4),
        torch.nested.nested_tensor([torch.ones(5)] * 4, layout=torch.jagged),
    ):
        with pytest.raises(ValueError, match="mask must be a dense"):
            vidfast.gaussian_nll(mean, target, alpha, mask=nested)
        with pytest.raises(ValueError, match="weight must be a number or a tensor of one element"):
            vidfast.gaussian_nll(mean, target, alpha, weight=nested)


BAD_MASKS = {
    "no tensor": (lambda: [True], TypeError, ["mask must be a torch.Tensor or None", "list"]),
    "complex": (lambda: torch.ones(4, 5, 5, dtype=torch.complex64), TypeError, ["mask must be bool", "complex64"]),
    "channels": (lambda: torch.ones(4, 6, 5, 5), ValueError, ["(4, 5, 5)", "(4, 1, 5, 5)", "(4,)", "(4, 6, 5, 5)"]),
    "a smaller map": (lambda: torch.ones(4, 5, 4), ValueError, ["(4, 5, 5)", "(4, 5, 4)"]),
    "broadcast of fewer dimensions": (lambda: torch.ones(5, 5), ValueError, ["(4, 5, 5)", "(5, 5)"]),
    "sizes of 1 without the channels": (lambda: torch.ones(4, 1, 1), ValueError, ["(4, 5, 5)", "(4, 1, 1)"]),
    "another batch": (lambda: torch.ones(3), ValueError, ["(4,)", "(3,)"]),
    "a number": (lambda: torch.ones(()), ValueError, ["(4, 5, 5)", "()"]),
    "gradient": (lambda: torch.ones(4, 5, 5, requires_grad=True), ValueError, ["must not require grad", "detach"]),
    "meta": (lambda: torch.ones(4, 5, 5, device="meta"), ValueError, ["cpu", "meta"]),
    "sparse": (lambda: torch.ones(4, 5, 5).to_sparse(), ValueError, ["dense", "sparse_coo"]),
    "negative": (lambda: torch.full((4, 5, 5), -0.5), ValueError, ["must not be negative", "-0.5"]),
    "a negative integer": (lambda: torch.full((4,), -100), ValueError, ["must not be negative", "-100"]),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_MASKS)
@pytest.mark.parametrize("named", ["auto", "reference"])
def test_bad_masks(what: str, named: str) -> None:
    make, kind, words = BAD_MASKS[what]
    mean, target, alpha = (torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5), torch.zeros(6))
    for _ in range(2):  # a call like one before is refused too
        vidfast.gaussian_nll(mean, target, alpha, mask=torch.ones(4, 5, 5), backend=named)
        with pytest.raises(kind) as caught:
            vidfast.gaussian_nll(mean, target, alpha, mask=make(), backend=named)  # type: ignore[arg-type]
        assert all(word in str(caught.value) for word in words), caught.value


BAD_WEIGHTS = {
    "two numbers": (lambda: torch.ones(2), ValueError, ["one element", "(2,)"]),
    "none": (lambda: torch.ones(0), ValueError, ["one element", "(0,)"]),
    "complex": (lambda: torch.ones((), dtype=torch.complex64), TypeError, ["weight must be", "complex64"]),
    "bool": (lambda: torch.ones((), dtype=torch.bool), TypeError, ["weight must be", "bool"]),
    "gradient": (lambda: torch.ones((), requires_grad=True), ValueError, ["must not require grad", "multiply"]),
    "meta": (lambda: torch.ones((), device="meta"), ValueError, ["activations' device, cpu", "meta"]),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_WEIGHTS)
def test_bad_weights(what: str) -> None:
    make, kind, words = BAD_WEIGHTS[what]
    with pytest.raises(kind) as caught:
        vidfast.gaussian_nll(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3), weight=make())
    assert all(word in str(caught.value) for word in words), caught.value
    if what != "meta":
        with pytest.raises(kind):
            vidfast.GaussianNLL(3, weight=make())


def test_in_place_over_the_mask_is_refused(backend: Place) -> None:
    whole = torch.rand(4, 6, device=backend.device)
    mean = (whole * 1).requires_grad_() * 1
    with pytest.raises(RuntimeError, match="would overwrite mask"):
        backend.nll(mean, whole, torch.zeros(6), inplace=True, mask=mean.detach()[:, 0])


def test_negative_weights_are_found_in_calls_like_one_before() -> None:
    mean, target, alpha = torch.randn(4, 6), torch.randn(4, 6), torch.zeros(6)
    mask = torch.ones(4)
    for _ in range(3):
        vidfast.gaussian_nll(mean, target, alpha, mask=mask)
    mask[2] = -1
    with pytest.raises(ValueError, match="must not be negative"):
        vidfast.gaussian_nll(mean, target, alpha, mask=mask)
