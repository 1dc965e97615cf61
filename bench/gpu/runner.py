"""Runs stages one after another within a limit, so that whatever is cut off costs only itself.

Every stage is a process of its own, with what it prints in a file of its own. Results are lines of JSON, written as
they are measured. After each stage the archive and the summary are written anew, so that what is in the folder is whole
at any time:

    results.jsonl   what was measured (bench/lines.py)
    summary.txt     a line a stage
    all.tgz         both, every stage's output, and the files that stages left (a profile)
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import re
import resource
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from bench.lines import Lines, one_line

# What the stages' own limits are meant for; in a longer run each may take longer in proportion.
LIMIT_SECONDS = 430.0
RESULTS, SUMMARY, ARCHIVE = "results.jsonl", "summary.txt", "all.tgz"
# A stage that returns this has nothing to do here, and has said why in the last line that it printed.
NOT_HERE = 77
# A stage that is cut off has this long to end by itself.
GRACE_SECONDS = 5.0
# A process that outlives SIGKILL by this much is abandoned.
ABANDON_SECONDS = 10.0
# What is kept of either end of a longer log, and what a stage may write into one file.
END_BYTES, MOST_FILE_BYTES = 1 << 20, 1 << 30
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# With less than this left nothing more is begun.
SHORTEST_STAGE_SECONDS = 3.0
INTERRUPTED = 130
# A lost connection (SIGHUP) stops a run as an interrupt does: what is done is kept, and the device is let go.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def not_here(why: str) -> int:
    """What a stage returns that has nothing to do here."""
    print(why)
    return NOT_HERE


@dataclass(frozen=True)
class Job:
    """What a stage is given."""

    out: Path  # the folder of results
    work: Path  # for files of its own, which end in the archive
    lines: Lines
    seconds: float  # until it is cut off
    deadline: float  # by time.monotonic(), with time left to end in order: nothing long is begun after it
    small: bool  # the shortest way through: for an emulated device


@dataclass(frozen=True)
class Stage:
    """`run` returns an exit code, None for 0; or it replaces its process by a command, which then does.

    prepared: it needs what `Runner.prepare` imports; where that is done once, before the first such stage, no stage
    waits for it. The device must not be used there: a forked process cannot use it then.
    """

    name: str
    what: str
    most_seconds: float
    run: Callable[[Job], int | None]
    prepared: bool = False


@dataclass(frozen=True)
class Outcome:
    stage: str
    verdict: str  # ok, not here, failed, cut off, left out
    seconds: float
    last_line: str
    code: int | None = None

    @property
    def text(self) -> str:
        return f"{self.stage:<12} {self.verdict:<9} {self.seconds:6.1f} s  {self.last_line[:140]}".rstrip()


class Runner:
    """One run: `run()` returns the exit code, 0 unless a stage failed or none ran (1), or it was interrupted (130).

    Args:
        stages: In the order of their value.
        out: A folder for the three files; made if it is not there.
        limit: Seconds of the whole run. Beyond LIMIT_SECONDS every stage's own limit grows in proportion.
        small: Given to the stages: the shortest way through each.
        prepare: Imports what the prepared stages share; called once, before the first of them.

    Raises:
        FileExistsError: `out` has results already.
        OSError: `out` cannot be written.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        out: Path,
        limit: float,
        small: bool = False,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self.stages, self.out, self.small = stages, out, small
        self.prepare, self.is_prepared = prepare, False
        self.deadline, self.stretch = time.monotonic() + limit, max(1.0, limit / LIMIT_SECONDS)
        self.outcomes: list[Outcome] = []
        self.stopped = False
        try:
            out.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, "it is a file", str(out)) from None
        for name in (RESULTS, SUMMARY, ARCHIVE):
            if (out / name).exists():
                raise FileExistsError(
                    f"--out must be a folder without results, got {out}, which has {name}: name another, or move it"
                )
        (out / RESULTS).touch()
        self.lines = Lines(out / RESULTS)

    def run(self) -> int:
        before = {number: signal.signal(number, self._stop) for number in STOPPING}
        try:
            with tempfile.TemporaryDirectory() as work:
                for stage in self.stages:
                    self._file(self._outcome_of(stage, Path(work)), Path(work))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        print(f"\n{self.summary()}\nresults in {self.out}")
        if self.stopped:
            return INTERRUPTED
        verdicts = {outcome.verdict for outcome in self.outcomes}
        return 1 if "failed" in verdicts or verdicts <= {"left out"} else 0

    def summary(self) -> str:
        return "\n".join(outcome.text for outcome in self.outcomes)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """The stage that is running is ended and no other is begun; what is done is kept."""
        del number, frame
        self.stopped = True

    def _outcome_of(self, stage: Stage, work: Path) -> Outcome:
        if stage.prepared and not self.is_prepared and not self.stopped:
            try:
                self.prepare()
            except Exception as error:
                traceback.print_exc()
                return Outcome(stage.name, "failed", 0.0, one_line(error))
            self.is_prepared = True
        if self.stopped:
            return Outcome(stage.name, "left out", 0.0, "interrupted before")
        seconds = min(self.stretch * stage.most_seconds, self.deadline - time.monotonic())
        if seconds < SHORTEST_STAGE_SECONDS:
            return Outcome(stage.name, "left out", 0.0, "no time was left")
        print(f"{stage.name}: {stage.what}", flush=True)
        begin = time.monotonic()
        deadline = begin + max(0.9 * seconds - 1.0, 0.5 * seconds)
        log = work / f"{stage.name}.log"
        code, cut_off = self._in_a_process(
            stage, Job(self.out, work, self.lines, seconds, deadline, self.small), log
        )
        last_line = _last_line(log)
        verdict = {0: "ok", NOT_HERE: "not here"}.get(code, "failed")
        if cut_off or self.stopped:
            verdict = "cut off"
        elif code == 0 and nothing_ran(last_line):
            verdict = "not here"
        return Outcome(stage.name, verdict, time.monotonic() - begin, last_line, code)

    def _in_a_process(self, stage: Stage, job: Job, log: Path) -> tuple[int, bool]:
        """(exit code, whether it was cut off) of the stage, in a forked process that heads a group of its own."""
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # until the child has handlers of its own
        child = os.fork()
        if child == 0:
            _in_the_child(stage, job, log)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(child, child)  # the child does so too, whichever comes first
        end = time.monotonic() + job.seconds
        cut_off, kill_at = False, float("inf")
        while True:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                break
            now = time.monotonic()
            if now > kill_at + ABANDON_SECONDS:  # stuck in the driver: nothing ends it
                return -signal.SIGKILL, True
            if now > kill_at:
                _signal_group(child, signal.SIGKILL)
            elif kill_at == float("inf") and (now > end or self.stopped):
                cut_off, kill_at = True, now + GRACE_SECONDS
                _signal_group(child, signal.SIGINT)
            time.sleep(0.02)
        _signal_group(child, signal.SIGKILL)  # what the stage started and left behind
        return os.waitstatus_to_exitcode(status), cut_off

    def _file(self, outcome: Outcome, work: Path) -> None:
        """Writes down how a stage ended. What cannot be written (a full disk) does not end the run."""
        self.outcomes.append(outcome)
        print(outcome.text, flush=True)
        for write in (
            partial(self._write_line, outcome),
            self._write_summary,
            partial(self._write_archive, work),
        ):
            try:
                write()
            except OSError as error:
                print(f"not written: {one_line(error)}", flush=True)

    def _write_line(self, outcome: Outcome) -> None:
        self.lines.write(
            "stage",
            stage=outcome.stage,
            verdict=outcome.verdict,
            seconds=round(outcome.seconds, 1),
            code=outcome.code,
            last_line=outcome.last_line[:400],
        )

    def _write_summary(self) -> None:
        (self.out / SUMMARY).write_text(self.summary() + "\n", encoding="utf-8")

    def _write_archive(self, work: Path) -> None:
        beside = self.out / f"{ARCHIVE}.part"
        with tarfile.open(beside, "w:gz", compresslevel=3) as archive:
            for path in (self.out / RESULTS, self.out / SUMMARY, *sorted(work.iterdir())):
                if path.is_file():
                    text = _shortened(path) if path.suffix == ".log" else path.read_bytes()
                    entry = tarfile.TarInfo(path.name)
                    entry.size, entry.mtime = len(text), int(path.stat().st_mtime)
                    archive.addfile(entry, io.BytesIO(text))
        beside.replace(self.out / ARCHIVE)


def _in_the_child(stage: Stage, job: Job, log: Path) -> None:
    """Never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        _die_with_the_parent()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError, ValueError):  # a lower limit is in force
            resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_FILE_BYTES, MOST_FILE_BYTES))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        code = stage.run(job) or 0
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("cut off")
        code = INTERRUPTED
    except BaseException:
        traceback.print_exc()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_with_the_parent() -> None:
    """A runner that is killed leaves no stage behind that goes on using the device (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _shortened(log: Path) -> bytes:
    """A log, or the two ends of one that is too long to bring home."""
    size = log.stat().st_size
    with log.open("rb") as file:
        if size <= 2 * END_BYTES:
            return file.read()
        first = file.read(END_BYTES)
        file.seek(-END_BYTES, os.SEEK_END)
        return first + f"\n... {size - 2 * END_BYTES} bytes ...\n".encode() + file.read()


def _signal_group(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, number)


def nothing_ran(last_line: str) -> bool:
    """Whether this is the end of a pytest run in which every test was skipped."""
    return re.search(r"\b\d+ skipped\b.* in [\d.]+s", last_line) is not None and "passed" not in last_line


def _last_line(log: Path) -> str:
    """The last line that says something."""
    try:
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - END_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def free_folder(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, ... in which no run's results are."""
    for number in range(1, 1000):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        if not (folder / RESULTS).exists():
            return folder
    raise FileExistsError(f"--out must be given: {wanted} and 998 more have results already")
