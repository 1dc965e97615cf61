"""What nvcc makes of the kernels with one variance an element: registers, spills, accesses.

VIDFAST_TEST_ARCHES  as in test_cuda_build.py
"""

from __future__ import annotations

import re

import pytest
from machine_code import ARCHES, BYTES, Built, Kernel, build, instructions

SOURCES = ("heteroscedastic_masked", "heteroscedastic_plain", "heteroscedastic")


@pytest.fixture(scope="module", params=ARCHES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(SOURCES, request.param, tmp_path_factory.mktemp("nvcc"))


def vectors(k: Kernel) -> tuple[int, int, int]:
    """(128-bit words of mean or raw that a thread takes, of the target, of weights that are numbers)."""
    mean, target = (BYTES[p] for p in k.pair)
    width = 16 // min(mean, target)
    return width * mean // 16, width * target // 16, width * max(4, mean, target) // 16


def batches(k: Kernel) -> int:
    """Where vectors are loaded: before the loop and in it, if the next are loaded while some are computed."""
    return 1 if k.masked or min(BYTES[p] for p in k.pair) == 2 else 2


def test_every_kernel_is_there(built: Built) -> None:
    """Seven triples, with and without sums, with and without a mask; one finish."""
    names = [k.mapping for k in built.kernels]
    assert (names.count("heteroscedastic"), names.count("heteroscedastic_finish")) == (28, 1)
    assert len(names) == 29


def test_half_of_a_multiprocessors_warps_fit_and_nothing_spills(built: Built) -> None:
    """Four blocks of 256 threads need at most 64 registers; fp64 has two blocks."""
    over = []
    for k in built.kernels:
        wide = any(p in ("double", "Any") for p in k.pair)
        most = 40 if k.mapping == "heteroscedastic_finish" else 128 if wide else 64
        if k.registers > most or k.stack or k.spill_loads or k.spill_stores:
            over.append(k)
    assert not over, "\n".join(map(str, over))


def test_elements_are_read_and_written_128_bits_at_a_time(built: Built) -> None:
    """All transforms share the loads and the stores."""
    seen = 0
    for k, code in instructions(built):
        if k.mapping != "heteroscedastic" or "Any" in k.pair:
            continue
        seen += 1
        own, target, weights = vectors(k)
        loads, stores = (sum(f"{name}.E.128" in line for line in code) for name in ("LDG", "STG"))
        assert loads == batches(k) * (2 * own + target) + k.masked * weights, (
            f"{k.name}: {loads} 128-bit loads"
        )
        assert stores == 2 * own + (0 if k.sums else target), f"{k.name}: {stores} 128-bit stores"
        local = [line for line in code if re.search(r"\b(LDL|STL)\b", line)]
        assert not local, f"{k.name}: {local}"
    assert seen == 24


def test_all_loads_are_in_flight_before_the_first_is_used(built: Built) -> None:
    """Between the first and the last 128-bit load of W elements nothing reads what they bring."""
    for k, code in instructions(built):
        if k.mapping != "heteroscedastic" or "Any" in k.pair:
            continue
        own, target, weights = vectors(k)
        at = [i for i, line in enumerate(code) if "LDG.E.128" in line][k.masked * weights :]
        each = 2 * own + target
        for first in range(0, len(at), each):
            registers: set[str] = set()
            for line in code[at[first] : at[first + each - 1]]:
                operands = re.findall(r"\bR(\d+)\b", line)
                if "LDG.E.128" in line:
                    registers.update(str(int(operands[0]) + i) for i in range(4))
                else:
                    assert not registers & set(operands[1:]), f"{k.name}: {line} waits for a load"


def test_the_finish_waits_for_the_sweep_that_lets_it_start(built: Built) -> None:
    if int(built.arch) < 90:
        pytest.skip("there is no early start")
    for k, code in instructions(built):
        waits = [i for i, line in enumerate(code) if "ACQBULK" in line]
        if k.mapping == "heteroscedastic_finish":
            assert len(waits) == 1
            # k is older than the sweep; the sums are loaded behind
            assert sum("LDG" in line for line in code[: waits[0]]) == 1
        else:
            assert not waits, k.name
            assert any("PREEXIT" in line for line in code) == k.sums, k.name
