"""The papers' networks: their sizes, their tapped layers, what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vidfast.distill import VID, Distiller, Taps
from vidfast.distill.models import TappedNetwork, build
from vidfast.distill.models.resnet import ResNet
from vidfast.distill.models.vgg import VGG9


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def tapped_shapes(network: TappedNetwork, images: Tensor) -> dict[str, tuple[int, ...]]:
    taps = Taps(network, [*network.taps, network.penultimate])
    with torch.no_grad(), taps.recording() as activations:
        network.eval()(images)
        return {name: tuple(value.shape[1:]) for name, value in activations().items()}


@pytest.mark.parametrize(
    ("name", "channels", "expected"),
    # Zagoruyko and Komodakis, table 4: WRN-40-4 has 8.9M and WRN-16-8 11.0M parameters; RepDistiller's
    # WRN-40-2 and WRN-16-2 have 2.26M and 0.70M for 100 classes.
    [
        ("wrn-16-2", (16, 32, 64, 128), 0.70e6),
        ("wrn-40-2", (16, 32, 64, 128), 2.26e6),
        ("wrn-16-8", (16, 128, 256, 512), 11.0e6),
    ],
)
def test_wide_residual_networks(name: str, channels: tuple[int, ...], expected: float) -> None:
    network = build(name, in_channels=3, num_classes=100)
    assert parameters(network) == pytest.approx(expected, rel=0.01)
    sizes = (32, 32, 16, 8)
    shapes = {tap: (c, n, n) for tap, c, n in zip(network.taps, channels, sizes, strict=True)}
    assert tapped_shapes(network, torch.randn(2, 3, 32, 32)) == {**shapes, "pool": (channels[-1],)}


def test_wide_residual_network_on_8x8_grey_images() -> None:
    network = build("wrn-10-1", in_channels=1, num_classes=10, image_size=(8, 8))
    network(torch.randn(2, 1, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in network.modules()) == 7


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        # He et al.'s networks as published for ImageNet (torchvision's documentation).
        ("resnet-18-imagenet", 1000, 11_689_512),
        ("resnet-34-imagenet", 1000, 21_797_672),
        # The CIFAR stem in common use: 3*64*9 weights in place of 3*64*49.
        ("resnet-18", 10, 11_173_962),
        ("resnet-34", 10, 21_282_122),
    ],
)
def test_residual_networks_have_the_published_number_of_parameters(
    name: str, classes: int, expected: int
) -> None:
    with torch.device("meta"):
        network = build(name, in_channels=3, num_classes=classes)
    assert parameters(network) == expected


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        # The stem for CIFAR keeps the image's size; the groups halve it three times.
        ("resnet-18-w8", (32, 32), {"group3": (32, 8, 8), "group4": (64, 4, 4), "pool": (64,)}),
        ("resnet-18-w8", (8, 8), {"group3": (32, 2, 2), "group4": (64, 1, 1), "pool": (64,)}),
        # The stem for ImageNet divides it by four more: at 32x32 what VGG-9's fourth and fifth pools leave.
        ("resnet-34-imagenet-w8", (32, 32), {"group3": (32, 2, 2), "group4": (64, 1, 1), "pool": (64,)}),
        ("vgg-9-w8", (32, 32), {"pool4": (64, 2, 2), "pool5": (64, 1, 1), "pool": (64,)}),
        # Not square, and larger than it needs to be.
        ("resnet-18-imagenet-w4", (64, 96), {"group3": (16, 4, 6), "group4": (32, 2, 3), "pool": (32,)}),
        ("vgg-9-w4", (64, 96), {"pool4": (32, 4, 6), "pool5": (32, 2, 3), "pool": (32,)}),
        ("mlp-32", (32, 32), {"fc1": (32,), "fc2": (32,), "fc3": (32,), "fc4": (32,), "fc5": (32,)}),
        ("mlp-8", (6, 5), {"fc1": (8,), "fc2": (8,), "fc3": (8,), "fc4": (8,), "fc5": (8,)}),
    ],
)
def test_shapes_of_tapped_layers(
    name: str, size: tuple[int, int], expected: dict[str, tuple[int, ...]]
) -> None:
    network = build(name, in_channels=3, num_classes=5, image_size=size)
    images = torch.randn(2, 3, *size)
    assert tapped_shapes(network, images) == expected
    # In training mode too, down to every parameter.
    taps = Taps(network, [*network.taps, network.penultimate])
    with taps.recording() as activations:
        logits = network.train()(images)
        features = activations()
    assert logits.shape == (2, 5)
    F.cross_entropy(logits, torch.tensor([1, 3])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    # The penultimate layer's output is what the classifier takes.
    torch.testing.assert_close(network.fc(features[network.penultimate]), logits)


def test_a_residual_block_adds_its_input() -> None:
    block = ResNet(18, width=4).group2[1].eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(block(x), x.relu())
    torch.testing.assert_close(block(x.relu()), x.relu())


@pytest.mark.parametrize(
    "name", ["resnet-18-w3", "resnet-18-imagenet-w4", "resnet-18-w5", "vgg-9-w3", "wrn-10-1"]
)
def test_the_layout_in_memory_changes_no_result(name: str) -> None:
    """Narrow ones above all: torch's strided 1x1 convolutions of few channels corrupt memory in this layout."""
    networks = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        network = build(name, in_channels=3, num_classes=4).to(memory_format=layout)
        images = torch.randn(5, 3, 32, 32).to(memory_format=layout)
        for _ in range(3):
            network.zero_grad()
            network(images).square().sum().backward()
        networks.append(network)
    for (key, plain), last in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(
            last.grad, plain.grad, rtol=0, atol=2e-3 * float(plain.grad.abs().max()), msg=key
        )


def test_a_strided_shortcut_takes_every_other_pixel() -> None:
    block = ResNet(18, width=4).group2[0].eval()
    x = torch.randn(2, 4, 7, 5)
    convolution = block.shortcut[1]
    expected = F.conv2d(x, convolution.weight, stride=2)
    torch.testing.assert_close(convolution(block.shortcut[0](x)), expected)


def test_depth_counts_convolutions_and_the_classifier() -> None:
    for depth in (18, 34):
        convolutions = [m for m in ResNet(depth, width=2).modules() if isinstance(m, nn.Conv2d)]
        assert sum(m.kernel_size == (3, 3) for m in convolutions) + 1 == depth
    vgg = VGG9(width=2)
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in vgg.modules()) == 9
    assert sum(isinstance(m, nn.MaxPool2d) for m in vgg.modules()) == 5


def test_vgg_has_the_channels_of_configuration_a() -> None:
    with torch.device("meta"):
        vgg = build("vgg-9", in_channels=3, num_classes=10)
    convolutions = [m.out_channels for m in vgg.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions == [64, 128, 256, 256, 512, 512, 512, 512]
    # Kernels, BatchNorms, classifier.
    weights = 9 * (3 * 64 + 64 * 128 + 128 * 256 + 256**2 + 256 * 512 + 3 * 512**2)
    assert parameters(vgg) == weights + 2 * sum(convolutions) + 512 * 10 + 10


def test_the_perceptron_is_the_papers() -> None:
    """Against the layers written out: bottlenecks without a non-linearity inside, taps after the ReLU."""
    torch.manual_seed(3)
    network = build("mlp-16", in_channels=2, num_classes=4, image_size=(3, 5))
    images = torch.randn(7, 2, 3, 5)
    weights = dict(network.named_parameters())

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = linear("fc1.0", images.reshape(7, 30)).relu()
    expected = {"fc1": x}
    for name in ("fc2", "fc3", "fc4"):
        assert weights[f"{name}.0.weight"].shape == (4, 16)
        assert weights[f"{name}.1.weight"].shape == (16, 4)
        expected[name] = x = linear(f"{name}.1", linear(f"{name}.0", x)).relu()
    expected["fc5"] = x = linear("fc5.0", x).relu()
    taps = Taps(network, expected)
    with taps.recording() as activations:
        logits = network(images)
        torch.testing.assert_close(activations(), expected)
    torch.testing.assert_close(logits, linear("fc", x))
    assert len(weights) == 2 * 9


def test_the_perceptrons_activations_keep_their_scale() -> None:
    network = build("mlp-1024", in_channels=1, num_classes=10, image_size=(16, 16))
    taps = Taps(network, [*network.taps, network.penultimate])
    with torch.no_grad(), taps.recording() as activations:
        network(torch.randn(32, 1, 16, 16))
        for name, value in activations().items():
            # He et al.'s weights keep the mean square of the inputs, 1.
            assert 0.5 < float(value.square().mean()) < 2, name


def test_the_papers_pairs_distil() -> None:
    """ResNet-34 to VGG-9 (table 3): the maps match at 32x32, so nothing is pooled."""
    size = {"in_channels": 1, "num_classes": 3, "image_size": (32, 32)}
    student, teacher = build("vgg-9-w4", **size), build("resnet-34-imagenet-w4", **size)
    images, labels = torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 2, 0])
    pairs = list(zip(student.taps, teacher.taps, strict=True))
    distiller = Distiller(student, teacher, [VID(pairs, regressor="linear")], example=images)
    distiller(images, labels).loss.backward()
    assert all(p.grad is not None for p in distiller.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("wrn-11-1", (32, 32), "depth 6n"),
        ("wrn-4-1", (32, 32), "depth 6n"),
        ("wrn-10-0", (32, 32), "width 1"),
        ("wrn-10", (32, 32), "wrn-DEPTH-WIDTH"),
        ("wrm-10-1", (32, 32), "did you mean 'wrn'"),
        ("resnet-19", (32, 32), "depth 18 or 34"),
        ("resnet-18-w0", (32, 32), "width 1 or more"),
        ("resnet-18-imagnet", (32, 32), "resnet-DEPTH"),
        ("resnet-18", (8, 7), "images of 8x8 or more for resnet-18 .*got 8x7"),
        ("resnet-34-imagenet", (31, 64), "images of 32x32 or more for resnet-34-imagenet .*got 31x64"),
        ("vgg-9", (8, 8), "images of 32x32 or more for vgg-9 .*got 8x8"),
        ("vgg-9-w0", (32, 32), "width of 1"),
        ("vgg-11", (32, 32), "vgg-9"),
        ("mlp", (32, 32), "mlp-HIDDEN"),
        ("mlp-10", (32, 32), "multiple of 4"),
        ("mlp-0", (32, 32), "multiple of 4"),
        ("wrn-10-1", (0, 32), "image_size of 1"),
    ],
)
def test_wrong_names_and_sizes(name: str, size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, in_channels=1, num_classes=10, image_size=size)


@pytest.mark.parametrize("wrong", [{"in_channels": 0}, {"num_classes": 0}])
def test_wrong_numbers(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} of 1 or more"):
        build("wrn-10-1", **({"in_channels": 1, "num_classes": 2} | wrong))


def test_a_perceptron_says_which_images_it_was_built_for() -> None:
    network = build("mlp-8", in_channels=1, num_classes=2, image_size=(8, 8))
    with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\).*got \(2, 1, 4, 16\)"):
        network(torch.randn(2, 1, 4, 16))


def test_weights_follow_from_the_random_state() -> None:
    for name in ("resnet-18-w4", "vgg-9-w4", "mlp-8", "wrn-10-1"):
        networks = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            networks.append(build(name, in_channels=1, num_classes=2).state_dict())
        first, again, other = (torch.cat([v.flatten().float() for v in n.values()]) for n in networks)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
