"""What all test folders share: the `slow` mark, off unless asked for, and the emulated CUDA back end."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Before torch comes in: threads that wait spin otherwise, and beside a busy neighbour each region of two
# threads then takes fifty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA back end's functions compiled for the host (tests/emulation), built once."""
    pytest.importorskip("pybind11", reason="pybind11 is needed to build the emulated module")
    sys.path.insert(0, str(Path(__file__).parent / "emulation"))
    from emulated import build_module, compiler

    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    return build_module(tmp_path_factory.mktemp("emulated"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--fuzz", type=int, metavar="N", help="run N random cases of each kind (tests/fuzz)")
    parser.addoption("--fuzz-seed", type=int, default=0, metavar="S", help="the first of them")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow(reason): needs much time or memory; runs only with --slow")
    config.addinivalue_line("markers", "backend: runs once for every back end (`-m backend` runs only these)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        slow = item.get_closest_marker("slow")
        if slow is not None and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason=f"--slow not given: {slow.kwargs['reason']}"))
