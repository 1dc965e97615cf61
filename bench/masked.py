"""The loss with a mask: cases, who is measured, and the suite.

A user without a masked kernel copies out the positions that count (`mean[mask]`), or gives torch.compile the formula
with `where`. Both are held against ours with the mask, and ours without any: what selecting costs, or saves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bench import masks
from bench.backends import runnable
from bench.buffers import EPS
from bench.cases import SEGMENTATION, Case
from bench.masks import IGNORED, PADDING, Mask
from bench.providers import COMPILE, MASKED_STRATEGIES, LossFunction, Provider, vidfast_loss
from bench.suites import StepSuite
from vidfast.report.results import INDEXING, MASKS, WITHOUT_MASK

# The tokens of 32 sequences of 512, 40 % of them padding; segmentation maps, 10 % of whose pixels are ignored.
SEQUENCES = (32 * 512, 768)
TOKENS, PIXELS = Mask(PADDING, 0.4), Mask(IGNORED, 0.1)
# What a mask may cost is 5 % of the rows' time: that wants more samples than a factor of two.
FEWEST_SAMPLES = 11


def masked_case(
    suite: str, shape: tuple[int, ...], dtype: torch.dtype, mask: Mask, device: str, last: bool = False
) -> Case:
    rows = len(shape) == 2
    return Case(
        suite,
        shape,
        dtype,
        "channels_last" if last else "contiguous",
        channel_dim=-1 if rows else 1,
        device=device,
        gradients=(1.0,),
        fewest=FEWEST_SAMPLES,
        mask=mask,
        extra={"mask": mask.title, "walk": "rows" if rows or last else "planes"},
    )


def masked_cases(suite: str, full: bool, device: str) -> list[Case]:
    """Padded tokens in bf16, ignored pixels in bf16 and fp32; in full other masks, and maps with the channels last."""

    def tokens(mask: Mask) -> Case:
        return masked_case(suite, SEQUENCES, torch.bfloat16, mask, device)

    def pixels(mask: Mask, dtype: torch.dtype = torch.bfloat16, last: bool = False) -> Case:
        return masked_case(suite, SEGMENTATION, dtype, mask, device, last)

    cases = [tokens(TOKENS), pixels(PIXELS), pixels(PIXELS, torch.float32)]
    if not full:
        return cases
    return [
        *cases,
        tokens(replace(TOKENS, dtype=torch.int64)),
        pixels(PIXELS, last=True),
        tokens(replace(TOKENS, dtype=torch.float32)),
        pixels(replace(PIXELS, dtype=torch.float32)),
    ]


def small_masked_cases(suite: str, full: bool, device: str) -> list[Case]:
    """Rows and planes of sizes for an emulated device, where Triton, interpreted, is not asked for all."""
    del full
    in_place = "vidfast triton one_pass in place"
    tokens = replace(TOKENS, sequence=10)
    cases = [
        masked_case(suite, (40, 12), torch.bfloat16, replace(tokens, dtype=torch.int64), device),
        masked_case(suite, (1, 2, 33, 33), torch.float32, PIXELS, device),
    ]
    skip = frozenset({in_place, in_place + WITHOUT_MASK})
    return [replace(case, fewest=0, skip=skip) for case in cases]


def indexed_formula(case: Case) -> LossFunction:
    """The eager formula on copies of the positions that count, (M, C); their gradients are written back by autograd."""
    mask = masks.of_case(case)

    def loss(mean: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        counts = mask if mask.dtype is torch.bool else mask != 0
        rows, wanted = (x.movedim(case.channel_dim, -1)[counts] for x in (mean, target))
        variance = torch.log(1.0 + torch.exp(alpha)) + EPS
        nll = 0.5 * (torch.log(variance) + (wanted - rows) ** 2 / variance)
        if not mask.dtype.is_floating_point:
            return torch.mean(nll)
        weights = mask[counts].unsqueeze(-1)
        return (weights * nll).sum() / (case.channels * weights.sum())

    return loss


def masked_formula(case: Case) -> LossFunction:
    """The same without indexing: nothing counts where the weight is 0, be it NaN, and the mean is a weighted one."""
    mask = masks.of_case(case)

    def loss(mean: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        weights = mask.unsqueeze(case.channel_dim)
        variance = case.per_channel(torch.log(1.0 + torch.exp(alpha)) + EPS)
        difference = torch.where(weights != 0, target - mean, 0.0)
        nll = 0.5 * (torch.log(variance) + difference**2 / variance)
        return (weights * nll).sum() / (case.channels * weights.sum())

    return loss


def compiled_formula(case: Case) -> LossFunction:
    loss: LossFunction = torch.compile(masked_formula(case), dynamic=False, fullgraph=True)
    return loss


def providers(device: str) -> list[Provider]:
    """Indexing, the compiled formula, and one pass of every back end, without the mask and with it."""
    found = [Provider(INDEXING, "eager", indexed_formula), Provider(COMPILE, "compile", compiled_formula)]
    for backend in runnable(device):
        for strategy in MASKED_STRATEGIES:
            in_place = strategy.endswith("in place")
            name = f"vidfast {backend} {strategy}"
            plain, masked = (vidfast_loss(backend, "one_pass", in_place, mask) for mask in (False, True))
            found += [
                Provider(
                    name + WITHOUT_MASK, "vidfast", plain, strategy, writes_mean=in_place, ignores_mask=True
                ),
                Provider(name, "vidfast", masked, strategy, writes_mean=in_place),
            ]
    return found


@dataclass(frozen=True)
class MaskedSuite(StepSuite):
    """Forward and backward with a mask. Indexing waits for its number of rows, which no graph can hold."""

    def providers(self, case: Case) -> list[Provider]:
        return [provider for provider in providers(case.device) if provider.name not in case.skip]

    def captured(self, provider: Provider) -> bool:
        return provider.family in ("vidfast", "compile")


def masked_suite(full: bool, device: str) -> MaskedSuite:
    return MaskedSuite(MASKS, masked_cases, full, device)
