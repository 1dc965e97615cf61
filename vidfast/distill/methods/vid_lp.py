"""VID-LP: variational information distillation of the logits (Ahn et al., CVPR 2019, equation 6).

With the teacher's logits t (B, N) and the student's penultimate features s (B, h),

    -log q(t|s) = sum_n  log sigma_n + (t_n - (W s)_n)^2 / (2 sigma_n^2) + constant,
    sigma_n^2 = softplus(alpha_n) + eps,

W being one linear layer and alpha one number per logit, both learned. The teacher's classes need not be the
student's: this is the paper's method for transfer between data sets. With all sigma_n^2 fixed to 1 it is
learning without forgetting in the paper's form (equation 7).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from vidfast.arguments import BackendName, ScalarReduction
from vidfast.nll import GaussianNLL

from ..weighting import Factor
from .base import METHODS, Batch
from .pairs import place
from .penultimate import check_layer, penultimate, sample_weights
from .variational import GaussianMethod


@METHODS.register("vid_lp")
class VIDLP(GaussianMethod):
    """The Gaussian negative log-likelihood of the teacher's logits given the student's last features.

    layer: the student's penultimate layer: its output is (B, h), or (B, h, 1, 1) of a pooling layer; or the
        classifier's input, "fc.input".
    bias: whether the linear layer has one. The paper writes W s, without.
    init_var: the variance of every logit at the start, above eps. eps: the variance's floor.
    reduction: "mean" (over batch and logits), "batchmean" (the paper's) or "sum".
    alpha_lr: alpha's learning rate as a multiple of the others'. alpha takes no weight decay.
    backend: as for `vidfast.gaussian_nll`. weight: lambda.

    Raises ValueError for options out of range, and for features or logits of other shapes; TypeError for a
    layer that is no name.
    """

    default_name: ClassVar[str] = "vid_lp"
    takes_mask: ClassVar[bool] = True
    likelihood: GaussianNLL

    def __init__(
        self,
        layer: str,
        *,
        bias: bool = False,
        init_var: float = 5.0,
        eps: float = 1e-5,
        reduction: ScalarReduction = "mean",
        alpha_lr: float = 1.0,
        backend: BackendName = "auto",
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            init_var=init_var,
            eps=eps,
            reduction=reduction,
            alpha_lr=alpha_lr,
            backend=backend,
            weight=weight,
            name=name,
        )
        self.layer, self.bias = check_layer(layer), bool(bias)
        self.student_layers = (layer,)

    def build(self, batch: Batch) -> None:
        student, teacher = penultimate(batch, self.layer)
        self.regressor = place(nn.Linear(student.shape[1], teacher.shape[1], bias=self.bias), student)
        self.likelihood = self.make_likelihood(teacher.shape[1]).to(student.device)

    def forward(self, batch: Batch, factor: Factor) -> Tensor:
        student, teacher = penultimate(batch, self.layer)
        mask = sample_weights(batch, student, self.layer)
        return self.gaussian_nll(self.regressor, self.likelihood, student, teacher, factor, mask)

    def variance(self) -> Tensor:
        """The learned variance of each logit, (N,): large where the student's features say little of it."""
        return self.likelihood.variance.detach()

    def extra_repr(self) -> str:
        return f"{self.layer} -> logits; {super().extra_repr()}"
