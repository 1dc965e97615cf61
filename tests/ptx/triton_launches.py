"""What Triton's back end launches, with the PTX that Triton makes for sm_90."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import Any

import triton
from interpreted import steps_of
from keeping import kept
from launches import TARGETS, recorded, specialised
from launches import Launch as TritonLaunch
from memory import GlobalMemory
from program import Module
from torch import Tensor
from waves import Launch

from vidfast.backends.triton import TritonBackend
from vidfast.backends.triton.plan import RULE, Tuning

Change = Callable[[str, str], str]


class TritonLaunches:
    """The launches of Triton's back end.

    Args:
        change: Given a kernel's name and its PTX, the text that is interpreted.
        rule: The free numbers of the plan.
    """

    def __init__(self, change: Change = lambda name, text: text, rule: Tuning = RULE) -> None:
        self._change = change
        self._rule = rule
        self._compiled: dict[str, Any] = {}
        self._modules: dict[str, Module] = {}

    def changed(self, change: Change | None = None, **numbers: int) -> TritonLaunches:
        """The same with another text of the kernels, or by other free numbers; what is compiled stays."""
        other = TritonLaunches(change or self._change, self._rule._replace(**numbers))
        other._compiled = self._compiled
        return other

    def __call__(
        self, primitive: str, inputs: tuple[Any, ...], outputs: dict[str, Any], memory: GlobalMemory
    ) -> list[Launch]:
        def call(backend: TritonBackend) -> None:
            getattr(backend, primitive)(*inputs, **outputs)

        known = (*inputs, *outputs.values(), *(outputs.get("counts") or ()))
        there = {x.data_ptr() for x in known if isinstance(x, Tensor)}
        made = recorded(call, rule=self._rule)
        for launch in made:
            for name, value in launch.arguments.items():
                if isinstance(value, Tensor) and value.numel() and value.data_ptr() not in there:
                    memory.add(value, f"the workspace {name}", holds=False, writable=True)
                    there.add(value.data_ptr())
        return [self._launch(launch) for launch in made]

    def _launch(self, launch: TritonLaunch) -> Launch:
        source, key = specialised(launch, lambda x: x.data_ptr() % 16 == 0)
        if key not in self._compiled:
            self._compiled[key] = triton.compile(source, target=TARGETS["sm_90"], options=launch.options)
        compiled = self._compiled[key]
        if key not in self._modules:
            text = self._change(launch.name, compiled.asm["ptx"])
            folder = kept("triton")
            if folder is not None:
                (folder / f"{launch.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.ptx").write_text(
                    text
                )
            self._modules[key] = Module(text)
        kernel = self._modules[key].kernel(compiled.metadata.name)
        values = [launch.arguments[name] for name, kind in source.signature.items() if kind != "constexpr"]
        data = bytearray(kernel.parameter_bytes)
        for i, (_, offset, size) in enumerate(kernel.parameters):
            # behind the kernel's own: addresses of memory that these kernels do not ask for
            value = values[i] if i < len(values) else 0
            data[offset : offset + size] = _bytes(value, size)
        x, y, z = (*launch.grid, 1, 1)[:3]
        return Launch(
            kernel, steps_of(kernel), launch.name, (x, y, z),
            32 * compiled.metadata.num_warps, compiled.metadata.shared, bytes(data),
            bool(getattr(compiled.metadata, "launch_pdl", False)),
        )  # fmt: skip


def _bytes(value: Any, size: int) -> bytes:
    if isinstance(value, Tensor):
        value = value.data_ptr()
    if isinstance(value, float):
        return struct.pack({4: "<f", 8: "<d"}[size], value)
    return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
