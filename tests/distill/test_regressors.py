"""Regressors and registries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vidfast.distill import (
    REGRESSORS,
    ConvBNReLU,
    FitNet,
    PointwiseStack,
    TransposedStack,
    UnknownNameError,
    UpsampledStack,
)
from vidfast.distill.registry import Registry
from vidfast.distill.regressors import keeps_resolution, make, resolve
from vidfast.regressor import owns_its_output


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


@pytest.mark.parametrize(
    "options",
    [{"depth": 0}, {"width": 0.0}, {"width": float("inf")}, {"width": float("nan")}, {"channel_dim": 2}],
)
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        PointwiseStack(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [1.5, True, "2"])
def test_a_depth_that_is_no_int_is_refused(depth: object) -> None:
    with pytest.raises(TypeError, match=f"wanted an int as depth, got {type(depth).__name__}"):
        PointwiseStack(depth)  # type: ignore[arg-type]


def test_a_stack_is_laid_out_for_the_methods_channels() -> None:
    """As many channels on both sides would hide a stack that runs over the positions of a (B, L, D)."""
    made = resolve(PointwiseStack(depth=2, width=1.0), -1)((2, 10, 6), (2, 10, 6))
    assert [type(layer) for layer in made.children()] == [nn.Linear, nn.ReLU, nn.Linear]
    assert resolve(PointwiseStack(channel_dim=-1)) == PointwiseStack()


def test_resolve_takes_names_and_functions() -> None:
    assert resolve("conv2") is REGRESSORS["conv2"]
    assert resolve("conv2", -1) == PointwiseStack(2, 0.5, -1)
    with pytest.raises(ValueError, match="wanted channel_dim 1 or -1, got 2"):
        resolve("transposed", 2)
    own = PointwiseStack(5)
    assert resolve(own) is own
    with pytest.raises(UnknownNameError, match="did you mean 'linear'"):
        resolve("liner")
    with pytest.raises(TypeError, match=r"name of a regressor or a function .* got the module Conv2d"):
        resolve(nn.Conv2d(2, 3, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got int"):
        resolve(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Module, got list"):
        make(lambda *_: [], (1, 2), (1, 2))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("student", [(2, 5), (2, 5, 1, 1)], ids=["vector", "1x1 map"])
@pytest.mark.parametrize(("size", "layers"), [(4, 1), (8, 2), (32, 4)])
def test_transposed_stack_is_the_papers(student: tuple[int, ...], size: int, layers: int) -> None:
    """One 4x4 of stride 1 and padding 0, then 4x4 of stride 2 and padding 1; no bias, nothing in between."""
    stack = TransposedStack(width=2.0)(student, (2, 6, size, size))
    assert stack(torch.randn(3, *student[1:])).shape == (3, 6, size, size)
    convolutions = [m for m in stack if isinstance(m, nn.ConvTranspose2d)]
    assert [(m.kernel_size, m.stride, m.padding) for m in convolutions] == [((4, 4), (1, 1), (0, 0))] + [
        ((4, 4), (2, 2), (1, 1))
    ] * (layers - 1)
    assert [m.out_channels for m in convolutions] == [12] * (layers - 1) + [6]
    assert all(m.bias is None for m in convolutions)
    assert len(stack) == layers + (len(student) == 2)
    assert owns_its_output(stack)


def test_transposed_stack_is_linear_and_its_default_width_the_teachers() -> None:
    stack = REGRESSORS["transposed"]((2, 5), (2, 6, 8, 8)).double()
    x, y = torch.randn(2, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(stack(x + 2 * y), stack(x) + 2 * stack(y))
    assert [m.out_channels for m in stack if isinstance(m, nn.ConvTranspose2d)] == [6, 6]


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 5, 2, 2), (2, 6, 8, 8), r"wanted student features \(batch, h\)"),
        ((2, 5, 1), (2, 6, 8, 8), "wanted student features"),
        ((2, 5), (2, 6, 8), "wanted a teacher's map"),
        ((2, 5), (2, 6, 8, 4), "reach the sizes 4, 8, 16"),
        ((2, 5), (2, 6, 12, 12), "reach the sizes"),
        ((2, 5), (2, 6, 2, 2), "reach the sizes"),
        ((2, 5), (2, 6, 0, 0), "reach the sizes"),
        ((2, 5), (2, 6, 7, 7), "reach the sizes"),
    ],
)
def test_shapes_that_transposed_convolutions_cannot_reach_are_refused(
    student: tuple[int, ...], teacher: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TransposedStack()(student, teacher)


@pytest.mark.parametrize(
    ("small", "large"), [((3,), (7,)), ((4, 3), (8, 5)), ((2, 2, 2), (3, 4, 5))], ids=["1-D", "2-D", "3-D"]
)
def test_upsampled_stack_reaches_the_size(small: tuple[int, ...], large: tuple[int, ...]) -> None:
    stack = UpsampledStack(depth=3, width=0.5)((2, 6, *small), (2, 4, *large))
    assert stack(torch.randn(5, 6, *small)).shape == (5, 4, *large)
    assert [m.out_channels for m in stack if hasattr(m, "out_channels")] == [3, 3, 4]
    assert type(stack[-1]) is nn.Upsample
    assert owns_its_output(stack)
    # At the student's own size there is nothing to interpolate.
    assert type(UpsampledStack()((2, 6, *small), (2, 4, *small))[-1]) is not nn.Upsample


def test_upsampled_stack_may_convolve_before_it_interpolates() -> None:
    convolution, upsample = UpsampledStack(depth=1)((2, 6, 4, 3), (2, 4, 8, 9)).double()
    x = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(upsample(convolution(x)), convolution(upsample(x)))


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 5), (2, 3, 8, 8), "for vectors there is regressor='transposed'"),
        ((2, 5), (2, 3), "1 to 3 spatial axes"),
        ((2, 5, 4), (2, 3, 8, 8), "as many on both sides"),
        ((2, 5, 4, 9), (2, 3, 8, 8), "no larger than"),
    ],
)
def test_shapes_that_an_upsampled_stack_cannot_reach_are_refused(
    student: tuple[int, ...], teacher: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        UpsampledStack()(student, teacher)


def described(layer: nn.Module) -> tuple[type[nn.Module], object, object, object]:
    return type(layer), layer.kernel_size, layer.stride, layer.padding


@pytest.mark.parametrize(
    ("student", "teacher", "layer"),
    [
        ((16, 16), (8, 8), (nn.Conv2d, (3, 3), (2, 2), (1, 1))),
        ((8, 8), (16, 16), (nn.ConvTranspose2d, (4, 4), (2, 2), (1, 1))),
        ((8, 8), (8, 8), (nn.Conv2d, (1, 1), (1, 1), (0, 0))),
        ((12, 9), (8, 8), (nn.Conv2d, (5, 2), (1, 1), (0, 0))),
        ((2, 2), (1, 1), (nn.Conv2d, (3, 3), (2, 2), (1, 1))),
        ((1, 1), (1, 1), (nn.Conv2d, (1, 1), (1, 1), (0, 0))),
        # by both axes, where public code looks at the height
        ((16, 9), (8, 9), (nn.Conv2d, (3, 1), (2, 1), (1, 0))),
        ((16, 10), (8, 7), (nn.Conv2d, (3, 4), (2, 1), (1, 0))),
        ((4, 5), (8, 5), (nn.ConvTranspose2d, (4, 1), (2, 1), (1, 0))),
        # odd sizes
        ((7, 7), (4, 4), (nn.Conv2d, (3, 3), (2, 2), (1, 1))),
        ((15, 16), (8, 8), (nn.Conv2d, (3, 3), (2, 2), (1, 1))),
        ((7, 7), (3, 3), (nn.Conv2d, (5, 5), (1, 1), (0, 0))),
        ((8,), (4,), (nn.Conv1d, (3,), (2,), (1,))),
        ((4,), (8,), (nn.ConvTranspose1d, (4,), (2,), (1,))),
        ((4, 6, 5), (2, 3, 5), (nn.Conv3d, (3, 3, 1), (2, 2, 1), (1, 1, 0))),
        ((2, 3, 5), (4, 6, 5), (nn.ConvTranspose3d, (4, 4, 1), (2, 2, 1), (1, 1, 0))),
    ],
)
@pytest.mark.parametrize("relu", [True, False])
def test_conv_bn_relu_reaches_the_size(
    student: tuple[int, ...], teacher: tuple[int, ...], layer: tuple[object, ...], relu: bool
) -> None:
    made = ConvBNReLU(relu)((2, 3, *student), (2, 5, *teacher))
    assert described(made.conv) == layer
    assert made.conv.bias is not None
    assert type(made.bn) is {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(student)]
    assert [name for name, _ in made.named_children()] == ["conv", "bn", "relu"][: 2 + relu]
    x = torch.randn(4, 3, *student)
    y = made(x)
    assert y.shape == (4, 5, *teacher)
    assert bool((y < 0).any()) is not relu
    assert not owns_its_output(made)
    normalised = nn.functional.batch_norm(made.conv(x), None, None, training=True)
    torch.testing.assert_close(y, normalised.relu() if relu else normalised)


def test_conv_bn_relu_of_vectors_is_linear() -> None:
    made = REGRESSORS["conv_bn_relu"]((2, 3), (2, 5))
    assert [type(layer) for layer in made.children()] == [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert made(torch.randn(4, 3)).shape == (4, 5)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 3, 4, 4), (2, 5, 7, 7), "no larger than the student's .* or twice its size"),
        ((2, 3, 4, 4), (2, 5, 12, 12), "twice its size"),
        ((2, 3, 4, 8), (2, 5, 8, 4), "twice its size"),
        ((2, 3, 4), (2, 5, 4, 4), "as many on both sides"),
        ((2, 3), (2, 5, 1, 1), "as many on both sides"),
        ((2, 3, 1, 1, 1, 1), (2, 5, 1, 1, 1, 1), "0 to 3 spatial axes"),
        ((2,), (2,), "0 to 3 spatial axes"),
    ],
)
def test_sizes_that_one_convolution_does_not_reach_are_refused(
    student: tuple[int, ...], teacher: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ConvBNReLU()(student, teacher)


def test_conv_bn_relu_gets_maps_as_they_are() -> None:
    assert not keeps_resolution(REGRESSORS["conv_bn_relu"])
    assert not FitNet({"a": "b"}, regressor="conv_bn_relu").pools
    with pytest.raises(TypeError, match="relu as True or False, got 1"):
        ConvBNReLU(relu=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (TransposedStack, {"width": 0.0}),
        (TransposedStack, {"width": float("inf")}),
        (UpsampledStack, {"width": -1.0}),
        (UpsampledStack, {"depth": 0}),
    ],
)
def test_bad_options_of_the_other_stacks_are_refused(kind: type, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        kind(**options)


def test_only_the_output_of_a_layer_that_does_not_need_it_is_owned() -> None:
    assert owns_its_output(nn.ConvTranspose2d(1, 1, 4))
    assert owns_its_output(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Upsample(4)))
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
