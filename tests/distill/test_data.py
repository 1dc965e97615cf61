"""The digits and their split, M-per-class subsets, parts of classes, normalisation, names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader

from vidfast.distill import UnknownNameError
from vidfast.distill.data import (
    DATA_SETS,
    DataError,
    ImageData,
    Images,
    Normalisation,
    hold_out,
    load,
    samples_per_class,
)
from vidfast.distill.data.sampling import stratified_shares


def rows(images: Images) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.images}


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load("digits")


@pytest.fixture(scope="module")
def digits32() -> ImageData:
    return load("digits32")


def test_the_parts_of_the_digits_share_no_image_and_are_fixed(digits: ImageData) -> None:
    parts = [digits.train, digits.validation, digits.test]
    assert [len(part) for part in parts] == [1047, 250, 500]
    # The 1797 digits are all different, so what is equal would be the same image.
    assert len(set.union(*map(rows, parts))) == 1797
    assert digits.test.labels.bincount().tolist() == [50] * 10
    assert digits.validation.labels.bincount().tolist() == [25] * 10
    assert float(digits.train.images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(digits.train.images.std()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(load("digits").test.images, digits.test.images)
    assert (digits.in_channels, digits.image_size, digits.num_classes) == (1, (8, 8), 10)


def test_the_digits_show_their_labels(digits: ImageData) -> None:
    """Every image is the one of scikit-learn with that label."""
    raw = load_digits()
    known = {
        bytes(image.astype("uint8")): int(label) for image, label in zip(raw.images, raw.target, strict=True)
    }
    pixels = digits.normalisation.pixels(digits.test.images)
    found = [known[bytes((image * 16).round().byte().numpy())] for image in pixels[:, 0]]
    assert found == digits.test.labels.tolist()


def test_enlarged_digits_are_the_digits(digits: ImageData, digits32: ImageData) -> None:
    assert (digits32.in_channels, digits32.image_size) == (1, (32, 32))
    for name in ("train", "validation", "test"):
        small, large = getattr(digits, name), getattr(digits32, name)
        assert torch.equal(small.labels, large.labels)
    assert float(digits32.train.images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(digits32.train.images.std()) == pytest.approx(1, abs=1e-5)
    small = digits.normalisation.pixels(digits.test.images)
    large = digits32.normalisation.pixels(digits32.test.images)
    # Four new pixels for an old one along each axis, whose centres lie 1/8 and 3/8 of a pixel from its own:
    # between two old ones the weights are 5/8 and 3/8, or 7/8 and 1/8.
    left, right = small[:, :, :, :-1], small[:, :, :, 1:]
    along = torch.stack([left * w + right * (1 - w) for w in (7 / 8, 5 / 8, 3 / 8, 1 / 8)], 4).flatten(3)
    top, bottom = along[:, :, :-1], along[:, :, 1:]
    both = torch.stack([top * w + bottom * (1 - w) for w in (7 / 8, 5 / 8, 3 / 8, 1 / 8)], 3).flatten(2, 3)
    torch.testing.assert_close(large[:, :, 2:-2, 2:-2], both, rtol=0, atol=1e-5)


def test_augmentation_of_the_digits_shifts_by_one_of_their_pixels(
    digits: ImageData, digits32: ImageData
) -> None:
    for data, reach in ((digits, 1), (digits32, 4)):
        side = data.image_size[0]
        black = float(data.train.images.min())
        dot = torch.full((256, 1, side, side), black)
        dot[:, :, side // 2, side // 2] = 9.0
        shifted = data.augment(dot, torch.Generator().manual_seed(0))
        where = (shifted == 9.0).nonzero()[:, 2:] - side // 2
        assert (int(where.min()), int(where.max())) == (-reach, reach)
        # Black comes in.
        assert float(shifted.min()) == pytest.approx(black, abs=1e-6)


def test_names_are_found_or_suggested(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'digits'"):
        load("digit")
    with pytest.raises(UnknownNameError, match="'digits-16'"):
        load("digits-16")
    with pytest.raises(DataError, match="no root"):
        load("digits", root=tmp_path)
    assert {"digits", "digits32", "cifar10", "cifar100", "folder"} <= set(DATA_SETS)


def test_samples_per_class_are_balanced_seeded_and_nested(digits: ImageData) -> None:
    five, again, other = (samples_per_class(digits.train, 5, seed) for seed in (0, 0, 1))
    assert five.labels.bincount().tolist() == [5] * 10
    assert torch.equal(five.images, again.images)
    assert not torch.equal(five.images, other.images)
    # A larger M adds images to the smaller one's.
    assert rows(five) < rows(samples_per_class(digits.train, 10, 0))
    assert rows(five) < rows(digits.train)
    with pytest.raises(ValueError, match="wanted 500 images a class, and class 0 has"):
        samples_per_class(digits.train, 500, 0)
    with pytest.raises(ValueError, match="1 or more"):
        samples_per_class(digits.train, 0, 0)


def test_samples_of_classes_that_differ_in_number() -> None:
    labels = torch.tensor([0] * 2 + [1] * 7 + [2] * 4)
    images = Images(torch.arange(13.0).reshape(13, 1, 1, 1), labels)
    assert samples_per_class(images, 4, 0, at_most=True).labels.bincount().tolist() == [2, 4, 4]
    assert rows(samples_per_class(images, 9, 0, at_most=True)) == rows(images)
    assert rows(samples_per_class(images, None, 0)) == rows(images)
    with pytest.raises(ValueError, match="wanted 4 images a class, and class 0 has 2"):
        samples_per_class(images, 4, 0)


def test_a_share_of_the_labelled_images_is_held_out(digits: ImageData) -> None:
    labelled = samples_per_class(digits.train, 10, 0)
    rest, held = hold_out(labelled, 0.2, seed=0)
    assert held.labels.bincount().tolist() == [2] * 10
    assert rest.labels.bincount().tolist() == [8] * 10
    assert rows(rest) | rows(held) == rows(labelled)
    assert torch.equal(hold_out(labelled, 0.2, seed=0)[1].images, held.images)
    assert rows(hold_out(labelled, 0.2, seed=1)[1]) != rows(held)
    with pytest.raises(ValueError, match="class 0 for 2 parts"):
        hold_out(samples_per_class(digits.train, 1, 0), 0.2, seed=0)
    with pytest.raises(ValueError, match="above 0"):
        hold_out(labelled, 0.0, seed=0)


def test_shares_of_classes_that_differ_in_number() -> None:
    labels = torch.tensor([0] * 3 + [1] * 40 + [2] * 25)[torch.randperm(68)]
    parts = stratified_shares(labels, (0.2, 0.1), seed=0)
    assert [labels[part].bincount().tolist() for part in parts] == [[1, 8, 5], [1, 4, 2], [1, 28, 18]]
    assert sorted(torch.cat(parts).tolist()) == list(range(68))


def test_classes_are_kept_and_renumbered(digits: ImageData) -> None:
    kept = digits.classes([7, 2, 3])
    assert kept.num_classes == 3
    assert kept.class_names == ("7", "2", "3")
    assert kept.name == "digits-classes-7-2to3"
    for name in ("train", "validation", "test"):
        old, new = getattr(digits, name), getattr(kept, name)
        assert len(new) == sum(int((old.labels == label).sum()) for label in (7, 2, 3))
        for number, label in enumerate((7, 2, 3)):
            assert torch.equal(new.images[new.labels == number], old.images[old.labels == label])
    # What was not asked for is as it was, and the parts of both halves are the whole.
    assert digits.num_classes == 10
    halves = [digits.classes(range(5)), digits.classes(range(5, 10))]
    assert sum(len(half.test) for half in halves) == 500
    assert halves[0].name != halves[1].name
    assert int(halves[1].train.labels.max()) == 4
    for wrong in ([], [1, 1], [10], [-1]):
        with pytest.raises(ValueError, match="different classes out of 0 to 9"):
            digits.classes(wrong)


def test_names_of_many_classes_stay_short_and_different() -> None:
    labels = torch.arange(200)
    images = Images(torch.zeros(200, 1, 1, 1), labels)
    data = ImageData("many", 200, images, images, images)
    even, odd = data.classes(range(0, 200, 2)), data.classes(range(1, 200, 2))
    assert len({even.name, odd.name, data.name}) == 3
    assert max(len(even.name), len(odd.name)) < 60


def test_the_validation_part_can_join_the_training_part(digits: ImageData) -> None:
    whole = digits.with_validation_in_train()
    assert rows(whole.train) == rows(digits.train) | rows(digits.validation)
    assert len(whole.train) == 1297
    assert not rows(whole.train) & rows(whole.test)
    assert whole.name != digits.name


def test_images_in_bytes_become_inputs_when_they_are_asked_for() -> None:
    images = torch.randint(0, 256, (20, 3, 4, 5), dtype=torch.uint8)
    images[:, 2] = 77  # a channel without variance
    normalisation = Normalisation.of(images)
    pixels = images.double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    torch.testing.assert_close(normalisation.mean, mean.float())
    torch.testing.assert_close(normalisation.std, torch.tensor([std[0], std[1], 1.0]).float())
    data = Images(images, torch.arange(20), normalisation)
    expected = ((pixels - mean[:, None, None]) / normalisation.std.double()[:, None, None]).float()
    torch.testing.assert_close(data[3][0], expected[3])
    torch.testing.assert_close(data.example(), expected[:2])
    torch.testing.assert_close(data.inputs([5, 1]), expected[[5, 1]])
    # A loader's batches, which take another way, hold the same numbers.
    for batch, (inputs, labels) in enumerate(DataLoader(data, batch_size=8)):
        torch.testing.assert_close(inputs, expected[8 * batch :][:8])
        assert labels.tolist() == list(range(20))[8 * batch :][:8]
    torch.testing.assert_close(normalisation.pixels(expected), pixels.float())
    black = normalisation.inputs(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).flatten()
    torch.testing.assert_close(torch.tensor(normalisation.black), black)
    assert data.subset(torch.tensor([4])).images.dtype == torch.uint8


def test_items_and_batches_of_a_loader_are_equal_and_draw_nothing(digits: ImageData) -> None:
    before = torch.get_rng_state()
    inputs, labels = next(iter(DataLoader(digits.test, batch_size=500)))
    assert torch.equal(inputs, digits.test.images)
    assert torch.equal(labels, digits.test.labels)
    digits.test[0], digits.test.example(3)
    # The loader itself draws a seed for its workers; the data set must draw nothing.
    torch.set_rng_state(before)
    item = digits.test[7]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(item[0], digits.test.images[7])


def test_images_and_labels_must_fit() -> None:
    with pytest.raises(ValueError, match="wanted images"):
        Images(torch.zeros(3, 1, 2, 2), torch.zeros(4, dtype=torch.int64))
    bytes_, labels = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="normalisation with uint8"):
        Images(bytes_, labels)
    with pytest.raises(ValueError, match="normalisation with uint8"):
        Images(bytes_.float(), labels, Normalisation(torch.zeros(1), torch.ones(1)))


def test_a_constant_image_is_not_divided_by_zero() -> None:
    constant: Tensor = torch.full((2, 1, 3, 3), 255, dtype=torch.uint8)
    assert torch.equal(Normalisation.of(constant).inputs(constant), torch.zeros(2, 1, 3, 3))
