"""PairedMethod: how pairs are named, which features reach the loss, and whose name an error bears."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_batches import batch_of, built, pair
from torch import Tensor, nn

from vidfast import distill
from vidfast.distill import METHODS, PairedMethod
from vidfast.distill.methods.pairs import place


class Difference(PairedMethod):
    """Adds up (s - t), and keeps what it was given."""

    def build_pair(self, student: Tensor, teacher: Tensor) -> None:
        if student.shape != teacher.shape:
            raise ValueError(f"{tuple(student.shape)} is not {tuple(teacher.shape)}")
        self.seen: list[tuple[int, Tensor, Tensor]] = []

    def pair_loss(self, index: int, student: Tensor, teacher: Tensor, factor: float) -> Tensor:
        self.seen.append((index, student, teacher))
        return (student - teacher).sum() * factor


def test_the_loss_is_the_sum_over_pairs_times_the_factor() -> None:
    student = {"a": torch.randn(2, 3, 4), "b": torch.randn(2, 5)}
    teacher = {"x": torch.randn(2, 3, 4), "y": torch.randn(2, 5)}
    batch = batch_of(student, teacher)
    method = built(Difference([("a", "x"), ("b", "y"), ("a", "x")], channel_dim=1), batch)
    expected = 2 * (student["a"] - teacher["x"]).sum() + (student["b"] - teacher["y"]).sum()
    torch.testing.assert_close(method(batch, 0.5), 0.5 * expected)
    assert [index for index, _, _ in method.seen] == [0, 1, 2]
    assert method.student_layers == ("a", "b", "a")
    assert method.teacher_layers == ("x", "y", "x")
    assert method.pair_names() == ["a -> x", "b -> y", "a -> x"]


def test_maps_are_pooled_to_the_smaller_size_along_each_axis_unless_told_not_to() -> None:
    student, teacher = torch.randn(2, 3, 8, 4), torch.randn(2, 3, 4, 6)
    pooling = built(Difference({"a": "x"}), pair(student, teacher))
    pooling(pair(student, teacher), 1.0)
    _, s, t = pooling.seen[0]
    torch.testing.assert_close(s, student.reshape(2, 3, 4, 2, 4).mean(3))
    torch.testing.assert_close(t, nn.functional.adaptive_avg_pool2d(teacher, (4, 4)))
    with pytest.raises(ValueError, match=r"pair 'a' -> 'x': \(2, 3, 8, 4\) is not \(2, 3, 4, 6\)"):
        built(Difference({"a": "x"}, pools=False), pair(student, teacher))


def test_the_teachers_feature_is_detached() -> None:
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    built(Difference({"a": "x"}), pair(student, teacher))(pair(student, teacher), 1.0).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_errors_name_the_pair_when_built_and_when_called() -> None:
    batch = batch_of({"a": torch.randn(2, 3), "b": torch.randn(2, 3)}, {"x": torch.randn(2, 3)})
    method = built(Difference([("a", "x"), ("b", "x")]), batch)
    other = batch_of({"a": torch.randn(2, 3), "b": torch.randn(3, 3)}, {"x": torch.randn(2, 3)})
    with pytest.raises(ValueError, match=r"pair 'b' -> 'x': .* one batch"):
        method(other, 1.0)
    with pytest.raises(ValueError, match=r"pair 'b' -> 'x': .* one batch"):
        built(Difference([("a", "x"), ("b", "x")]), other)


PAIRED = sorted(name for name in METHODS if issubclass(METHODS[name], PairedMethod))


def test_these_are_the_paired_methods() -> None:
    compares_pairs = {"at", "fitnet", "itrd", "mimkd", "nst", "vid"}
    assert set(PAIRED) == compares_pairs | {"vid_heteroscedastic", "vid_student_t", "vid_mixture"}
    assert {m.default_name for m in vars(distill).values() if m in map(METHODS.__getitem__, PAIRED)} == set(
        PAIRED
    )


@pytest.mark.parametrize("name", PAIRED)
def test_a_failed_build_leaves_nothing_and_a_second_one_works(name: str) -> None:
    """The first pair fits, and the second does not: its teacher's feature is of another batch or number of axes."""
    method: Any = METHODS[name]([("a", "x"), ("b", "y")])
    student = {"a": torch.randn(2, 3, 4, 4), "b": torch.randn(2, 5, 4, 4)}
    teacher = {"x": torch.randn(2, 6, 4, 4), "y": torch.randn(2, 7, 4, 4)}
    empty, alone = list(method.state_dict()), repr(method)
    # ITRD takes any feature with channels.
    unfit = torch.randn(2) if name == "itrd" else torch.randn(2, 7, 4)
    for _ in range(2):
        with pytest.raises(ValueError, match="pair 'b' -> 'y'"):
            method.build(batch_of(student, {**teacher, "y": unfit}))
        assert not list(method.parameters())
        assert list(method.state_dict()) == empty
        assert repr(method) == alone
    torch.manual_seed(5)
    method.build(batch_of(student, teacher))
    torch.manual_seed(5)
    fresh = built(METHODS[name]([("a", "x"), ("b", "y")]), batch_of(student, teacher))
    assert repr(method) == repr(fresh)
    assert list(method.state_dict()) == list(fresh.state_dict())
    loss = method(batch_of(student, teacher), 1.0)
    assert torch.isfinite(loss)
    assert torch.equal(loss, fresh(batch_of(student, teacher), 1.0))
    # And so does a failure after a build that worked.
    with pytest.raises(ValueError, match="pair 'b' -> 'y'"):
        method.build(batch_of(student, {**teacher, "y": unfit}))
    assert not list(method.parameters())


@pytest.mark.parametrize("pairs", ["ab", ("aa", "bb"), [("a",)], [("a", 1)], {"a": None}, [1], None, 3])
def test_what_is_no_pair_is_refused(pairs: Any) -> None:
    with pytest.raises(TypeError, match=r"wanted \{student layer: teacher layer\}"):
        Difference(pairs)


@pytest.mark.parametrize("pairs", [{}, []])
def test_no_pairs_are_refused(pairs: Any) -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        Difference(pairs)


@pytest.mark.parametrize(
    ("dtype", "autocast", "wanted"),
    [
        (torch.bfloat16, False, torch.bfloat16),
        (torch.bfloat16, True, torch.float32),
        (torch.float32, True, torch.float32),
        (torch.float64, True, torch.float64),
    ],
)
def test_parameters_have_the_students_dtype_and_not_autocasts(
    dtype: torch.dtype, autocast: bool, wanted: torch.dtype
) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert place(nn.Linear(2, 2), torch.zeros(1, dtype=dtype)).weight.dtype == wanted
