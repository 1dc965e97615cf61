"""On PYTHONPATH, makes the back end `cuda` of every Python process run emulated, on CPU tensors.

VIDFAST_EMULATED_CUDA is the path of the module that `emulated.build_module` made.
"""

import importlib.util
import os
import sys

_path = os.environ.get("VIDFAST_EMULATED_CUDA")
if _path:
    from vidfast import dispatch
    from vidfast.backends.cuda import CudaBackend

    _spec = importlib.util.spec_from_file_location("vidfast_emulated", _path)
    assert _spec is not None
    assert _spec.loader is not None
    _native = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_native)
    sys.modules["vidfast_emulated"] = _native
    dispatch._loaded["cuda"] = CudaBackend(_native, None, "cpu", lambda index: 0)
