"""What VID and its variants share: a regressor and a likelihood for every pair of layers."""

from __future__ import annotations

from torch import Tensor, nn

from ..regressors import PointwiseStack, Regressor, make, resolve
from .base import Batch, ParameterGroup
from .pairs import PairedMethod, Pairs, place

REDUCTIONS = ("mean", "batchmean", "sum")


def check_reduction(reduction: str) -> str:
    """Raises ValueError for a name that is not known."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"wanted reduction 'mean', 'batchmean' or 'sum', got {reduction!r}")
    return reduction


def check_variational(reduction: str, init_var: float, eps: float, alpha_lr: float) -> None:
    """The options of every Gaussian likelihood. Raises ValueError saying what was wanted and what came."""
    check_reduction(reduction)
    if not 0 <= alpha_lr < float("inf"):
        raise ValueError(f"wanted a finite alpha_lr of 0 or more, got {alpha_lr}")
    if not 0 < eps < init_var < float("inf"):
        raise ValueError(f"wanted 0 < eps < init_var, finite, got eps={eps}, init_var={init_var}")


class VariationalMethod(PairedMethod):
    """The sum over pairs of -log q(t|s), with q's parameters from a regressor on s and from a likelihood.

    Implement `make_likelihood` and `pair_loss`. The options are described at `VID`.

    outputs: how many numbers per teacher channel and position the regressor gives.
    """

    outputs: int = 1

    def __init__(
        self,
        pairs: Pairs,
        *,
        regressor: str | Regressor = "conv3",
        init_var: float = 5.0,
        eps: float = 1e-5,
        reduction: str = "mean",
        channel_dim: int = 1,
        alpha_lr: float = 1.0,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        if channel_dim not in (1, -1):
            raise ValueError(f"wanted channel_dim 1 or -1, got {channel_dim}")
        check_variational(reduction, init_var, eps, alpha_lr)
        resolved = resolve(regressor, channel_dim)
        # A stack of 1x1 convolutions cannot change the resolution; another regressor is left to do it.
        pools = isinstance(resolved, PointwiseStack) and channel_dim == 1
        super().__init__(pairs, pools=pools, weight=weight, name=name)
        self.regressor = resolved
        self.init_var, self.eps, self.alpha_lr = float(init_var), float(eps), float(alpha_lr)
        self.reduction, self.channel_dim = reduction, channel_dim
        self.regressors = nn.ModuleList()
        self.likelihoods = nn.ModuleList()

    def make_likelihood(self, channels: int) -> nn.Module:
        """The parameters of q that the student does not predict, for a layer of `channels`."""
        raise NotImplementedError

    def prepare_regressor(self, regressor: nn.Module, channels: int) -> None:
        """Change what the regressor starts from, where the likelihood asks for it."""

    def build(self, batch: Batch) -> None:
        self.regressors, self.likelihoods = nn.ModuleList(), nn.ModuleList()
        try:
            super().build(batch)
        except Exception:
            self.regressors, self.likelihoods = nn.ModuleList(), nn.ModuleList()
            raise

    def build_pair(self, student: Tensor, teacher: Tensor) -> None:
        shape, channels = list(teacher.shape), teacher.shape[self.channel_dim]
        shape[self.channel_dim] = channels * self.outputs
        regressor = place(make(self.regressor, student.shape, shape), student)
        self.prepare_regressor(regressor, channels)
        self.regressors.append(regressor)
        self.likelihoods.append(self.make_likelihood(channels).to(student.device))

    def predict(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """The regressor's output for pair `index`. Raises ValueError unless it fits the teacher's feature."""
        output: Tensor = self.regressors[index](student)
        wanted = list(teacher.shape)
        wanted[self.channel_dim] *= self.outputs
        if list(output.shape) != wanted:
            several = f", wanted {tuple(wanted)}" if self.outputs > 1 else ""
            raise ValueError(
                f"the regressor gives {tuple(output.shape)}, the teacher {tuple(teacher.shape)}{several}"
            )
        return output

    def reduce(self, nll: Tensor, factor: float) -> Tensor:
        """`factor` times the sum or mean of -log q per element."""
        if self.reduction == "mean":
            return factor * nll.mean()
        return (factor if self.reduction == "sum" else factor / nll.shape[0]) * nll.sum()

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup(list(self.regressors.parameters()), name="regressor"),
            ParameterGroup(
                list(self.likelihoods.parameters()), lr_factor=self.alpha_lr, decay=False, name="alpha"
            ),
        ]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, init_var={self.init_var:g}, reduction={self.reduction}"
