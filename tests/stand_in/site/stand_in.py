"""A GPU that is not there: "cuda" is the CPU's memory, with stand-ins for events, streams and graphs.

The back end `cuda` is the emulated one (tests/emulation), `triton` the interpreter. So everything that a run on a GPU
does is done, and its numbers are right; only its times say nothing.

A graph is one: what is called during a capture does not run, its results are NaN until a replay, and a replay runs on
the memory that was captured.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

L2_BYTES = 512


def on_the_cpu(value: Any) -> Any:
    """A device or its name, "cuda" made "cpu"; anything else as it is."""
    if isinstance(value, str) and value.split(":")[0] == "cuda":
        return "cpu"
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


class Graph:
    """torch.cuda.CUDAGraph."""

    capturing: Graph | None = None

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[[], Any], Any]] = []

    def capture_begin(self, *_: Any, **__: Any) -> None:
        assert Graph.capturing is None, "a capture is under way"
        Graph.capturing = self

    def capture_end(self) -> None:
        assert Graph.capturing is self
        Graph.capturing = None

    def replay(self) -> None:
        for call, results in self.calls:
            for old, new in zip(tensors_in(results), tensors_in(call()), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new.detach())

    def record(self, call: Callable[[], Any], arguments: Any, outputs: Any = ()) -> Any:
        """What `call` returns, of the right shapes and at the right addresses, but not yet computed.

        `outputs` is memory that it fills and that is given too.
        """
        given = tensors_in(arguments)
        before = [x.detach().clone() for x in given]
        Graph.capturing = None
        try:
            results = call()
            for x, old in zip(given, before, strict=True):
                x.detach().copy_(old)
            own = {x.data_ptr() for x in given}
            for x in tensors_in([results, outputs]):
                if x.data_ptr() not in own:
                    x.detach().fill_(torch.nan)
        finally:
            Graph.capturing = self
        self.calls.append((call, results))
        return results


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [x for item in value for x in tensors_in(item)]
    return []


class OnTheCpu(TorchFunctionMode):
    """Every device named in a call of torch is the CPU; copies under capture are recorded."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        kwargs = dict(kwargs or {})
        if func is torch.device or ("device" in name and name != "to"):
            return func(*args, **kwargs)
        args = tuple(map(on_the_cpu, args))
        if "device" in kwargs:
            kwargs["device"] = on_the_cpu(kwargs["device"])
        if name == "copy_" and Graph.capturing is not None:
            return Graph.capturing.record(lambda: func(*args, **kwargs), args)
        return func(*args, **kwargs)


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        """Everything has happened."""

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3


class Stream:
    cuda_stream = 0

    def wait_stream(self, stream: Stream) -> None:
        """Everything has happened."""

    def synchronize(self) -> None:
        """Everything has happened."""


class Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, device=on_the_cpu(device))

    def __init__(self, device: Any = "cpu") -> None:
        """All was done before."""


@contextlib.contextmanager
def stream(_: Stream) -> Iterator[None]:
    yield


class Captured:
    """A back end whose primitives a capture records, with the free numbers of that moment, as a launch would be."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.name = inner, inner.name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @property
    def rule(self) -> Any:
        return self._inner.rule

    @rule.setter
    def rule(self, value: Any) -> None:
        self._inner.rule = value

    def _numbers(self) -> Any:
        return self._inner._native.cuda_free_numbers() if self.name == "cuda" else self._inner.rule

    def _set(self, numbers: Any) -> None:
        if self.name != "cuda":
            self._inner.rule = numbers
            return
        for name, value in numbers.items():
            self._inner._native.cuda_set_free_number(name, value)
        self._inner._workspace_length.cache_clear()

    def _run(self, primitive: str, inputs: tuple[Any, ...], counts: Any = None, **outputs: Any) -> None:
        run = getattr(self._inner, primitive)
        if counts is not None:
            run = partial(run, counts=counts)
        if Graph.capturing is None:
            run(*inputs, **outputs)
            return
        numbers = self._numbers()

        def launch() -> None:
            others = self._numbers()
            self._set(numbers)
            try:
                run(*inputs, **outputs)
            finally:
                self._set(others)

        Graph.capturing.record(launch, [*inputs, counts], list(outputs.values()))

    def forward(self, *inputs: Any, **outputs: Any) -> None:
        self._run("forward", inputs, **outputs)

    def forward_grad(self, *inputs: Any, **outputs: Any) -> None:
        self._run("forward_grad", inputs, **outputs)

    def backward(self, *inputs: Any, **outputs: Any) -> None:
        self._run("backward", inputs, **outputs)

    def scale(self, *inputs: Any, **outputs: Any) -> None:
        self._run("scale", inputs, **outputs)

    def total(self, *inputs: Any, **outputs: Any) -> None:
        self._run("total", inputs, **outputs)


def as_one_launch(prepare: Callable[[Any], Callable[[], Any]]) -> Callable[[Any], Callable[[], Any]]:
    """`ModuleContender.prepare`, whose calls a capture records whole: a layer's products are launches too."""

    def prepared(contender: Any) -> Callable[[], Any]:
        call = prepare(contender)

        def from_no_gradients() -> Any:
            """Where a replay writes gradients, these calls would add to them."""
            contender.module.zero_grad(set_to_none=True)
            return call()

        return lambda: call() if Graph.capturing is None else Graph.capturing.record(from_no_gradients, ())

    return prepared


class Autocast(torch.autocast):
    """Of the CPU, which is where the tensors are."""

    def __init__(self, device_type: str, *arguments: Any, **options: Any) -> None:
        super().__init__(on_the_cpu(device_type), *arguments, **options)


class Profile:
    """torch.profiler.profile, as far as it counts what is put on the device: the emulated back end's operations."""

    machine: Any = None

    def __init__(self, **_: Any) -> None:
        self.before = self.after = 0

    def count(self) -> int:
        return int(self.machine.launches + self.machine.memsets)

    def __enter__(self) -> Profile:
        self.before = self.count()
        return self

    def __exit__(self, *_: object) -> None:
        self.after = self.count()

    def events(self) -> list[Any]:
        event = SimpleNamespace(device_type=SimpleNamespace(name="CUDA"))
        return [event] * (self.after - self.before)


def install(path: str) -> None:
    """For all of this process, and of those that are forked from it."""
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_name = lambda *_: "Stand-in"
    cuda.synchronize = lambda *_: None
    cuda.Event, cuda.Stream, cuda.CUDAGraph, cuda.stream = Event, Stream, Graph, stream
    cuda.current_stream = lambda *_: Stream()
    cuda.get_device_properties = lambda *_: SimpleNamespace(
        name="Stand-in",
        total_memory=1 << 30,
        L2_cache_size=L2_BYTES,
        major=9,
        minor=0,
        multi_processor_count=3,
    )
    cuda.memory_allocated = cuda.max_memory_allocated = lambda *_: 0
    cuda.reset_peak_memory_stats = cuda.empty_cache = lambda *_: None
    torch.Generator = Generator  # type: ignore[misc]
    torch.autocast = Autocast  # type: ignore[misc]

    # Compiling for the CPU would take most of the time, and says nothing of a GPU.
    torch.compile = lambda model=None, **_: model  # type: ignore[assignment]

    import bench.backends
    import bench.buffers
    import bench.gpu.build
    import bench.memory
    from vidfast import backends
    from vidfast.backends.cuda import CudaBackend

    sys.path.append(str(Path(__file__).parents[2] / "emulation"))
    from emulated import load_module

    native = load_module(Path(path))
    backends._loaded["cuda"] = Captured(CudaBackend(native, None, "cpu", lambda index: 0))
    backends._loaded["triton"] = Captured(backends.load("triton"))
    backends._CPU_FIRST = backends.NAMES
    bench.backends.runnable = lambda device: ["cuda", "triton"]
    bench.buffers.HOT_SLOTS = bench.buffers.FEWEST_SLOTS_OF_A_GRAPH = 2  # an interpreted call takes 15 ms
    from bench.modules import ModuleContender  # now: it takes `runnable` by name

    ModuleContender.prepare = as_one_launch(ModuleContender.prepare)  # type: ignore[method-assign, assignment]
    Profile.machine = native.machine()
    bench.memory.profile = Profile  # type: ignore[misc, assignment]
    bench.gpu.build.in_place = lambda: Path(path)
    bench.gpu.build.load_extension = lambda path: native
    OnTheCpu().__enter__()
