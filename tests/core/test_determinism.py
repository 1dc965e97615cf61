"""The same bits from run to run, for any number of threads, in any process; and every instruction set in bounds."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from bounds import check_call
from places import Place
from problems import BF16, BY_NAME, CASES, DTYPES, FP16, FP32, FP64, ISAS, WAYS, Case, short
from torch import Tensor

import vidfast

# Large enough to wake other threads for, even where these sleep while they wait.
PROBLEMS = (
    Case("planes", "many tasks of planes", (27, 33, 41, 17)),
    Case("one plane", "many pieces of one plane", (1, 1, 600_011)),
    Case("rows", "many row blocks and column tiles", (601, 1027)),
    Case("many channels", "channels enough for threads of their own", (130, 5003)),
    Case("narrow rows", "joined rows and a tail", (50_003, 12)),
    Case("small planes", "rows of small planes", (900, 64, 3, 3)),
    Case("channels_last", "a long column reduction", (8, 48, 40, 40), mean_layout="channels_last"),
    Case("slice", "rows that are not back to back", (4001, 130), mean_layout="batch_slice"),
)


def outputs(case: Case, dtype: torch.dtype, device: torch.device | str, name: str) -> list[Tensor]:
    """Everything both strategies return. alpha is fp64, so that d/d alpha shows the last bit of the sums."""
    found: list[Tensor] = []
    for strategy in ("one_pass", "two_pass"):
        m, t, a = case.tensors(dtype, alpha_dtype=FP64, device=device)
        m, a = m.requires_grad_(), a.requires_grad_()
        wanted = [m, a]
        if strategy == "two_pass":
            wanted.append(t.requires_grad_())
        loss = vidfast.gaussian_nll(m, t, a, strategy=strategy, backend=name, channel_dim=case.channel_dim)
        found += [
            loss,
            *torch.autograd.grad(loss, wanted, torch.tensor(3.3, dtype=loss.dtype, device=device)),
        ]
    return found


def digest(tensors: list[Tensor]) -> str:
    h = hashlib.sha256()
    for x in tensors:
        h.update(
            np.ascontiguousarray(
                x.detach().cpu().contiguous().view(torch.uint8 if x.dim() else x.dtype).numpy()
            ).tobytes()
        )
    return h.hexdigest()


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=short)
@pytest.mark.parametrize("case", PROBLEMS, ids=lambda c: c.name)
def test_the_same_from_run_to_run(backend: Place, case: Case, dtype: torch.dtype) -> None:
    backend.need(case.numel)
    first = digest(outputs(case, dtype, backend.device, backend.name))
    keep = []
    for i in range(3):
        keep.append(torch.empty(1000 * i + 7))  # other addresses, the same 16-byte alignment
        assert digest(outputs(case, dtype, backend.device, backend.name)) == first


def test_digests_can_differ() -> None:
    found = [torch.ones(3), torch.tensor(1.0)]
    other = [found[0], torch.nextafter(found[1], torch.tensor(2.0))]
    assert digest(found) != digest(other)


@pytest.fixture
def _cpu(backend: Place) -> None:
    if not backend.is_cpu:
        pytest.skip("threads and instruction sets are the CPU's")


@pytest.mark.usefixtures("_cpu")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=short)
@pytest.mark.parametrize("case", PROBLEMS, ids=lambda c: c.name)
def test_the_same_for_any_number_of_threads(backend: Place, case: Case, dtype: torch.dtype) -> None:
    found = {}
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found[threads] = digest(outputs(case, dtype, backend.device, backend.name))
    assert len(set(found.values())) == 1, found


def all_digests() -> list[str]:
    return [digest(outputs(case, FP32, "cpu", "cpu")) for case in PROBLEMS]


@pytest.mark.usefixtures("_cpu")
@pytest.mark.parametrize("threads", ["1", "4"])
def test_the_same_in_a_process_with_other_threads(backend: Place, threads: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import test_determinism; print(*test_determinism.all_digests())"],
        capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": threads, "VIDFAST_CPU_ISA": vidfast.info()["backends"]["cpu"]["isa"]},  # type: ignore[index]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == all_digests()


def instruction_sets() -> list[str]:
    from vidfast import _C

    before = _C.cpu_isa()
    found = [name for name in ISAS if _C.cpu_select_isa(name)]
    assert _C.cpu_select_isa(before)
    return found


@pytest.fixture
def _own_isa() -> Iterator[None]:
    from vidfast import _C

    before = _C.cpu_isa()
    yield
    assert _C.cpu_select_isa(before)


@pytest.mark.usefixtures("_cpu", "_own_isa")
def test_instruction_sets_are_chosen_by_name(backend: Place) -> None:
    from vidfast import _C

    assert "baseline" in instruction_sets()
    for name in instruction_sets():
        assert _C.cpu_select_isa(name)
        assert _C.cpu_isa() == name
    assert not _C.cpu_select_isa("sse9")
    assert _C.cpu_isa() == name


@pytest.mark.usefixtures("_cpu", "_own_isa")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_every_instruction_set_keeps_the_bounds(backend: Place, isa: str, dtype: torch.dtype) -> None:
    from vidfast import _C

    if not _C.cpu_select_isa(isa):
        pytest.skip(f"this processor has no {isa}")
    for case in CASES:
        if case.numel > 20_000:
            continue
        tensors = case.tensors(dtype)
        for strategy in ("one_pass", "two_pass"):
            check_call(backend, *tensors, strategy=strategy, g=2.0, channel_dim=case.channel_dim)
    for case in WAYS:
        for target_dtype in DTYPES:
            check_call(
                backend, *case.tensors(dtype, target_dtype), strategy="one_pass", channel_dim=case.channel_dim
            )
            check_call(
                backend,
                *case.tensors(dtype, target_dtype),
                strategy="two_pass",
                g=-3.5,
                channel_dim=case.channel_dim,
            )


@pytest.mark.usefixtures("_cpu", "_own_isa")
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_rounds_and_reads_alike(backend: Place, isa: str) -> None:
    """16-bit values, their rounding, and threads: what the default instruction set is held to elsewhere."""
    import test_precision

    from vidfast import _C

    if not _C.cpu_select_isa(isa):
        pytest.skip(f"this processor has no {isa}")
    for dtype in (BF16, FP16):
        for strategy in ("one_pass", "two_pass"):
            for exact, shapes in (
                (
                    test_precision.test_every_16_bit_value_is_read_and_written_exactly,
                    ((1, 1, 65536), (64, 1024)),
                ),
                (test_precision.test_rounds_to_nearest_even, ((1, 1, -1), (64, -1))),
            ):
                for shape in shapes:
                    exact(backend, dtype, strategy, shape)
    test_precision.test_bad_values_come_out_and_stay_in_their_channel(
        backend, "mean", float("nan"), (3, 4, 7, 7), "one_pass"
    )
    for case in PROBLEMS:
        found = set()
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.add(digest(outputs(case, FP32, "cpu", "cpu")))
        assert len(found) == 1


@pytest.mark.usefixtures("_cpu")
def test_the_environment_chooses_the_instruction_set(backend: Place) -> None:
    from vidfast import _C

    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.cpu_isa())
"""
    available = instruction_sets()
    for name in (*available, "no such set"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, text=True, timeout=300, env={**os.environ, "VIDFAST_CPU_ISA": name},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == (name if name in available else available[-1])


def test_misalignment_does_not_change_gradients(backend: Place) -> None:
    """An element's gradient does not depend on where its row begins."""
    case = BY_NAME["misaligned"]
    m, t, a = case.tensors(FP32, device=backend.device)
    grads = []
    for mean in (m, m.contiguous().clone()):
        x = mean.detach().requires_grad_()
        grads.append(torch.autograd.grad(backend.nll(x, t, a, strategy="one_pass"), x)[0])
    assert torch.equal(*grads)
