"""Every fault that the interpreter is there for, on small programs, with what its message says."""

from __future__ import annotations

import pytest
import torch
import waves
from errors import Fault, UnknownInstruction
from interpreted import steps_of
from program import Module
from small_programs import kernel_text, launched

I32 = torch.int32
SHARED = ".extern .shared .align 16 .b8 memory[];"
BOTH = """mov.u32 %r1, %tid.x;
    ld.param.u64 %d1, [param0];
    ld.param.u64 %d2, [param1];
    mad.wide.u32 %d3, %r1, 4, %d1;
    mad.wide.u32 %d4, %r1, 4, %d2;
"""


def ran(body: str, **more: object) -> torch.Tensor:
    x, y = torch.arange(64, dtype=I32), torch.empty(64, dtype=I32)
    return launched(BOTH + body, [x], y, threads=64, outside=SHARED, **more)  # type: ignore[arg-type]


def test_a_program_without_fault() -> None:
    assert ran("ld.global.u32 %r2, [%d3]; st.global.u32 [%d4], %r2;").tolist() == list(range(64))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("ld.global.u32 %r2, [%d3+4];", r"load out of bounds.*input 0.*block \(0, 0, 0\), thread 63.*ld\.global\.u32"),
        ("ld.global.u32 %r2, [%d3+-4];", r"load out of bounds.*thread 0;"),
        ("mov.u64 %d5, 0; ld.global.u32 %r2, [%d5];", "load out of bounds: 0x0"),
        ("ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%d3];", "misaligned load of 16 bytes.*thread 1;"),
        ("ld.global.u32 %r2, [%d3+2];", "misaligned load of 4 bytes"),
        ("ld.global.u32 %r2, [%d4];", "load of memory that was not written: byte 0 of output"),
        ("st.global.u32 [%d3], %r1;", "store to memory that may only be read: byte 0 of input 0"),
        ("st.global.u32 [%d4+256], %r1;", "store out of bounds.*output"),
        ("prefetch.global.L2 [%d3+256];", r"prefetch out of bounds.*thread 0;"),
        ("mov.u64 %d5, 0; prefetch.global.L2 [%d5];", "prefetch out of bounds: 0x0"),
        ("ld.param.u64 %d5, [param1+8];", "a parameter out of bounds.*byte 16 of 16"),
        ("mov.u32 %r2, memory; ld.shared.u32 %r3, [%r2];", "shared load of memory that was not written: byte 0"),
        ("mov.u32 %r2, memory; st.shared.u32 [%r2+256], %r1;", "shared store out of bounds: byte 256 of 256"),
        ("mov.u32 %r2, memory; st.shared.u32 [%r2+-4], %r1;", "shared store out of bounds: byte -4 of 256"),
        ("mov.u32 %r2, memory; st.shared.u32 [%r2+2], %r1;", "misaligned shared store of 4 bytes"),
        ("mov.u32 %r2, memory; st.shared.u32 [%r2], %r1;", "races: its memory is stored to.*another"),
        ("add.u32 %r2, %r3, 1;", r"%r3 is read before it is written; .*thread 0; line \d+: `add\.u32"),
        ("setp.lt.u32 %p1, %r1, 9; @%p1 mov.u32 %r3, 1; add.u32 %r2, %r3, 1;", "%r3 is read before.*thread 9"),
        ("@%p3 mov.u32 %r2, 1;", "%p3 is read before it is written"),
        ("div.u32 %r2, %r1, %r1;", "division by zero.*thread 0"),
        ("trap;", "the program stops itself"),
        ("mov.u32 %r2, %clock;", "does not have %clock"),
    ],
)  # fmt: skip
def test_faults(body: str, says: str) -> None:
    with pytest.raises(Fault, match=f"program: .*{says}"):
        ran(body, shared=256)


def test_an_endless_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waves, "MOST_STEPS", 1000)
    with pytest.raises(Fault, match=r"no end after 1000 steps.*again"):
        ran("again: bra again;")


def test_a_register_may_be_written_by_those_that_read_it() -> None:
    body = """setp.lt.u32 %p1, %r1, 9;
    @%p1 mov.u32 %r3, 5;
    @!%p1 mov.u32 %r3, 6;
    st.global.u32 [%d4], %r3;"""
    assert ran(body).tolist() == [5] * 9 + [6] * 55


def test_gaps_of_a_strided_tensor_do_not_exist() -> None:
    x = torch.arange(128, dtype=I32)[::2]
    body = BOTH.replace("4, %d1", "{step}, %d1") + "ld.global.u32 %r2, [%d3]; st.global.u32 [%d4], %r2;"
    y = torch.empty(64, dtype=I32)
    assert launched(body.format(step=8), [x], y, 64).tolist() == x.tolist()
    with pytest.raises(Fault, match=r"load out of bounds: byte 4 of input 0.*thread 1;"):
        launched(body.format(step=4), [x], y, 64)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("frobnicate.u32 %r1, %r2;", r"does not have frobnicate\.u32 \(program, line \d+: `frobnicate"),
        ("mul.rz.f32 %f1, %f2, %f3;", r"does not have mul\.rz\.f32"),
        ("ld.global.v8.u32 {%r1}, [%d3];", r"does not have ld\.global\.v8\.u32"),
        ("add.u64 %d1, %r1, %d2;", "%r1 of 32 bits as uint64"),
        ("cvt.s32.f32 %r1, %f1;", "without a rounding"),
        ("bar.sync 0, 64;", "a barrier with a number of threads"),
        ("call f;", "does not have call"),
        ("add.u32 %r1, %r2, ?;", "cannot read the operand '?'"),
    ],
)
def test_what_it_does_not_have_is_named(body: str, says: str) -> None:
    module = Module(kernel_text(body))
    with pytest.raises(UnknownInstruction, match=says.replace("?'", r"\?'")):
        steps_of(module.kernel("program"))


def test_arrays_and_parameters_of_a_file() -> None:
    outside = """.const .align 4 .b32 table[3] = {7, 8, 0x9};
    .shared .align 8 .b8 fixed[40];
    .extern .shared .align 16 .b8 rest[];"""
    kernel = Module(kernel_text(".local .align 8 .b8 own[24];", 3, outside)).kernel("program")
    assert kernel.constants["table"] == b"\7\0\0\0\x08\0\0\0\x09\0\0\0"
    assert (kernel.shared, kernel.shared_bytes) == ({"fixed": 0, "rest": 48}, 48)
    assert (kernel.local, kernel.local_bytes) == ({"own": 0}, 24)
    assert kernel.parameters == [("param0", 0, 8), ("param1", 8, 8), ("param2", 16, 8)]


def test_local_and_constant_memory() -> None:
    outside = SHARED + ".const .align 4 .b32 table[4] = {10, 20, 30, 40};"
    body = """.local .align 8 .b8 own[16];
    and.b32 %r2, %r1, 3;
    mov.u64 %d5, table;
    mad.wide.u32 %d6, %r2, 4, %d5;
    ld.const.u32 %r3, [%d6];
    mov.u64 %d7, own;
    mad.wide.u32 %d8, %r2, 4, %d7;
    st.local.u32 [%d8], %r3;
    ld.u32 %r4, [%d8];
    st.global.u32 [%d4], %r4;"""
    x, y = torch.arange(64, dtype=I32), torch.empty(64, dtype=I32)
    assert launched(BOTH + body, [x], y, 64, outside=outside).tolist() == [10, 20, 30, 40] * 16
