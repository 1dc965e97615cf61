"""Runs pytest over the folders of tests, two at a time where there are two cores; with arguments it is plain pytest.

A folder's output is shown when it is done. The longest folders begin, so that the last one keeps no core waiting.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).parent
# In the order in which they begin; those that are not named come last.
LONGEST = ("core", "distill", "emulation", "triton", "ptx", "compile", "bench", "fuzz", "toy", "cuda")
NO_TESTS = 5  # pytest's exit status where it collected none


def folders() -> list[str]:
    """The folders with tests, the longest first."""
    found = sorted({path.parent.name for path in HERE.glob("*/test_*.py")})
    return sorted(found, key=lambda name: LONGEST.index(name) if name in LONGEST else len(LONGEST))


def run_folder(name: str) -> tuple[str, int, float, str]:
    """(its name, pytest's exit status, seconds, what pytest said)."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", f"tests/{name}", "-p", "no:cacheprovider"],
        cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    return name, done.returncode, time.monotonic() - begin, done.stdout


def main(arguments: list[str]) -> int:
    """0 if all tests passed."""
    workers = min(2, os.cpu_count() or 1)
    if arguments or workers < 2:
        return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=HERE.parent).returncode
    begin, summary, names = time.monotonic(), list[tuple[str, int, str]](), folders()
    print(f"tests: {', '.join(names)}; {workers} folders at a time", flush=True)
    with ThreadPoolExecutor(workers) as pool:
        for done in as_completed([pool.submit(run_folder, name) for name in names]):
            name, status, seconds, output = done.result()
            print(output, flush=True)
            last = output.strip().splitlines()[-1].strip("= ") if output.strip() else "no output"
            summary.append((name, status, last))
            print(
                f"tests/{name}: {last} [{len(summary)} of {len(names)} folders, {seconds:.0f} s]\n",
                flush=True,
            )
    for name, status, last in sorted(summary):
        print(f"{'passed' if status == 0 else 'FAILED'} tests/{name}: {last}")
    failed = [name for name, status, _ in summary if status not in (0, NO_TESTS)]
    print(f"{len(names) - len(failed)} of {len(names)} folders passed in {time.monotonic() - begin:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
