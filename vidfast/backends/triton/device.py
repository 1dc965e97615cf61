"""What Triton drives here: a GPU, the CPU by its interpreter, or nothing."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from vidfast.backends.triton.interpreter import interpreter_fault


class Device(NamedTuple):
    """A type of device, as torch names it, and the threads of a warp."""

    kind: str
    lanes: int = 32


def find_device() -> Device | str:
    """The device that Triton drives, or why there is none."""
    if importlib.util.find_spec("triton") is None:
        return (
            "the package triton is not installed: torch's GPU builds bring it, "
            "pip install 'vidfast[triton]' adds it"
        )
    try:
        from vidfast.backends.triton.math import INTERPRETED

        if INTERPRETED.value:
            # a thread of its own has none of this one's modes, transforms and default devices
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(interpreter_fault).result() or Device("cpu")
        from triton.runtime import driver

        found = Device(
            str(driver.active.get_active_torch_device().type),
            driver.active.get_current_target().warp_size,
        )
    except Exception as error:  # a broken installation must not take the other back ends with it
        return f"triton finds no GPU that it can drive ({type(error).__name__}: {error})"
    try:
        torch.get_device_module(found.kind).current_device()
    except Exception as error:
        return f"this build of torch cannot use the {found.kind} device that triton drives ({error})"
    return found
