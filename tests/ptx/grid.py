"""Runs launches: which blocks run together, and what overlaps."""

from __future__ import annotations

import random

from memory import GlobalMemory
from waves import Launch, Wave


def run(launches: list[Launch], memory: GlobalMemory, seed: int = 0) -> None:
    """One launch after another, blocks in an order drawn at random, some of them at once.

    What a launch with `overlap` does before its wait is done before the launch before it has begun, which is the
    earliest that hardware allows where that one lets its dependents start.
    """
    draw = random.Random(seed)
    waves: list[list[Wave]] = [_waves(launch, memory, draw) for launch in launches]
    for i, mine in enumerate(waves):
        early = i + 1 < len(waves) and launches[i + 1].overlap
        if early and launches[i].kernel.has("griddepcontrol.launch_dependents"):
            for wave in waves[i + 1]:
                wave.run(hold=True)
        for wave in mine:
            wave.run()
        waves[i] = []


def _waves(launch: Launch, memory: GlobalMemory, draw: random.Random) -> list[Wave]:
    """Blocks that speak to one another run one at a time or all at once; others as many as numpy is quick with."""
    for name, data in launch.kernel.constants.items():
        launch.constants[name] = memory.add_constant(data, f"the array {name}")
    blocks = list(range(launch.blocks))
    draw.shuffle(blocks)
    most = max(1, 4096 // launch.threads)
    if launch.kernel.has("atom", "red"):
        most = draw.choice((1, 2, most))
    return [Wave(launch, blocks[i : i + most], memory, draw) for i in range(0, len(blocks), most)]
