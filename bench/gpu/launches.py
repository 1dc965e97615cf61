"""A forward_grad of each mapping and back end, for a profiler: nothing else of ours is launched."""

from __future__ import annotations

import sys

import torch

from bench.backends import runnable
from bench.buffers import Pool
from bench.cases import device_cases
from bench.device_kernels import FORWARD_GRAD, DeviceKernel

# Large planes, channels_last, small planes in joined rows: numbers of points in cases.DEVICE_POINTS.
SHOWN = (0, 2, 6)


def main() -> None:
    for case in device_cases("profile", "cuda", "--small" in sys.argv, SHOWN):
        pool = Pool(case, slots=1)
        for backend in runnable("cuda"):
            DeviceKernel(backend, FORWARD_GRAD, case, pool).prepare()()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
