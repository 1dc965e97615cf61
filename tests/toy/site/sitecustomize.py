"""On PYTHONPATH, gives every Python process the back ends `toy` and, by its own name, `plain`."""

import sys
from pathlib import Path

from vidfast import backends
from vidfast.backends.plain import PlainBackend

sys.path.append(str(Path(__file__).parents[1]))
import toy  # noqa: F401


class NamedPlainBackend(PlainBackend):
    """`backend="reference"` goes to the reference itself; this one goes where kernels go."""

    name = "plain"


backends.NAMES = (*backends.NAMES, "plain")
backends._loaded["plain"] = NamedPlainBackend()
