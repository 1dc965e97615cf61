"""On PYTHONPATH, makes the back end `cuda` of every Python process run emulated, on CPU tensors.

VIDFAST_EMULATED_CUDA is the path of the module that `emulated.build_module` made.
"""

import os
import sys
from pathlib import Path

_path = os.environ.get("VIDFAST_EMULATED_CUDA")
if _path:
    sys.path.append(str(Path(__file__).parents[1]))
    from emulated import load_module

    from vidfast import backends
    from vidfast.backends.cuda import CudaBackend

    sys.modules["vidfast_emulated"] = _native = load_module(Path(_path))
    backends._loaded["cuda"] = CudaBackend(_native, None, "cpu", lambda index: 0)
