"""A back end whose kernels are interpreted: what the shared checks call in place of the real one.

It knows the protocol of vidfast.backends.base alone: tensors given by position are inputs, those given by name are
outputs, but for `counts`. Kernels may read inputs, and write outputs and workspaces; nothing else is there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import accesses  # noqa: F401  (the tables of instructions)
import control  # noqa: F401
import conversions  # noqa: F401
import instructions  # noqa: F401
import matrices  # noqa: F401
from decode import Step, decoded
from grid import run
from memory import GlobalMemory
from places import Place
from program import Kernel
from torch import Tensor
from waves import Launch

from vidfast.backends.base import Backend
from vidfast.positions import Counts

# A primitive's launches: its name, its arguments, and the memory to which workspaces are added.
LaunchesOf = Callable[[str, tuple[Any, ...], dict[str, Any], GlobalMemory], list[Launch]]

_steps: dict[int, tuple[Kernel, list[Step]]] = {}


def steps_of(kernel: Kernel) -> list[Step]:
    """Its instructions ready to run, prepared once."""
    if id(kernel) not in _steps:
        _steps[id(kernel)] = kernel, decoded(kernel)
    return _steps[id(kernel)][1]


@dataclass
class Interpreted:
    """See :class:`vidfast.backends.base.Backend`.

    Attributes:
        name: Of the back end that it stands for.
        launches_of: What that one would launch.
        ran: The titles and grids of all that was launched.
        seed: Draws the order of blocks.
    """

    name: str
    launches_of: LaunchesOf
    ran: list[tuple[str, tuple[int, int, int]]]
    seed: int = 0

    walks = True
    in_parts = False

    def unavailable(self) -> str | None:
        return None

    def supports(self, mean: Tensor, target: Tensor, alpha: Tensor) -> str | None:
        return None

    def info(self) -> dict[str, object]:
        return {}

    def total(self, *inputs: Any, **outputs: Any) -> None:
        self._primitive("total", inputs, outputs)

    def forward(self, *inputs: Any, **outputs: Any) -> None:
        self._primitive("forward", inputs, outputs)

    def forward_grad(self, *inputs: Any, **outputs: Any) -> None:
        self._primitive("forward_grad", inputs, outputs)

    def backward(self, *inputs: Any, **outputs: Any) -> None:
        self._primitive("backward", inputs, outputs)

    def scale(self, *inputs: Any, **outputs: Any) -> None:
        self._primitive("scale", inputs, outputs)

    def heteroscedastic_forward(self, *inputs: Any, **outputs: Any) -> None:
        self._primitive("heteroscedastic_forward", inputs, outputs)

    def heteroscedastic_forward_grad(self, *inputs: Any, **outputs: Any) -> None:
        self._primitive("heteroscedastic_forward_grad", inputs, outputs)

    def heteroscedastic_backward(self, *inputs: Any, **outputs: Any) -> None:
        self._primitive("heteroscedastic_backward", inputs, outputs)

    def _primitive(self, name: str, inputs: tuple[Any, ...], outputs: dict[str, Any]) -> None:
        memory = GlobalMemory()
        names = list(inspect.signature(getattr(Backend, name)).parameters)[1:]
        for what, x in zip(names, inputs, strict=False):
            if isinstance(x, Tensor):
                memory.add(x, what, holds=True, writable=False)
        for what, x in zip(Counts._fields, outputs.get("counts") or (), strict=False):
            if x is not None:
                memory.add(x, what, holds=True, writable=False)
        written = {what: x for what, x in outputs.items() if isinstance(x, Tensor)}
        for what, x in written.items():
            memory.add(x, what, holds=False, writable=True)
        launches = self.launches_of(name, inputs, outputs, memory)
        self.ran += [(launch.title, launch.grid) for launch in launches]
        self.seed += 1
        run(launches, memory, self.seed)
        for what, x in written.items():
            missing = memory.unwritten(x)
            assert not missing, f"{name}: {missing} of {x.numel()} elements of {what} were not written"


# Puts an interpreted back end, by name, in the place of the real one.
Install = Callable[[str, LaunchesOf], tuple[Interpreted, Place]]
