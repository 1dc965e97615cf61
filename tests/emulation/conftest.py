from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from emulated import load_module


@pytest.fixture(scope="session")
def native(emulated_module: Path) -> Any:
    """The emulated functions as the back end calls them."""
    return load_module(emulated_module)
