"""Masks of positions: how they are drawn, and the bytes that one pass with a mask moves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from bench.cases import Case

PADDING, IGNORED = "padding", "ignored"
# Rows of a sequence that is padded.
SEQUENCE = 512
# Of the ignored pixels this share is scattered; the rest are in discs, whose radius is one of these shares of a side.
SCATTERED, RADII = 0.1, (0.03, 0.12)
# What memory gives at least, in bytes: a line of a CPU's caches, a sector of a GPU's.
LINE, SECTOR = 64, 32
NAMES = {torch.bool: "", torch.int64: " int64 mask", torch.float32: " fractional weights"}


@dataclass(frozen=True)
class Mask:
    """Which positions do not count, and how it is said.

    kind: PADDING (the ends of sequences) or IGNORED (pixels of maps).
    share: Of the positions that do not count; of padding at most a half.
    dtype: bool; int64, as tokenizers give it; float32, a weight in (0, 1] where a position counts.
    sequence: Rows of a sequence, of padding.
    """

    kind: str
    share: float
    dtype: torch.dtype = torch.bool
    sequence: int = SEQUENCE

    @property
    def title(self) -> str:
        return f"{100 * self.share:g}% {self.kind}{NAMES[self.dtype]}"


@lru_cache(maxsize=8)
def of_case(case: Case) -> torch.Tensor:
    """The case's mask, on its device: the shape of its tensors without the channels. Every call gives the same one."""
    mask = case.mask
    assert mask is not None, f"{case.key} has no mask"
    generator = torch.Generator().manual_seed(0)
    shape = list(case.shape)
    del shape[case.channel_dim]
    counts = (padding if mask.kind == PADDING else ignored)(mask, shape, generator)
    if mask.dtype.is_floating_point:
        weights = 1.0 - torch.rand(shape, generator=generator, dtype=mask.dtype)  # never 0
        return torch.where(counts, weights, torch.zeros_like(weights)).to(case.device)
    return counts.to(mask.dtype).to(case.device)


def padding(mask: Mask, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    """Rows of sequences, each of which counts up to a length of its own. In all, the share does not, to the row.

    Lengths are even between all of a sequence and as much below the mean; every second one makes up for another.
    """
    (rows,) = shape
    count, kept = rows // mask.sequence, (1.0 - mask.share) * mask.sequence
    assert count * mask.sequence == rows, f"{rows} rows are no whole sequences of {mask.sequence}"
    spread = mask.sequence - kept
    more = ((2 * torch.rand(count // 2, generator=generator) - 1) * spread).round()
    less = torch.cat([-more, torch.zeros(count % 2)])
    lengths = (kept + torch.cat([more, less])[torch.randperm(count, generator=generator)]).floor()
    lengths[: round(count * kept - float(lengths.sum()))] += 1  # where the mean length is no whole number
    return (torch.arange(mask.sequence) < lengths[:, None]).flatten()


def ignored(mask: Mask, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    """Maps in which discs and scattered pixels do not count: in each the share, to the pixel."""
    height, width = shape[-2:]
    down, across = torch.arange(height)[:, None], torch.arange(width)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def one() -> torch.Tensor:
        wanted = round(mask.share * height * width)
        left_out = torch.zeros(height * width, dtype=torch.bool)
        left_out[torch.randperm(height * width, generator=generator)[: round(SCATTERED * wanted)]] = True
        while (lacking := wanted - int(left_out.sum())) > 0:
            y, x = uniform(0, height), uniform(0, width)
            radius = max(uniform(*RADII) * min(height, width), 1.0)
            disc = ((down - y) ** 2 + (across - x) ** 2 <= radius**2).flatten() & ~left_out
            left_out[disc.nonzero()[:lacking]] = True
        return ~left_out.view(height, width)

    return torch.stack([one() for _ in range(shape[0])])


@lru_cache(maxsize=8)
def nbytes_of_a_pass(case: Case) -> int:
    """What one pass with the case's mask moves at least: the loss, and the gradient of mean.

    Of mean and target the lines (on a GPU the sectors) in which any element counts are read, all of the gradient is
    written, zeros among it, and the mask is read once. One that kernels do not read as it is, an integer's or bool's
    bytes apart, is also written and read as fp32.
    """
    mask = of_case(case)
    piece = SECTOR if case.on_gpu else LINE
    whole = (mask != 0).unsqueeze(case.channel_dim).expand(case.shape)
    if case.layout == "channels_last":
        whole = whole.permute(0, 2, 3, 1)
    flat, each = whole.flatten(), piece // case.dtype.itemsize
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % each))
    read = min(int(padded.view(-1, each).any(1).sum()) * piece, case.nbytes)
    converted = 0 if mask.dtype in (torch.bool, torch.float32) else 2 * 4 * mask.numel()
    return 2 * read + case.nbytes + mask.nbytes + converted
