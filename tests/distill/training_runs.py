"""A short training of small networks, for the tests of the trainer and of what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from small_networks import PAIRS, SmallNet
from torch import Tensor

from vidfast.distill import VID, Distiller
from vidfast.distill.data import Images, random_shift
from vidfast.distill.trainer import Trainer, TrainOptions

QUICK = TrainOptions(steps=12, batch_size=8, lr=0.05, eval_every=4, checkpoint_every=4, device="cpu")


def made(images: Images, dropout: float = 0.3, **vid: Any) -> Distiller:
    torch.manual_seed(3)
    student, teacher = SmallNet(4, dropout), SmallNet(6)
    return Distiller(student, teacher, [VID(PAIRS, **vid)], example=images.images[:2])


def train(
    images: Images,
    options: TrainOptions = QUICK,
    folder: Path | None = None,
    resume: bool = False,
    **more: Any,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    distiller = made(images, **more)
    trainer = Trainer(
        distiller,
        images,
        options,
        evaluate={"test": images},
        augment=random_shift(1),
        folder=folder,
        progress=False,
    )
    history = trainer.fit(resume=resume)
    return history, distiller.state_dict()


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key
