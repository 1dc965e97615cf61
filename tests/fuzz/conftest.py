"""The fuzz: random calls against the oracle of tests/core.

`pytest tests/fuzz` runs the first cases of each kind. `--fuzz N` runs N of each kind, `--fuzz-seed S` begins
with the case of seed S, so `--fuzz 1 --fuzz-seed S` runs one alone. The seed of the case that is running is
written to `.pytest_cache/d/fuzz/running`, to be read after a crash. VIDFAST_TEST_BACKEND and the like
are as in tests/core/conftest.py, but for the default, which is the CPU alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "core"))

from places import Place, chosen_places

BLOCK = 25  # cases of one test, unless its module has another number


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        try:
            places, _ = chosen_places()
        except RuntimeError as error:
            raise pytest.UsageError(str(error)) from error
        if not os.environ.get("VIDFAST_TEST_BACKEND"):
            places = [p for p in places if p.name == "cpu"]
        metafunc.parametrize("backend", places, ids=[p.name for p in places], indirect=True)
    if "seeds" in metafunc.fixturenames:
        usual: int = metafunc.module.CASES
        asked = metafunc.config.getoption("--fuzz")
        first = metafunc.config.getoption("--fuzz-seed")
        end = first + (usual if asked is None else asked)
        size = getattr(metafunc.module, "BLOCK", BLOCK)
        blocks = [range(n, min(n + size, end)) for n in range(first, end, size)]
        metafunc.parametrize("seeds", blocks, ids=[f"{b.start}-{b.stop - 1}" for b in blocks])


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Place:
    """A back end under test, and the device of its tensors."""
    place: Place = request.param
    return place


@pytest.fixture(scope="session")
def note(request: pytest.FixtureRequest) -> Iterator[Callable[[object], None]]:
    """Writes down which case runs, to be read after a crash."""
    cache = getattr(request.config, "cache", None)
    with open(os.devnull if cache is None else cache.mkdir("fuzz") / "running", "w") as file:

        def write(what: object) -> None:
            file.seek(0)
            file.write(f"{what}\n".ljust(80))
            file.flush()

        yield write


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
