"""The bytes that a provider moves, so that a time becomes a rate.

Three sources, and a row says which: `algorithm` (the passes that a vidfast strategy makes over N elements, known
from how it is written), `operators` (eager code: the operands and results of each operator that it ran, counted) and
`assumed` (generated code that cannot be counted: the passes of a forward and a backward fused as far as possible).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Passes over N elements: what each strategy reads and writes, at g = 1 and at any other g.
PASSES: Mapping[str, tuple[int, int]] = {
    "forward": (2, 2),
    "two_pass": (5, 5),
    "one_pass": (3, 5),
    "one_pass in place": (3, 5),
    "backward": (3, 3),
    # A gradient in place: nothing is touched where g is 1.
    "scale": (0, 2),
    "copy": (2, 2),
}
# What no implementation of forward and gradient can go below: two reads and one write.
FLOOR_PASSES = {"forward": 2, "step": 3}


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written, and where the number comes from."""

    nbytes: int
    source: str


def of_strategy(strategy: str, unit_gradient: bool, pass_bytes: int) -> Traffic:
    """The traffic of a strategy whose passes are known."""
    passes = PASSES[strategy][0 if unit_gradient else 1]
    return Traffic(passes * pass_bytes, "algorithm")


def touched(tensor: torch.Tensor) -> int:
    """Bytes of memory behind a tensor: an expanded dimension is read once."""
    elements = 1
    for extent, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= extent if stride != 0 else 1
    return elements * tensor.element_size() if tensor.numel() else 0


def tensors_in(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


class CountOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what every operator reads and writes; views and allocations move nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0
        self.operators = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.__name__ and func.__name__ != "detach.default":
            operands = [*tensors_in(args), *tensors_in(list((kwargs or {}).values()))]
            self.nbytes += sum(touched(tensor) for tensor in [*operands, *tensors_in(result)])
            self.operators += 1
        return result


def of_operators(call: Callable[[], object]) -> Traffic:
    """Run `call` once and count. Backward on the CPU runs on the calling thread, so it is counted too."""
    with CountOperators() as counter:
        call()
    return Traffic(counter.nbytes, "operators")
