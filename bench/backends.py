"""Which of vidfast's back ends this machine can run: asked of vidfast, so that a new one is measured unasked."""

from __future__ import annotations

import torch

from vidfast import backends


def runnable(device: str) -> list[str]:
    """The back ends that take plain tensors on `device`, in vidfast's order of preference."""
    mean, target = torch.zeros(2, 3, device=device), torch.zeros(2, 3, device=device)
    alpha = torch.zeros(3, device=device)
    loaded = ((name, backends.load(name)) for name in backends.NAMES)
    return [name for name, backend in loaded if backend.supports(mean, target, alpha) is None]
