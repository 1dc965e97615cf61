"""What VID, its variants and its relatives share: the loss -log q(t|s), and what is learned for it.

    VariationalMethod   any q: its options, and its parameters' groups
    GaussianMethod      a Gaussian q with one variance for each channel, through the fused kernel
    VariationalPairs    t and s are pairs of layers

A method takes those that fit it: VID is a GaussianMethod over VariationalPairs.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vidfast.arguments import BackendName, ScalarReduction
from vidfast.backends import check_name
from vidfast.nll import GaussianNLL
from vidfast.regressor import regress, regressed_nll

from ..layouts import ChannelDim
from ..regressors import Regressor, keeps_resolution, laid_out, make, resolve, takes_last
from ..tokens import Tokens
from ..weighting import Factor, times, weighted
from .base import Method, ParameterGroup
from .pairs import PairedMethod, Pairs, place

REDUCTIONS = ("mean", "batchmean", "sum")


def check_reduction(reduction: ScalarReduction) -> ScalarReduction:
    """Raises ValueError for a name that is not known."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"wanted reduction 'mean', 'batchmean' or 'sum', got {reduction!r}")
    return reduction


class VariationalMethod(Method):
    """A method whose loss is -log q(t|s), of mean functions mu(s) and of what q learns besides.

    A subclass keeps the mean functions in `regressor` or `regressors`, and the modules that hold alpha and the like
    in `likelihood` or `likelihoods`: those take no weight decay, and `alpha_lr` times the learning rate.

    init_var: the variance at the start, above eps. eps: the variance's floor.
    reduction: "mean" (over all elements), "batchmean" (the paper's) or "sum".
    alpha_lr: alpha's learning rate as a multiple of the others'.
    method: what the class after this one takes: weight, name.

    Raises ValueError for options out of range.
    """

    def __init__(
        self,
        *,
        init_var: float = 5.0,
        eps: float = 1e-5,
        reduction: ScalarReduction = "mean",
        alpha_lr: float = 1.0,
        **method: Any,
    ) -> None:
        check_reduction(reduction)
        if not 0 <= alpha_lr < float("inf"):
            raise ValueError(f"wanted a finite alpha_lr of 0 or more, got {alpha_lr}")
        if not 0 < eps < init_var < float("inf"):
            raise ValueError(f"wanted 0 < eps < init_var, finite, got eps={eps}, init_var={init_var}")
        super().__init__(**method)
        self.init_var, self.eps, self.alpha_lr = float(init_var), float(eps), float(alpha_lr)
        self.reduction = reduction

    def make_likelihood(self, channels: int, channel_dim: int = 1) -> nn.Module:
        """The parameters of q that the student does not predict, for a target of `channels` in this dimension."""
        raise NotImplementedError

    def parameter_groups(self) -> list[ParameterGroup]:
        """ "regressor", and "alpha": all that is in a likelihood."""
        regressors: list[nn.Parameter] = []
        likelihoods: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            (likelihoods if name.startswith("likelihood") else regressors).append(parameter)
        return [
            ParameterGroup(regressors, name="regressor"),
            ParameterGroup(likelihoods, lr_factor=self.alpha_lr, decay=False, name="alpha"),
        ]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, init_var={self.init_var:g}, reduction={self.reduction}"


class GaussianMethod(VariationalMethod):
    """q(t|s) is Gaussian with one learned variance for each channel: equation 5, through the fused kernel.

    backend: as for `vidfast.gaussian_nll`. options: VariationalMethod's, and those of the class after it.

    Raises ValueError for a backend that is not known.
    """

    def __init__(self, *, backend: BackendName = "auto", **options: Any) -> None:
        super().__init__(**options)
        check_name(backend)
        self.backend = backend

    def make_likelihood(self, channels: int, channel_dim: int = 1) -> GaussianNLL:
        return GaussianNLL(
            channels,
            channel_dim=channel_dim,
            init_var=self.init_var,
            eps=self.eps,
            reduction=self.reduction,
            backend=self.backend,
        )

    def gaussian_nll(
        self,
        regressor: nn.Module,
        likelihood: nn.Module,
        student: Tensor,
        target: Tensor,
        factor: Factor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """`factor` times -log q(target|student), a scalar in fp32, or in fp64 if the mean or the target is.

        mask: a weight for each of the target's positions, as in `vidfast.gaussian_nll`.

        Raises ValueError when the regressor's output is not of the target's shape.
        """
        assert isinstance(likelihood, GaussianNLL)
        return regressed_nll(
            regressor,
            student,
            target,
            None,
            channel_dim=likelihood.channel_dim,
            weight=factor.to(target.device) if isinstance(factor, Tensor) else factor,
            likelihood=likelihood,
            mask=mask,
        )


class VariationalPairs(VariationalMethod, PairedMethod):
    """The sum over pairs of layers of -log q(t|s), with q's parameters from a regressor on s and from a likelihood.

    Implement `make_likelihood` and `pair_loss`. The options are described at `VID`.

    outputs: how many numbers per teacher channel and position the regressor gives.
    """

    per_pair: ClassVar[tuple[str, ...]] = ("regressors", "likelihoods")
    regressors: nn.ModuleList
    likelihoods: nn.ModuleList
    outputs: int = 1

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
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        resolved = resolve(regressor)
        super().__init__(
            init_var=init_var,
            eps=eps,
            reduction=reduction,
            alpha_lr=alpha_lr,
            pairs=pairs,
            channel_dim=channel_dim,
            tokens=tokens,
            pools=keeps_resolution(resolved),
            takes_last=takes_last(resolved),
            weight=weight,
            name=name,
        )
        self.regressor = resolved

    def prepare_regressor(self, regressor: nn.Module, channels: int) -> None:
        """Change what the regressor starts from, where the likelihood asks for it."""

    def build_pair(self, student: Tensor, teacher: Tensor) -> None:
        dim = self.dim(len(self.regressors))
        wanted = laid_out(self.regressor, dim)
        regressor = place(make(wanted, student.shape, self._wanted(teacher, dim)), student)
        channels = teacher.shape[dim]
        self.prepare_regressor(regressor, channels)
        self.regressors.append(regressor)
        self.likelihoods.append(self.make_likelihood(channels, dim).to(student.device))

    def predict(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """The regressor's output for pair `index`. Raises ValueError unless it fits the teacher's feature."""
        return regress(self.regressors[index], student, self._wanted(teacher, self.dim(index)))

    def reduce(self, nll: Tensor, factor: Factor, mask: Tensor | None = None) -> Tensor:
        """`factor` times the sum or mean of -log q per element, by the weights of a mask if there is one."""
        if mask is not None:
            return times(weighted(nll, mask, self.reduction), factor)
        if self.reduction == "mean":
            return times(nll.mean(), factor)
        return times(nll.sum(), factor if self.reduction == "sum" else factor / nll.shape[0])

    def _wanted(self, teacher: Tensor, dim: int) -> list[int]:
        """The shape that the regressor has to give, for channels in this dimension."""
        shape = list(teacher.shape)
        shape[dim] *= self.outputs
        return shape
