"""FSDP2: parameters are DTensors outside of a module and plain tensors in its forward: the kernels run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import logging, os, sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import vidfast

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
picked = []
handler = logging.Handler()
handler.emit = lambda record: picked.append(record.getMessage())
logging.getLogger("vidfast").addHandler(handler)
logging.getLogger("vidfast").setLevel(logging.DEBUG)

def close(a, b, bound=1e-6):
    assert (a.double() - b.double()).norm() <= bound * b.double().norm(), (a, b)

def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x

student, teacher = torch.randn(8, 6, 5, 5), torch.randn(8, 4, 5, 5)
plain, sharded = vidfast.VIDLoss(6, 8, 4), vidfast.VIDLoss(6, 8, 4)
sharded.load_state_dict(plain.state_dict())
fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
assert all(isinstance(p, DTensor) for p in sharded.parameters())
share = slice(4 * rank, 4 * rank + 4)
loss = sharded(student[share], teacher[share])
close(loss.detach(), plain(student[share], teacher[share]).detach(), 2e-7)
loss.backward()
assert picked and not [said for said in picked if "reference" in said], picked
plain(student, teacher).backward()
for (name, got), wanted in zip(sharded.named_parameters(), plain.parameters(), strict=True):
    assert got.grad is not None, name
    close(full(got.grad), wanted.grad)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads do not always outlive the interpreter's end
"""


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7),
    reason="fully_shard needs a GPU before torch 2.7",
)
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torch.distributed")
def test_the_kernels_run_inside_a_sharded_module(tmp_path: Path) -> None:
    """Two processes, each with half of the batch and half of every parameter, against one with all of it."""
    script = tmp_path / "sharded.py"
    script.write_text(SCRIPT)
    environment = {"GLOO_SOCKET_IFNAME": "lo", **os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
