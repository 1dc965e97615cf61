"""One or several processes, as `torchrun` and `accelerate launch` start them: where each computes, which one prints.

With torch's own means alone, and nothing kept for the whole process: what a training does follows from its options,
whatever else runs beside it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")

_PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def joined() -> bool:
    """Whether this process has joined others."""
    return distributed.is_available() and distributed.is_initialized()


def process_count() -> int:
    """How many processes there are: those joined, else those that a launcher has started."""
    if joined():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE") or 1) if "RANK" in os.environ else 1


def process_index() -> int:
    """This process's number, 0 for the only one."""
    return distributed.get_rank() if joined() else int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes files: the first of several, or the only one."""
    return process_count() == 1 or process_index() == 0


def join(device: str) -> torch.device:
    """Join the other processes, if there are any and this one has not, and return the device to compute on.

    Of several GPUs a process takes the one of its LOCAL_RANK. A group of processes that is there is used as it is;
    one that is made here stays.

    device: the kind of device, such as "cpu" or "cuda"; "auto" for the one that torch prefers here.
    """
    found = torch.device(_preferred() if device == "auto" else device)
    if process_count() == 1:
        return found
    if found.type == "cuda":
        local = os.environ.get("LOCAL_RANK")
        number = torch.cuda.current_device() if local is None else int(local) % torch.cuda.device_count()
        found = torch.device("cuda", number)
        torch.cuda.set_device(found)
    if not joined():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo")
    return found


def _preferred() -> str:
    """The kind of device that torch computes on by preference."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


class Processes:
    """What a training asks of the processes that it runs in: the device, precision, and what they tell each other.

    device: where this process computes. index, count: of this process, and how many there are.

    Raises ValueError for fp16 on a CPU, and for settings of `accelerate launch` that no training here follows.
    """

    def __init__(self, device: str, precision: str) -> None:
        _refuse_sharding()
        self.device = join(device)
        if precision == "fp16" and self.device.type == "cpu":
            raise ValueError(
                "wanted mixed_precision 'bf16' or 'no' on the CPU, got 'fp16', which needs a GPU; take 'bf16'"
            )
        self.count = process_count()
        self.index = process_index() if self.count > 1 else 0
        self.is_main = self.index == 0
        self.dtype = _PRECISIONS[precision]

    def scaler(self) -> torch.amp.GradScaler:
        """A loss scaler for fp16; it does nothing in the other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def autocast(self) -> torch.autocast:
        """The precision that was asked for."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    @contextmanager
    def own_modes(self) -> Iterator[None]:
        """A block that the caller's modes do not reach: autocast, with the weights that it keeps in 16 bits until it
        ends, and those in which there are no gradients."""
        torch.clear_autocast_cache()
        try:
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autocast("cpu", enabled=False),
                torch.autocast(self.device.type, enabled=False),
            ):
                yield
        finally:
            torch.clear_autocast_cache()

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model, with its gradients averaged over the processes if there are several."""
        if self.count == 1:
            return model
        on_gpu = self.device.type == "cuda"
        return nn.parallel.DistributedDataParallel(model, [self.device] if on_gpu else None)

    def unsent(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A block in which gradients of a wrapped model are added up here, and not sent."""
        return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in a tensor of its own."""
        total = values.clone()
        if self.count > 1:
            distributed.all_reduce(total)
        return total

    def gather(self, values: Tensor) -> Tensor:
        """(processes, ...): every process's values, which have one shape."""
        if self.count == 1:
            return values[None]
        found = [torch.empty_like(values) for _ in range(self.count)]
        distributed.all_gather(found, values.contiguous())
        return torch.stack(found)

    def gather_objects(self, value: T) -> list[T]:
        """Every process's value."""
        found = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(found, value)
        return found

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the first one's values."""
        if self.count > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)


def _refuse_sharding() -> None:
    for name, what in (("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true", "yes"):
            raise ValueError(
                f"wanted processes that each hold the whole networks, got `accelerate launch` with {what}: the Trainer "
                "averages gradients by torch's DistributedDataParallel; turn it off in accelerate's configuration, or "
                "write a loop of your own around the Distiller"
            )


def refuse_prepared(distiller: nn.Module) -> None:
    """Raises ValueError for networks whose forward Accelerate has put into an autocast of its own."""
    for role in ("student", "teacher"):
        network = getattr(distiller, role)
        if network is not None and any("_original_forward" in vars(module) for module in network.modules()):
            raise ValueError(
                f"wanted a {role} as it was before Accelerator.prepare(), got one that runs in that Accelerator's "
                "precision, whatever mixed_precision is here; give "
                f"accelerator.unwrap_model({role}, keep_fp32_wrapper=False)"
            )


def wrapper_in(network: nn.Module) -> str | None:
    """What averages or shards for processes around the network, or around a part of it: the name of its call."""
    kinds: dict[type, str] = {nn.parallel.DistributedDataParallel: "DistributedDataParallel"}
    # A network can be of FSDP's only where FSDP has been imported, which takes long.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        kinds[fsdp.FullyShardedDataParallel] = "FullyShardedDataParallel"
        kinds[fsdp.FSDPModule] = "fully_shard"
    found = (name for module in network.modules() for kind, name in kinds.items() if isinstance(module, kind))
    return next(found, None)


@contextmanager
def one_voice(device: str) -> Iterator[None]:
    """Join the other processes for the block, in which only the first one's stdout and stderr go anywhere.

    Does nothing where there is one process. device: as for `join`.
    """
    if process_count() == 1:
        yield
        return
    found = joined()
    join(device)
    with open(os.devnull, "w") as nowhere:
        if is_main():
            yield
        else:
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield
    # Not after an exception: the others may be waiting for this process, and its end is what frees them.
    if not found:
        distributed.destroy_process_group()


def from_main(work: Callable[[], T]) -> T:
    """What `work` returns in the first process, in all of them; only that one does it.

    If it raises there, the others leave without a word.
    """
    if process_count() == 1:
        return work()
    done: list[tuple[bool, T | None]] = [(False, None)]
    failed: BaseException | None = None
    if is_main():
        try:
            done = [(True, work())]
        except BaseException as error:
            failed = error
    distributed.broadcast_object_list(done, 0)
    if failed is not None:
        raise failed
    good, value = done[0]
    if not good:
        raise SystemExit(2)
    return value  # type: ignore[return-value]
