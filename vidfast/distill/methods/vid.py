"""VID-I: variational information distillation of intermediate layers (Ahn et al., CVPR 2019).

Equation 5, for one pair of layers with teacher activation t and student activation s of C channels:

    -log q(t|s) = sum_c,h,w  log sigma_c + (t_chw - mu_chw(s))^2 / (2 sigma_c^2) + constant,
    sigma_c^2 = softplus(alpha_c) + eps.

mu is a regressor on s (regressors.py); alpha is one number per channel, learned along with it. The paper sums
over c, h, w and averages over the batch (reduction="batchmean"); the code that distillation repositories
share, and this default, takes the mean over all elements, so that lambda_mean = lambda_paper * C * H * W.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vidfast.arguments import BackendName, ScalarReduction
from vidfast.nll import GaussianNLL

from ..layouts import ChannelDim
from ..regressors import Regressor
from ..tokens import Tokens
from ..weighting import Factor
from .base import METHODS
from .pairs import Pairs
from .variational import GaussianMethod, VariationalPairs


@METHODS.register("vid")
class VID(GaussianMethod, VariationalPairs):
    """The sum over pairs of layers of the Gaussian negative log-likelihood of equation 5.

    pairs: {student layer: teacher layer}, or a sequence of such pairs when a layer occurs twice.
    regressor: "linear", "conv2", "conv3", "transposed" (regressors.py), a registered name, or a function
        (student_shape, teacher_shape) -> nn.Module whose output has the teacher's shape. A stack of 1x1
        convolutions cannot change the resolution: where maps differ, for such a stack both are average-pooled
        to the smaller size along each axis (`vidfast.vid.match_spatial`); other regressors get them as they
        are.
    init_var: the variance at the start, above eps. eps: the variance's floor.
    reduction: "mean" (over all elements), "batchmean" (the paper's) or "sum".
    channel_dim: where the channels are, as for every `PairedMethod`: 1, -1 for channels last, a pair (student's,
        teacher's), or None for what the layers' classes tell, which features of three dimensions need.
    tokens: what tokens (B, L, D) become: None, "grid", "sequence", or an adaptor of `tokens.py`.
    alpha_lr: alpha's learning rate as a multiple of the others'. alpha takes no weight decay.
    backend: as for `vidfast.gaussian_nll`. weight: lambda, what the sum is multiplied by.

    Raises ValueError for options out of range, and when built on features that do not match; TypeError for a
    regressor that is neither a name nor a function.
    """

    default_name: ClassVar[str] = "vid"
    takes_mask: ClassVar[bool] = True

    def __init__(
        self,
        pairs: Pairs,
        *,
        regressor: str | Regressor = "conv3",
        init_var: float = 5.0,
        eps: float = 1e-5,
        reduction: ScalarReduction = "mean",
        channel_dim: ChannelDim = None,
        tokens: Tokens = None,
        alpha_lr: float = 1.0,
        backend: BackendName = "auto",
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            pairs=pairs,
            regressor=regressor,
            init_var=init_var,
            eps=eps,
            reduction=reduction,
            channel_dim=channel_dim,
            tokens=tokens,
            alpha_lr=alpha_lr,
            backend=backend,
            weight=weight,
            name=name,
        )

    def pair_loss(
        self, index: int, student: Tensor, teacher: Tensor, factor: Factor, mask: Tensor | None = None
    ) -> Tensor:
        regressor, likelihood = self.regressors[index], self.likelihoods[index]
        return self.gaussian_nll(regressor, likelihood, student, teacher, factor, mask)

    def variances(self) -> dict[str, Tensor]:
        """The learned variance per channel, (C,), by "student layer -> teacher layer": large where the student
        explains little of the teacher."""
        gaussians = [nll for nll in self.likelihoods if isinstance(nll, GaussianNLL)]
        return {name: nll.variance.detach() for name, nll in zip(self.pair_names(), gaussians, strict=True)}
