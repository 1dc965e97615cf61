"""Networks written as torchvision and timm write theirs: in-place ReLUs behind BatchNorm, one ReLU called twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vidfast.distill import VID, Distiller, TapError
from vidfast.distill.models import build


class InPlaceBlock(nn.Module):
    """As in torchvision's ResNet: one in-place ReLU, called behind bn1 and behind the sum."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        y: Tensor = self.relu(out)
        return y


class ForeignResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(InPlaceBlock(1, 4, 1), InPlaceBlock(4, 4, 1))
        self.layer2 = nn.Sequential(InPlaceBlock(4, 8, 2), InPlaceBlock(8, 8, 1))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))
        return logits


class ForeignVGG(nn.Module):
    """As in torchvision's VGG: all of it in one Sequential, `features`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Linear(8 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


IMAGES, LABELS = torch.linspace(-1, 1, 4 * 64).reshape(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])


def distil(student: nn.Module, teacher: nn.Module, pairs: dict[str, str], **options: bool) -> Distiller:
    distiller = Distiller(student, teacher, [VID(pairs, regressor="linear")], example=IMAGES, **options)
    distiller(IMAGES, LABELS).loss.backward()
    return distiller


def test_groups_of_a_foreign_network_are_tapped_by_name() -> None:
    """The documented way: the end of a group is a ReLU's output, which nothing changes afterwards."""
    student = build("wrn-10-1", in_channels=1, num_classes=3)
    distil(student, ForeignResNet(), {"group1": "layer1", "group2": "layer2"})
    assert all(p.grad is not None for p in student.parameters())


def test_a_foreign_student_learns_too() -> None:
    student = ForeignVGG()
    distil(student, ForeignResNet(), {"features.2": "layer1", "features.6": "layer2"})
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize(
    ("network", "layer"),
    [(ForeignResNet, "layer1.0.bn1"), (ForeignResNet, "layer1.1.bn2"), (ForeignVGG, "features.1")],
)
def test_a_layer_behind_which_a_relu_works_in_place_is_an_error_or_a_copy(
    network: type[nn.Module], layer: str
) -> None:
    for student, teacher, pairs in (
        (network(), ForeignResNet(), {layer: "layer1"}),
        (ForeignVGG(), network(), {"features.2": layer}),
    ):
        with pytest.raises(TapError, match=rf"{layer}.*in place.*clone_taps=True"):
            distil(student, teacher, pairs)
        distil(student, teacher, pairs, clone_taps=True)


def test_a_copy_is_what_the_layer_gave() -> None:
    """Not what the ReLU made of it: BatchNorm's output has mean 0 and negative elements."""
    seen: list[Tensor] = []

    def mean_function(student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module:
        class Looks(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                seen.append(x.detach().clone())
                return super().forward(x)

        return Looks(student[1], teacher[1], 1)

    term = VID({"features.1": "layer1"}, regressor=mean_function)
    distiller = Distiller(ForeignVGG(), ForeignResNet(), [term], example=IMAGES, clone_taps=True)
    distiller.train()
    distiller(IMAGES, LABELS).loss.backward()
    assert float(seen[-1].min()) < 0
    assert float(seen[-1].mean()) == pytest.approx(0, abs=1e-5)


def test_a_relu_that_is_called_twice_is_an_error_that_says_so() -> None:
    with pytest.raises(TapError, match=r"layer1\.0\.relu.*called twice"):
        distil(ForeignVGG(), ForeignResNet(), {"features.2": "layer1.0.relu"})
