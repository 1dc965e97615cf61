"""Regressors and registries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vidfast.distill import REGRESSORS, PointwiseStack, UnknownNameError
from vidfast.distill.registry import Registry
from vidfast.distill.regressors import owns_its_output, resolve


@pytest.mark.parametrize(
    ("spatial", "layer"),
    [((), nn.Linear), ((7,), nn.Conv1d), ((5, 9), nn.Conv2d), ((2, 3, 4), nn.Conv3d)],
    ids=["vector", "1-D", "2-D non-square", "3-D"],
)
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_stack_maps_student_shape_to_teacher_shape(
    spatial: tuple[int, ...], layer: type[nn.Module], depth: int
) -> None:
    stack = PointwiseStack(depth=depth, width=1.5)((2, 3, *spatial), (2, 8, *spatial))
    assert stack(torch.randn(5, 3, *spatial)).shape == (5, 8, *spatial)
    pointwise = [m for m in stack if not isinstance(m, nn.ReLU)]
    assert [type(m) for m in pointwise] == [layer] * depth
    assert all(m.bias is None for m in pointwise)
    assert len(stack) == 2 * depth - 1
    assert [m.weight.shape[0] for m in pointwise] == [12] * (depth - 1) + [8]
    assert owns_its_output(stack)


def test_channels_last_stack_works_on_the_last_dimension() -> None:
    stack = PointwiseStack(depth=2, channel_dim=-1)((2, 10, 3), (2, 10, 6))
    assert stack(torch.randn(4, 11, 3)).shape == (4, 11, 6)


@pytest.mark.parametrize(
    ("name", "depth", "hidden"), [("linear", 1, None), ("conv2", 2, 8), ("conv3", 3, 32)]
)
def test_named_regressors_are_the_papers(name: str, depth: int, hidden: int | None) -> None:
    stack = REGRESSORS[name]((1, 4, 2, 2), (1, 16, 2, 2))
    convolutions = [m for m in stack if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == depth
    assert all(m.out_channels == hidden for m in convolutions[:-1])


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((1, 4, 8, 8), (1, 4, 4, 4)), ((1, 4, 8), (1, 4, 8, 8)), ((4,), (4,))],
)
def test_shapes_that_a_pointwise_stack_cannot_bridge_are_refused(
    student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"got|differ"):
        PointwiseStack()(student, teacher)


def test_four_spatial_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="0 to 3"):
        PointwiseStack()((1, 2, 1, 1, 1, 1), (1, 2, 1, 1, 1, 1))


@pytest.mark.parametrize("options", [{"depth": 0}, {"width": 0.0}, {"channel_dim": 2}])
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        PointwiseStack(**options)  # type: ignore[arg-type]


def test_resolve_takes_names_and_functions() -> None:
    assert resolve("conv2") is REGRESSORS["conv2"]
    assert resolve("conv2", -1) == PointwiseStack(2, 0.5, -1)
    own = PointwiseStack(5)
    assert resolve(own) is own
    with pytest.raises(UnknownNameError, match="did you mean 'linear'"):
        resolve("liner")


def test_only_a_last_convolution_or_linear_layer_is_owned() -> None:
    assert owns_its_output(nn.Linear(1, 1))
    assert owns_its_output(nn.Sequential(nn.ReLU(), nn.Sequential(nn.Conv1d(1, 1, 1))))
    assert not owns_its_output(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()))
    assert not owns_its_output(nn.Identity())
    assert not owns_its_output(nn.Sequential())


def test_registry_refuses_a_second_thing_of_the_same_name() -> None:
    registry: Registry[object] = Registry("thing")
    one = object()
    registry.register("a")(one)
    registry.register("a")(one)
    with pytest.raises(ValueError, match="thing 'a' is registered already"):
        registry.register("a")(object())
    assert list(registry) == ["a"]
    assert "a" in registry
    with pytest.raises(UnknownNameError, match="unknown thing 'zzz': there are 'a'"):
        registry["zzz"]
