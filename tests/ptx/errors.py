"""What is wrong with a program that is interpreted, and where."""

from __future__ import annotations


class Fault(Exception):
    """An access, a register or a barrier that is used wrongly.

    lane: which of the threads that run together, where that is known. The machine turns it into a block and a thread
    and adds the kernel and the instruction.
    """

    def __init__(self, message: str, lane: int | None = None) -> None:
        super().__init__(message)
        self.lane = lane


class UnknownInstruction(Exception):
    """A program has an instruction, or a form of one, that the interpreter does not have."""
