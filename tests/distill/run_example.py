"""Runs a program of examples/, also where torchvision's compiled operators do not load.

python tests/distill/run_example.py PROGRAM [its arguments]
"""

from __future__ import annotations

import runpy
import sys

from declared_operators import declare_torchvision

if __name__ == "__main__":
    declare_torchvision()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
