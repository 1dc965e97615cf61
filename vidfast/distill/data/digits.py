"""Handwritten digits, 8x8 grey, that come with scikit-learn: no download; also enlarged to 32x32.

1797 images: the test set of the UCI data set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak
1998). The split is fixed: 50 images a class to test, 25 to validate, the rest (about 105) to train.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from .augment import random_shift
from .base import DATA_SETS, ImageData, Images, Normalisation, no_root
from .sampling import stratified_parts

TEST_PER_CLASS = 50
VALIDATION_PER_CLASS = 25
SPLIT_SEED = 20190
WHITE = 16  # the digits' largest value


@DATA_SETS.register("digits")
def digits(root: Path | None = None) -> ImageData:
    """The digits, scaled so that the training part has mean 0 and standard deviation 1.

    Images are (N, 1, 8, 8) fp32; augmentation shifts by up to one pixel. Needs scikit-learn.
    """
    no_root("digits", root)
    return _digits("digits", enlarged=1)


@DATA_SETS.register("digits32")
def digits32(root: Path | None = None) -> ImageData:
    """The digits enlarged four times, bilinearly, for networks whose layers do not fit 8x8 images.

    Images are (N, 1, 32, 32) fp32; augmentation shifts by up to four pixels, which is one of the original's.
    The split is that of "digits". Needs scikit-learn.
    """
    no_root("digits32", root)
    return _digits("digits32", enlarged=4)


def _digits(name: str, enlarged: int) -> ImageData:
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images).to(torch.float32)[:, None] / WHITE
    if enlarged > 1:
        images = F.interpolate(images, scale_factor=enlarged, mode="bilinear", align_corners=False)
    labels = torch.from_numpy(raw.target).to(torch.int64)
    test, validation, train = stratified_parts(labels, (TEST_PER_CLASS, VALIDATION_PER_CLASS), SPLIT_SEED)
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    everything = Images(images, labels)
    return ImageData(
        name=name,
        num_classes=10,
        train=everything.subset(train),
        validation=everything.subset(validation),
        test=everything.subset(test),
        augment=random_shift(enlarged, fill=float(-mean / std)),
        normalisation=Normalisation(mean.reshape(1), std.reshape(1)),
        class_names=tuple(str(digit) for digit in range(10)),
    )
