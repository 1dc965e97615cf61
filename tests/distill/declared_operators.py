"""torchvision where its compiled operators do not load, as a build for GPUs beside torch's for the CPU.

Its Python files describe operators that are then not there, so importing it fails, and timm and torchdistill with it.
Their networks and training loops use none of these operators: with the names declared, everything else works.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import torch

_DESCRIBED = re.compile(r"register_fake\(\"torchvision::(\w+)\"")
_libraries: list[torch.library.Library] = []  # a library takes its operators with it


def declare_torchvision() -> None:
    """Makes `import torchvision` work. Does nothing where it works already, or where torchvision is not installed."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        sources = [path.read_text() for path in sorted(Path(found.origin).parent.glob("*.py"))]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in sorted({name for source in sources for name in _DESCRIBED.findall(source)}):
            library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        _libraries.append(library)
