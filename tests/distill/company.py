"""A process in which others train too: an Accelerator in the middle of a cycle, another Trainer, mutual learning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from small_networks import PAIRS, SmallNet
from torch import nn
from training_runs import QUICK, made

from vidfast.distill import KD, VID, Distiller
from vidfast.distill.data import Images
from vidfast.distill.trainer import Trainer


def unfinished_cycle() -> Any:
    """An Accelerator that has gone two of four parts of a batch, and so holds its gradients back."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
    model = nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(2, 2)).float().sum())
            optimizer.step()
            optimizer.zero_grad()
    return accelerator


def of_accelerate() -> dict[str, Any]:
    """All that Accelerate keeps for the whole process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    kinds = (AcceleratorState, GradientState, PartialState)
    return {f"{kind.__name__}.{name}": value for kind in kinds for name, value in kind._shared_state.items()}


@contextmanager
def company() -> Iterator[None]:
    """Afterwards it is looked at whether the others were left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(17)
        data = Images(torch.randn(30, 1, 8, 8), torch.arange(30) % 3)
        accelerator = unfinished_cycle()
        trainer = Trainer(made(data), data, QUICK, progress=False)
        trainer.fit()
        a, b = SmallNet(4), SmallNet(6)
        pair = [Distiller(s, t, [VID(PAIRS), KD()], example=data.images[:2]) for s, t in ((a, b), (b, a))]
        for distiller in pair:
            distiller(data.images[:8], data.labels[:8]).loss.backward()
    before = of_accelerate()
    gradients = [p.grad for p in a.parameters()]
    yield
    assert of_accelerate() == before
    assert not accelerator.sync_gradients
    assert all(module.training for network in (a, b) for module in network.modules())
    assert all(p.grad is g for p, g in zip(a.parameters(), gradients, strict=True))
    assert [row["step"] for row in trainer.history] == [4, 8, 12]
