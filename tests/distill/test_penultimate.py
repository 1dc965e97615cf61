"""What the methods that predict the teacher's logits take as penultimate features, and what they say of the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_batches import batch_of, built
from torch import Tensor

from vidfast.distill import VIDLP, Batch, LwF, Method

pytestmark = pytest.mark.parametrize("kind", [LwF, VIDLP])


def batch(features: Tensor, logits: Tensor) -> Batch:
    return batch_of({"pool": features}, teacher_logits=logits)


@pytest.mark.parametrize("axes", [(1,), (1, 1), (1, 1, 1)])
def test_an_average_pools_output_is_a_vector(kind: type[Method], axes: tuple[int, ...]) -> None:
    features, logits = torch.randn(3, 4), torch.randn(3, 5)
    method = built(kind("pool"), batch(features.reshape(3, 4, *axes), logits))  # type: ignore[arg-type]
    expected = method(batch(features, logits), 1.0)
    assert torch.isfinite(expected)
    assert torch.equal(method(batch(features.reshape(3, 4, *axes), logits), 1.0), expected)


@pytest.mark.parametrize(
    ("features", "logits", "message"),
    [
        (
            (2, 3, 4, 4),
            (2, 5),
            r"penultimate features \(B, D\) .* from the student's layer 'pool', got \(2, 3, 4, 4\)",
        ),
        ((2,), (2, 5), r"wanted penultimate features .* got \(2,\)"),
        ((2, 3), (2, 5, 4), r"wanted the teacher's logits as \(B, classes\), got \(2, 5, 4\)"),
        ((2, 3), (4, 5), r"layer 'pool' and teacher's logits of one batch, got \(2, 3\) and \(4, 5\)"),
    ],
)
def test_other_shapes_are_refused_when_built_and_when_called(
    kind: type[Method], features: tuple[int, ...], logits: tuple[int, ...], message: str
) -> None:
    other = batch(torch.randn(features), torch.randn(logits))
    method: Any = kind("pool")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        method.build(other)
    assert not list(method.parameters())
    method.build(batch(torch.randn(2, 3), torch.randn(2, 5)))
    with pytest.raises(ValueError, match=message):
        method(other, 1.0)


@pytest.mark.parametrize("layer", [None, 3, {"pool": "pool"}])
def test_what_is_no_name_is_refused(kind: type[Method], layer: Any) -> None:
    wanted = f"wanted the name of the student's penultimate layer, got {type(layer).__name__}"
    with pytest.raises(TypeError, match=wanted):
        kind(layer)
