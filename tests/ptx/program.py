"""The text of PTX -> its kernels: instructions with their operands, registers, parameters and symbols."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from errors import UnknownInstruction

TYPES = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16,
    "b32": 32, "u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32,
    "b64": 64, "u64": 64, "s64": 64, "f64": 64,
}  # fmt: skip


# ---- operands


@dataclass(frozen=True)
class Register:
    name: str
    number: int
    bits: int


@dataclass(frozen=True)
class Immediate:
    bits: int  # as they are written, with a sign
    size: int | None  # of a floating-point number; an integer takes that of its instruction


@dataclass(frozen=True)
class Special:
    """%tid.x and its like."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """The address of a parameter, or of an array in shared, local, constant or global memory."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    """[base + offset]."""

    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}."""

    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """a|b: a result and a predicate."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Not:
    """!p."""

    register: Register


@dataclass(frozen=True)
class Sink:
    """_: a result that is thrown away."""


@dataclass(frozen=True)
class Label:
    name: str


Operand = Register | Immediate | Special | Symbol | Address | Vector | Pair | Not | Sink | Label


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | Not | None
    text: str
    line: int  # of the file

    @property
    def head(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        """What stands between the head and the types."""
        return tuple(self.opcode.split(".")[1 : len(self.opcode.split(".")) - len(self.types)])

    @property
    def types(self) -> tuple[str, ...]:
        parts = self.opcode.split(".")
        first = len(parts)
        while first > 1 and parts[first - 1] in TYPES:
            first -= 1
        return tuple(parts[first:])

    def __str__(self) -> str:
        return f"line {self.line}: `{self.text}`"


@dataclass
class Kernel:
    """One .entry."""

    name: str
    parameters: list[tuple[str, int, int]]  # name, offset and bytes
    shared: dict[str, int]  # name: offset
    shared_bytes: int  # of fixed size; what a launch asks for follows
    local: dict[str, int]
    local_bytes: int
    constants: dict[str, bytes]  # arrays in constant and global memory, with what they hold at the start
    registers: list[Register] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    targets: dict[str, list[str]] = field(default_factory=dict)  # .branchtargets

    @property
    def parameter_bytes(self) -> int:
        return max((offset + size for _, offset, size in self.parameters), default=0)

    def has(self, *opcodes: str) -> bool:
        """Whether one of these begins an instruction's opcode."""
        return any(i.opcode.startswith(opcodes) for i in self.instructions)


# ---- the text of a file

_ARRAY = re.compile(
    r"\.(?P<space>shared|global|const|local)(?:\s+\.align\s+(?P<align>\d+))?\s+\.(?P<type>\w+)\s+(?P<name>[\w$]+)"
    r"(?:\[(?P<count>\d*)\])?(?:\s*=\s*(?:\{(?P<values>[^}]*)\}|(?P<value>[\w.+-]+)))?\s*;"
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
    r"(?P<name>[\w$]+)(?:\[(?P<count>\d+)\])?"
)
_ENTRY = re.compile(r"\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>.*?)\)[^{]*\{", re.DOTALL)


def _without_comments(text: str) -> str:
    """With as many lines as before."""

    def blank(found: re.Match[str]) -> str:
        return "\n" * found[0].count("\n")

    text = re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.DOTALL)
    return re.sub(r"^[ \t]*\.(?:loc|file)\b[^\n]*", "", text, flags=re.MULTILINE)


def _end_of_braces(text: str, start: int) -> int:
    """Where the brace that opens at `start` closes."""
    depth = 0
    for found in re.finditer(r"[{}]", text[start:]):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return start + found.start()
    raise ValueError(f"a brace is not closed: {text[start : start + 80]!r}")


def _round_up(n: int, to: int) -> int:
    return (n + to - 1) // to * to


def _initial(found: re.Match[str]) -> bytes:
    """What a constant or global array holds."""
    size = TYPES[found["type"]] // 8
    count = int(found["count"] or 1)
    if found["values"] is None and found["value"] is None:
        return bytes(size * count)
    numbers = [v.strip() for v in (found["values"] or found["value"]).split(",") if v.strip()]
    out = b""
    for number in numbers:
        bits = int(number[2:], 16) if re.match(r"0[fFdD]", number) else int(number.rstrip("U"), 0)
        out += (bits & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return out.ljust(size * count, b"\0")


class Module:
    """A file. A kernel is read when it is asked for."""

    def __init__(self, text: str) -> None:
        self._text = _without_comments(text)
        self._entries = {found["name"]: found for found in _ENTRY.finditer(self._text)}
        self._kernels: dict[str, Kernel] = {}

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def kernel(self, name: str) -> Kernel:
        if name not in self._kernels:
            if name not in self._entries:
                raise ValueError(f"there is no kernel {name!r}, but {', '.join(self._entries) or 'none'}")
            entry, text = self._entries[name], self._text
            body = text[entry.end() : _end_of_braces(text, entry.end() - 1)]
            outside = [a for a in _ARRAY.finditer(text) if not self._is_inside(a.start())]
            kernel = _outline(entry, outside + list(_ARRAY.finditer(body)))
            _Body(kernel).read(_ARRAY.sub("", body), 1 + text.count("\n", 0, entry.end()))
            self._kernels[name] = kernel
        return self._kernels[name]

    def _is_inside(self, place: int) -> bool:
        """Whether it is in some kernel's body."""
        before = [e for e in self._entries.values() if e.start() < place]
        return bool(before) and _end_of_braces(self._text, before[-1].end() - 1) > place


def _outline(entry: re.Match[str], arrays: list[re.Match[str]]) -> Kernel:
    kernel = Kernel(entry["name"], [], {}, 0, {}, 0, {})
    at = 0
    for p in _PARAMETER.finditer(entry["parameters"]):
        size = TYPES[p["type"]] // 8
        at = _round_up(at, int(p["align"] or size))
        kernel.parameters.append((p["name"], at, size * int(p["count"] or 1)))
        at += kernel.parameters[-1][2]
    dynamic = []
    for a in arrays:
        size, align = TYPES[a["type"]] // 8 * int(a["count"] or 1), int(a["align"] or 1)
        if a["space"] in ("global", "const"):
            kernel.constants[a["name"]] = _initial(a)
        elif a["space"] == "local":
            kernel.local[a["name"]] = _round_up(kernel.local_bytes, align)
            kernel.local_bytes = kernel.local[a["name"]] + size
        elif a["count"] == "":  # its size is the launch's
            dynamic.append(a["name"])
        else:
            kernel.shared[a["name"]] = _round_up(kernel.shared_bytes, align)
            kernel.shared_bytes = kernel.shared[a["name"]] + size
    kernel.shared_bytes = _round_up(kernel.shared_bytes, 16)
    kernel.shared |= dict.fromkeys(dynamic, kernel.shared_bytes)
    return kernel


# ---- the body of a kernel


def _statements(body: str, line: int) -> Iterator[tuple[str, int]]:
    """`{` and `}` of scopes, labels with their colon, and what ends with a semicolon, each with its line."""
    at = 0
    pattern = re.compile(r"\s*(?:(?P<scope>[{}])|(?P<label>[\w$]+:)(?!:)|(?P<statement>[^;]*);)")
    while at < len(body):
        found = pattern.match(body, at)
        if found is None:
            if body[at:].strip():
                raise ValueError(f"line {line}: cannot read {body[at:].strip()[:80]!r}")
            return
        part = found.lastgroup or ""
        line += body.count("\n", at, found.start(part))
        yield found[part].strip(), line
        line += body.count("\n", found.start(part), found.end())
        at = found.end()


def _split(text: str) -> list[str]:
    """At commas that are not inside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


class _Body:
    """Reads statements into a kernel. Registers declared within braces are seen there only."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes: list[dict[str, Register]] = [{}]
        self.symbols = {name for name, _, _ in kernel.parameters}
        self.symbols |= {*kernel.shared, *kernel.local, *kernel.constants}

    def read(self, body: str, first_line: int) -> None:
        kernel = self.kernel
        label = ""
        for text, line in _statements(body, first_line):
            if text == "{":
                self.scopes.append({})
            elif text == "}":
                self.scopes.pop()
            elif text.endswith(":"):
                label = text[:-1]
                kernel.labels[label] = len(kernel.instructions)
            elif text.startswith(".reg"):
                self.declare(text)
            elif text.startswith(".branchtargets"):
                kernel.targets[label] = _split(text.removeprefix(".branchtargets"))
            elif text.startswith(".pragma") or not text:
                continue
            else:
                kernel.instructions.append(self.instruction(" ".join(text.split()), line))

    def declare(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        bits = TYPES[kind[1:]]
        for name in _split(names):
            found = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
            for each in [f"{found[1]}{i}" for i in range(int(found[2]))] if found else [name]:
                register = Register(each, len(self.kernel.registers), bits)
                self.kernel.registers.append(register)
                self.scopes[-1][each] = register

    def instruction(self, text: str, line: int) -> Instruction:
        found = re.fullmatch(r"(?:@(!?[%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", text)
        if found is None:
            raise UnknownInstruction(f"{self.kernel.name}, line {line}: cannot read `{text}`")
        try:
            guard = self.operand(found[1]) if found[1] else None
            operands = tuple(self.operand(part) for part in _split(found[3]))
        except ValueError as error:
            raise UnknownInstruction(f"{self.kernel.name}, line {line}: `{text}`: {error}") from None
        assert guard is None or isinstance(guard, Register | Not), text
        return Instruction(found[2].rstrip("."), operands, guard, text, line)

    def register(self, name: str) -> Register | None:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def operand(self, text: str) -> Operand:
        register = self.register(text)
        if register is not None:
            return register
        if text == "_":
            return Sink()
        if text[0] == "{":
            return Vector(tuple(self.operand(part) for part in _split(text[1:-1])))
        if text[0] == "[":
            return self.address(text[1:-1])
        if text[0] == "!":
            inner = self.operand(text[1:])
            if isinstance(inner, Register):
                return Not(inner)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first.strip()), self.operand(second.strip()))
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return Immediate(int(text[2:], 16), 32)
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return Immediate(int(text[2:], 16), 64)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0), None)
        if text in ("true", "false"):
            return Immediate(int(text == "true"), None)
        if re.fullmatch(r"%[a-z_0-9]+(\.[xyzw])?", text):
            return Special(text)
        found = re.fullmatch(r"([\w$]+)(?:\s*\+\s*(\d+))?", text)
        if found and found[1] in self.symbols:
            return Symbol(found[1], int(found[2] or 0))
        if found and not found[2]:
            return Label(text)
        raise ValueError(f"cannot read the operand {text!r}")

    def address(self, text: str) -> Address:
        found = re.fullmatch(r"(.+?)(?:\s*\+\s*(-?\w+))?", text.strip())
        assert found is not None
        base = self.operand(found[1].strip())
        if isinstance(base, Register | Symbol | Immediate):
            return Address(base, int(found[2], 0) if found[2] else 0)
        raise ValueError(f"cannot read the address [{text}]")
