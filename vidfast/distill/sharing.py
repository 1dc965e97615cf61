"""What student and teacher share: allowed as long as no training changes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vidfast._torch import BATCH_NORM, version_of


@dataclass
class Shared:
    """The tensors in memory that is the teacher's too, by their names in the teacher.

    parameters: of the student and the terms. norms: the student's layers with running statistics. buffers: all others.
    """

    parameters: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    norms: list[tuple[str, nn.Module]] = field(default_factory=list)
    buffers: list[tuple[str, Tensor]] = field(default_factory=list)

    @classmethod
    def between(cls, trained: Iterable[nn.Module], teacher: nn.Module) -> Shared:
        """What the modules that are trained, the student and the terms, share with the teacher.

        Raises ValueError for a parameter that is trained.
        """
        names = {place: name for name, t in _named_tensors(teacher) if (place := _place(t)) is not None}
        shared = cls()
        for module in trained:
            for _, parameter in module.named_parameters():
                name = names.get(_place(parameter))
                if name is not None:
                    shared.parameters.append((name, parameter))
            for part in module.modules():
                has_statistics = _has_statistics(part)
                found = [
                    (names[place], b) for b in part.buffers(recurse=False) if (place := _place(b)) in names
                ]
                if found and has_statistics:
                    shared.norms.append((found[0][0].rpartition(".")[0], part))
                elif found:
                    shared.buffers += found
        for name, parameter in shared.parameters:
            if parameter.requires_grad:
                raise ValueError(
                    f"student and teacher share the parameter {name!r}, which is trained (requires_grad is True), and "
                    "the teacher must not change: freeze it with requires_grad_(False), or give "
                    "copy.deepcopy(network) as the teacher"
                )
        return shared

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """A run of the student.

        Raises RuntimeError before it if a training would change what is shared, and after it if the run has.
        """
        for name, parameter in self.parameters:
            if parameter.requires_grad:
                raise RuntimeError(
                    f"student and teacher share the parameter {name!r}, and it requires a gradient since: the teacher "
                    "would change; keep it frozen, or make a Distiller with a copy as the teacher"
                )
        for name, norm in self.norms:
            if norm.training:
                raise RuntimeError(
                    f"student and teacher share the layer {name!r} ({type(norm).__name__}), and it is in training "
                    "mode: its running statistics, and with them the teacher, would change; put it into eval mode "
                    "after train(), or give the teacher a copy"
                )
        looked_at = (
            [] if torch.compiler.is_compiling() else [(n, b) for n, b in self.buffers if not b.is_inference()]
        )
        before = [version_of(buffer) for _, buffer in looked_at]
        yield
        for (name, buffer), version in zip(looked_at, before, strict=True):
            if version_of(buffer) != version:
                raise RuntimeError(
                    f"student and teacher share the buffer {name!r}, and a run of the student has changed it, and "
                    "with it the teacher; put its layer into eval mode, or give the teacher a copy"
                )


def _named_tensors(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [*network.named_parameters(), *network.named_buffers()]


def _place(tensor: Tensor) -> object:
    """Where a tensor's memory begins; None for a tensor without elements."""
    if not tensor.numel():
        return None
    try:
        address = 0 if tensor.is_meta else tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # a kind of tensor that has no address
        address = 0
    return (tensor.device, address) if address else id(tensor)


def _has_statistics(module: nn.Module) -> bool:
    norms = (BATCH_NORM, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    return isinstance(module, norms) and module.running_mean is not None
