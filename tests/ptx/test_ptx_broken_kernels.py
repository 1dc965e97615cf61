"""Kernels broken on purpose: a change of nvcc's or Triton's PTX makes the check of a problem fail.

A check that no change can fail proves nothing. Each change has to meet the text, whatever registers it names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from errors import Fault
from interpreted import Install, Interpreted, LaunchesOf
from nvcc_launches import NvccKernels, NvccLaunches
from places import Place
from problems import BF16, FP32
from regimes import CUT_RUNS, EDGES, LONG_ROWS, MANY_CHANNELS, PIECES, SHORT_PLANES, VECTORS, Problem

Replacement = str | Callable[[re.Match[str]], str]


def further(by: int) -> Callable[[re.Match[str]], str]:
    """[base + offset] so many bytes further on; the groups are what is before, the base and the offset."""
    return lambda found: f"{found[1]}[{found[2]}+{int(found[3] or 0) + by}]"


@dataclass(frozen=True)
class Change:
    name: str
    where: str  # the file of nvcc's, the kernel of Triton's
    pattern: str
    replacement: Replacement
    problem: Problem
    says: str = ""  # part of the message
    count: int = 0  # of places, from the first on; 0: all
    hits: list[int] = field(default_factory=lambda: [0], compare=False)

    def __str__(self) -> str:
        return f"{self.where}: {self.name}"

    def applied(self, text: str) -> str:
        text, hits = re.subn(self.pattern, self.replacement, text, count=self.count, flags=re.DOTALL)
        self.hits[0] += hits
        return text


ROWS, ROWS_BF16 = Problem(CUT_RUNS, FP32, FP32), Problem(CUT_RUNS, BF16, BF16, "two_pass")
LONG = Problem(LONG_ROWS, FP32, FP32)
WHOLE = Problem(VECTORS, FP32, FP32)
PLANES = Problem(PIECES, FP32, FP32, "two_pass")
EDGE = Problem(EDGES, FP32, FP32, inplace=True)
SHORT = Problem(SHORT_PLANES, FP32, FP32)
SEVERAL = Problem(MANY_CHANNELS, FP32, FP32, g=1.0)  # blocks of the finish

MASKED_PLANES = Problem(SHORT_PLANES, FP32, FP32, mask="bool")
MASKED_JOINED, MASKED_ROWS = (
    Problem(CUT_RUNS, FP32, FP32, mask="bool"),
    Problem(LONG_ROWS, FP32, FP32, mask="bool"),
)

PLACE = r"\[\s*(%\w+)(?:\s*\+\s*(\d+))?\s*\]"
BARRIER, WAIT = r"bar\.sync\s+0;", r"griddepcontrol\.wait\s*;"
DISTANCE = r"(shfl\.sync\.bfly\.b32\s+[^,]+, %r\d+, )[^,]+"
FMA = r"fma\.rn\.f32\s+(%[fr]\d+), %[fr]\d+, %[fr]\d+, (%[fr]\d+);"
VECTOR, ELEMENT, SUM = (rf"(st\.global\.{kind}\s+){PLACE}" for kind in (r"v4\.(?:f32|b32)", "f32", "f64"))
VECTOR_LOAD = r"(ld\.global\.v4\.b32\s+\{[^}]*\}, )" + PLACE
WEIGHT = r"(ld\.global\.u8\s+%\w+, )" + PLACE
BYTE = r"(ld\.global\.b8\s+\{[^}]*\}, )" + PLACE
SELECTED = r"selp\.f32\s+(%f\d+), (%f\d+), 0f00000000, %p\d+;"
LAST = r"(atom\.[^;]*;.*?add\.s32\s+%r\d+, %r\d+, )-1;"
NOT_WRITTEN, RACE = "that was not written", "races"

NVCC = (
    Change("all shuffles one lane apart", "planes", DISTANCE, r"\g<1>1", PLANES),
    Change("a term of a sum is dropped", "planes", FMA, r"mov.f32 \1, \2;", EDGE, count=1),
    Change("terms of sums are dropped", "rows", FMA, r"mov.f32 \1, \2;", ROWS),
    Change("a vector is stored one further", "planes", VECTOR, further(16), WHOLE, count=1),
    Change("vectors are stored one further", "rows", VECTOR, further(16), LONG),
    Change("vectors are stored one element further", "rows", VECTOR, further(4), LONG, "misaligned store"),
    Change("edges are stored one element further", "planes", ELEMENT, further(4), EDGE),
    Change("sums of chunks are stored one further", "planes", SUM, further(8), PLANES),
    Change("a scale of the next run", "rows", r"(ld\.shared\.f32\s+%f\d+, )" + PLACE, further(4), ROWS, count=1),
    Change("the last block but one is the last", "finish", LAST, r"\1-2;", SEVERAL),
    Change("blocks count by two", "finish", r"(atom\.[\w.]*add\.u32\s+[^;]*, )1;", r"\g<1>2;", SEVERAL),
    Change("no counter from zero", "rows", r"st\.global\.u32\s+\[%rd\d+\], %r\d+;", "", SEVERAL, NOT_WRITTEN),
    Change("no barrier before the scales are read", "rows", BARRIER, "", ROWS, RACE, count=1),
    Change("no barrier in the finish", "finish", BARRIER, "", SHORT, RACE),
    Change("no wait for the sweep", "finish", WAIT, "", SHORT, NOT_WRITTEN),
    Change("a load before the wait", "finish", WAIT + r"(.*?ld\.global\.f64[^;]*;)", r"\1 griddepcontrol.wait;", SHORT,
           NOT_WRITTEN),
    Change("comparisons take one more", "rows", r"setp\.ge\.s(32|64)", r"setp.gt.s\1", LONG),
    Change("the weight of the next position", "masked_planes", WEIGHT, further(1), MASKED_PLANES),
    Change("what does not count is used", "masked_planes", SELECTED, r"mov.f32 \1, \2;", MASKED_PLANES),
    Change("the weight of the next token", "masked_rows", WEIGHT, further(1), MASKED_ROWS),
    Change("what does not count is used", "masked_rows", SELECTED, r"mov.f32 \1, \2;", MASKED_JOINED),
    Change("bytes that are left out", "total", r"(and\.b32\s+%r\d+, %r\d+, )16711935;", r"\g<1>255;", MASKED_ROWS),
    Change("M for k", "finish", r"(ld\.global\.f64\s+%fd\d+, )\[(%rd\d+)\+8\]", r"\1[\2]", MASKED_PLANES),
    Change("lines far away are prefetched", "planes", r"(prefetch\.global\.L2\s+)" + PLACE, further(1 << 20), PLANES,
           "prefetch out of bounds"),
)  # fmt: skip

TRITON = (
    Change("gathers from lane 0", "sweep_rows", r"(shfl\.sync\.idx\.b32\s+[^,]+, [^,]+, )[^,]+", r"\g<1>0", ROWS_BF16),
    Change("all shuffles one lane apart", "finish", DISTANCE, r"\g<1>1", ROWS),
    Change("a term of a sum is dropped", "sweep_planes", FMA, r"mov.b32 \1, \2;", WHOLE, count=1),
    Change("a vector is stored one further", "sweep_planes", VECTOR, further(16), WHOLE, count=1),
    Change("vectors are stored one element further", "sweep_rows", VECTOR, further(4), ROWS, "misaligned store"),
    Change("vectors are loaded one further", "sweep_planes", VECTOR_LOAD, further(16), WHOLE),
    Change("the last block but one is the last", "finish", LAST, r"\1-2;", SEVERAL),
    Change("no counter from zero", "sweep_rows", r"@%p\d+ st\.global\.b32[^;]*;", "", SEVERAL, NOT_WRITTEN, count=1),
    Change("no barriers in the sweep", "sweep_rows", BARRIER, "", ROWS),
    Change("no barriers in the finish", "finish", BARRIER, "", ROWS, RACE),
    Change("no wait for the sweep", "finish", WAIT, "", SHORT, NOT_WRITTEN),
    Change("a load before the wait", "finish", WAIT + r"(.*?ld\.global\.[^;]*;)", r"\1 griddepcontrol.wait;", SHORT,
           NOT_WRITTEN),
    Change("the weight of the next position", "sweep_planes", BYTE, further(1), MASKED_PLANES),
    Change("the weight of the next token", "sweep_rows", BYTE, further(1), MASKED_ROWS),
    Change("what does not count is used", "sweep_rows", r"selp\.[fb]32\s+(%r\d+), 0f?0*, (%r\d+), %p\d+;",
           r"mov.b32 \1, \2;", MASKED_JOINED),
    Change("a weight that is left out", "total", r"@%p\d+ ld\.global\.b8[^;]*;", "", MASKED_ROWS, count=1),
    Change("M for k", "finish", r"(ld\.global\.b64 [^[]*)(\[[^;]*;)(.*?ld\.global\.b64 [^[]*)\[[^;]*;", r"\1\2\3\2",
           MASKED_PLANES),
    Change("masks take one more", "sweep_planes", r"setp\.lt\.([su])(32|64)", r"setp.le.\1\2", PLANES),
)  # fmt: skip


def noticed(change: Change, backend: Interpreted, place: Place) -> str:
    """How the first of some orders of blocks shows it; "" where none does."""
    for seed in (0, 10, 20, 30, 40):
        backend.seed = seed
        try:
            change.problem.check(place)
        except (AssertionError, Fault) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def check_noticed(change: Change, backend: Interpreted, place: Place) -> None:
    message = noticed(change, backend, place)
    assert change.hits[0] > 0, f"{change} meets nothing"
    assert message, f"{change} is not noticed"
    assert change.says in message


@pytest.mark.parametrize("change", NVCC, ids=str)
def test_a_change_of_nvccs_code_is_noticed(
    change: Change, install: Install, nvcc_texts: dict[str, str], native: Any, emulated_module: Path
) -> None:
    kernels = NvccKernels({**nvcc_texts, change.where: change.applied(nvcc_texts[change.where])})
    check_noticed(change, *install("cuda", NvccLaunches(native, emulated_module, kernels)))


@pytest.mark.parametrize("change", TRITON, ids=str)
def test_a_change_of_tritons_code_is_noticed(change: Change, install: Install, triton_launches: Any) -> None:
    launches: LaunchesOf = triton_launches.changed(
        lambda name, text: change.applied(text) if name == change.where else text,
        overlap=int(WAIT in change.pattern),
    )
    check_noticed(change, *install("triton", launches))
