"""The code that Triton generates for weights of positions: activations in 128 bits all the same, nothing spilled.

As test_generated_code.py, of which the kernels without weights are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

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
from vidfast.layout import layout_of  # noqa: E402
from vidfast.positions import Counts, Weights  # noqa: E402

PRIMITIVES = ("forward", "forward_grad", "backward")
# Of positions; None: the totals alone, as with a weight on the device.
KINDS = ("bytes", "numbers", None)


def launches(
    primitive: str,
    regime: str,
    dtypes: str,
    kind: str | None,
    target: str = "sm_90",
    rule: Tuning = RULE,
) -> list[Launch]:
    shape, last, _ = REGIMES[regime]
    order = torch.channels_last if last else torch.contiguous_format
    mean, teacher = (
        torch.empty(shape, dtype=d, device="meta").contiguous(memory_format=order) for d in DTYPES[dtypes]
    )
    alpha, sum_sq, totals = (
        torch.empty(n, dtype=d, device="meta")
        for n, d in ((shape[1], torch.float32), (shape[1], torch.float64), (2, torch.float64))
    )
    layout = layout_of(mean, teacher, 1)
    positions = None
    if kind is not None:
        wide = torch.float64 if torch.float64 in DTYPES[dtypes] else torch.float32
        dtype = torch.uint8 if kind == "bytes" else wide
        positions = torch.empty(layout.outer * layout.inner, dtype=dtype, device="meta")
    counts = Counts(positions, totals)
    asked = Call(1, 1e-5, full=primitive == "forward", k=1.0)
    loss = torch.empty((), device="meta")

    def call(backend: TritonBackend) -> None:
        if primitive == "forward":
            backend.forward(mean, teacher, alpha, layout, asked, loss=loss, sum_sq=sum_sq, counts=counts)
        elif primitive == "forward_grad":
            backend.forward_grad(
                mean, teacher, alpha, layout, asked,
                loss=loss, grad_mean=torch.empty_like(mean), grad_alpha=sum_sq, counts=counts,
            )  # fmt: skip
        else:
            backend.backward(
                loss, mean, teacher, alpha, sum_sq, layout, asked,
                grad_mean=torch.empty_like(mean), grad_target=torch.empty_like(teacher), grad_alpha=alpha,
                counts=counts,
            )  # fmt: skip

    return recorded(call, TARGETS[target].warp_size, rule)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtypes" not in metafunc.fixturenames:
        return
    every = list(product(REGIMES, PRIMITIVES, KINDS))
    if metafunc.config.getoption("--slow"):
        chosen = [(target, *case, dtype) for target, case, dtype in product(TARGETS, every, DTYPES)]
    else:
        targets, dtypes = ("sm_80", "sm_90", "gfx942"), list(DTYPES)
        chosen = []
        for i, (regime, primitive, kind) in enumerate(every):
            # the totals alone belong to the kernels without weights: once
            if kind is not None or (regime, primitive) == ("channels_last", "forward_grad"):
                chosen.append((targets[(i + i // 3) % 3], regime, primitive, kind, dtypes[(i + i // 6) % 6]))
    metafunc.parametrize(
        ("target", "regime", "primitive", "kind", "dtypes"), chosen, ids=lambda name: str(name)
    )


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compilations of other runs prove nothing about this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def values_a_thread(sweep: Launch, target: str) -> int:
    """Of a tile."""
    given = sweep.arguments
    tile = given["TILE"] if "TILE" in given else given["ROWS"] * given["COLS"]
    return int(tile) // (TARGETS[target].warp_size * int(sweep.options["num_warps"]))


def check_vectors(
    code: Code, sweep: Launch, target: str, primitive: str, kind: str | None, dtypes: str
) -> None:
    """Each tile of mean and target is loaded in as few accesses as there can be, before the loop and within."""
    accesses = code.accesses()
    values = values_a_thread(sweep, target)
    sizes = [torch.empty((), dtype=d).element_size() for d in DTYPES[dtypes]]
    tile = sum(values * size for size in sizes) // 16
    weights = 0  # wide loads of weights: planes have them as neighbours
    if kind == "numbers" and sweep.name == "sweep_planes":
        weights = values * (8 if 8 in sizes else 4) // 16
    assert accesses["load", 128] == 2 * (tile + weights), accesses
    stored = {"forward": [], "forward_grad": sizes[:1], "backward": sizes}[primitive]
    assert accesses["store", 128] >= sum(values * size for size in stored) // 16, accesses
    if 2 in sizes and sweep.arguments["tail"] is None:
        assert not accesses["load", 16], accesses
        assert not accesses["store", 16], accesses


def test_the_activations_move_in_vectors_and_nothing_spills(
    target: str, regime: str, primitive: str, kind: str | None, dtypes: str
) -> None:
    made = launches(primitive, regime, dtypes, kind, target)
    assert made[0].name == REGIMES[regime][2]
    for launch in made:
        code = compiled(launch, target)
        assert not any(code.local_bytes().values()), (launch.name, code.local_bytes())
        assert code.shared_bytes() <= 48 * 1024
        if launch is made[0]:
            check_vectors(code, launch, target, primitive, kind, dtypes)
            if not code.amd:
                most = 96 if kind is None else 128
                assert code.registers() <= most, (
                    f"{512 // (most // 32 * 32) * 4} programs of 128 threads have no more"
                )


FP64 = re.compile(r"\bD(ADD|MUL|FMA|SETP)\b")
# Reciprocals, of a division of integers too, and what is called.
LONG = re.compile(r"\bMUFU|\bCALL\b")


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("primitive", ["forward_grad", "backward"])
def test_the_first_tile_is_loaded_as_soon_as_its_weights_are_there(regime: str, primitive: str) -> None:
    """While they are on their way the channel's exponential begins; and a tile is loaded before the last is stored."""
    sweep = launches(primitive, regime, "bf16", "bytes")[0]
    text = compiled(sweep, "sm_90").text
    code = [line.strip() for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", text)]
    loads = [i for i, line in enumerate(code) if "LDG.E.128" in line]
    first = values_a_thread(sweep, "sm_90") * 4 // 16
    before = code[: loads[first - 1]]
    weights = next(i for i, line in enumerate(before) if "LDG" in line)
    assert not any(FP64.search(line) for line in before[:weights])
    assert not any(LONG.search(line) for line in before), (
        "something is divided before the first tile is loaded"
    )
    assert sum(bool(FP64.search(line)) for line in before) <= 20, "a channel is computed first"
    stores = [i for i, line in enumerate(code) if "STG.E.128" in line]
    assert sum(load < stores[0] for load in loads[first : 2 * first]) == first


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, None], ids=str)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_totals(target: str, dtype: torch.dtype | None) -> None:
    """One launch, two for very many positions; k's factor may have any dtype."""
    for count, most in ((1, 1), (1 << 17, 1), (1 << 20, 1 if dtype is None else 2)):
        positions = None if dtype is None else torch.empty(count, dtype=dtype, device="meta")
        factor = torch.empty((), dtype=torch.bfloat16, device="meta")
        totals = torch.empty(2, dtype=torch.float64, device="meta")

        def call(
            backend: TritonBackend,
            positions: torch.Tensor | None = positions,
            factor: torch.Tensor = factor,
            count: int = count,
            totals: torch.Tensor = totals,
        ) -> None:
            backend.total(positions, factor, count, 1.0, 64, totals=totals)

        made = recorded(call, TARGETS[target].warp_size)
        assert [launch.name for launch in made] == ["sum_positions", "total"][-most:]
        for launch in made:
            code = compiled(launch, target)
            assert not any(code.local_bytes().values()), (launch.name, code.local_bytes())


def test_the_sum_of_positions_does_not_follow_from_their_address() -> None:
    """Weights on any address are loaded alike, so that they are added alike."""

    def call(backend: TritonBackend) -> None:
        positions = torch.empty(1 << 18, device="meta")
        backend.total(
            positions, None, 1 << 18, 1.0, 0, totals=torch.empty(2, dtype=torch.float64, device="meta")
        )

    for launch in recorded(call):
        aligned, anywhere = (compiled(launch, "sm_90", aligned).accesses() for aligned in (True, False))
        assert aligned["load", 32] == anywhere["load", 32]
        assert aligned["load", 64] == anywhere["load", 64]


def test_a_mask_is_one_launch_more() -> None:
    mean = torch.empty(64, 256, 8, 7, device="meta")
    alpha = torch.empty(256, device="meta")
    mask = torch.empty(64, 8, 7, dtype=torch.bool, device="meta")
    asked = Call(1, 1e-5, k=1.0, masked=True)

    def call(backend: TritonBackend) -> None:
        counts = primitives.counted(backend, mean, mean, asked, Weights(mask.unsqueeze(1), None))
        primitives.forward_grad(backend, mean, mean, alpha, asked, counts=counts)

    assert [launch.name for launch in recorded(call)] == ["total", "sweep_rows", "finish"]
