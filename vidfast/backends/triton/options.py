"""What all launches share: options, and fp64 numbers as kernels take them."""

from __future__ import annotations

import struct

# Of a kernel that may start before the one before it has ended.
EARLY = {"launch_pdl": True}


def bits(x: float) -> int:
    """The bit pattern of an fp64 number, as an int64: Triton passes a Python float as fp32."""
    found: int = struct.unpack("<q", struct.pack("<d", x))[0]
    return found
