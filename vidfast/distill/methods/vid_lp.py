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

from vidfast.nll import GaussianNLL

from ..regressors import owns_its_output
from .base import METHODS, Batch, Method, ParameterGroup
from .pairs import place
from .variational import check_variational


def as_vectors(x: Tensor, what: str) -> Tensor:
    """(B, h) of (B, h) or of (B, h, 1, ...), as a global pooling layer gives it. ValueError for all else."""
    if x.dim() < 2 or x.shape[2:].numel() != 1:
        raise ValueError(f"wanted {what} of shape (batch, features), got {tuple(x.shape)}")
    return x.flatten(1)


@METHODS.register("vid_lp")
class VIDLP(Method):
    """The Gaussian negative log-likelihood of the teacher's logits given the student's last features.

    layer: the student's penultimate layer: its output is (B, h), or (B, h, 1, 1) of a pooling layer.
    bias: whether the linear layer has one. The paper writes W s, without.
    init_var: the variance of every logit at the start, above eps. eps: the variance's floor.
    reduction: "mean" (over batch and logits), "batchmean" (the paper's) or "sum".
    alpha_lr: alpha's learning rate as a multiple of the others'. alpha takes no weight decay.
    backend: as for `vidfast.gaussian_nll`. weight: lambda.

    Raises ValueError for options out of range, and for features or logits of other shapes; TypeError for a
    layer that is no name.
    """

    default_name: ClassVar[str] = "vid_lp"

    def __init__(
        self,
        layer: str,
        *,
        bias: bool = False,
        init_var: float = 5.0,
        eps: float = 1e-5,
        reduction: str = "mean",
        alpha_lr: float = 1.0,
        backend: str = "auto",
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight=weight, name=name)
        if not isinstance(layer, str):
            raise TypeError(f"wanted the name of the student's penultimate layer, got {type(layer).__name__}")
        check_variational(reduction, init_var, eps, alpha_lr)
        self.layer, self.bias = layer, bool(bias)
        self.student_layers = (layer,)
        self.init_var, self.eps, self.alpha_lr = float(init_var), float(eps), float(alpha_lr)
        self.reduction, self.backend = reduction, backend

    def build(self, batch: Batch) -> None:
        student, teacher = self._features(batch)
        linear = place(nn.Linear(student.shape[1], teacher.shape[1], bias=self.bias), student)
        likelihood = GaussianNLL(
            teacher.shape[1],
            init_var=self.init_var,
            eps=self.eps,
            reduction=self.reduction,
            backend=self.backend,
        )
        self.regressor, self.likelihood = linear, likelihood.to(student.device)

    def forward(self, batch: Batch, factor: float) -> Tensor:
        student, teacher = self._features(batch)
        self.likelihood.weight = factor
        # Over the linear layer's own output, which nothing else reads: nothing is allocated for the gradient.
        self.likelihood.inplace = owns_its_output(self.regressor)
        try:
            loss: Tensor = self.likelihood(self.regressor(student), teacher)
        except ValueError as error:
            raise ValueError(f"student layer {self.layer!r} -> teacher's logits: {error}") from None
        return loss

    def variance(self) -> Tensor:
        """The learned variance of each logit, (N,): large where the student's features say little of it."""
        return self.likelihood.variance.detach()

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup(list(self.regressor.parameters()), name="regressor"),
            ParameterGroup([self.likelihood.alpha], lr_factor=self.alpha_lr, decay=False, name="alpha"),
        ]

    def _features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        try:
            student = as_vectors(batch.student.taps[self.layer], "penultimate features")
        except ValueError as error:
            raise ValueError(f"student layer {self.layer!r}: {error}") from None
        teacher = batch.from_teacher.logits.detach()
        if teacher.dim() != 2:
            raise ValueError(f"wanted the teacher's logits as (batch, classes), got {tuple(teacher.shape)}")
        return student, teacher

    def extra_repr(self) -> str:
        return f"{self.layer} -> logits; {super().extra_repr()}, init_var={self.init_var:g}, reduction={self.reduction}"
