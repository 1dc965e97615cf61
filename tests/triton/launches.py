"""The kernel launches of a call, recorded instead of run, and compiled for a GPU that need not be there."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from vidfast.backends.triton import TritonBackend
from vidfast.backends.triton import kernels as programs
from vidfast.backends.triton.plan import RULE, Tuning

KERNELS = (
    "sweep_planes", "sweep_rows", "finish", "alpha_gradient", "scale", "sum_positions", "total",
    "heteroscedastic_sweep", "heteroscedastic_finish",
)  # fmt: skip
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp64": (torch.float64, torch.float64),
    "bf16_fp32": (torch.bfloat16, torch.float32),
    "fp32_fp64": (torch.float32, torch.float64),
}
# name: shape, channels_last, kernel. Vectors are possible in all of them.
REGIMES: dict[str, tuple[tuple[int, ...], bool, str]] = {
    "big_planes": ((16, 256, 128, 128), False, "sweep_planes"),
    "planes_sharing_a_program": ((128, 64, 32, 32), False, "sweep_planes"),
    "small_planes": ((512, 256, 8, 7), False, "sweep_rows"),
    "channels_last": ((64, 256, 56, 56), True, "sweep_rows"),
    "narrow_rows_joined": ((4096, 10), False, "sweep_rows"),
    "one_channel_with_a_tail": ((7, 1, 33333), False, "sweep_planes"),
}
_POINTER = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


def recorded(call: Callable[[TritonBackend], object], lanes: int = 32, rule: Tuning = RULE) -> list[Launch]:
    """What `call` launches on a back end whose tensors may lie anywhere, "meta" included."""
    launches: list[Launch] = []

    def recorder(kernel: Any) -> Any:
        def launch(grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
            names = [p.name for p in kernel.params]
            arguments = dict(zip(names, args, strict=False))
            arguments |= {k: v for k, v in kwargs.items() if k in names}
            assert list(arguments) == names, f"{kernel.__name__} was given {list(arguments)} for {names}"
            options = {k: v for k, v in kwargs.items() if k not in names}
            launches.append(Launch(kernel, grid, arguments, options))

        class Indexed:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda *args, **kwargs: launch(grid, *args, **kwargs)

        return Indexed()

    backend = TritonBackend()
    kernels = {name: recorder(getattr(programs, name)) for name in KERNELS}
    backend._module = SimpleNamespace(tl=programs.tl, **kernels)  # type: ignore[assignment]
    backend.rule = rule._replace(lanes=lanes)
    backend._on = lambda x: contextlib.nullcontext()  # type: ignore[method-assign]
    call(backend)
    return launches


class Code:
    """What is asked of generated code."""

    def __init__(self, kernel: Any, target: str) -> None:
        self.kernel = kernel
        self.amd = target.startswith("gfx")
        self.text: str = kernel.asm["amdgcn"] if self.amd else self._tool("-sass")

    def _tool(self, *options: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, *options, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def accesses(self) -> Counter[tuple[str, int]]:
        """("load" or "store", bits) of every access to global memory."""
        found: Counter[tuple[str, int]] = Counter()
        if self.amd:
            widths = {"ubyte": 8, "byte": 8, "ushort": 16, "short": 16, "dword": 32}
            pattern = (
                r"\b(?:global|buffer|flat)_(load|store)_(?:d16_hi_|d16_)?"
                r"(ubyte|byte|ushort|short|dword|b16|b32)(?:_d16_hi|_d16)?(x[234])?\b"
            )
            for kind, width, times in re.findall(pattern, self.text):
                found[kind, widths.get(width) or int(width[1:])] += 0 if times else 1
                if times:
                    found[kind, 32 * int(times[1:])] += 1
        else:
            for kind, rest in re.findall(r"\b(LD|ST)G\.E((?:\.[A-Z0-9]+)*)", self.text):
                parts = rest.split(".")
                bits = next(
                    (
                        int(p.removeprefix("U").removeprefix("S"))
                        for p in parts
                        if re.fullmatch(r"[US]?(8|16|64|128|256)", p)
                    ),
                    32,
                )
                found["load" if kind == "LD" else "store", bits] += 1
        return +found

    def local_bytes(self) -> dict[str, int]:
        """Memory of one thread's own: what spilled registers, or arrays that are indexed, take."""
        if self.amd:
            keys = ("private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")
            return {key: int(re.search(rf"\.{key}:\s+(\d+)", self.text).group(1)) for key in keys}  # type: ignore[union-attr]
        usage = self._tool("-res-usage")
        found = {key: int(re.search(rf"\b{key}:(\d+)", usage).group(1)) for key in ("STACK", "LOCAL")}  # type: ignore[union-attr]
        found["spills"] = len(re.findall(r"\b(?:LDL|STL)\b", self.text))
        return found

    def registers(self) -> int:
        """Of a thread, on NVIDIA's GPUs."""
        return int(re.search(r"\bREG:(\d+)", self._tool("-res-usage")).group(1))  # type: ignore[union-attr]

    def shared_bytes(self) -> int:
        return int(self.kernel.metadata.shared)


def specialised(launch: Launch, aligned: Callable[[Tensor], bool]) -> tuple[Any, str]:
    """What Triton compiles for that launch, and a text that is the same for the same code. aligned: on 16 bytes."""
    signature: dict[str, str] = {}
    constants, attributes = {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[i,] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _POINTER[value.dtype]
            if aligned(value) and not parameter.do_not_specialize_on_alignment:
                attributes[i,] = [["tt.divisibility", 16]]
        else:
            assert parameter.do_not_specialize, f"{parameter.name} would compile again for every divisor"
            natural = "i32" if -(2**31) <= value < 2**31 else "i64"
            signature[parameter.name] = parameter.annotation_type or natural
    key = repr((launch.name, signature, constants, attributes, launch.options))
    return triton.compiler.ASTSource(launch.kernel, signature, constants, attributes), key


def compiled(launch: Launch, target: str, aligned: bool = True) -> Code:
    """The machine code for that launch, with pointers on 16 bytes or anywhere."""
    source, _ = specialised(launch, lambda x: aligned)
    return Code(triton.compile(source, target=TARGETS[target], options=launch.options), target)
