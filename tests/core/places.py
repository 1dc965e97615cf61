"""A back end under test and the device of its tensors; see conftest.py for the environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import vidfast
from vidfast import backends

SMALL = 1 << 14  # elements, for VIDFAST_TEST_SMALL=1


@dataclass(frozen=True)
class Place:
    name: str
    device: torch.device
    limit: int | None  # elements of the biggest problem that runs here
    gpu_code: bool = False  # a GPU's instructions, interpreted on tensors of the CPU

    @property
    def is_cpu(self) -> bool:
        """Whether it is the native CPU back end (not an emulation on CPU tensors)."""
        return self.name == "cpu"

    def need(self, elements: int) -> None:
        """Skips the test where a problem of this size is too big."""
        if self.limit is not None and elements > self.limit:
            pytest.skip(f"{elements} elements, VIDFAST_TEST_SMALL allows {self.limit}")

    def nll(self, mean: Tensor, target: Tensor, alpha: Tensor, **options: Any) -> Tensor:
        """gaussian_nll on this back end; anything else running is an error."""
        return vidfast.gaussian_nll(mean, target, alpha, backend=self.name, **options)


def _limit() -> int | None:
    value = os.environ.get("VIDFAST_TEST_SMALL", "0")
    return {"0": None, "": None, "1": SMALL}.get(value, int(value or 0))


def _device(name: str) -> str:
    asked = os.environ.get("VIDFAST_TEST_DEVICE")
    if asked:
        return asked
    return "cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda"


def obstacle(place: Place) -> str | None:
    """None if a small problem runs there, or why not."""
    if place.device.type == "cuda" and not torch.cuda.is_available():
        return "there is no GPU"
    x = torch.zeros(2, 2, device=place.device)
    return backends.load(place.name).supports(x, x, x[0])


@lru_cache(maxsize=1)
def chosen_places() -> tuple[list[Place], dict[str, str]]:
    """The places that run here, and the reasons of those that do not.

    :raises RuntimeError: a back end named by VIDFAST_TEST_BACKEND cannot run.
    """
    asked = [n for n in os.environ.get("VIDFAST_TEST_BACKEND", "").split(",") if n]
    places, missing = [], {}
    for name in asked or backends.NAMES:
        try:
            backends.check_name(name)
        except ValueError as error:
            raise RuntimeError(f"VIDFAST_TEST_BACKEND: {error}") from None
        place = Place(name, torch.device(_device(name)), _limit())
        reason = obstacle(place)
        if reason is None:
            places.append(place)
        elif asked:
            raise RuntimeError(f"VIDFAST_TEST_BACKEND: {name} cannot run on {place.device}: {reason}")
        else:
            missing[name] = reason
    return places, missing
