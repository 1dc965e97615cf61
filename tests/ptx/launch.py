"""A kernel with what it is launched with."""

from __future__ import annotations

from dataclasses import dataclass, field

from decode import Step
from program import Kernel


@dataclass
class Launch:
    kernel: Kernel
    steps: list[Step]
    title: str  # in messages
    grid: tuple[int, int, int]
    threads: int  # of a block, which has one dimension
    shared_bytes: int  # asked for beside those of fixed size
    parameters: bytes
    overlap: bool = False  # it may start before the launch before it has ended
    constants: dict[str, int] = field(default_factory=dict)  # where its arrays in global memory are

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def block(self, number: int) -> tuple[int, int, int]:
        x, y, _ = self.grid
        return number % x, number // x % y, number // (x * y)
