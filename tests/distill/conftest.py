"""Small networks and data for the distillation library's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small_networks import SmallNet
from torch import Tensor

from vidfast.distill.data import Images


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def student() -> SmallNet:
    return SmallNet(4, dropout=0.3)


@pytest.fixture
def teacher() -> SmallNet:
    return SmallNet(6, dropout=0.3)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 1, 8, 8)


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture
def small_data() -> Images:
    """Three classes that differ in their mean, so that a network can learn them in a few steps."""
    labels = torch.arange(30) % 3
    return Images(torch.randn(30, 1, 8, 8) + labels[:, None, None, None] - 1.0, labels)
