"""VID-I: variational information distillation of intermediate layers (Ahn et al., CVPR 2019).

Equation 5, for one pair of layers with teacher activation t and student activation s of C channels:

    -log q(t|s) = sum_c,h,w  log sigma_c + (t_chw - mu_chw(s))^2 / (2 sigma_c^2) + constant,
    sigma_c^2 = softplus(alpha_c) + eps.

mu is a regressor on s (regressors.py); alpha is one number per channel, learned along with it. The paper sums
over c, h, w and averages over the batch (reduction="batchmean"); the code that distillation repositories
share, and this default, takes the mean over all elements, so that lambda_mean = lambda_paper * C * H * W.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from vidfast.nll import GaussianNLL
from vidfast.vid import match_spatial

from ..regressors import PointwiseStack, Regressor, owns_its_output, resolve
from .base import METHODS, Batch, Method, ParameterGroup


@METHODS.register("vid")
class VID(Method):
    """The sum over pairs of layers of the Gaussian negative log-likelihood of equation 5.

    pairs: {student layer: teacher layer}, or a sequence of such pairs when a layer occurs twice.
    weight: lambda, what the sum is multiplied by.
    regressor: "linear", "conv2", "conv3", a registered name, or a function
        (student_shape, teacher_shape) -> nn.Module whose output has the teacher's shape. A stack of 1x1
        convolutions cannot change the resolution: where maps differ, for such a stack both are average-pooled
        to the smaller size along each axis (`vidfast.vid.match_spatial`); other regressors get them as they
        are.
    init_var: the variance at the start, above eps. eps: the variance's floor.
    reduction: "mean" (over all elements), "batchmean" (the paper's) or "sum".
    channel_dim: where the channels are: 1, or -1 for channels last.
    alpha_lr: alpha's learning rate as a multiple of the others'. alpha takes no weight decay.
    backend: as for `vidfast.gaussian_nll`.

    Raises ValueError for options out of range, and when built on features that do not match.
    """

    default_name: ClassVar[str] = "vid"

    def __init__(
        self,
        pairs: Mapping[str, str] | Sequence[tuple[str, str]],
        *,
        weight: float = 1.0,
        regressor: str | Regressor = "conv3",
        init_var: float = 5.0,
        eps: float = 1e-5,
        reduction: str = "mean",
        channel_dim: int = 1,
        alpha_lr: float = 1.0,
        backend: str = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__(weight=weight, name=name)
        self.pairs = tuple(pairs.items()) if isinstance(pairs, Mapping) else tuple((s, t) for s, t in pairs)
        if not self.pairs:
            raise ValueError("wanted at least one pair {student layer: teacher layer}, got none")
        if reduction not in ("mean", "batchmean", "sum"):
            raise ValueError(f"wanted reduction 'mean', 'batchmean' or 'sum', got {reduction!r}")
        if channel_dim not in (1, -1):
            raise ValueError(f"wanted channel_dim 1 or -1, got {channel_dim}")
        if not alpha_lr >= 0:
            raise ValueError(f"wanted alpha_lr of 0 or more, got {alpha_lr}")
        if not 0 < eps < init_var:
            raise ValueError(f"wanted 0 < eps < init_var, got eps={eps}, init_var={init_var}")
        self.student_layers = tuple(s for s, _ in self.pairs)
        self.teacher_layers = tuple(t for _, t in self.pairs)
        self.regressor = resolve(regressor, channel_dim)
        self.init_var, self.eps = float(init_var), float(eps)
        self.reduction, self.channel_dim, self.backend = reduction, channel_dim, backend
        self.alpha_lr = float(alpha_lr)
        self.pools = isinstance(self.regressor, PointwiseStack) and channel_dim == 1
        self.regressors = nn.ModuleList()
        self.likelihoods = nn.ModuleList()

    def build(self, batch: Batch) -> None:
        for student_layer, teacher_layer in self.pairs:
            try:
                student, teacher = self._features(batch, student_layer, teacher_layer)
                regressor = self.regressor(student.shape, teacher.shape)
            except ValueError as error:
                raise ValueError(f"pair {student_layer!r} -> {teacher_layer!r}: {error}") from None
            dtype = student.dtype if student.is_floating_point() else None
            self.regressors.append(regressor.to(student.device, dtype))
            nll = GaussianNLL(
                teacher.shape[self.channel_dim],
                channel_dim=self.channel_dim,
                init_var=self.init_var,
                eps=self.eps,
                reduction=self.reduction,
                backend=self.backend,
            )
            self.likelihoods.append(nll.to(student.device))

    def forward(self, batch: Batch, factor: float) -> Tensor:
        losses = []
        for (s, t), regressor, nll in zip(self.pairs, self.regressors, self._gaussians(), strict=True):
            student, target = self._features(batch, s, t)
            mean = regressor(student)
            if mean.shape != target.shape:
                raise ValueError(
                    f"pair {s!r} -> {t!r}: the regressor gives {tuple(mean.shape)}, the teacher "
                    f"{tuple(target.shape)}"
                )
            nll.weight = factor
            # Over the regressor's own last output, which nothing else reads: no N-sized allocation.
            nll.inplace = owns_its_output(regressor)
            losses.append(nll(mean, target))
        total: Tensor = sum(losses[1:], losses[0])
        return total

    def _features(self, batch: Batch, student_layer: str, teacher_layer: str) -> tuple[Tensor, Tensor]:
        student, teacher = batch.student.taps[student_layer], batch.from_teacher.taps[teacher_layer]
        return match_spatial(student, teacher) if self.pools else (student, teacher)

    def variances(self) -> dict[str, Tensor]:
        """The learned variance per channel, (C,), by "student layer -> teacher layer": large where the student
        explains little of the teacher."""
        names = [f"{s} -> {t}" for s, t in self.pairs]
        return {name: nll.variance.detach() for name, nll in zip(names, self._gaussians(), strict=True)}

    def parameter_groups(self) -> list[ParameterGroup]:
        alphas = [nll.alpha for nll in self._gaussians()]
        return [
            ParameterGroup(list(self.regressors.parameters()), name="regressor"),
            ParameterGroup(alphas, lr_factor=self.alpha_lr, decay=False, name="alpha"),
        ]

    def _gaussians(self) -> list[GaussianNLL]:
        return [nll for nll in self.likelihoods if isinstance(nll, GaussianNLL)]

    def extra_repr(self) -> str:
        pairs = ", ".join(f"{s} -> {t}" for s, t in self.pairs)
        return f"{pairs}; {super().extra_repr()}, init_var={self.init_var:g}, reduction={self.reduction}"
