"""The code that Triton generates for GPUs that need not be there: 128-bit accesses, nothing spilled.

The launches are those that the back end makes for real shapes, recorded; `--slow` compiles all of them for all
targets and dtypes, otherwise one target for each regime and every dtype for the widest used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from launches import DTYPES, REGIMES, TARGETS, Code, Launch, compiled, recorded  # noqa: E402

from vidfast import primitives  # noqa: E402
from vidfast.arguments import Call  # noqa: E402
from vidfast.backends.triton import TritonBackend  # noqa: E402
from vidfast.backends.triton.plan import RULE, Tuning  # noqa: E402

PRIMITIVES = ("forward", "forward_grad", "backward", "backward_mean", "scale", "scale_in_place")
BITS = {torch.float32: 32, torch.float64: 64, torch.bfloat16: 16, torch.float16: 16}


def launches(
    primitive: str, regime: str, dtypes: str, target: str = "sm_90", rule: Tuning = RULE
) -> list[Launch]:
    shape, last, _ = REGIMES[regime]
    order = torch.channels_last if last else torch.contiguous_format
    mean, teacher = (
        torch.empty(shape, dtype=d, device="meta").contiguous(memory_format=order) for d in DTYPES[dtypes]
    )
    alpha, sum_sq = (torch.empty(shape[1], dtype=d, device="meta") for d in (torch.float32, torch.float64))
    g = torch.empty((), device="meta")
    asked = Call(1, 1e-5, full=primitive == "forward", k=1.0)

    def call(backend: TritonBackend) -> Any:
        if primitive == "forward":
            return primitives.forward(backend, mean, teacher, alpha, asked)
        if primitive == "forward_grad":
            return primitives.forward_grad(backend, mean, teacher, alpha, asked)
        if primitive.startswith("backward"):
            want = (True, primitive == "backward", True)
            return primitives.backward(backend, g, mean, teacher, alpha, sum_sq, shape, asked, want)
        in_place = primitive == "scale_in_place"
        return primitives.scale(backend, g, mean, 1, sum_sq, torch.float32, in_place)

    return recorded(call, TARGETS[target].warp_size, rule)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtypes" not in metafunc.fixturenames:
        return
    if metafunc.config.getoption("--slow"):
        chosen = list(product(TARGETS, REGIMES, PRIMITIVES, DTYPES))
    else:
        targets, dtypes = list(TARGETS), list(DTYPES)
        # every regime and primitive once, the targets and dtypes in turn
        chosen = [
            (targets[i % 4], regime, primitive, dtypes[(i + i // 6) % 6])
            for i, (regime, primitive) in enumerate(product(REGIMES, PRIMITIVES))
        ]
        for i, dtype in enumerate(dtypes):
            chosen.append((targets[i % 4], "planes_sharing_a_program", "forward_grad", dtype))
            chosen.append((targets[(i + 2) % 4], "channels_last", "forward_grad", dtype))
    metafunc.parametrize(
        ("target", "regime", "primitive", "dtypes"), sorted(set(chosen)), ids=lambda name: str(name)
    )


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compilations of other runs prove nothing about this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def check_vectors(code: Code, launch: Launch, primitive: str, dtypes: str) -> None:
    """Every access to the activations is 128 bits wide; what is narrower belongs to channels and scalars."""
    accesses = code.accesses()
    reads = 1 if primitive.startswith("scale") else 2
    writes = {"forward": 0, "backward": 2}.get(primitive, 1)
    assert accesses["load", 128] >= reads, accesses
    assert accesses["store", 128] >= writes, accesses
    if launch.arguments["tail"] is not None:
        return  # the last values, fewer than a vector, are masked one by one
    narrowest = min(BITS[d] for d in DTYPES[dtypes])
    if narrowest == 16:
        assert not accesses["load", 16], accesses
        assert not accesses["store", 16], accesses
    elif narrowest == 32:
        # the counter, a partial sum, alpha, its gradient and g
        assert accesses["load", 32] <= 6, accesses
        assert accesses["store", 32] <= 6, accesses


def test_the_activations_move_in_vectors_and_nothing_spills(
    target: str, regime: str, primitive: str, dtypes: str
) -> None:
    made = launches(primitive, regime, dtypes, target)
    sweep = made[0]
    assert sweep.name == (REGIMES[regime][2] if not primitive.startswith("scale") else "scale")
    for launch in made:
        code = compiled(launch, target)
        assert not any(code.local_bytes().values()), (launch.name, code.local_bytes())
        assert code.shared_bytes() <= 48 * 1024
        if launch is sweep:
            check_vectors(code, launch, primitive, dtypes)


# What takes long before anything is loaded: fp64, conversions and reciprocals of an integer division, calls.
HEAVY = re.compile(r"\bD(ADD|MUL|FMA|SETP)\b|\bMUFU|\bI2F|\bCALL\b")


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("primitive", ["forward_grad", "backward"])
@pytest.mark.parametrize("ahead", [0, 1])
def test_the_first_tile_is_loaded_before_anything_is_divided(regime: str, primitive: str, ahead: int) -> None:
    """Both its tensors' loads stand before the channel's variance and before any division of integers."""
    sweep = launches(primitive, regime, "bf16", rule=RULE._replace(ahead=ahead))[0]
    code = [
        line.strip() for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", compiled(sweep, "sm_90").text)
    ]
    loads = [i for i, line in enumerate(code) if "LDG.E.128" in line]
    heavy = next(i for i, line in enumerate(code) if HEAVY.search(line))
    first = 2 * RULE.vectors
    assert len(loads) >= 2 * first, "the first tile's and the loop's"
    assert loads[first - 1] < heavy, f"{code[heavy]} stands before the loads of the first tile"
    stores = [i for i, line in enumerate(code) if "STG.E.128" in line]
    before = sum(load < stores[0] for load in loads[first : 2 * first])
    assert compiled(sweep, "sm_90").registers() <= 96, "five programs of 128 threads have no more"
    assert before == (first if ahead else 0), (
        "a tile's loads stand before the stores of the one before it, if ahead"
    )


@pytest.mark.parametrize("regime", ["big_planes", "channels_last"])
def test_a_finish_computes_while_its_first_sums_are_on_their_way(regime: str) -> None:
    """Where it does not start early, the loads of its first tile stand before the channels' logarithms."""
    finish = launches("forward_grad", regime, "bf16")[1]
    code = [
        line.strip() for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", compiled(finish, "sm_90").text)
    ]
    loads = [i for i, line in enumerate(code) if re.search(r"\bLDG\b", line)]
    first = next(i for i, line in enumerate(code) if re.search(r"\bD(ADD|MUL|FMA)\b", line))
    a_thread = finish.arguments["CHANNELS"] * finish.arguments["DEPTH"] // (32 * finish.options["num_warps"])
    assert sum(load < first for load in loads) >= max(a_thread, 1), "channels are computed first"


def test_a_finish_that_starts_early_waits_before_it_reads_sums() -> None:
    """With `overlap` the sweep lets it start; channels' numbers are computed before it waits, sums are read behind."""
    made = launches("forward_grad", "channels_last", "bf16", rule=RULE._replace(overlap=1))
    sweep, finish = (compiled(launch, "sm_90") for launch in made)
    assert "PREEXIT" in sweep.text
    assert "ACQBULK" not in sweep.text
    before, after = finish.text.split("ACQBULK")
    assert re.search(r"\bDFMA\b", before), "nothing is computed while it waits"
    assert len(re.findall(r"\bLDG\b", before)) < len(re.findall(r"\bLDG\b", after))
    assert made[1].options["launch_pdl"] is True
    assert all(
        "launch_pdl" not in launch.options for launch in [made[0], *launches("forward", "big_planes", "fp32")]
    )


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(
    ("primitive", "most"),
    [("forward", 2), ("forward_grad", 2), ("backward", 1), ("scale", 1), ("scale_in_place", 1)],
)
def test_launches(primitive: str, most: int, regime: str) -> None:
    assert len(launches(primitive, regime, "bf16")) <= most


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("regime", ["planes_sharing_a_program", "channels_last"])
def test_misaligned_pointers_compile_without_vectors(target: str, regime: str) -> None:
    """The counterpart: what check_vectors sees is alignment, not a habit of the compiler."""
    code = compiled(launches("forward_grad", regime, "fp32", target)[0], target, aligned=False)
    assert not code.accesses()["load", 128]
    assert not any(code.local_bytes().values())


def test_eps_and_k_are_not_rounded_to_fp32() -> None:
    """Numbers that fp32 does not hold arrive as the bits of their fp64."""
    import struct

    eps, k = 1e-5 + 2**-60, 1 / 3
    mean = torch.empty(4, 6, 5, 5, device="meta")
    asked = Call(1, eps, k=k)
    alpha = torch.empty(6, device="meta")

    def call(backend: TritonBackend) -> Any:
        return primitives.forward_grad(backend, mean, mean, alpha, asked)

    for launch in recorded(call):
        for name, value in (("eps_bits", eps), ("k_bits", k)):
            assert struct.unpack("<d", struct.pack("<q", launch.arguments[name]))[0] == value


@pytest.mark.parametrize("target", TARGETS)
def test_alphas_gradient_alone_is_one_launch_that_reads_no_activation(target: str) -> None:
    alpha, sum_sq = torch.empty(257, device="meta"), torch.empty(257, dtype=torch.float64, device="meta")
    g, want = torch.empty((), device="meta"), (False, False, True)

    def call(backend: TritonBackend) -> Any:
        shape = torch.Size((4, 257, 5, 5))
        return primitives.backward(backend, g, None, None, alpha, sum_sq, shape, Call(1, 1e-5, k=1.0), want)

    (launch,) = recorded(call, TARGETS[target].warp_size)
    assert (launch.name, launch.grid) == ("alpha_gradient", (3,))
    assert not any(compiled(launch, target).local_bytes().values())
