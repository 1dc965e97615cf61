"""Wide residual networks, the digits and their split, M-per-class subsets, augmentation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vidfast.distill import Taps, UnknownNameError
from vidfast.distill.data import DATA_SETS, Images, random_shift, samples_per_class
from vidfast.distill.models import build


@pytest.mark.parametrize(
    ("name", "channels", "parameters"),
    # Zagoruyko and Komodakis, table 4: WRN-40-4 has 8.9M and WRN-16-8 11.0M parameters; RepDistiller's
    # WRN-40-2 and WRN-16-2 have 2.26M and 0.70M for 100 classes.
    [
        ("wrn-16-2", (16, 32, 64, 128), 0.70e6),
        ("wrn-40-2", (16, 32, 64, 128), 2.26e6),
        ("wrn-16-8", (16, 128, 256, 512), 11.0e6),
    ],
)
def test_wide_residual_networks(name: str, channels: tuple[int, ...], parameters: float) -> None:
    network = build(name, in_channels=3, num_classes=100).eval()
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=0.01)
    taps = Taps(network, [*network.taps, network.penultimate])
    with torch.no_grad(), taps.recording() as activations:
        assert network(torch.randn(2, 3, 32, 32)).shape == (2, 100)
        shapes = [tuple(value.shape) for value in activations().values()]
    sizes = (32, 32, 16, 8)
    assert shapes == [*((2, c, n, n) for c, n in zip(channels, sizes, strict=True)), (2, channels[-1])]


def test_wide_residual_network_on_8x8_grey_images() -> None:
    network = build("wrn-10-1", in_channels=1, num_classes=10)
    network(torch.randn(2, 1, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in network.modules()) == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrn-11-1", "depth 6n"),
        ("wrn-4-1", "depth 6n"),
        ("wrn-10-0", "width 1"),
        ("wrn-10", "wrn-DEPTH-WIDTH"),
        ("wrm-10-1", "did you mean 'wrn'"),
    ],
)
def test_wrong_network_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, in_channels=1, num_classes=10)


def rows(images: Images) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.images}


def test_the_parts_of_the_digits_share_no_image_and_are_fixed() -> None:
    data = DATA_SETS["digits"]()
    parts = [data.train, data.validation, data.test]
    assert [len(part) for part in parts] == [1047, 250, 500]
    # The 1797 digits are all different, so what is equal would be the same image.
    assert len(set.union(*map(rows, parts))) == 1797
    assert data.test.labels.bincount().tolist() == [50] * 10
    assert data.validation.labels.bincount().tolist() == [25] * 10
    assert float(data.train.images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(data.train.images.std()) == pytest.approx(1, abs=1e-5)
    again = DATA_SETS["digits"]()
    assert torch.equal(again.test.images, data.test.images)
    assert data.in_channels == 1
    with pytest.raises(UnknownNameError, match="did you mean 'digits'"):
        DATA_SETS["digit"]


def test_samples_per_class_are_balanced_seeded_and_nested() -> None:
    data = DATA_SETS["digits"]()
    five, again, other = (samples_per_class(data.train, 5, seed) for seed in (0, 0, 1))
    assert five.labels.bincount().tolist() == [5] * 10
    assert torch.equal(five.images, again.images)
    assert not torch.equal(five.images, other.images)
    # A larger M adds images to the smaller one's.
    assert rows(five) < rows(samples_per_class(data.train, 10, 0))
    assert rows(five) < rows(data.train)
    with pytest.raises(ValueError, match="wanted 500 images a class, and class 0 has"):
        samples_per_class(data.train, 500, 0)
    with pytest.raises(ValueError, match="1 or more"):
        samples_per_class(data.train, 0, 0)


def test_shift_moves_each_image_whole_by_its_own_amount() -> None:
    images = torch.zeros(64, 2, 5, 5)
    images[:, :, 2, 2] = torch.tensor([1.0, 2.0])
    shifted = random_shift(1, fill=0.0)(images, torch.Generator().manual_seed(0))
    assert shifted.shape == images.shape
    where: list[Tensor] = [channel.nonzero()[:, 1:] for channel in shifted.unbind(1)]
    assert torch.equal(*where)
    assert len({tuple(place.tolist()) for place in where[0]}) == 9
    assert int((where[0] - 2).abs().max()) == 1
    filled = random_shift(2, fill=-7.0)(torch.zeros(8, 1, 4, 4), torch.Generator().manual_seed(0))
    assert set(filled.unique().tolist()) == {0.0, -7.0}


def test_images_and_labels_must_fit() -> None:
    with pytest.raises(ValueError, match="wanted images"):
        Images(torch.zeros(3, 1, 2, 2), torch.zeros(4, dtype=torch.int64))
