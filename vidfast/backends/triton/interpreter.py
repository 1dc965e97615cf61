"""Whether Triton's interpreter can run here: TRITON_INTERPRET=1 has it run the kernels on the CPU."""

from __future__ import annotations

import torch


def interpreter_fault() -> str | None:
    """Why this Triton's interpreter cannot run here, or None. Triton 3.6 cannot count with numpy 2.4 and later."""
    import numpy
    import triton

    from vidfast.backends.triton.math import counts

    found = torch.full((2,), -1, dtype=torch.int32, device="cpu")
    try:
        counts[(1,)](found, 7)
    except Exception as error:
        versions = f"triton {triton.__version__} with numpy {numpy.__version__}"
        return (
            f"the interpreter of {versions} fails ({error}): install another version of one of them, "
            "or unset TRITON_INTERPRET"
        )
    if found.tolist() != [0, 2]:
        return f"the interpreter of triton {triton.__version__} counts wrong: {found.tolist()} for [0, 2]"
    return None
