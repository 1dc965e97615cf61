"""What a training makes of the networks: compiled ones while it lasts, and SyncBatchNorm layers for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from vidfast._torch import BATCH_NORM, compiled_call, has_forward_hook, set_compiled_call

from .distiller import Distiller


@contextmanager
def compiled(distiller: Distiller, backend: bool | str) -> Iterator[None]:
    """Both networks run by torch.compile during the block. backend: False for not, True for the default, or a name.

    The losses stay eager: their kernels are the same there, and nothing waits for a compiler.
    """
    if not backend:
        yield
        return
    networks = [n for n in (distiller.student, distiller.teacher) if n is not None]
    before = [compiled_call(network) for network in networks]
    try:
        for network in networks:
            network.compile(backend=backend if isinstance(backend, str) else "inductor")
        yield
    finally:
        for network, call in zip(networks, before, strict=True):
            set_compiled_call(network, call)
        distiller.detach_taps()


def synchronise_batchnorm(distiller: Distiller) -> None:
    """Make the student's BatchNorm layers torch's SyncBatchNorm: statistics over the batch of all processes.

    The parameters, the names in checkpoints and the tapped layers stay the same. Raises ValueError if such a layer has
    a forward hook, which the new layer would not have, or if the student is one.
    """
    student = distiller.student
    for name, module in student.named_modules():
        if isinstance(module, BATCH_NORM) and (has_forward_hook(module) or not name):
            found = f"a forward hook on {name!r}" if name else "a student that is one itself"
            raise ValueError(
                f"wanted BatchNorm layers that can be replaced, got {found}; use "
                "torch.nn.SyncBatchNorm.convert_sync_batchnorm before you make the Distiller and the hooks"
            )
    norms = {
        name: module.training for name, module in student.named_modules() if isinstance(module, BATCH_NORM)
    }
    nn.SyncBatchNorm.convert_sync_batchnorm(student)  # type: ignore[no-untyped-call]
    for name, training in norms.items():
        student.get_submodule(name).training = training
