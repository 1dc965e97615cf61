"""What threads do together and where they go: branches, barriers, shuffles, votes, the wait for the grid before."""

from __future__ import annotations

from typing import Any

import numpy as np
from decode import Run, Step, instruction, reader, writer
from errors import Fault, UnknownInstruction
from program import Immediate, Instruction, Operand, Pair
from waves import WARP, Wave

Array = Any


@instruction("bra", modifiers="uni")
def _branch(ins: Instruction) -> Step:
    return Step(ins, None, "branch")


@instruction("brx", modifiers="idx uni")
def _indexed_branch(ins: Instruction) -> Step:
    return Step(ins, reader(ins.operands[0], "u32"), "branch")


@instruction("ret exit", modifiers="uni")
def _exit(ins: Instruction) -> Step:
    return Step(ins, None, "exit")


@instruction("trap")
def _trap(ins: Instruction) -> Run:
    def run(wave: Wave) -> None:
        raise Fault("the program stops itself", wave.first(wave.mask))

    return run


@instruction("griddepcontrol", modifiers="wait launch_dependents")
def _grid_dependency(ins: Instruction) -> Step:
    return Step(ins, lambda wave: None, "wait" if "wait" in ins.modifiers else "plain")


# ---- barriers


def _only_barrier_of_all(ins: Instruction, operands: list[Operand]) -> None:
    """A barrier of some of the block's threads is another thing."""
    if len(operands) != 1 or not isinstance(operands[0], Immediate):
        raise UnknownInstruction("a barrier with a number of threads, or in a register")


@instruction("bar barrier", modifiers="cta sync aligned")
def _barrier(ins: Instruction) -> Step:
    _only_barrier_of_all(ins, list(ins.operands))
    return Step(ins, lambda wave: wave.pass_barrier(), "block")


@instruction("bar barrier", "pred u32", "cta red aligned or and popc")
def _barrier_with_vote(ins: Instruction) -> Step:
    result, *barrier, vote = ins.operands
    _only_barrier_of_all(ins, barrier)
    write, read = writer(result), reader(vote, "pred")
    kind = ins.modifiers[-1] if ins.modifiers[-1] != "aligned" else ins.modifiers[-2]

    def run(wave: Wave) -> None:
        votes = np.broadcast_to(read(wave), (wave.lanes,)).reshape(-1, wave.threads)
        each = {"or": votes.any(1), "and": votes.all(1), "popc": votes.sum(1).astype(np.uint32)}[kind]
        wave.pass_barrier()
        write(wave, np.repeat(each, wave.threads))

    return Step(ins, run, "block")


@instruction("bar", modifiers="warp sync")
def _warp_barrier(ins: Instruction) -> Step:
    return Step(ins, lambda wave: None, "warp", members=reader(ins.operands[0], "b32"))


# ---- exchanges within a warp


@instruction("shfl", "b32", "sync up down bfly idx")
def _shuffle(ins: Instruction) -> Step:
    result, source, distance, clamp, members = ins.operands
    pair = (result.first, result.second) if isinstance(result, Pair) else (result, None)
    write, write_inside = writer(pair[0]), None if pair[1] is None else writer(pair[1])
    read, by, limits = reader(source, "b32"), reader(distance, "b32"), reader(clamp, "b32")
    mode = ins.modifiers[-1]

    def run(wave: Wave) -> None:
        lane = np.arange(wave.lanes) % WARP
        b, c = by(wave).astype(np.int64) & 31, limits(wave).astype(np.int64)
        segment, end = (c >> 8) & 31, c & 31
        last, first = (lane & segment) | (end & ~segment), lane & segment
        other = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[mode]
        inside = np.broadcast_to(other >= last if mode == "up" else other <= last, (wave.lanes,))
        taken = np.arange(wave.lanes) - lane + np.where(inside, other, lane)
        absent = wave.mask & ~wave.mask[taken]
        if absent.any():
            raise Fault("a shuffle takes from a thread that is not there", wave.first(absent))
        write(wave, np.broadcast_to(read(wave), (wave.lanes,))[taken])
        if write_inside is not None:
            write_inside(wave, inside)

    return Step(ins, run, "warp", members=reader(members, "b32"))


@instruction("vote", "b32 pred", "sync ballot any all uni")
def _vote(ins: Instruction) -> Step:
    result, vote, members = ins.operands
    write, read, mode = writer(result), reader(vote, "pred"), ins.modifiers[-1]

    def run(wave: Wave) -> None:
        active = wave.mask.reshape(-1, WARP)
        votes = np.broadcast_to(read(wave), (wave.lanes,)).reshape(-1, WARP)
        yes, every = (votes & active).any(1), (votes | ~active).all(1)
        ballot = ((votes & active).astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1)
        each = {"ballot": ballot.astype(np.uint32), "any": yes, "all": every, "uni": every | ~yes}[mode]
        write(wave, np.repeat(each, WARP))

    return Step(ins, run, "warp", members=reader(members, "b32"))


@instruction("redux", "u32 s32", "sync add")
def _warp_sum(ins: Instruction) -> Step:
    result, source, members = ins.operands
    write, read, named = writer(result), reader(source, "b32"), reader(members, "b32")

    def run(wave: Wave) -> None:
        values = np.broadcast_to(read(wave), (wave.lanes,)).reshape(-1, 1, WARP).astype(np.uint64)
        of = np.broadcast_to(named(wave), (wave.lanes,)).reshape(-1, WARP, 1)
        added = (of >> np.arange(WARP, dtype=np.uint32)) & 1
        write(wave, (values * added).sum(2).astype(np.uint32).reshape(-1))

    return Step(ins, run, "warp", members=named)


@instruction("activemask", "b32")
def _active(ins: Instruction) -> Run:
    write = writer(ins.operands[0])

    def run(wave: Wave) -> None:
        active = wave.mask.reshape(-1, WARP).astype(np.uint64) << np.arange(WARP, dtype=np.uint64)
        write(wave, np.repeat(active.sum(1).astype(np.uint32), WARP))

    return run
