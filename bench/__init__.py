"""Where every figure about vidfast's speed comes from: `python -m pytest bench`.

cases.py       what is measured: shapes, dtypes, layouts, incoming gradients
providers.py   who is measured: eager, torch's own loss, torch.compile, each vidfast back end and strategy
masks.py       masks, and what a pass with one moves; masked.py the loss with them beside indexing and torch.compile
kernels.py     the CPU kernels alone, without autograd; device_kernels.py a GPU back end's primitives
graphs.py      calls in a CUDA graph: the device's own time
traffic.py     the bytes each of them moves
clock.py       the clocks: processor and device
interleave.py  the rounds: every provider in turn, cold buffers, spread kept
memory.py  accuracy.py  machine.py  record.py   what else a row carries, and how it is stored
lines.py  measured.py                           the same as lines of JSON, written case after case
gpu/           a GPU's first minutes (bench/gpu.sh)
"""
