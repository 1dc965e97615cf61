"""A network on tokens whose features are NaN where there is padding, and a Distiller of two."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vidfast.distill import KD, VID, Distiller, FitNet, StudentTVID


class TokenNet(nn.Module):
    """Tokens (B, L, 5) and where they are padding (B, L) -> logits (B, L, 3); the layer "seen" gives (B, L, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.seen = nn.Identity()
        self.fc = nn.Linear(width, 3)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        features = self.first(tokens).tanh()
        self.seen(features.masked_fill(padding[..., None], math.nan))
        logits: Tensor = self.fc(features).masked_fill(padding[..., None], math.nan)
        return logits


def token_distiller(tokens: Tensor, reduction: Any = "mean") -> Distiller:
    """In fp64. reduction: of all terms but KD."""
    torch.manual_seed(3)
    options = {"channel_dim": -1, "reduction": reduction}
    pairs = {"seen": "seen"}
    terms = [
        VID(pairs, **options), StudentTVID(pairs, **options), FitNet(pairs, weight=1.0, **options),
        KD(class_dim=-1),
    ]  # fmt: skip
    if reduction == "sum":
        terms.pop()
    example = {"tokens": tokens, "padding": torch.zeros(tokens.shape[:2], dtype=torch.bool)}
    return Distiller(TokenNet(4).double(), TokenNet(6).double(), terms, example=example).double()


def inputs(tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"tokens": tokens, "padding": mask == 0}


def token_data(count: int = 8, length: int = 6) -> tuple[Tensor, Tensor]:
    """Tokens (B, L, 5), and a mask (B, L) of sequences of 1 to L tokens."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(count, length, 5, dtype=torch.float64, generator=generator)
    lengths = torch.randint(1, length + 1, (count, 1), generator=generator)
    return tokens, torch.arange(length) < lengths


def gradients(distiller: Distiller) -> dict[str, Tensor]:
    """Of every parameter that the loss reaches; all are finite."""
    found = {n: p.grad.clone() for n, p in distiller.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in found.values())
    return found
