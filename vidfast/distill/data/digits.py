"""Handwritten digits, 8x8 grey, that come with scikit-learn: no download.

1797 images: the test set of the UCI data set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak
1998). The split is fixed: 50 images a class to test, 25 to validate, the rest (about 105) to train.
"""

from __future__ import annotations

import torch

from .base import DATA_SETS, ImageData, Images, random_shift, stratified_parts

TEST_PER_CLASS = 50
VALIDATION_PER_CLASS = 25
SPLIT_SEED = 20190


@DATA_SETS.register("digits")
def digits() -> ImageData:
    """The digits, scaled so that the training part has mean 0 and standard deviation 1.

    Images are (N, 1, 8, 8) fp32; augmentation shifts by up to one pixel. Needs scikit-learn.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images).to(torch.float32)[:, None]
    labels = torch.from_numpy(raw.target).to(torch.int64)
    test, validation, train = stratified_parts(labels, (TEST_PER_CLASS, VALIDATION_PER_CLASS), SPLIT_SEED)
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    everything = Images(images, labels)
    return ImageData(
        name="digits",
        num_classes=10,
        train=everything.subset(train),
        validation=everything.subset(validation),
        test=everything.subset(test),
        augment=random_shift(1, fill=float(-mean / std)),
    )
