"""A forward_grad of each mapping and back end, for a profiler: nothing else of ours is launched."""

from __future__ import annotations

import sys

import torch

from bench.backends import runnable
from bench.cases import DEVICE_POINTS, SMALL_DEVICE_POINTS
from vidfast import dispatch
from vidfast.layout import prepare

# Large planes, channels_last, small planes in joined rows.
SHOWN = (0, 2, 6)


def main() -> None:
    points = SMALL_DEVICE_POINTS if "--small" in sys.argv else [DEVICE_POINTS[i] for i in SHOWN]
    for name in runnable("cuda"):
        for shape, dtype, last in points:
            mean, target = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
            if last:
                mean, target = (x.contiguous(memory_format=torch.channels_last) for x in (mean, target))
            alpha = torch.randn(shape[1], device="cuda")
            mean, target, layout = prepare(mean, target, 1)
            k = 1.0 / mean.numel()
            dispatch.load(name).forward_grad(mean, target, alpha, layout, k, 1e-5, False, False)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
