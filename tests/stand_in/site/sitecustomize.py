"""On PYTHONPATH, gives every Python process run the stand-in of a GPU. VIDFAST_EMULATED_CUDA is the emulated module."""

import os

if os.environ.get("VIDFAST_EMULATED_CUDA"):
    import stand_in

    stand_in.install(os.environ["VIDFAST_EMULATED_CUDA"])
