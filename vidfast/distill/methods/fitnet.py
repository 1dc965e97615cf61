"""FitNet: mean squared error to the teacher's features (Romero et al., ICLR 2015), as a regulariser.

Equation 7 of the VID paper (Ahn et al., CVPR 2019), which is equation 5 with every variance fixed at one:

    sum_chw (t_chw - mu_chw(s))^2 / 2,   mu(s) = W s, one 1x1 convolution.

The original trains in two stages, first up to the hint; here, as in the VID paper, the term is added to the
student's loss from the start.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from vidfast.arguments import ScalarReduction
from vidfast.regressor import regress

from ..layouts import ChannelDim
from ..regressors import Regressor, keeps_resolution, laid_out, make, resolve, takes_last
from ..tokens import Tokens
from ..weighting import Factor, selected, times, weighted
from .base import METHODS
from .pairs import PairedMethod, Pairs, place, wide
from .variational import check_reduction


@METHODS.register("fitnet")
class FitNet(PairedMethod):
    """The sum over pairs of layers of half the squared error of equation 7.

    pairs: {student layer: teacher layer}, or a sequence of such pairs when a layer occurs twice.
    regressor: mu, as for `VID`; the default "linear" is one 1x1 convolution without bias; "conv_bn_relu" is public
        code's, a convolution that changes the size, BatchNorm and ReLU. Where maps differ in
        size, for a stack of 1x1 convolutions both are average-pooled to the smaller size along each axis
        (`vidfast.vid.match_spatial`); other regressors get them as they are.
    reduction: "mean" (over all elements), "batchmean" (the equation, averaged over the batch) or "sum".
    channel_dim, tokens: where the channels are, and what tokens become, as for every `PairedMethod`.
    weight: what the sum is multiplied by. Public code takes 100 times the mean squared error without the half:
        the default.

    Features are (B, C, *spatial) of any floating dtype; differences and squares are formed in fp32 or wider.

    Raises ValueError for options out of range, and, naming the pair, for features that do not match.
    """

    default_name: ClassVar[str] = "fitnet"
    per_pair: ClassVar[tuple[str, ...]] = ("regressors",)
    takes_mask: ClassVar[bool] = True
    regressors: nn.ModuleList

    def __init__(
        self,
        pairs: Pairs,
        regressor: str | Regressor = "linear",
        reduction: ScalarReduction = "mean",
        channel_dim: ChannelDim = None,
        *,
        tokens: Tokens = None,
        weight: float = 200.0,
        name: str | None = None,
    ) -> None:
        resolved = resolve(regressor)
        super().__init__(
            pairs,
            channel_dim=channel_dim,
            tokens=tokens,
            pools=keeps_resolution(resolved),
            takes_last=takes_last(resolved),
            weight=weight,
            name=name,
        )
        self.regressor = resolved
        self.reduction = check_reduction(reduction)

    def build_pair(self, student: Tensor, teacher: Tensor) -> None:
        regressor = laid_out(self.regressor, self.dim(len(self.regressors)))
        self.regressors.append(place(make(regressor, student.shape, teacher.shape), student))

    def pair_loss(
        self, index: int, student: Tensor, teacher: Tensor, factor: Factor, mask: Tensor | None = None
    ) -> Tensor:
        student, teacher = selected(student, teacher, mask, self.dim(index))
        mean = regress(self.regressors[index], student, teacher.shape)
        return half_squared_error(mean, teacher, self.reduction, factor, mask)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reduction={self.reduction}"


def half_squared_error(
    mean: Tensor, target: Tensor, reduction: ScalarReduction, factor: Factor, mask: Tensor | None = None
) -> Tensor:
    """factor * 1/2 ||target - mean||^2, equation 7 of the VID paper, in fp32 or wider.

    mean, target: of one shape, batch first. reduction: the sum as it is, over the batch size ("batchmean") or
    over the number of elements ("mean"). mask: a weight for each of target's positions, as in `weighted`, where mean
    and target are finite.
    """
    if mask is not None:
        return times(weighted((wide(mean) - wide(target)).square(), mask, reduction), 0.5 * factor)
    if reduction == "batchmean":
        factor = factor / mean.shape[0]
    # mse_loss takes mixed dtypes forwards and fails on them backwards.
    dtype = torch.promote_types(wide(mean).dtype, wide(target).dtype)
    over = "mean" if reduction == "mean" else "sum"
    error = torch.nn.functional.mse_loss(mean.to(dtype), target.to(dtype), reduction=over)
    return times(error, 0.5 * factor)
