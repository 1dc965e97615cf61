"""ldmatrix and stmatrix: 8 by 8 matrices of 16 bits, moved between shared memory and a warp's registers.

Thread 8 i + j of a warp gives the address of row j of matrix i, 16 bytes. Of each matrix thread t has two neighbours in
one register: elements 2 (t % 4) and the next of row t / 4, with `.trans` of column t / 4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from decode import Step, addresses, instruction, parts, reader, writer
from program import Immediate, Instruction
from waves import WARP, Wave

Array = Any
_ALL = Immediate(0xFFFFFFFF, None)
_FORMS = "sync aligned m8n8 x1 x2 x4 trans shared shared::cta"


def _rows(wave: Wave, address: Array, matrix: int) -> tuple[Array, Array]:
    """The addresses of a matrix's rows, given to the first eight threads of each warp; and these threads."""
    given = np.broadcast_to(address, (wave.lanes,)).reshape(-1, WARP)
    rows, lanes = np.zeros_like(given), np.zeros(given.shape, bool)
    rows[:, :8] = given[:, 8 * matrix : 8 * matrix + 8]
    lanes[:, :8] = True
    return rows.reshape(-1), lanes.reshape(-1) & wave.mask


@instruction("ldmatrix", "b16", _FORMS)
def _load(ins: Instruction) -> Step:
    writes, address = [writer(o) for o in parts(ins.operands[0])], addresses(ins.operands[1])

    def run(wave: Wave) -> None:
        for i, write in enumerate(writes):
            rows, lanes = _rows(wave, address(wave), i)
            with wave.only(lanes):
                words = [wave.spread(word) for word in wave.load("shared", rows, 4, 4)]
            matrix = np.stack(words, 1).reshape(-1, WARP, 4)[:, :8].copy().view(np.uint16)
            if "trans" in ins.modifiers:
                matrix = np.ascontiguousarray(matrix.transpose(0, 2, 1))
            write(wave, matrix.view(np.uint32).reshape(-1))

    return Step(ins, run, "warp", members=reader(_ALL, "b32"))


@instruction("stmatrix", "b16", _FORMS)
def _store(ins: Instruction) -> Step:
    address, reads = addresses(ins.operands[0]), [reader(o, "b32") for o in parts(ins.operands[1])]

    def run(wave: Wave) -> None:
        for i, read in enumerate(reads):
            rows, lanes = _rows(wave, address(wave), i)
            pairs = np.ascontiguousarray(np.broadcast_to(read(wave), (wave.lanes,)))
            matrix = pairs.view(np.uint16).reshape(-1, 8, 8)
            if "trans" in ins.modifiers:
                matrix = matrix.transpose(0, 2, 1)
            words = np.zeros((wave.lanes // WARP, WARP, 4), np.uint32)
            words[:, :8] = np.ascontiguousarray(matrix).view(np.uint32)
            with wave.only(lanes):
                wave.store("shared", rows, list(words.reshape(-1, 4).T))

    return Step(ins, run, "warp", members=reader(_ALL, "b32"))
