"""NST: neuron selectivity transfer (Huang and Wang, arXiv 1707.01219) with the polynomial kernel, d = 2, c = 0.

Each channel's map over the P positions, divided by its length, is one sample; the loss is the squared maximum
mean discrepancy between the student's C_s samples and the teacher's C_t, averaged over the batch:

    mean_ij (s_i . s_j)^2  +  mean_ij (t_i . t_j)^2  -  2 mean_ij (s_i . t_j)^2.

With the samples as the rows of S (C_s, P) and T (C_t, P) the same is

    || S S' ||^2 / C_s^2  +  || T T' ||^2 / C_t^2  -  2 || S T' ||^2 / (C_s C_t)      channel Grams
    = || S' S / C_s  -  T' T / C_t ||^2                                                position Grams

(Frobenius norms), and whichever Grams are smaller are formed. Nothing of size C_s * C_t * P exists.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vidfast.reference import no_autocast

from ..layouts import ChannelDim
from ..tokens import Tokens
from ..weighting import Factor, times
from .attention import check_positions, unit
from .base import METHODS
from .pairs import PairedMethod, Pairs, wide


@METHODS.register("nst")
class NST(PairedMethod):
    """The sum over pairs of layers of the squared maximum mean discrepancy of their channels' maps.

    pairs: {student layer: teacher layer}, or a sequence of such pairs when a layer occurs twice.
    channel_dim, tokens: where the channels are, and what tokens become, as for every `PairedMethod`.
    weight: what the sum is multiplied by; half the paper's lambda.

    Features are (B, C, *spatial) with 1 to 3 spatial axes and any floating dtype; the numbers of channels may
    differ. Where the sizes differ both are average-pooled to the smaller along each axis. Computed in fp32 or
    wider, also under autocast. A channel that is zero everywhere is the sample zero, and has the gradient zero.

    Raises ValueError, naming the pair, for features of fewer than two positions or that do not match.
    """

    default_name: ClassVar[str] = "nst"

    def __init__(
        self,
        pairs: Pairs,
        *,
        channel_dim: ChannelDim = None,
        tokens: Tokens = None,
        weight: float = 50.0,
        name: str | None = None,
    ) -> None:
        super().__init__(pairs, channel_dim=channel_dim, tokens=tokens, weight=weight, name=name)

    def build_pair(self, student: Tensor, teacher: Tensor) -> None:
        check_positions("NST", student, teacher)

    def pair_loss(self, index: int, student: Tensor, teacher: Tensor, factor: Factor) -> Tensor:
        check_positions("NST", student, teacher)
        # Autocast would take the products to 8 bits, and their difference is what is wanted.
        with no_autocast(student):
            s, t = unit(wide(student).flatten(2)), unit(wide(teacher).flatten(2))
            dtype = torch.promote_types(s.dtype, t.dtype)
            return times(discrepancy(s.to(dtype), t.to(dtype)), factor)


def discrepancy(s: Tensor, t: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of the rows of s, (B, C_s, P), and t, (B, C_t, P), batch mean."""
    (c_s, positions), c_t = s.shape[1:], t.shape[1]
    if positions * positions <= c_s * c_s + c_t * c_t + c_s * c_t:
        return by_position_grams(s, t)
    return by_channel_grams(s, t)


def by_position_grams(s: Tensor, t: Tensor) -> Tensor:
    """`discrepancy` from matrices (B, P, P). No term cancels another here."""
    teachers = torch.bmm(t.mT, t)
    difference = torch.baddbmm(teachers, s.mT, s, beta=-1 / t.shape[1], alpha=1 / s.shape[1])
    return difference.square().sum((1, 2)).mean()


def by_channel_grams(s: Tensor, t: Tensor) -> Tensor:
    """`discrepancy` from matrices (B, C_s, C_s), (B, C_t, C_t) and (B, C_s, C_t)."""

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b.mT).square().mean()

    return similarity(s, s) + similarity(t, t) - 2 * similarity(s, t)
