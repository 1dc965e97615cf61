"""Which back ends the suite runs on, and where. A back end is a parameter of the suite, not a copy of it.

By default every back end that `vidfast.backends.NAMES` knows and that runs on this machine. To run the same
suite otherwise, in a process of its own:

VIDFAST_TEST_BACKEND  names, separated by commas; one that cannot run is then an error
VIDFAST_TEST_DEVICE   the device of their tensors ("cpu" for an interpreted or emulated GPU back end)
VIDFAST_TEST_SMALL    1, or a number of elements: bigger problems are skipped (an interpreter is slow)

`pytest tests/core -m backend` runs only the tests that take a back end.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from places import Place, chosen_places
from problems import ISAS

from vidfast import memory


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        try:
            places, _ = chosen_places()
        except RuntimeError as error:
            raise pytest.UsageError(str(error)) from error
        metafunc.parametrize("backend", places, ids=[p.name for p in places], indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "backend" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.backend)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Place:
    """A back end under test, and the device of its tensors."""
    place: Place = request.param
    return place


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU back end's instruction sets, each in use within its tests."""
    if memory._C is None:
        pytest.skip("the extension is not built")
    before = memory._C.cpu_isa()
    if not memory._C.cpu_select_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    assert memory._C.cpu_select_isa(before)


@pytest.fixture
def head_isa(isa: str) -> str:
    """Those of them that have a kernel for heads."""
    if memory._C.cpu_head_instructions(0, 1) is None:
        pytest.skip(f"{isa} has no kernel for heads")
    return isa


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Each test starts from the same seed, and leaves the number of threads as it was."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
