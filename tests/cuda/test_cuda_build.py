"""What nvcc makes of the kernels: registers and spills by its report, accesses by the machine code.

VIDFAST_TEST_ARCHES  the architectures, separated by commas (default: 90; "80,90" takes twice as long)
"""

from __future__ import annotations

import re

import pytest
from machine_code import ARCHES, BYTES, Built, Kernel, build, instructions

SOURCES = ("masked_rows", "masked_planes", "rows", "planes", "scale", "alpha", "finish", "total")


@pytest.fixture(scope="module", params=ARCHES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(SOURCES, request.param, tmp_path_factory.mktemp("nvcc"))


def test_every_kernel_is_there(built: Built) -> None:
    """Two mappings, nine pairs, with and without sums, with and without a mask; two finishes; four dtypes of scale;
    alpha alone; three kinds of weights.
    """
    count = {
        m: sum(k.mapping == m for k in built.kernels)
        for m in ("planes", "rows", "finish", "scale_rows", "alpha_only", "total_of")
    }
    assert count == {
        "planes": 36, "rows": 36, "finish": 2, "scale_rows": 4, "alpha_only": 1, "total_of": 3,
    }  # fmt: skip


def test_registers_and_spills_are_in_budget(built: Built) -> None:
    """Three blocks of 256 threads on a multiprocessor need at most 80 registers; masked kernels and the rare pairs have
    two blocks.
    """
    over = []
    for k in built.kernels:
        registers = {"scale_rows": 64, "alpha_only": 48, "finish": 80, "total_of": 64}.get(
            k.mapping, 128 if "Any" in k.pair or k.masked else 80
        )
        spills = 16 if k.mapping == "finish" else 0  # around its divisions, which are calls
        if k.registers > registers or k.stack > spills or k.spill_loads > spills:
            over.append(k)
    assert not over, "\n".join(map(str, over))


def vector_loop(code: list[str]) -> tuple[int, int]:
    loads = [i for i, line in enumerate(code) if "LDG.E.128" in line]
    stores = [i for i, line in enumerate(code) if "STG.E.128" in line]
    return loads[0], stores[-1]


def batch(pair: tuple[str, ...]) -> tuple[int, int, int]:
    """(vectors in flight, 128-bit words of mean in a vector, of target), as csrc/cuda/element.h has them."""
    mean, target = (BYTES[p] for p in pair)
    width = 16 // min(mean, target)
    return 128 // (width * (mean + target)), width * mean // 16, width * target // 16


def batches(k: Kernel) -> list[int]:
    """The vectors in flight of each loop over vectors.

    Masked rows have one for a weight a row, and one for a weight a column, which keeps 16 weights at most.
    """
    vectors, _, _ = batch(k.pair)
    if not k.masked or k.mapping == "planes":
        return [vectors]
    width = 16 // min(BYTES[p] for p in k.pair)
    return [vectors, min(vectors, 16 // width)]


def words_of_weights(k: Kernel) -> int:
    """128-bit words of weights that are numbers: masked planes load a batch's to ask for it, and in the loop."""
    if not k.masked or k.mapping == "rows":
        return 0
    vectors, _, _ = batch(k.pair)
    width, accumulated = 16 // min(BYTES[p] for p in k.pair), 8 if "double" in k.pair else 4
    return 2 * vectors * width * accumulated // 16


def test_activations_are_read_and_written_128_bits_at_a_time(built: Built) -> None:
    seen = 0
    for k, code in instructions(built):
        if not k.sweeps:
            continue
        seen += 1
        _, mean, target = batch(k.pair)
        loads = sum("LDG.E.128" in line for line in code)
        stores = sum("STG.E.128" in line for line in code)
        vectors = sum(batches(k))
        assert loads == vectors * (mean + target) + words_of_weights(k), f"{k.name} has {loads} 128-bit loads"
        assert stores == vectors * (mean if k.sums else mean + target), (
            f"{k.name} has {stores} 128-bit stores"
        )
    assert seen == 64


def test_all_loads_of_a_batch_are_in_flight_before_the_first_is_used(built: Built) -> None:
    """Between the first and the last 128-bit load of a batch nothing reads what they bring."""
    for k, code in instructions(built):
        if not k.sweeps:
            continue
        _, mean, target = batch(k.pair)
        at = [i for i, line in enumerate(code) if "LDG.E.128" in line][words_of_weights(k) :]
        for vectors in batches(k):
            of_batch, at = at[: vectors * (mean + target)], at[vectors * (mean + target) :]
            registers: set[str] = set()
            for line in code[of_batch[0] : of_batch[-1]]:
                operands = re.findall(r"\bR(\d+)\b", line)
                if "LDG.E.128" in line:
                    first = int(operands[0])
                    registers.update(str(first + i) for i in range(4))
                else:
                    assert not registers & set(operands[1:]), (
                        f"{k.name}: {line} waits for a load of its batch"
                    )
        assert not at


def test_the_weights_of_a_batch_are_in_flight_together(built: Built) -> None:
    """Masked kernels read a batch's weights of each kind one after another, and none is converted between two loads."""
    seen = 0
    for k, code in instructions(built):
        if not k.sweeps or not k.masked:
            continue
        width = 16 // min(BYTES[p] for p in k.pair)
        weights = max(n * (width if i or k.mapping == "planes" else 1) for i, n in enumerate(batches(k)))
        together = longest = 0
        for line in code:
            if "LDG.E.U8" in line:
                together += 1
                longest = max(longest, together)
            elif "I2F" in line:
                together = 0
        seen += 1
        assert longest >= weights, (
            f"{k.name}: {longest} of {weights} bytes are loaded before one is converted"
        )
    assert seen == 32


# What takes long before anything is loaded: fp64, conversions and reciprocals of an integer division, calls.
HEAVY = re.compile(r"\bD(ADD|MUL|FMA|SETP)\b|\bMUFU|\bI2F|\bCALL\b")
OF_WEIGHTS = re.compile(r"\bDSETP\b|\bI2F")  # from bytes, and compared with 0


def test_the_first_batch_is_asked_for_before_anything_is_divided(built: Built) -> None:
    """The variance of a channel takes about 200 fp64 instructions, and a division of integers a call."""
    seen = 0
    for k, code in instructions(built):
        if not k.sweeps:
            continue
        seen += 1
        asked = [i for i, line in enumerate(code) if "CCTL" in line]
        heavy = next(
            i
            for i, line in enumerate(code)
            if HEAVY.search(line) and not (k.masked and OF_WEIGHTS.search(line))
        )
        # with sums, the first block asks for alpha besides; masked, each vector of both is asked for where it counts
        times = 2 * batch(k.pair)[0] if k.masked else 1
        assert len(asked) == times + k.sums, f"{k.name} asks {len(asked)} times"
        assert asked[-1] < heavy, f"{k.name}: {code[heavy]} stands before the first batch is asked for"
    assert seen == 64


def test_loops_do_not_spill(built: Built) -> None:
    for k, code in instructions(built):
        if not k.sweeps:
            continue
        first, last = vector_loop(code)
        local = [line for line in code[first : last + 1] if re.search(r"\b(LDL|STL)\b", line)]
        assert not local, f"{k.name}: {local}"


def test_the_finish_waits_for_the_sweep_that_lets_it_start(built: Built) -> None:
    """On sm_90 it may begin before the sweep's sums are there; nothing that runs without a GPU would notice."""
    if int(built.arch) < 90:
        pytest.skip("there is no early start")
    seen = set()
    for k, code in instructions(built):
        waits = [i for i, line in enumerate(code) if "ACQBULK" in line]
        starts = sum("PREEXIT" in line for line in code)
        seen.add((k.mapping, k.sums))
        if k.mapping == "finish":
            assert len(waits) == 1, k.name
            # alpha, of 2, 4 or 8 bytes, is the user's, and M and k are older than the sweep; the sums are loaded behind
            assert sum("LDG" in line for line in code[: waits[0]]) == 5, k.name
        elif k.mapping == "total_of":  # of very many positions, the second launch
            assert len(waits) == starts == 1, k.name
        else:
            assert not waits, k.name
            assert bool(starts) == (k.mapping in ("planes", "rows") and k.sums), k.name
    assert {
        ("finish", False),
        ("planes", True),
        ("rows", True),
        ("planes", False),
        ("total_of", False),
    } <= seen
