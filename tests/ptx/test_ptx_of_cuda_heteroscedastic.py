"""nvcc's PTX of the kernels with one variance an element, interpreted: every output against the oracle.

The problems are those that the Triton kernels have (tests/triton/element_problems.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from element_problems import (
    BF16,
    BY_NAME,
    F16,
    F32,
    F64,
    SHAPES,
    TRANSFORMS,
    Problem,
    Shape,
    run_all,
    run_in_place,
)
from errors import Fault
from interpreted import Install, Interpreted
from memory import GlobalMemory
from nvcc_launches import NvccKernels, NvccLaunches
from waves import Launch

VECTORS, TAIL, HALVES, ODD = (BY_NAME[name] for name in ("vectors", "tail", "long_halves", "odd_rows"))
TOKENS, PLANES, SHIFTED = (BY_NAME[name] for name in ("channels_last", "planes", "shifted"))
ONE_TYPE = {"fp32": (F32,) * 3, "bf16": (BF16,) * 3, "fp16": (F16,) * 3, "fp64": (F64,) * 3}
MIXED = {
    "bf16_fp32": (BF16, F32, BF16),
    "fp16_fp32": (F16, F32, F16),
    "any": (F32, BF16, F16),
    "any_fp64": (BF16, F64, F32),
}
PROBLEMS = (
    *(Problem(VECTORS, transform=t, beta=b) for t in TRANSFORMS for b in (0.0, 1.0)),
    *(Problem(TAIL, transform=t, beta=b) for t, b in zip(TRANSFORMS, (0.5, 0.7, 0.7, 0.5), strict=True)),
    *(Problem(shape, dtypes) for dtypes in ({**ONE_TYPE, **MIXED}).values() for shape in (HALVES, ODD)),
    Problem(VECTORS, ONE_TYPE["fp64"], "exp", 0.7),
    Problem(SHIFTED, ONE_TYPE["bf16"]),
    Problem(SHIFTED, transform="clamp", negative_is_nan=True),
    Problem(BY_NAME["halves_of_channels"], ONE_TYPE["bf16"], "log_variance", 0.5),
    Problem(BY_NAME["seven"], ONE_TYPE["fp16"], "exp"),
)  # fmt: skip
# One weight for all of a vector, weights as vectors, and one by one.
MASKED = (
    Problem(TOKENS, weights="bytes"),
    Problem(TOKENS, ONE_TYPE["bf16"], "exp", 0.5, weights="numbers"),
    Problem(PLANES, weights="halves"),
    Problem(PLANES, ONE_TYPE["bf16"], "clamp", 1.0, weights="fractions"),
    Problem(TAIL, MIXED["bf16_fp32"], weights="bytes"),
    Problem(ODD, weights="fractions"),
    Problem(ODD, MIXED["any"], "log_variance", weights="numbers"),
    Problem(HALVES, ONE_TYPE["fp64"], "exp", 0.7, weights="numbers"),
    Problem(BY_NAME["odd_planes"], MIXED["any_fp64"], weights="bytes"),
    Problem(BY_NAME["few_channels_last"], ONE_TYPE["fp16"], weights="one"),
    Problem(VECTORS, weights="none"),
)  # fmt: skip


@pytest.fixture
def cuda(install: Install, nvcc_launches: NvccLaunches) -> Interpreted:
    torch.manual_seed(0)
    return install("cuda", nvcc_launches)[0]


@pytest.mark.parametrize("problem", [*PROBLEMS, *MASKED], ids=str)
def test_results(cuda: Interpreted, problem: Problem) -> None:
    run_all(cuda, problem)


@pytest.mark.parametrize("problem", [Problem(VECTORS), Problem(ODD, ONE_TYPE["bf16"], "exp"),
                                     Problem(HALVES, weights="bytes")], ids=str)  # fmt: skip
def test_in_place(cuda: Interpreted, problem: Problem) -> None:
    run_in_place(cuda, problem)


def test_kernels_that_run(cuda: Interpreted) -> None:
    """A sweep and its finish with sums, a sweep alone without; the rare triples share one kernel."""
    run_all(cuda, Problem(VECTORS, MIXED["bf16_fp32"]))
    sums, gradients = (f"heteroscedastic<__nv_bfloat16, float, {s}, false>" for s in ("true", "false"))
    names = [name for name, _ in cuda.ran]
    assert names == [sums, "heteroscedastic_finish"] * 2 + [gradients]
    cuda.ran.clear()
    run_all(cuda, Problem(VECTORS, MIXED["any"], weights="bytes"))
    assert cuda.ran[0][0] == "heteroscedastic<Any, Any, true, true>"


def test_the_order_of_blocks_does_not_show(cuda: Interpreted) -> None:
    x = Problem(Shape("several_blocks", 1, 5000)).made()
    losses = []
    for seed in (0, 100, 200):
        cuda.seed = seed
        losses.append(torch.empty(()))
        cuda.heteroscedastic_forward(*x.given(), loss=losses[-1])
    assert all(torch.equal(loss, losses[0]) for loss in losses)


def test_what_does_not_count_is_not_loaded(install: Install, nvcc_launches: NvccLaunches) -> None:
    """Of vectors without a weight: a load of one is a fault."""
    torch.manual_seed(0)
    x = Problem(TOKENS, weights="halves").made()
    forgotten = x.w == 0

    def launches(
        primitive: str, inputs: tuple[Any, ...], outputs: dict[str, Any], memory: GlobalMemory
    ) -> list[Launch]:
        made = nvcc_launches(primitive, inputs, outputs, memory)
        for tensor in inputs[:3]:
            memory.forget(tensor[0, : int(forgotten.sum())])
        return made

    backend, _ = install("cuda", launches)
    loss = torch.empty(())
    backend.heteroscedastic_forward(*x.given(), loss=loss, counts=x.counts)
    x.check(loss)
    forgotten[0, -1] = True
    with pytest.raises(Fault, match="that was not written"):
        backend.heteroscedastic_forward(*x.given(), loss=loss, counts=x.counts)


# ---- the text


def kernels(texts: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(file, PTX of a kernel) of those of this family."""
    for file, text in texts.items():
        if file.startswith("heteroscedastic_"):
            for part in text.split(".entry ")[1:]:
                yield file, part


def test_all_accesses_are_to_memory_that_is_meant(nvcc_texts: dict[str, str]) -> None:
    """Nothing local: no array that registers do not hold."""
    seen = 0
    for file, part in kernels(nvcc_texts):
        seen += 1
        assert not re.search(r"\b(ld|st)\.local|\.local\b", part), file
    assert seen == 28


# A change of the text, and a problem that shows it.
CHANGES = {
    "vectors are stored one further": (r"(st\.global\.v4\.\w+\s+\[%rd\d+)\]", r"\1+16]", VECTORS),
    "a reciprocal is left out": (r"rcp\.rn\.f32(\s+%f\d+, %f\d+;)", r"mov.f32\1", VECTORS),
    "an exponential is left out": (r"ex2\.approx\.ftz\.f32(\s+%f\d+, %f\d+;)", r"mov.f32\1", VECTORS),
    "gaps are left out": (r"add\.s64\s+(%rd\d+), (%rd\d+), %rd\d+;", r"mov.u64 \1, \2;", ODD),
    "signs that are not turned": (r"xor\.b32\s+(%r\d+), (%r\d+), -2147483648;", r"mov.u32 \1, \2;", VECTORS),
    "no barrier": (r"bar\.sync\s+0;", "", VECTORS),
    "all shuffles one lane apart": (r"(shfl\.sync\.bfly\.b32\s+[^,]+, %r\d+, )[^,]+", r"\g<1>1", VECTORS),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(
    name: str, install: Install, nvcc_texts: dict[str, str], native: Any, emulated_module: Any
) -> None:
    pattern, replacement, shape = CHANGES[name]
    where = "heteroscedastic_plain"
    changed, hits = re.subn(pattern, replacement, nvcc_texts[where])
    assert hits > 0, f"{name} meets nothing"
    found = NvccKernels({**nvcc_texts, where: changed})
    backend, _ = install("cuda", NvccLaunches(native, emulated_module, found))
    torch.manual_seed(0)
    with pytest.raises((AssertionError, Fault)):
        run_all(backend, Problem(shape))


@pytest.mark.slow(reason="every shape, dtype, transform and weight: minutes")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_problem(cuda: Interpreted, shape: Any) -> None:
    turn = 0
    for dtypes in {**ONE_TYPE, **MIXED}.values():
        for transform in TRANSFORMS:
            weights = ("", "bytes", "fractions", "numbers")[turn % 4]
            run_all(cuda, Problem(shape, dtypes, transform, (0.0, 0.5, 1.0, 0.7)[turn // 4 % 4], weights))
            turn += 1
