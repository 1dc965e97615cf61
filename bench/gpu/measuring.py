"""The stages that measure: kernels alone, the host, whole steps and modules, and the free numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from bench.gpu.runner import Job, not_here
from bench.gpu.workers import DEVICE, ask, backends, device_is_broken, processes, share

# Numbers of points in cases.DEVICE_POINTS.
STEP_POINTS = (0, 1, 5)
TUNING_POINTS = (0, 1, 2, 4, 6, 7, 8, 10, 11, 13, 14, 16)
TRITON_TUNING_POINTS = (0, 1, 2, 4, 8, 10, 13, 14)
# Of seven samples the spread calls equal rows different in 1.6% of the cases, of five in 6%.
FEWEST_SAMPLES = 7


def measured(job: Job, cases: Sequence[tuple[Any, Any]], seconds: float) -> int:
    """Measures (suite, case) after (suite, case) and prints a line a row; 1 if a row failed.

    All in one process, forked from this one, for as long as the device lives in it: after a fault another goes on.
    """
    from bench.interleave import Budget
    from bench.measured import measure_all

    budget = Budget(0.02 if job.small else seconds, fewest=2 if job.small else FEWEST_SAMPLES, most=30)
    longest = [0.0]

    def one(item: tuple[Any, Any]) -> dict[str, Any]:
        suite, case = item
        failed = 0
        for _, rows in measure_all(suite, [case], job.lines, budget, job.deadline, longest):
            failed += sum(print_row(case, name, row) for name, row in rows.items())
        return {"failed": failed}

    results = share(cases, one, 1, job.work / "measured", device_is_broken)
    failed = 0
    for (_, case), result in zip(cases, results, strict=True):
        if result is None:
            raise KeyboardInterrupt
        if "error" in result:
            print(f"{case.title}: {result['error']}")
            job.lines.write("failure", suite=case.suite, case=case.title, row="all", error=result["error"])
        failed += result.get("failed", 1)
    print(f"{failed} rows failed" if failed else "every row was measured")
    return 1 if failed else 0


def print_row(case: Any, name: str, row: Any) -> bool:
    """Whether it failed."""
    if row.timings is None or row.info is None:
        print(f"{case.title} | {name}: {type(row.failure).__name__}: {row.failure}", flush=True)
        return True
    middle = sorted(sample.seconds for sample in row.timings.samples)[len(row.timings.samples) // 2]
    share_of_copy = row.info.get("share_of_copy")
    rate = "" if share_of_copy is None else f", {100 * share_of_copy:.0f}% of the copy"
    print(f"{case.title} | {name}: {middle * 1e6:.2f} us{rate}", flush=True)
    return False


def rates(job: Job) -> int | None:
    """Device time of every primitive of both back ends beside `copy_`, from graphs, cold."""
    from bench.cases import device_cases
    from bench.suites import KernelSuite

    suite = KernelSuite("kernel alone", lambda *_: [], True, DEVICE)
    cases = device_cases(suite.name, DEVICE, job.small)
    warm(job, cases)
    return measured(job, [(suite, case) for case in cases], seconds=0.5)


def compile_all(job: Job, calls: dict[str, Callable[[], object]]) -> None:
    """Makes the calls, of these names, in processes side by side: what they compile ends in caches on disk.

    Raises:
        KeyboardInterrupt: An interrupt came first.
    """
    begin = time.monotonic()

    def one(name: str) -> dict[str, Any]:
        calls[name]()
        return {}

    found = share(list(calls), one, processes(), job.work / "compile", device_is_broken)
    for name, result in zip(calls, found, strict=True):
        if result is None:
            raise KeyboardInterrupt
        if "error" in result:
            print(f"{name}: {result['error']}")
    print(f"compiled in {time.monotonic() - begin:.1f} s", flush=True)


def warm(job: Job, cases: Sequence[Any]) -> None:
    """Compiles Triton's kernels for the cases."""
    from bench.buffers import Pool
    from bench.device_kernels import PRIMITIVES, DeviceKernel

    def one(case: Any, primitive: str) -> None:
        if "triton" in backends():
            DeviceKernel("triton", primitive, case, Pool(case, slots=1)).prepare()()

    compile_all(job, {f"{c.title} | triton {p}": partial(one, c, p) for c in cases for p in PRIMITIVES})


def host(job: Job) -> int | None:
    """Host time and launches of a step on 32 elements."""
    from dataclasses import replace

    from bench.cases import WEIGHTED, overhead_cases
    from bench.suites import StepSuite

    suite = StepSuite("overhead", overhead_cases, False, DEVICE, floor=True)
    cases = suite.list_cases()
    if job.small:
        cases = [replace(case, gradients=(WEIGHTED,)) for case in cases]
    return measured(job, [(suite, case) for case in cases], seconds=2.0)


def steps(job: Job) -> int | None:
    """Whole loss steps: eager, torch's own loss, torch.compile, every strategy, and each of ours in a graph."""
    from bench.cases import device_cases
    from bench.suites import StepSuite

    suite = StepSuite("loss step", lambda *_: [], False, DEVICE)
    cases = device_cases(suite.name, DEVICE, job.small, STEP_POINTS)
    return measured(job, [(suite, case) for case in (cases[-1:] if job.small else cases)], seconds=2.0)


def masks(job: Job) -> int | None:
    """Steps with a mask: indexing, the compiled formula, and ours without the mask and with it, ours in graphs too."""
    from bench.masked import masked_suite, small_masked_cases

    suite = masked_suite(True, DEVICE)
    cases = small_masked_cases(suite.name, True, DEVICE) if job.small else suite.list_cases()
    warm_masks(job, suite, cases)
    return measured(job, [(suite, case) for case in cases], seconds=1.0)


def warm_masks(job: Job, suite: Any, cases: Sequence[Any]) -> None:
    """Compiles what the cases' rows compile: the formula, and Triton's kernels."""
    from bench.buffers import Pool
    from bench.providers import COMPILE, StepContender
    from vidfast.report.results import WITHOUT_MASK

    def one(case: Any, name: str) -> None:
        for provider in suite.providers(case):  # asks the device which back ends run
            if provider.name == name:
                StepContender(provider, case, Pool(case, slots=1), provider.build(case), 1.0).prepare()()

    triton = "vidfast triton one_pass"
    names = (COMPILE, triton, triton + WITHOUT_MASK)
    compile_all(job, {f"{c.title} | {name}": partial(one, c, name) for c in cases for name in names})


def modules(job: Job) -> int | None:
    """Distillation steps, and what of them the pairs of layers take."""
    from dataclasses import replace

    from bench.module_cases import COMPILED_STEPS, small_training_cases, training_cases
    from bench.modules import ModuleSuite
    from bench.training import TRAINING_STEP
    from vidfast.report.results import TRAINING

    chosen = small_training_cases if job.small else training_cases
    suite = ModuleSuite(TRAINING, chosen, True, DEVICE, TRAINING_STEP)
    # Compiling a whole step takes longer than the stage has.
    cases = [replace(case, gradients=(1.0,), skip=COMPILED_STEPS) for case in suite.list_cases()]
    return measured(job, [(suite, case) for case in cases], seconds=3.0)


def head(job: Job) -> int | None:
    """VIDLoss, the head of a pair of layers: device time, host time and memory, in fp32 and under bf16 autocast."""
    from bench.module_cases import head_cases
    from bench.modules import VID_LOSS, ModuleSuite
    from vidfast.report.results import HEAD

    suite = ModuleSuite(HEAD, lambda *_: [], True, DEVICE, VID_LOSS, graphs=True)
    cases = head_cases(DEVICE, job.small)
    warm_heads(job, cases)
    return measured(job, [(suite, case) for case in cases], seconds=0.6)


def warm_heads(job: Job, cases: Sequence[Any]) -> None:
    """Compiles the compiled rows of the cases."""
    from bench.buffers import Pool
    from bench.modules import VID_LOSS
    from bench.providers import COMPILE
    from vidfast.report.results import COMPILED_DEFAULT

    def one(case: Any, name: str) -> None:
        VID_LOSS[name](case, Pool(case, slots=1))(case.gradients[0]).prepare()()

    names = (COMPILE, COMPILED_DEFAULT)
    compile_all(job, {f"{c.title} | {name}": partial(one, c, name) for c in cases for name in names})


def tune(job: Job) -> int | None:
    """Every free number of the CUDA back end's host code, changed alone, and some together."""
    from bench.gpu import tuning
    from vidfast.report.device import TUNING

    return tuned(
        job, tuning.missing, tuning.TuningSuite(tuple(tuning.GRID)[:2] if job.small else None), TUNING
    )


def tune_triton(job: Job) -> int | None:
    """The free numbers of the Triton back end's plan, each changed alone, and some together."""
    from bench.gpu import tuning
    from vidfast.report.device import TUNING_TRITON

    overlaps, error = ask(tuning.triton_overlaps, job.work / "ask")
    if error or not overlaps:
        print(
            f"overlap is left out: {error or 'it wants compute capability 9.0 and a Triton that launches so'}"
        )
    suite = tuning.triton_suite(("ahead", "finish_depth") if job.small else None, bool(overlaps))
    return tuned(job, tuning.triton_missing, suite, TUNING_TRITON, TRITON_TUNING_POINTS)


def tuned(
    job: Job,
    missing: Callable[[Sequence[str]], str | None],
    suite: Any,
    name: str,
    points: Sequence[int] = TUNING_POINTS,
) -> int | None:
    """Measures a TuningSuite, after what it compiles was compiled in processes side by side.

    Args:
        job: Of the stage.
        missing: Says of the back ends that run here why nothing can be tuned, or None.
        suite: A :class:`bench.gpu.tuning.TuningSuite`.
        name: Of the suite in the results.
        points: Numbers of points in cases.DEVICE_POINTS.
    """
    from bench.cases import device_cases

    reason, error = ask(lambda: missing(backends()), job.work / "ask")
    if error or reason:
        return not_here(error or reason)
    cases = device_cases(name, DEVICE, job.small, points)[: 2 if job.small else None]
    if suite.backend == "triton":
        warm_tuned(job, suite, cases)
    return measured(job, [(suite, case) for case in cases], seconds=0.4)


def warm_tuned(job: Job, suite: Any, cases: Sequence[Any]) -> None:
    """Compiles Triton's kernels for every setting of the cases."""
    from bench.buffers import Pool
    from bench.device_kernels import IN_PLACE, DeviceKernel
    from vidfast.report.device import AS_BUILT

    def one(case: Any, values: dict[str, int]) -> None:
        with suite.changed(values):
            DeviceKernel(suite.backend, IN_PLACE, case, Pool(case, slots=1)).prepare()()

    settings = {AS_BUILT: {}, **suite.settings()}
    compile_all(
        job, {f"{c.title} | {name}": partial(one, c, v) for c in cases for name, v in settings.items()}
    )
