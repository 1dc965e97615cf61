"""The code that Triton generates for one variance an element: 128-bit accesses, nothing spilled, few instructions.

As test_generated_code.py, of which the kernels with one variance a channel are.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from launches import TARGETS, Code, Launch, compiled, recorded  # noqa: E402

from vidfast.backends.triton import TritonBackend  # noqa: E402
from vidfast.backends.triton.plan import RULE, Tuning  # noqa: E402
from vidfast.heteroscedastic.arguments import CLAMP, EXP, LOG_VARIANCE, SOFTPLUS, HeteroscedasticCall  # noqa: E402
from vidfast.heteroscedastic.layout import Rows  # noqa: E402
from vidfast.positions import Counts  # noqa: E402

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
PRIMITIVES = ("forward", "forward_grad", "backward")
TRANSFORMS = {"softplus": SOFTPLUS, "exp": EXP, "log_variance": LOG_VARIANCE, "clamp": CLAMP}
DTYPES = {
    "fp32": (F32,) * 3,
    "bf16": (BF16,) * 3,
    "fp16": (F16,) * 3,
    "fp64": (F64,) * 3,
    "bf16_fp32": (BF16, BF16, F32),
    "fp32_bf16": (F32, F32, BF16),
    "bf16_fp32_fp16": (BF16, F32, F16),
    "fp32_fp64": (F32, F32, F64),
    "bf16_fp64": (BF16, F64, BF16),
}
BETAS = (0.0, 0.5, 1.0, 0.7)
N = 1 << 24


def dense(count: int, channels: int = 1, inner: int = 1) -> Rows:
    return Rows(1, *[count] * 6, channels=channels, inner=inner)


# Elements as they are stored; vectors are possible in all of them.
REGIMES = {
    "dense": dense(N),
    "tail": dense(N + 3),
    "halves": Rows(64, 200704, 401408, 200704, 401408, 200704, 200704),
    "short_rows": Rows(4096, 96, 192, 96, 192, 96, 96),
}
# What has a weight.
WEIGHED = {
    "elements": dense(N),
    "planes": dense(N, 64, 1024),
    "channels_last": dense(N, 64),
    "channels_of_halves": Rows(64, 200704, 401408, 200704, 401408, 200704, 200704, 64, 3136),
    "odd_planes": dense(64 * 49 * 5000, 64, 49),
}


def launches(
    primitive: str,
    rows: Rows,
    dtypes: str,
    transform: str = "softplus",
    beta: float = 0.0,
    weights: str = "",
    target: str = "sm_90",
    rule: Tuning = RULE,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    eps: float = 1e-5,
) -> list[Launch]:
    def empty(dtype: torch.dtype, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=dtype, device="meta")

    count = rows.outer * rows.row
    mean, teacher, raw = (empty(d, count) for d in DTYPES[dtypes])
    wide = F64 if F64 in DTYPES[dtypes] else F32
    grads = {
        f"grad_{name}": torch.empty_like(x) if want else None
        for name, x, want in zip(("mean", "target", "raw"), (mean, teacher, raw), wanted, strict=True)
    }
    call = HeteroscedasticCall(
        TRANSFORMS[transform],
        0.0 if transform == "log_variance" else eps,
        beta,
        full=primitive == "forward",
        k=1 / 3,
    )
    counts = None
    if weights:
        positions = empty(torch.uint8 if weights == "bytes" else wide, count // rows.channels)
        counts = Counts(positions, empty(F64, 2))

    def run(backend: TritonBackend) -> None:
        given: tuple[Any, ...] = (mean, teacher, raw, rows, call)
        loss = torch.empty((), dtype=wide, device="meta")
        if primitive == "forward":
            backend.heteroscedastic_forward(*given, loss=loss, counts=counts)
        elif primitive == "forward_grad":
            del grads["grad_target"]
            backend.heteroscedastic_forward_grad(*given, loss=loss, **grads, counts=counts)
        else:
            backend.heteroscedastic_backward(torch.empty((), device="meta"), *given, **grads, counts=counts)

    return recorded(run, TARGETS[target].warp_size, rule)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compilations of other runs prove nothing about this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def check_vectors(code: Code, sweep: Launch, target: str, primitive: str, dtypes: str, weights: int) -> None:
    """Each tile is loaded in as few accesses as there can be, before the loop and within, and so it is stored.

    weights: wide loads of weights in a tile.
    """
    accesses = code.accesses()
    given = sweep.arguments
    values = given["TILE"] // (TARGETS[target].warp_size * int(sweep.options["num_warps"]))
    widths = [values * d.itemsize for d in DTYPES[dtypes]]
    # a narrow tensor beside fp64 fills half a vector
    wide = sum(width // 16 for width in widths) + weights
    stored = {"forward": [], "forward_grad": [widths[0], widths[2]], "backward": widths}[primitive]
    tails = given["tail"] is not None
    assert accesses["load", 128] == 2 * wide, accesses
    assert accesses["store", 128] == sum(width // 16 for width in stored), accesses
    if not tails and min(d.itemsize for d in DTYPES[dtypes]) == 2:
        assert not accesses["load", 16], accesses
        assert not accesses["store", 16], accesses


def check_code(launch: Launch, target: str) -> Code:
    code = compiled(launch, target)
    assert not any(code.local_bytes().values()), (launch.name, code.local_bytes())
    assert code.shared_bytes() <= 16 * 1024
    return code


def _every(slow: bool) -> list[tuple[str, str, str, str]]:
    if slow:
        return list(product(TARGETS, REGIMES, PRIMITIVES, DTYPES))
    targets, dtypes = ("sm_80", "sm_90", "gfx942"), list(DTYPES)
    chosen = [
        (targets[(i + i // 3) % 3], regime, primitive, dtypes[(2 * i + i // 9) % 9])
        for i, (regime, primitive) in enumerate(product(REGIMES, PRIMITIVES))
    ]
    chosen += [(targets[i % 3], "dense", "forward_grad", dtype) for i, dtype in enumerate(dtypes)]
    chosen += [(target, "dense", "backward", dtype) for target in targets for dtype in ("fp32", "bf16")]
    return sorted(set(chosen))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    slow = metafunc.config.getoption("--slow")
    if "dtypes" in metafunc.fixturenames:
        metafunc.parametrize(("target", "regime", "primitive", "dtypes"), _every(slow), ids=str)
    elif "beta" in metafunc.fixturenames:
        targets = ("sm_80", "sm_90", "gfx942")
        kinds = list(product(TRANSFORMS, BETAS, PRIMITIVES))
        chosen = [(targets[i % 3], *kind) for i, kind in enumerate(kinds) if slow or i % 3 == 0]
        metafunc.parametrize(("target", "transform", "beta", "primitive"), chosen, ids=str)


def test_elements_move_in_vectors_and_nothing_spills(
    target: str, regime: str, primitive: str, dtypes: str
) -> None:
    made = launches(primitive, REGIMES[regime], dtypes, target=target)
    assert [x.name for x in made] == ["heteroscedastic_sweep", "heteroscedastic_finish"][
        : 1 + (primitive != "backward")
    ]
    for launch in made:
        code = check_code(launch, target)
        if launch is made[0]:
            check_vectors(code, launch, target, primitive, dtypes, 0)
            if not code.amd:
                mixed = len(set(DTYPES[dtypes])) > 1
                assert code.registers() <= (128 if F64 in DTYPES[dtypes] else 96 if mixed else 80)


def test_every_transform_and_power(target: str, transform: str, beta: float, primitive: str) -> None:
    sweep = launches(primitive, REGIMES["dense"], "bf16", transform, beta, target=target)[0]
    code = check_code(sweep, target)
    check_vectors(code, sweep, target, primitive, "bf16", 0)
    if not code.amd:
        assert code.registers() <= 80, "six programs of 128 threads have no more"


@pytest.mark.parametrize("weights", ["bytes", "numbers"])
@pytest.mark.parametrize(("place", "kind"), product(WEIGHED, ["fp32", "bf16"]), ids=str)
def test_weights(place: str, kind: str, weights: str) -> None:
    """They leave the elements' vectors as they are; those of neighbours are vectors too."""
    for target, primitive in (("sm_90", "forward_grad"), ("gfx942", "backward")):
        sweep = launches(primitive, WEIGHED[place], kind, weights=weights, target=target)[0]
        code = check_code(sweep, target)
        values = sweep.arguments["VEC"]
        neighbours = place not in ("channels_last", "odd_planes")
        wide = values * 4 // 16 if weights == "numbers" and neighbours else 0
        check_vectors(code, sweep, target, primitive, kind, wide)
        if not code.amd:
            assert code.registers() <= (96 if weights == "bytes" else 112)
        if weights == "bytes" and place != "odd_planes":
            assert code.accesses()["load", 8] <= 2, "a byte at a time"


def instructions(code: Code) -> dict[int, str]:
    return {
        int(address, 16): text.strip()
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code.text)
    }


def loop_of(code: Code) -> list[str]:
    """The instructions of the longest way back."""
    there = instructions(code)
    found: list[str] = []
    for address, text in there.items():
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            turn = [x for at, x in there.items() if int(jump[1], 16) <= at <= address]
            found = max(found, turn, key=len)
    return found


# Of a bf16 element, its share of what a turn of the loop costs included. An H100 has 96 for 5 N of traffic at its
# copy's rate and 57 for 3 N, counted as one a clock for each of four schedulers.
@pytest.mark.parametrize(
    ("primitive", "transform", "most"),
    [
        ("forward", "softplus", 54), ("forward_grad", "softplus", 66), ("backward", "softplus", 48),
        ("forward", "exp", 49), ("forward_grad", "exp", 57), ("backward", "exp", 40),
        ("forward", "log_variance", 28), ("forward_grad", "log_variance", 33), ("backward", "log_variance", 31),
        ("forward", "clamp", 35), ("forward_grad", "clamp", 41), ("backward", "clamp", 24),
    ],
)  # fmt: skip
def test_the_instructions_of_an_element(primitive: str, transform: str, most: int) -> None:
    """Straight through: eight elements beside one another, without a call or a branch for one."""
    sweep = launches(primitive, REGIMES["dense"], "bf16", transform)[0]
    turn = loop_of(compiled(sweep, "sm_90"))
    assert len(turn) / sweep.arguments["VEC"] <= most
    assert not any(re.search(r"\bCALL\b", x) for x in turn)
    assert sum(bool(re.search(r"\bBRA\b", x)) for x in turn) == 1
    loads = [i for i, x in enumerate(turn) if "LDG.E.128" in x]
    stores = [i for i, x in enumerate(turn) if "STG.E.128" in x]
    assert not stores or loads[-1] < stores[0], "the next tile is on its way before this one is stored"


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_the_first_tile_is_loaded_at_once(primitive: str) -> None:
    code = instructions(compiled(launches(primitive, REGIMES["dense"], "bf16")[0], "sm_90"))
    loads = [i for i, text in enumerate(code.values()) if "LDG.E.128" in text]
    assert loads[2] < 80
    before = list(code.values())[: loads[2]]
    assert not any(re.search(r"\bMUFU|\bI2F|\bCALL\b|\bD(ADD|MUL|FMA)\b", text) for text in before)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_misaligned_pointers_compile_without_vectors(target: str) -> None:
    """The counterpart: what check_vectors sees is alignment, not a habit of the compiler."""
    for rows in (REGIMES["dense"], REGIMES["halves"]):
        code = compiled(launches("forward_grad", rows, "fp32", target=target)[0], target, aligned=False)
        assert not code.accesses()["load", 128]
        assert not any(code.local_bytes().values())


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_rows_without_vectors_compile(target: str) -> None:
    for rows in (Rows(64, 49, 98, 49, 98, 49, 49), dense(7)):
        for launch in launches("forward_grad", rows, "bf16", target=target):
            check_code(launch, target)


def test_a_finish_that_starts_early_waits_before_it_reads_sums() -> None:
    made = launches("forward_grad", REGIMES["dense"], "bf16", rule=RULE._replace(overlap=1))
    sweep, finish = (compiled(launch, "sm_90") for launch in made)
    assert "PREEXIT" in sweep.text
    assert not re.search(r"\bLDG\b", finish.text.split("ACQBULK")[0])
    assert made[1].options["launch_pdl"] is True
    assert all("launch_pdl" not in x.options for x in launches("forward_grad", REGIMES["dense"], "bf16"))
    assert "PREEXIT" not in compiled(launches("backward", REGIMES["dense"], "bf16")[0], "sm_90").text


def test_numbers_are_not_rounded_to_fp32() -> None:
    """Those that fp32 does not hold arrive as the bits of their fp64."""
    eps, beta = 1e-5 + 2**-60, 0.7
    for launch in launches("forward_grad", REGIMES["dense"], "bf16", beta=beta, eps=eps):
        for name, value in (("eps_bits", eps), ("beta_bits", beta), ("k_bits", 1 / 3)):
            if name in launch.arguments:
                assert struct.unpack("<d", struct.pack("<q", launch.arguments[name]))[0] == value
