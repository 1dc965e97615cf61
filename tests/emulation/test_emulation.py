"""The CUDA kernels on the host: the shared suite, the sanitizers, and kernels broken on purpose."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from emulated import (
    CHECKS,
    CSRC,
    F32_ONLY,
    HERE,
    KERNELS,
    ROOT,
    SANITIZE,
    build_check,
    compile_all,
    compiler,
    link,
    sources_of,
)

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # fibers and stacks that outlive their function do not go together
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
    return subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, timeout=1800, env=environment
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
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("check", CHECKS)
def test_all_primitives_under_the_sanitizers(check: str, tmp_path: Path) -> None:
    """AddressSanitizer and UBSan, every mixture of dtypes and every regime of shapes, against long double."""
    (tmp_path / "empty.cpp").write_text("int main() {}")
    try:
        link([tmp_path / "empty.cpp"], tmp_path / "empty", SANITIZE)
    except AssertionError as error:
        pytest.skip(f"this compiler has no sanitizers: {error}")
    done = run(build_check(tmp_path, flags=SANITIZE, check=check))
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]


@dataclass(frozen=True)
class Break:
    file: str
    old: str
    new: str
    sanitized: bool = False  # only the sanitizer can see it

    @property
    def check(self) -> str:
        """The program that must notice."""
        return "check_heteroscedastic" if self.file.startswith("heteroscedastic") else "check"


SWEEP, MATH, HOST = "heteroscedastic_sweep.h", "heteroscedastic_math.h", "heteroscedastic.cu"
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
    "a block's sum is not stored": Break(SWEEP, "a.partials[blockIdx.x] = sum", "a.partials[0] = sum"),
    "elements beyond the end have terms": Break(SWEEP, "if (Sum && i < count) sum", "if (Sum) sum"),
    "the next vectors twice": Break(SWEEP, "loaded = ahead;", ""),
    "the batch before": Break(SWEEP, "vector += kThreads) {", "vector += 0) {"),
    "an element too many": Break(SWEEP, "if (i < n.count) one(i, at);", "if (i <= n.count) one(i, at);", True),
    "vectors beyond the end": Break(SWEEP, "t.vectors && n.count == W) return into", "t.vectors) return into", True),
    "the gap behind the next row": Break(SWEEP, "if (--left == 0) {\n      at +=", "if (left-- == 0) {\n      at +="),
    "the first row's gaps": Break(SWEEP, "+ n.outer * t.gap_bytes", ""),
    "a row of one is a row of many": Break(SWEEP, "const int row = at_most<W>(a.row);", "const int row = W + 1;"),
    "the weights of the first block": Break(SWEEP, "position = block * a.inner + in_run", "position = in_run"),
    "the weights of the next channel": Break(SWEEP, "          else\n            position -= a.inner;", ""),
    "the next sample's weights": Break(SWEEP, "if (--runs == 0)", "if (runs-- == 0)"),
    "one weight where there are more": Break(HOST, "&& a.channels % width == 0", ""),
    "a vector of weights where channels end": Break(HOST, "(a.channels == 1 || a.inner % width == 0)", "(true)"),
    "misaligned vectors of weights": Break(HOST, "(p.positions) % access == 0", "(p.positions) % 1 == 0", True),
    "rows between vectors": Break(HOST, "(row % width == 0 && s.gap_bytes", "(s.gap_bytes"),
    "gaps of half a vector as vectors": Break(HOST, "s.gap_bytes % 16 == 0);", "true);", True),
    "misaligned vectors": Break(HOST, "= whole && reinterpret_cast<uintptr_t>(v.data) % 16 == 0", "= whole", True),
    "gaps forgotten": Break(HOST, "s->data == nullptr || s->gap_bytes == 0", "true"),
    "a sum too few": Break(HOST, "u * kThreads < a.blocks) sum", "u * kThreads + 1 < a.blocks) sum"),
    "sums that are not there": Break(HOST, "i < a.blocks ? i : first", "i", True),
    "k of the host": Break(SWEEP, "a.totals == nullptr ? a.k : a.totals[1];", "a.k;"),
    "M for the finish's k": Break(HOST, "a.k : a.totals[1];", "a.k : a.totals[0];"),
    "a negative variance counts": Break(MATH, "negative_is_nan && u < 0", "false"),
    "a NaN that becomes a variance": Break(MATH, "u <= eps ? eps : u;", "u > eps ? u : eps;"),
    "exp overflows": Break(MATH, "positive ? 1 + eps * e : e + eps", "exp_of(u) + eps"),
    "softplus by log": Break(MATH, "log1p_of(e) + eps", "log_of(1 + e) + eps"),
    "a slope of the other side": Break(MATH, "(positive ? Acc(1) : e) * both", "(positive ? e : Acc(1)) * both"),
    "the power of a quotient": Break(MATH, "if (shifted) weight *= exp_of", "if (false) weight *= exp_of"),
    "a weight of an element is squared": Break(MATH, "weight *= w;", "weight *= w * w;"),
    "what does not count in a term": Break(MATH, "if (w == 0) x = y = u = 0;", ""),
    "an infinite factor of nothing": Break(MATH, "if (w == 0) factor = 0;", ""),
}  # fmt: skip
# What is compiled anew where a header has changed.
INCLUDED_BY = {
    "planes.h": ("planes.cu", "masked_planes.cu"),
    "rows.h": ("rows.cu", "masked_rows.cu"),
    "weights.h": ("masked_planes.cu", "masked_rows.cu"),
    **dict.fromkeys((SWEEP, MATH), ("heteroscedastic_plain.cu", "heteroscedastic_masked.cu")),
    "reduce.h": tuple(name for name in KERNELS if name not in ("scale.cu", "gaussian_nll.cu", "chunks.cpp")),
}  # fmt: skip


SoundObjects = dict[tuple[str, bool], dict[str, Path]]


@pytest.fixture(scope="module")
def sound_objects(tmp_path_factory: pytest.TempPathFactory) -> SoundObjects:
    """The check programs for fp32 alone, in objects, with and without sanitizers; and they must pass."""
    found = {}
    for check in CHECKS:
        for sanitized in (False, True):
            into = tmp_path_factory.mktemp("sound")
            flags = (*F32_ONLY, *(SANITIZE if sanitized else ()))
            objects = compile_all(sources_of(check), into, flags=flags)
            done = run(link(objects, into / "program", SANITIZE if sanitized else ()), "f32")
            assert done.returncode == 0, done.stderr
            found[check, sanitized] = {o.name.removesuffix(".o"): o for o in objects}
    return found


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_is_found(name: str, sound_objects: SoundObjects, tmp_path: Path) -> None:
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
    sound = sound_objects[broken.check, broken.sanitized]
    objects = {**sound, **{o.name.removesuffix(".o"): o for o in changed}}
    done = run(link(list(objects.values()), tmp_path / "check", sanitize), "f32")
    assert done.returncode != 0, f"nobody noticed: {done.stdout}"
