"""The machine: what it is, and who else was using it while we measured."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from bench.nvidia_smi import first_gpu

# A neighbour that takes more than this share of one core makes a run contended; so does a hypervisor that steals it.
NEIGHBOUR_CORES = 0.10
STOLEN_CORES = 0.05
# /proc/stat counts in hundredths of a second: below this much CPU time a share is only rounding.
RESOLUTION_SECONDS = 0.05
CONTROL_GROUP = Path("/sys/fs/cgroup")
PROCESSOR_FACTS = Path("/proc/cpuinfo")
ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "OMP_PROC_BIND",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "MALLOC_CONF",
)


@dataclass(frozen=True)
class Load:
    """Who else ran during a window. Cores are CPU seconds of others per second of ours."""

    neighbour_cores: float
    stolen_cores: float
    load_average: float
    seconds: float
    contended: bool

    def as_dict(self) -> dict[str, float | bool]:
        return asdict(self)


def own_seconds() -> float:
    """CPU seconds of this process and of its children, dead or alive."""
    process = psutil.Process()
    times = process.cpu_times()
    total = float(times.user + times.system + times.children_user + times.children_system)
    for child in process.children(recursive=True):
        try:
            spent = child.cpu_times()
        except psutil.Error:
            continue
        total += float(spent.user + spent.system)
    return total


def machine_seconds() -> tuple[float, float]:
    """CPU seconds that the whole machine has been busy, and that a hypervisor has taken, since it started."""
    times = psutil.cpu_times()
    busy = float(times.user + times.system)
    for name in ("nice", "irq", "softirq"):
        busy += float(getattr(times, name, 0.0))
    return busy, float(getattr(times, "steal", 0.0))


class LoadWindow:
    """`with LoadWindow() as window: ...`, then `window.load`."""

    load: Load

    def __enter__(self) -> LoadWindow:
        self._start = time.monotonic()
        self._own = own_seconds()
        self._busy, self._stolen = machine_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        busy, stolen = machine_seconds()
        seconds = max(time.monotonic() - self._start, 1e-3)
        others = max((busy - self._busy) - (own_seconds() - self._own), 0.0)
        taken = stolen - self._stolen
        self.load = Load(
            neighbour_cores=round(others / seconds, 4),
            stolen_cores=round(taken / seconds, 4),
            load_average=round(os.getloadavg()[0], 2),
            seconds=round(seconds, 3),
            contended=(others > max(RESOLUTION_SECONDS, NEIGHBOUR_CORES * seconds))
            or (taken > max(RESOLUTION_SECONDS, STOLEN_CORES * seconds)),
        )


def idle_load(seconds: float = 1.0) -> Load:
    """The load that others make while we do nothing."""
    with LoadWindow() as window:
        time.sleep(seconds)
    return window.load


def last_level_cache(device: str) -> int:
    """Bytes of the cache that a cold measurement must exceed; 32 MiB where the system does not say."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        found.append(int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text))
    return max(found, default=1 << 25)


def free_memory() -> int:
    """Bytes of the host's memory that may still be allocated, by the control group of a container too."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((CONTROL_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        facts = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max": no limit
        return free
    # Files that nothing has read lately are counted as used, and go when memory is wanted.
    return max(0, min(free, limit - used + int(facts.get("inactive_file", 0))))


CPU_FACTS = ("brand_raw", "arch", "count", "hz_advertised_friendly")
SIMD_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_fp16", "asimd", "sve"),
)
# What PROCESSOR_FACTS calls the instructions for products in a dtype, on x86 and on Arm.
PRODUCT_FLAGS = {
    torch.bfloat16: frozenset({"avx512_bf16", "amx_bf16", "bf16"}),
    torch.float16: frozenset({"avx512_fp16", "amx_fp16", "asimdhp"}),
}


def processor(found: Mapping[str, Any] | None = None) -> dict[str, object]:
    """What is stored of the processor: its name and its vector instructions. Asks py-cpuinfo unless it is given."""
    if found is None:
        try:
            from cpuinfo import get_cpu_info  # type: ignore[import-untyped]
        except ImportError:  # comes with pytest-benchmark
            return {"brand_raw": platform.processor() or platform.machine(), "simd": []}
        found = get_cpu_info()
    facts: dict[str, object] = {name: found[name] for name in CPU_FACTS if name in found}
    return {**facts, "simd": [flag for flag in SIMD_FLAGS if flag in found.get("flags", [])]}


@lru_cache(maxsize=1)
def instructions() -> frozenset[str]:
    """The processor's instruction sets as Linux names them; none where it does not say."""
    try:
        lines = PROCESSOR_FACTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    found = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(found, []))


def multiplies_in(dtype: torch.dtype, device: str) -> bool:
    """Whether the device has instructions for products in that half precision.

    On a CPU without them oneDNN's bf16 products take 20 to 50 times as long as fp32's.
    """
    return torch.device(device).type != "cpu" or bool(PRODUCT_FLAGS[dtype] & instructions())


def describe(device: str) -> dict[str, object]:
    """What the head of a report says about the machine and the software; no host names, no paths."""
    facts: dict[str, object] = {
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "logical_cores": psutil.cpu_count(logical=True),
        "physical_cores": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().total,
        "last_level_cache_bytes": last_level_cache("cpu"),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "device": device,
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda or torch.version.hip,
            **first_gpu("driver_version", "power.limit", "clocks.max.sm"),
        }
    return facts
