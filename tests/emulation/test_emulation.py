"""The CUDA kernels on the host: the shared suite, the sanitizers, and kernels broken on purpose."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from emulated import CSRC, F32_ONLY, HERE, KERNELS, ROOT, SANITIZE, build_check, compile_all, compiler, link

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # fibers and stacks that outlive their function do not go together
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
    return subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, timeout=600, env=environment
    )


def test_shared_suite_on_the_emulated_back_end(emulated_module: Path) -> None:
    """The tests that every back end must pass, with `cuda` running on CPU tensors."""
    environment = {
        **os.environ,
        "VIDFAST_EMULATED_CUDA": str(emulated_module),
        "VIDFAST_TEST_BACKEND": "cuda",
        "VIDFAST_TEST_DEVICE": "cpu",
        "VIDFAST_TEST_SMALL": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "site"), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-m", "backend", "-p", "no:cacheprovider", "tests/core"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_all_primitives_under_the_sanitizers(tmp_path: Path) -> None:
    """AddressSanitizer and UBSan, every pair of dtypes and every regime of shapes, against long double."""
    (tmp_path / "empty.cpp").write_text("int main() {}")
    try:
        link([tmp_path / "empty.cpp"], tmp_path / "empty", SANITIZE)
    except AssertionError as error:
        pytest.skip(f"this compiler has no sanitizers: {error}")
    done = run(build_check(tmp_path, flags=SANITIZE))
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]


@dataclass(frozen=True)
class Break:
    file: str
    old: str
    new: str
    sanitized: bool = False  # only the sanitizer can see it


BREAKS = {
    "the barrier before columns are added": Break(
        "rows.h", "columns.sum[e];\n    __syncthreads();", "columns.sum[e];"
    ),
    "the barrier after the scales": Break(
        "rows.h", "  __syncthreads();\n\n  Columns<M, T, Sum, Masked> columns", "\n  Columns<M, T, Sum, Masked> columns"
    ),
    "a barrier between the steps of a sum": Break(
        "reduce.h", "    __syncthreads();\n    if (i < half)", "    if (i < half)"
    ),
    "the counter is not set": Break("reduce.h", "*a.counter = 0", "*a.counter = *a.counter"),
    "a column too many": Break("rows.h", "if (column(e) < limit) el", "if (column(e) <= limit) el", sanitized=True),
    "a vector too many": Break("planes.h", ": v < count) {", ": v <= count) {", sanitized=True),
    "a vector too few": Break("planes.h", "if (v >= count) continue;", "if (v + 1 >= count) continue;"),
    "nobody is last": Break("reduce.h", "== expected - 1", "== expected"),
    "the first block is last": Break("reduce.h", "== expected - 1", "== 0"),
    "a shuffle without some lanes": Break(
        "planes.h", "total = warp_sum(total);", "if (lane > 0) total = warp_sum(total);"
    ),
    "the sum of a cut run on one side only": Break(
        "finish.cu", "(parts.more == 0) y[u] = 0;\n    } else", "(parts.more <= 1) y[u] = 0;\n    } else"
    ),
    "the sum of a run cut twice": Break("finish.cu", "p <= parts.more; ++p", "p < parts.more; ++p"),
    "one of several runs that a block adds": Break("rows.h", "more < added; ++more", "more + 1 < added; ++more"),
    "a divisor's factor rounded down": Break("chunks.cpp", "(numerator + d - 1) / d", "numerator / d"),
    "a partial sum too few": Break("finish.cu", "deep < depth) s +=", "deep + 1 < depth) s +="),
    "what does not count is used": Break("weights.h", "r = w != 0 ? x - y : Acc(0)", "r = x - y"),
    "a weight is squared": Break("weights.h", "sum += weighted * r", "sum += weighted * weighted"),
    "bytes in the other order": Break("weights.h", "raw[u] >> (8 * e)", "raw[u] >> (8 * (W - 1 - e))"),
    "vectors of weights where they are not aligned": Break("weights.h", "(size == 1 ? W : 16) == 0", "1 == 0", True),
    "the weights of the first sample": Break("planes.h", "(o * a.inner + first) * weights", "first * weights"),
    "the weights of the sample before": Break("planes.h", "weights.base += a.inner *", "weights.base += 0 *"),
    "a vector of weights too many": Break(
        "planes.h", "return vector(u) < count ?", "return vector(u) <= count ?", sanitized=True
    ),
    "the weights of the first of joined rows": Break(
        "rows.h", "quotient(run, a.rows.by_channels) * a.inner + in_run", "in_run"
    ),
    "the weights of the batch before": Break("rows.h", "begin += B * down;", "begin += B;"),
    "one weight a row where there are more": Break("gaussian_nll.cu", "= plan.inner == 1 &&", "="),
    "a row of weights too many": Break("rows.h", "j / Each < left ?", "j / Each <= left ?", sanitized=True),
    "M of the shape": Break("reduce.h", "a.m : a.totals[0]", "a.m : a.m"),
    "a weight too few": Break("total.cu", "(threadIdx.x) < tail", "(threadIdx.x) + 1 < tail"),
    "weights in place of their sums": Break("total.cu", "a.positions = a.sums;", "a.positions = t.positions;"),
}  # fmt: skip
# What is compiled anew where a header has changed.
INCLUDED_BY = {
    "planes.h": ("planes.cu", "masked_planes.cu"),
    "rows.h": ("rows.cu", "masked_rows.cu"),
    "weights.h": ("masked_planes.cu", "masked_rows.cu"),
    "reduce.h": tuple(name for name in KERNELS if name not in ("scale.cu", "gaussian_nll.cu", "chunks.cpp")),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound_objects(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Path]]:
    """The check program for fp32 alone, in objects, with and without sanitizers; and it must pass."""
    found = {}
    sources = [CSRC / "cuda" / name for name in KERNELS] + [HERE / "check.cpp", HERE / "emulation.cpp"]
    for sanitized in (False, True):
        into = tmp_path_factory.mktemp("sound")
        flags = (*F32_ONLY, *(SANITIZE if sanitized else ()))
        objects = compile_all(sources, into, flags=flags)
        done = run(link(objects, into / "check", SANITIZE if sanitized else ()), "f32")
        assert done.returncode == 0, done.stderr
        found[sanitized] = {o.name.removesuffix(".o"): o for o in objects}
    return found


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_is_found(
    name: str, sound_objects: dict[bool, dict[str, Path]], tmp_path: Path
) -> None:
    broken = BREAKS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    file = csrc / "cuda" / broken.file
    text = file.read_text()
    found = text.count(broken.old)
    assert found == 1, f"{broken.file} has changed: {broken.old!r} is there {found} times"
    file.write_text(text.replace(broken.old, broken.new))
    names = INCLUDED_BY.get(broken.file, (broken.file,))
    sanitize = SANITIZE if broken.sanitized else ()
    changed = compile_all(
        [csrc / "cuda" / n for n in names], tmp_path / "objects", csrc, (*F32_ONLY, *sanitize)
    )
    objects = {**sound_objects[broken.sanitized], **{o.name.removesuffix(".o"): o for o in changed}}
    done = run(link(list(objects.values()), tmp_path / "check", sanitize), "f32")
    assert done.returncode != 0, f"nobody noticed: {done.stdout}"
