from __future__ import annotations

from pathlib import Path

import pytest
from emulated import build_module, compiler


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA back end's functions compiled for the host."""
    pytest.importorskip("pybind11", reason="pybind11 is needed to build the emulated module")
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    return build_module(tmp_path_factory.mktemp("emulated"))
