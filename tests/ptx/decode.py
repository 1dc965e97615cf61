"""From an instruction to a function that carries it out: the table of opcodes, and how operands are read and written.

An entry of the table says which types and modifiers it takes; an instruction that no entry takes is an
`UnknownInstruction`, so that a modifier is never passed over. To add an instruction, write a function under
`@instruction` in instructions.py (arithmetic), conversions.py, accesses.py (memory) or control.py (threads).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from arithmetic import flushed
from errors import UnknownInstruction
from program import (
    TYPES,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Label,
    Not,
    Operand,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)

if TYPE_CHECKING:
    from waves import Wave

Array = Any
Read = Callable[["Wave"], Array]
Write = Callable[["Wave", Array], None]
Run = Callable[["Wave"], Any]

UNSIGNED: dict[int, Any] = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_KIND = {"u": "u", "b": "u", "s": "i", "f": "f"}
INTEGERS = "u16 u32 u64 s16 s32 s64"
BITS = "b16 b32 b64"
FLOATS = "f32 f64"


def numpy_type(name: str) -> Any:
    """Of a type of PTX. bf16 and packed types are their bits."""
    if name == "pred":
        return np.dtype(np.bool_)
    bits = TYPES[name]
    kind = "u" if name.startswith("bf16") or name.endswith("x2") else _KIND[name[0]]
    return np.dtype(f"{kind}{bits // 8}")


# ---- operands


def reader(operand: Operand, kind: str) -> Read:
    """How an operand's values are read as this type: an array, or one value for all threads."""
    dtype = numpy_type(kind)
    if isinstance(operand, Register):
        return _register_reader(operand, dtype)
    if isinstance(operand, Not):
        inner = _register_reader(operand.register, dtype)
        return lambda wave: ~inner(wave)
    if isinstance(operand, Immediate):
        if operand.size not in (None, 8 * dtype.itemsize):
            raise UnknownInstruction(f"a number of {operand.size} bits as {kind}")
        if kind == "pred":
            truth = np.bool_(operand.bits)
            return lambda wave: truth
        unsigned = UNSIGNED[8 * dtype.itemsize]
        value = unsigned(operand.bits & ((1 << 8 * dtype.itemsize) - 1)).view(dtype)
        return lambda wave: value
    if isinstance(operand, Special):
        name = operand.name
        return lambda wave: wave.special(name).astype(dtype, copy=False)
    if isinstance(operand, Symbol):
        symbol, offset = operand.name, operand.offset
        return lambda wave: dtype.type(wave.symbol(symbol) + offset)
    raise UnknownInstruction(f"{operand} cannot be read")


def _register_reader(register: Register, dtype: Any) -> Read:
    number = register.number
    bits = 1 if dtype == np.bool_ else 8 * dtype.itemsize
    if register.bits < bits or (register.bits == 1) != (bits == 1):
        raise UnknownInstruction(f"{register.name} of {register.bits} bits as {dtype}")
    narrower = None if register.bits == bits else UNSIGNED[bits]

    def read(wave: Wave) -> Array:
        value = wave.registers[number]
        if value is None or number in wave.partly_written:
            wave.check_written(register)
        if narrower is not None:
            value = value.astype(narrower)
        return value.view(dtype)

    return read


def writer(operand: Operand) -> Write:
    """How values are put into a register, by the threads that are active. A narrower value is extended by its sign."""
    if isinstance(operand, Sink):
        return lambda wave, value: None
    if not isinstance(operand, Register):
        raise UnknownInstruction(f"{operand} cannot be written")
    unsigned, size = UNSIGNED[operand.bits], max(operand.bits // 8, 1)
    number = operand.number

    def write(wave: Wave, value: Array) -> None:
        value = np.asarray(value)
        if (value.dtype == np.bool_) != (unsigned is np.bool_) or value.itemsize > size:
            raise UnknownInstruction(f"{value.dtype} into {operand.name} of {operand.bits} bits")
        if value.itemsize < size:
            value = value.astype(f"{value.dtype.kind}{size}")
        wave.put(number, value.view(unsigned))

    return write


def addresses(operand: Operand) -> Read:
    """The byte addresses of [base + offset], unsigned."""
    if not isinstance(operand, Address):
        raise UnknownInstruction(f"{operand} is no address")
    base = operand.base
    bits = base.bits if isinstance(base, Register) else 64
    read = reader(base, f"u{bits}")
    offset = np.uint64(operand.offset & (2**64 - 1))
    return lambda wave: read(wave).astype(np.uint64) + offset


def parts(operand: Operand) -> Sequence[Operand]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


# ---- what many instructions share


def applied(ins: Instruction, function: Callable[..., Array], kinds: Sequence[str]) -> Run:
    """The first operand becomes function of the others, which are read as `kinds`."""
    inputs = [reader(o, kind) for o, kind in zip(ins.operands[1:], kinds, strict=True)]
    write = writer(ins.operands[0])
    return lambda wave: write(wave, function(*(read(wave) for read in inputs)))


def flush(ins: Instruction, function: Callable[..., Array]) -> Callable[..., Array]:
    """With .ftz fp32's subnormal inputs and results are zeros; fp64 has none of it."""
    if "ftz" not in ins.modifiers or ins.types[-1] != "f32":
        return function
    return lambda *inputs: flushed(function(*(flushed(x) for x in inputs)))


# ---- the table


@dataclass
class Step:
    """An instruction, ready to run.

    kind: "plain"; "branch", to `targets` (more than one: `run` gives which); "exit"; "wait", for the grid before;
    "warp" or "block": the threads that `members` names, or all of the block, meet here before they go on.
    """

    instruction: Instruction
    run: Run | None = None
    kind: str = "plain"
    targets: tuple[int, ...] = ()
    members: Read | None = None
    guard: Read | None = field(default=None)


Builder = Callable[[Instruction], "Step | Run"]


@dataclass(frozen=True)
class _Entry:
    types: frozenset[str]
    modifiers: frozenset[str]
    build: Builder


_TABLE: dict[str, list[_Entry]] = {}


def instruction(heads: str, types: str = "", modifiers: str = "") -> Callable[[Builder], Builder]:
    """The decorated function makes the steps of these opcodes, where they have only these types and modifiers."""

    def register(build: Builder) -> Builder:
        for head in heads.split():
            entry = _Entry(frozenset(types.split()), frozenset(modifiers.split()), build)
            _TABLE.setdefault(head, []).append(entry)
        return build

    return register


def decoded(kernel: Kernel) -> list[Step]:
    """The steps of a kernel."""
    steps = []
    for ins in kernel.instructions:
        where = f"{kernel.name}, {ins}"
        entry = next(
            (
                e
                for e in _TABLE.get(ins.head, ())
                if e.types >= set(ins.types) and e.modifiers >= set(ins.modifiers)
            ),
            None,
        )
        if entry is None:
            raise UnknownInstruction(f"the interpreter does not have {ins.opcode} ({where})")
        try:
            made = entry.build(ins)
            step = made if isinstance(made, Step) else Step(ins, made)
            step.guard = None if ins.guard is None else reader(ins.guard, "pred")
        except (UnknownInstruction, ValueError, IndexError) as error:
            raise UnknownInstruction(f"{error} ({where})") from error
        step.targets = _targets(kernel, ins) if step.kind == "branch" else ()
        steps.append(step)
    return steps


def _targets(kernel: Kernel, ins: Instruction) -> tuple[int, ...]:
    label = ins.operands[-1]
    assert isinstance(label, Label), ins
    names = kernel.targets[label.name] if ins.opcode.startswith("brx") else [label.name]
    return tuple(kernel.labels[name] for name in names)
