"""What users write to train; it needs the packages of vidfast[train] (test_typing.py)."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import assert_type

from vidfast.distill import VID, Distiller
from vidfast.distill.data import load
from vidfast.distill.models import build
from vidfast.distill.trainer import Trainer, TrainOptions


def main() -> None:
    data = load("digits")
    student = build("wrn-10-1", in_channels=1, num_classes=10, image_size=data.image_size)
    teacher = build("wrn-10-1", in_channels=1, num_classes=10, image_size=data.image_size)
    vid = VID({"group3": "group3"}, regressor="linear")
    distiller = Distiller(student, teacher, [vid], example=data.train.example())
    options = TrainOptions(
        steps=2,
        batch_size=8,
        optimizer="adamw",
        lr=1e-3,
        schedule="steps",
        eval_every="epoch",
        checkpoint_every=0,
        mixed_precision="no",
        device="cpu",
    )
    few = data.validation.subset(torch.arange(16))
    trainer = Trainer(distiller, data.train, options, evaluate={"validation": few}, progress=False)
    rows = assert_type(trainer.fit(), list[dict[str, Any]])
    print(rows[-1]["loss"], assert_type(trainer.accuracy(few), float))


if __name__ == "__main__":
    main()
