"""Threads together: divergence, barriers, shuffles, votes, atomics, grids, and the wait for the grid before."""

from __future__ import annotations

import pytest
import torch
from errors import Fault
from grid import run
from interpreted import steps_of
from memory import GlobalMemory
from program import Module
from small_programs import elementwise, kernel_text, launched
from waves import Launch

I32 = torch.int32

# The address of this thread's own word of the first tensor in %d9, its number in %r1.
OWN_WORD = """mov.u32 %r1, %tid.x;
    ld.param.u64 %d1, [param0];
    mad.wide.u32 %d9, %r1, 4, %d1;
"""


def ran(body: str, threads: int = 32, **more: object) -> list[int]:
    return launched(OWN_WORD + body, [], torch.empty(threads, dtype=I32), threads, **more).tolist()  # type: ignore[arg-type]


def test_threads_part_and_meet_again() -> None:
    """A loop with as many rounds as a thread's number, then a shuffle that needs all of them."""
    body = """mov.u32 %r2, 0;
    mov.u32 %r3, 0;
    again:
    setp.ge.u32 %p1, %r2, %r1;
    @%p1 bra done;
    add.u32 %r3, %r3, %r2;
    add.u32 %r2, %r2, 1;
    bra.uni again;
    done:
    shfl.sync.idx.b32 %r4, %r3, 31, 31, -1;
    sub.u32 %r5, %r4, %r3;
    st.global.u32 [%d9], %r5;"""
    assert ran(body) == [31 * 30 // 2 - i * (i - 1) // 2 for i in range(32)]


def test_a_branch_by_number() -> None:
    body = """rem.u32 %r2, %r1, 3;
    places: .branchtargets zero, one, two;
    brx.idx %r2, places;
    two: mov.u32 %r3, 222; bra end;
    zero: mov.u32 %r3, 0; bra end;
    one: mov.u32 %r3, 11;
    end: st.global.u32 [%d9], %r3;"""
    assert ran(body) == [(0, 11, 222)[i % 3] for i in range(32)]


@pytest.mark.parametrize(
    ("mode", "by", "limit", "source"),
    [
        ("bfly", 5, 31, lambda i: i ^ 5),
        ("down", 3, 31, lambda i: i + 3 if i + 3 < 32 else i),
        ("up", 3, 0, lambda i: i - 3 if i >= 3 else i),
        ("idx", 9, 31, lambda i: 9),
        ("down", 2, (24 << 8) | 7, lambda i: i + 2 if i % 8 < 6 else i),  # within eight
        ("idx", 3, (24 << 8) | 7, lambda i: i // 8 * 8 + 3),
    ],
)
def test_shuffles(mode: str, by: int, limit: int, source: object) -> None:
    body = f"""mul.lo.u32 %r2, %r1, 10;
    shfl.sync.{mode}.b32 %r3|%p1, %r2, {by}, {limit}, 0xffffffff;
    selp.u32 %r4, 1000, 0, %p1;
    add.u32 %r3, %r3, %r4;
    st.global.u32 [%d9], %r3;"""
    own = mode in ("up", "down")
    want = [source(i % 32) for i in range(64)]  # type: ignore[operator]
    inside = [not own or w != i % 32 for i, w in enumerate(want)]
    assert ran(body, 64) == [
        10 * (i // 32 * 32 + w) + 1000 * p for i, (w, p) in enumerate(zip(want, inside, strict=True))
    ]


def test_votes() -> None:
    body = """setp.gt.u32 %p1, %r1, 29;
    vote.sync.ballot.b32 %r2, %p1, -1;
    vote.sync.any.pred %p2, %p1, -1;
    vote.sync.all.pred %p3, %p1, -1;
    @%p3 add.u32 %r2, %r2, 1;
    @%p2 add.u32 %r2, %r2, 2;
    st.global.u32 [%d9], %r2;"""
    assert ran(body, 64) == [(3 << 30) + 2 - 2**32] * 32 + [-1 + 3] * 32


def test_sums_over_a_warp() -> None:
    """Of the threads that are named, modulo 2^32."""
    body = """sub.s32 %r2, %r1, 40;
    and.b32 %r5, %r1, 31;
    setp.lt.u32 %p1, %r5, 16;
    selp.u32 %r4, 0xffff, 0xffff0000, %p1;
    redux.sync.add.s32 %r3, %r2, %r4;
    st.global.u32 [%d9], %r3;"""
    assert ran(body, 64) == [sum(range(i // 16 * 16 - 40, i // 16 * 16 - 24)) for i in range(64)]


def test_a_barrier_with_a_vote() -> None:
    body = """setp.eq.u32 %p1, %r1, 40;
    bar.red.or.pred %p2, 0, %p1;
    bar.red.popc.u32 %r2, 0, %p2;
    st.global.u32 [%d9], %r2;"""
    assert ran(body, 64) == [64] * 64


REVERSED = """mov.u32 %r2, memory;
    mad.lo.u32 %r3, %r1, 4, %r2;
    st.shared.u32 [%r3], %r1;
    {barrier}
    sub.u32 %r4, 63, %r1;
    mad.lo.u32 %r3, %r4, 4, %r2;
    ld.shared.u32 %r5, [%r3];
    st.global.u32 [%d9], %r5;"""
SHARED = ".extern .shared .align 16 .b8 memory[];"


def test_shared_memory() -> None:
    body = REVERSED.format(barrier="bar.sync 0;")
    assert ran(body, 64, shared=256, outside=SHARED) == list(range(63, -1, -1))


def test_a_missing_barrier_is_a_race() -> None:
    with pytest.raises(Fault, match=r"races.*by another warp.*thread 0.*ld.shared"):
        ran(REVERSED.format(barrier=""), 64, shared=256, outside=SHARED)


def test_a_barrier_that_some_threads_miss() -> None:
    for body in (
        "setp.lt.u32 %p1, %r1, 40; @%p1 bra past; bar.sync 0; past: st.global.u32 [%d9], %r1;",
        "setp.lt.u32 %p1, %r1, 40; @%p1 ret; bar.sync 0; st.global.u32 [%d9], %r1;",
    ):
        with pytest.raises(
            Fault, match=r"only 24 of 64 threads come to a barrier; block \(0, 0, 0\).*bar.sync"
        ):
            ran(body, 64)


def test_a_shuffle_of_a_divided_warp() -> None:
    body = """setp.lt.u32 %p1, %r1, 5;
    @%p1 bra past;
    shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;
    past: st.global.u32 [%d9], %r1;"""
    with pytest.raises(Fault, match=r"only 27 of a warp's threads.*shfl"):
        ran(body)
    # those that it names are all there, but it takes from another
    with pytest.raises(Fault, match=r"takes from a thread that is not there.*thread 5"):
        ran(body.replace("-1", "0xffffffe0"))
    with pytest.raises(Fault, match="does not name itself"):
        ran(body.replace("-1", "0xffffff00"))


@pytest.mark.parametrize(
    "body",
    [
        "shfl.sync.bfly.b32 %r3, %r1, 1, 31, 0xffff; st.global.u32 [%d9], %r3;",
        "bar.warp.sync 1; st.global.u32 [%d9], %r1;",
    ],
)
def test_all_are_there_and_some_are_not_named(body: str) -> None:
    with pytest.raises(Fault, match="does not name itself"):
        ran(body)


def test_a_shuffle_waits_for_threads_that_come_later() -> None:
    """Their way is further down in the text, and comes back."""
    body = """setp.lt.u32 %p1, %r1, 5;
    mov.u32 %r2, 7;
    @%p1 bra later;
    back: shfl.sync.idx.b32 %r3, %r2, 0, 31, -1;
    st.global.u32 [%d9], %r3;
    ret;
    later: mov.u32 %r2, 9;
    bra back;"""
    assert ran(body) == [9] * 32


def test_blocks_of_a_grid_of_three_dimensions() -> None:
    body = """mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %ctaid.z;
    mov.u32 %r5, %nctaid.x; mov.u32 %r6, %nctaid.y;
    mad.lo.u32 %r7, %r4, %r6, %r3;
    mad.lo.u32 %r7, %r7, %r5, %r2;
    mov.u32 %r8, %ntid.x;
    mad.lo.u32 %r7, %r7, %r8, %r1;
    mad.wide.u32 %d9, %r7, 4, %d1;
    st.global.u32 [%d9], %r7;"""
    out = torch.empty(32 * 30, dtype=I32)
    assert launched(OWN_WORD + body, [], out, 32, (5, 3, 2)).tolist() == list(range(32 * 30))


@pytest.mark.parametrize("seed", range(6))
def test_a_counter_of_blocks(seed: int) -> None:
    """The first counts from zero, since the input may not be written: the last sees what all have stored."""
    body = """mov.u32 %r2, %ctaid.x;
    ld.param.u64 %d1, [param0];
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra end;
    mad.wide.u32 %d2, %r2, 4, %d1;
    st.global.u32 [%d2+4], %r2;
    fence.acq_rel.gpu;
    atom.global.add.u32 %r3, [%d1+400], 1;
    end: ret;"""
    out = torch.zeros(101, dtype=I32)
    memory = GlobalMemory()
    memory.add(out, "output", holds=True, writable=True)
    kernel = Module(kernel_text(OWN_WORD + body, 1)).kernel("program")
    parameters = out.data_ptr().to_bytes(8, "little")
    run([Launch(kernel, steps_of(kernel), "program", (50, 1, 1), 64, 0, parameters)], memory, seed)
    assert out[1:51].tolist() == list(range(50))
    assert out[100] == 50


def test_atomics_take_turns() -> None:
    body = """setp.eq.u32 %p1, %r1, 0;
    mov.u32 %r2, 0;
    @%p1 st.global.u32 [%d1], %r2;
    bar.sync 0;
    atom.global.add.u32 %r3, [%d1], 1;
    bar.sync 0;
    @!%p1 st.global.u32 [%d9], %r3;"""
    got = launched(OWN_WORD + body, [], torch.empty(64, dtype=I32), 64).tolist()
    assert got[0] == 64
    assert len(set(got[1:])) == 63
    assert got[1:] != sorted(got[1:])


def pair_of_launches(second: str, first: str = "griddepcontrol.launch_dependents;") -> list[int]:
    """A grid that stores 7, and one that reads it and may start before."""
    x, y = torch.empty(32, dtype=I32), torch.empty(32, dtype=I32)
    memory = GlobalMemory()
    for name, t in (("x", x), ("y", y)):
        memory.add(t, name, holds=False, writable=True)
    bodies = (first + OWN_WORD + "mov.u32 %r2, 7; st.global.u32 [%d9], %r2;", OWN_WORD + second)
    launches = []
    for i, body in enumerate(bodies):
        kernel = Module(kernel_text(body, 2)).kernel("program")
        parameters = b"".join(t.data_ptr().to_bytes(8, "little") for t in (x, y))
        launches.append(Launch(kernel, steps_of(kernel), f"kernel {i}", (1, 1, 1), 32, 0, parameters, i == 1))
    run(launches, memory)
    return y.tolist()


READ = "ld.global.u32 %r3, [%d9];"
WRITE = "ld.param.u64 %d2, [param1]; mad.wide.u32 %d3, %r1, 4, %d2; st.global.u32 [%d3], %r3;"


def test_what_is_behind_the_wait_sees_the_grid_before() -> None:
    assert pair_of_launches("griddepcontrol.wait;" + READ + WRITE) == [7] * 32
    # warps that go on and warps that wait meet again
    both = "setp.lt.u32 %p1, %r1, 9; @%p1 bra on; on: griddepcontrol.wait;" + READ + WRITE
    assert pair_of_launches(both) == [7] * 32


@pytest.mark.parametrize("second", [READ + "griddepcontrol.wait;" + WRITE, READ + WRITE])
def test_a_load_before_the_wait_is_a_fault(second: str) -> None:
    with pytest.raises(
        Fault, match=r"kernel 1: load of memory that was not written: byte 0 of x; .*ld.global"
    ):
        pair_of_launches(second)


def test_a_grid_that_lets_nothing_start_ends_first() -> None:
    assert pair_of_launches(READ + WRITE, first="") == [7] * 32


@pytest.mark.parametrize("form", ["m8n8.x1", "m8n8.x1.trans"])
def test_matrices_are_loaded_across_a_warp(form: str) -> None:
    """Thread t's elements of two bytes: of row t / 4, or of column t / 4."""
    body = """mov.u32 %r2, memory;
    mad.lo.u32 %r3, %r1, 4, %r2;
    mad.lo.u32 %r4, %r1, 0x20002, 0x10000;
    st.shared.u32 [%r3], %r4;
    bar.sync 0;
    and.b32 %r4, %r1, 7;
    mad.lo.u32 %r4, %r4, 16, %r2;
    ldmatrix.sync.aligned.{form}.shared.b16 {{%r5}}, [%r4];
    st.global.u32 [%d9], %r5;"""
    own = torch.arange(64).view(8, 8)
    want = (own if form == "m8n8.x1" else own.T).reshape(32, 2).tolist()
    got = ran(body.format(form=form), 32, shared=128, outside=SHARED)
    assert [[v & 0xFFFF, v >> 16] for v in got] == want


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_come_back_as_they_were_stored(trans: str) -> None:
    body = """mov.u32 %r2, memory;
    mad.lo.u32 %r3, %r1, 0x20002, 0x10000;
    add.u32 %r5, %r3, 0x400040;
    mad.lo.u32 %r4, %r1, 16, %r2;
    stmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 [%r4], {{%r3, %r5}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 {{%r6, %r7}}, [%r4];
    sub.u32 %r8, %r7, %r6;
    sub.u32 %r9, %r6, %r3;
    xor.b32 %r8, %r8, %r9;
    st.global.u32 [%d9], %r8;"""
    assert ran(body.format(trans=trans), 32, shared=512, outside=SHARED) == [0x400040] * 32


def test_special_registers_of_a_thread() -> None:
    a = torch.arange(64, dtype=I32)
    got = elementwise(
        "mov.u32 {0}, %laneid; mov.u32 %r9, %warpid; mad.lo.u32 {0}, %r9, 100, {0};",
        (a,),
        torch.empty_like(a),
    )
    assert got.tolist() == [100 * (i // 32) + i % 32 for i in range(64)]
