"""Small programs written by hand: a few threads, an array in, an array out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from grid import run
from interpreted import steps_of
from memory import GlobalMemory
from program import Module
from torch import Tensor
from waves import Launch

_FRAME = """
.version 8.0
.target sm_90
.address_size 64
{outside}
.visible .entry program(
    {parameters}
)
{{
    .reg .pred %p<16>;
    .reg .b16 %h<16>;
    .reg .b32 %r<32>;
    .reg .f32 %f<16>;
    .reg .b64 %d<32>;
    .reg .f64 %g<16>;
    {body}
    ret;
}}
"""


def kernel_text(body: str, tensors: int = 2, outside: str = "") -> str:
    """A kernel whose parameters are the addresses of tensors: `param0`, `param1`, ..."""
    parameters = ",\n    ".join(f".param .u64 param{i}" for i in range(tensors))
    return _FRAME.format(body=body, parameters=parameters, outside=outside)


def launched(
    body: str,
    inputs: Sequence[Tensor],
    output: Tensor,
    threads: int = 32,
    grid: tuple[int, int, int] = (1, 1, 1),
    shared: int = 0,
    outside: str = "",
    seed: int = 0,
) -> Tensor:
    """Runs a body: parameters are the inputs' addresses and then the output's."""
    tensors = [*inputs, output]
    memory = GlobalMemory()
    for i, x in enumerate(inputs):
        memory.add(x, f"input {i}", holds=True, writable=False)
    memory.add(output, "output", holds=False, writable=True)
    kernel = Module(kernel_text(body, len(tensors), outside)).kernel("program")
    parameters = b"".join(x.data_ptr().to_bytes(8, "little") for x in tensors)
    run([Launch(kernel, steps_of(kernel), "program", grid, threads, shared, parameters)], memory, seed)
    return output


def elementwise(instruction: str, inputs: Sequence[Tensor], output: Tensor) -> Tensor:
    """One instruction for each element: `{0}` is the result, `{1}`, ... are the inputs; `{p}` a predicate."""

    def register(x: Tensor, number: int) -> tuple[str, str]:
        size = x.element_size()
        kind = {2: "%h", 4: "%r", 8: "%d"}[size]
        if x.dtype in (torch.float32, torch.float64):
            kind = {4: "%f", 8: "%g"}[size]
        return f"{kind}{number}", f"b{8 * size}"

    lines = ["mov.u32 %r30, %tid.x;", "cvt.u64.u32 %d30, %r30;"]
    names = []
    for i, x in enumerate(inputs):
        name, kind = register(x, i + 1)
        names.append(name)
        lines += [
            f"ld.param.u64 %d31, [param{i}];",
            f"mad.lo.u64 %d31, %d30, {x.element_size()}, %d31;",
            f"ld.global.{kind} {name}, [%d31];",
        ]
    result, kind = register(output, 15)
    lines.append(instruction.format(result, *names, p="%p1"))
    lines += [
        f"ld.param.u64 %d31, [param{len(inputs)}];",
        f"mad.lo.u64 %d31, %d30, {output.element_size()}, %d31;",
        f"st.global.{kind} [%d31], {result};",
    ]
    return launched("\n    ".join(lines), inputs, output, threads=output.numel())
