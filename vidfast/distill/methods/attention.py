"""AT: attention transfer (Zagoruyko and Komodakis, ICLR 2017, section 3.1), the activation-based form with p = 2.

For one pair of layers, of activations a with C channels,

    q(a) = vec(mean_c a_c^2) / || vec(mean_c a_c^2) ||_2,   one vector over the positions for each sample,
    loss = mean over samples and positions of (q(s) - q(t))^2,   summed over pairs.

The maps have no channels left, so student and teacher may differ in width and nothing is learned.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..layouts import ChannelDim
from ..tokens import Tokens
from ..weighting import Factor, times
from .base import METHODS
from .pairs import PairedMethod, Pairs, wide


@METHODS.register("at")
class AT(PairedMethod):
    """The sum over pairs of layers of the mean squared difference of their normalised attention maps.

    pairs: {student layer: teacher layer}, or a sequence of such pairs when a layer occurs twice.
    channel_dim, tokens: where the channels are, and what tokens become, as for every `PairedMethod`.
    weight: beta.

    Features are (B, C, *spatial) with 1 to 3 spatial axes and any floating dtype; where the sizes differ both
    are average-pooled to the smaller along each axis, before the squares. Computed in fp32 or wider. A sample
    whose activations are all zero has the map zero, and the gradient zero.

    Raises ValueError, naming the pair, for features of fewer than two positions or that do not match.
    """

    default_name: ClassVar[str] = "at"

    def __init__(
        self,
        pairs: Pairs,
        *,
        channel_dim: ChannelDim = None,
        tokens: Tokens = None,
        weight: float = 1e3,
        name: str | None = None,
    ) -> None:
        super().__init__(pairs, channel_dim=channel_dim, tokens=tokens, weight=weight, name=name)

    def build_pair(self, student: Tensor, teacher: Tensor) -> None:
        check_positions("AT", student, teacher)

    def pair_loss(self, index: int, student: Tensor, teacher: Tensor, factor: Factor) -> Tensor:
        check_positions("AT", student, teacher)
        return times((attention_map(student) - attention_map(teacher)).square().mean(), factor)


def attention_map(features: Tensor) -> Tensor:
    """q(a), (B, positions), of unit length in every sample that is not zero; in fp32 or wider.

    features: (B, C, *spatial).
    """
    energy = wide(features).square().mean(1).flatten(1)
    # q is the same for any multiple of the map; at a peak of 1 the norm's squares neither vanish nor overflow.
    return unit(energy / nonzero(energy.detach().amax(1, keepdim=True)))


def unit(x: Tensor) -> Tensor:
    """x over its length along the last dimension; zero, and without gradient, where that is zero."""
    return x / nonzero(torch.linalg.vector_norm(x, dim=-1, keepdim=True))


def nonzero(x: Tensor) -> Tensor:
    """x, with 1 for 0: a divisor that leaves zeros as they are, with no eps to bend small values."""
    return torch.where(x == 0, torch.ones_like(x), x)


def check_positions(method: str, student: Tensor, teacher: Tensor) -> None:
    """Raises ValueError where there are not two positions: a normalised map of one is the same for everything."""
    if min(student.shape[2:].numel(), teacher.shape[2:].numel()) < 2:
        raise ValueError(
            f"{method} compares maps (B, C, *spatial) of at least two positions, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}; pair layers before the pooling"
        )
