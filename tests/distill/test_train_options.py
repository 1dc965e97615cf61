"""What a training is asked to do: options that are refused, schedules, epochs and checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import QUICK, made, train

from vidfast.distill.data import Images
from vidfast.distill.trainer import Trainer, TrainOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps of 1 or more"),
        ({"batch_size": 0}, "batch_size of 1"),
        ({"lr": float("nan")}, "lr of 0 or more"),
        ({"weight_decay": -1.0}, "weight_decay of 0"),
        ({"seed": -1}, "seed of 0"),
        ({"schedule": "linear"}, "one of cosine, steps, constant"),
        ({"optimizer": "lion"}, "one of sgd, adamw"),
        ({"mixed_precision": "int8"}, "one of no, bf16, fp16"),
        ({"device": "tpu"}, "one of auto, cpu, cuda"),
        ({"epochs": 0}, "epochs of 1 or more"),
        ({"checkpoint_every": "hour"}, "checkpoint_every as a number of steps or 'epoch'"),
        ({"clip": 0.0}, "clip above 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainOptions(**options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"steps": 2.5}, "steps as a whole number, got 2.5"),
        ({"eval_every": 1.5}, "eval_every as a whole number"),
        ({"lr": "0.1"}, "lr as a number, got '0.1'"),
        ({"steps": True}, "steps as a whole number, got True"),
    ],
)
def test_options_of_other_types_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TrainOptions(**options)


def test_schedules_and_clipping(small_data: Images) -> None:
    lr = [row["lr"] for row in train(small_data, replace(QUICK, schedule="steps", eval_every=1, lr=1e-3))[0]]
    # The rate for the step after the row: ten times less at 60, 80 and 90 % of 12 steps.
    assert lr == pytest.approx([1e-3] * 7 + [1e-4] * 2 + [1e-5] + [1e-6] * 2)
    clipped = train(small_data, replace(QUICK, clip=1e-9, weight_decay=0.0))[1]
    for key, value in made(small_data).state_dict().items():
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(clipped[key], value, rtol=0, atol=1e-6)


def test_epochs_and_checkpoints_at_their_ends(small_data: Images, tmp_path: Path) -> None:
    options = replace(QUICK, epochs=3, eval_every="epoch", checkpoint_every="epoch")
    trainer = Trainer(made(small_data), small_data, options, folder=tmp_path, progress=False)
    # 30 images in batches of 8: the ends are in steps 4, 8 and 12 (3.75, 7.5 and 11.25).
    assert [row["step"] for row in trainer.fit()] == [4, 8, 12]
    due = [step for step in range(1, 13) if trainer.options.checkpoint_due(step, 30)]
    assert due == [4, 8, 12]
    # One step is a whole epoch: not a checkpoint a step.
    tiny = TrainOptions(epochs=1000, batch_size=64, checkpoint_every="epoch").of_data(30)
    assert tiny.steps == 1000
    assert sum(tiny.checkpoint_due(step, 30) for step in range(1, 1001)) == 100
    large = TrainOptions(epochs=2, batch_size=8, checkpoint_every="epoch").of_data(1000)
    assert [step for step in range(1, 251) if large.checkpoint_due(step, 1000)] == [125, 250]
