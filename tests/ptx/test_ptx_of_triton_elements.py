"""Triton's PTX for one variance an element, interpreted: every output against the oracle, and it broken on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from element_problems import BF16, BY_NAME, F16, F32, F64, Problem, Shape, run_all, run_in_place
from errors import Fault
from interpreted import Install, Interpreted
from memory import GlobalMemory
from test_ptx_broken_kernels import (
    BARRIER,
    BYTE,
    DISTANCE,
    FMA,
    NOT_WRITTEN,
    PLACE,
    RACE,
    VECTOR,
    VECTOR_LOAD,
    WAIT,
    Change,
    further,
)
from waves import Launch

from vidfast.backends.triton import heteroscedastic_launch, heteroscedastic_plan
from vidfast.backends.triton.heteroscedastic_plan import plan_elements, plan_weights

TAIL, HALVES, LONG = BY_NAME["tail"], BY_NAME["halves"], BY_NAME["long_halves"]
ALL_BF16, ALL_F64 = (BF16,) * 3, (F64,) * 3
# The numbers of the plan with which small problems have several programs, each with several tiles.
SMALL = {"warps": 1, "programs": 1}

# Each kind of row, of weights and of dtypes, each transform and power.
PROBLEMS = (
    Problem(TAIL),
    Problem(BY_NAME["vectors"], ALL_BF16),
    Problem(BY_NAME["shifted"], (BF16, F32, F16), "log_variance", 1.0),
    Problem(HALVES, ALL_BF16, "exp", weights="bytes"),
    Problem(LONG, transform="exp", beta=0.5, weights="numbers"),
    Problem(LONG, (F32, BF16, BF16), "softplus", 1.0),
    Problem(BY_NAME["odd_rows"], transform="clamp", beta=0.5, weights="fractions"),
    Problem(BY_NAME["halves_of_channels"], ALL_BF16, "log_variance", weights="bytes"),
    Problem(BY_NAME["channels_last"], ALL_BF16, "softplus", 0.5, "bytes"),
    Problem(BY_NAME["few_channels_last"], ALL_BF16, "exp", 1.0, "fractions"),
    Problem(BY_NAME["odd_planes"], transform="clamp", beta=1.0, weights="bytes", negative_is_nan=True),
    Problem(TAIL, ALL_F64, "softplus", 0.7, "fractions"),
    Problem(BY_NAME["seven"], ALL_F64, "exp", 0.5),
    Problem(TAIL, (F32, F32, F64), "log_variance", 0.5),
    Problem(TAIL, transform="clamp", beta=0.7, weights="bytes"),
    Problem(TAIL, transform="softplus", eps=1e-40),
    Problem(BY_NAME["one"], transform="log_variance", beta=2.5),
    Problem(BY_NAME["many_channels_last"], weights="halves"),
)


@pytest.fixture(autouse=True)
def _start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    monkeypatch.setattr(heteroscedastic_plan, "TIMES_AS_MANY", 1)
    heteroscedastic_plan.plan_elements.cache_clear()
    yield
    heteroscedastic_plan.plan_elements.cache_clear()


@pytest.fixture
def gpu(install: Install, triton_launches: Any) -> Interpreted:
    return install("triton", triton_launches.changed(**SMALL))[0]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_results(gpu: Interpreted, problem: Problem) -> None:
    run_all(gpu, problem)
    assert [name for name, _ in gpu.ran] == [
        *("heteroscedastic_sweep", "heteroscedastic_finish") * 2, "heteroscedastic_sweep",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "problem",
    [
        Problem(TAIL),
        Problem(HALVES, ALL_BF16, weights="bytes"),
        Problem(BY_NAME["odd_rows"], (F32, BF16, F32)),
    ],
    ids=str,
)
def test_in_place(gpu: Interpreted, problem: Problem) -> None:
    run_in_place(gpu, problem)


@pytest.mark.parametrize(
    "numbers",
    [{"ahead": 0}, {"overlap": 1}, {"warps": 4}, {"warps": 2, "programs": 1 << 20}],
    ids=str,
)
@pytest.mark.parametrize("problem", [Problem(TAIL), Problem(HALVES, ALL_BF16, weights="bytes")], ids=str)
def test_other_free_numbers(
    install: Install, triton_launches: Any, problem: Problem, numbers: dict[str, int]
) -> None:
    run_all(install("triton", triton_launches.changed(**SMALL | numbers))[0], problem)


@pytest.mark.parametrize("weights", ["", "bytes"])
@pytest.mark.parametrize("shape", [LONG, BY_NAME["odd_planes"], BY_NAME["channels_last"]], ids=str)
def test_extents_beyond_32_bits(
    gpu: Interpreted, monkeypatch: pytest.MonkeyPatch, shape: Shape, weights: str
) -> None:
    """Where a chunk begins, and in long runs the planes, are divided in 64 bits."""
    elements, places = plan_elements, plan_weights
    monkeypatch.setattr(
        heteroscedastic_launch, "plan_elements", lambda *args: elements(*args)._replace(narrow=False)
    )
    monkeypatch.setattr(
        heteroscedastic_launch,
        "plan_weights",
        lambda *args: places(*args)._replace(narrow=False, small=False),
    )
    run_all(gpu, Problem(shape, weights=weights))


@pytest.mark.parametrize("shape", [TAIL, HALVES, BY_NAME["channels_last"]], ids=str)
def test_what_does_not_count_is_not_loaded(install: Install, triton_launches: Any, shape: Shape) -> None:
    """Of vectors without a weight: a load of one is a fault."""
    x = Problem(shape, weights="halves").made()
    size = 4 if shape.channels == 1 or shape.inner > 1 else shape.channels
    unweighed = (x.w.flatten() == 0).nonzero()[: -2 * size, 0]

    def launches(
        primitive: str, inputs: tuple[Any, ...], outputs: dict[str, Any], memory: GlobalMemory
    ) -> list[Launch]:
        made: list[Launch] = triton_launches.changed(**SMALL)(primitive, inputs, outputs, memory)
        for tensor in inputs[:3]:
            for e in unweighed.tolist():
                memory.forget(tensor[divmod(e, shape.row)])
        return made

    backend, _ = install("triton", launches)
    loss, grad = torch.empty(()), x.empty(x.raw)
    wanted = {"loss": loss, "grad_mean": None, "grad_raw": grad, "counts": x.counts}
    backend.heteroscedastic_forward_grad(*x.given(), **wanted)
    x.check(loss, grad_raw=grad)
    unweighed = torch.cat([unweighed, (x.w.flatten() != 0).nonzero()[:1, 0]])
    with pytest.raises(Fault, match=NOT_WRITTEN):
        backend.heteroscedastic_forward_grad(*x.given(), **wanted)


def test_the_order_of_blocks_does_not_show(install: Install, triton_launches: Any) -> None:
    gpu, _ = install("triton", triton_launches.changed(warps=1, programs=8))
    x = Problem(BY_NAME["vectors"]).made()
    losses = []
    for seed in (0, 100, 200):
        gpu.seed = seed
        losses.append(torch.empty(()))
        gpu.heteroscedastic_forward(*x.given(), loss=losses[-1])
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    assert gpu.ran[0][1][0] > 1


WHOLE, ENDS = Problem(BY_NAME["vectors"]), Problem(TAIL, ALL_BF16)
ROWS, WEIGHED, SIX_PROGRAMS = (
    Problem(LONG),
    Problem(TAIL, weights="bytes"),
    Problem(BY_NAME["rows_of_vectors"]),
)
SWEEP, FINISH = "heteroscedastic_sweep", "heteroscedastic_finish"

# As test_ptx_broken_kernels.py says.
CHANGES = (
    Change("all shuffles one lane apart", SWEEP, DISTANCE, r"\g<1>1", WHOLE),
    Change("all shuffles one lane apart", FINISH, DISTANCE, r"\g<1>1", WHOLE),
    Change("a term of a sum is dropped", SWEEP, FMA, r"mov.b32 \1, \2;", WHOLE),
    Change("products for quotients", SWEEP, r"div\.approx\.ftz\.f32", "mul.f32", WHOLE),
    Change("a vector is stored one further", SWEEP, VECTOR, further(16), WHOLE, count=1),
    Change("vectors are stored one element further", SWEEP, VECTOR, further(4), ROWS, "misaligned store"),
    Change("vectors are loaded one further", SWEEP, VECTOR_LOAD, further(16), WHOLE),
    Change("partial sums are stored one further", SWEEP, r"(st\.global\.b32\s+)" + PLACE, further(4), WHOLE),
    Change("masks take one more", SWEEP, r"setp\.lt\.([su])32", r"setp.le.\g<1>32", ENDS),
    Change("masks take one more", FINISH, r"setp\.lt\.([su])32", r"setp.le.\g<1>32", SIX_PROGRAMS),
    Change("no barriers in the sweep", SWEEP, BARRIER, "", WHOLE, RACE),
    Change("no wait for the sweep", FINISH, WAIT, "", WHOLE, NOT_WRITTEN),
    Change("a load before the wait", FINISH, WAIT + r"(.*?ld\.global\.[^;]*;)", r"\1 griddepcontrol.wait;", WHOLE,
           NOT_WRITTEN),
    Change("the weight of the next element", SWEEP, BYTE, further(1), WEIGHED),
    Change("what does not count is used", SWEEP, r"selp\.[fb]32\s+(%r\d+), 0f?0*, (%r\d+), %p\d+;", r"mov.b32 \1, \2;",
           WEIGHED),
    Change("M for k", FINISH, r"(add\.s64\s+%rd\d+, %rd\d+, )8;", r"\g<1>0;", WEIGHED),
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_change_of_the_code_is_noticed(change: Change, install: Install, triton_launches: Any) -> None:
    launches = triton_launches.changed(
        lambda name, text: change.applied(text) if name == change.where else text,
        warps=2 if change.pattern == BARRIER else 1,
        programs=8,
        overlap=int(WAIT in change.pattern),
    )
    backend, _ = install("triton", launches)
    message = ""
    for seed in (0, 10, 20, 30):
        backend.seed = seed
        try:
            run_all(backend, change.problem)
        except (AssertionError, Fault) as error:
            message = f"{type(error).__name__}: {error}"
            break
    assert change.hits[0] > 0, f"{change} meets nothing"
    assert message, f"{change} is not noticed"
    assert change.says in message
