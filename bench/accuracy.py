"""The error of a provider's numbers against fp64 on the same inputs, so that nobody wins by being wrong."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from bench.cases import Case

# Elements of fp64 held at once: the oracle of a 51-million-element case would otherwise need gigabytes.
# Temporaries of 8 MiB are also reused by malloc, where those of 32 MiB and more are fresh pages each time.
CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Errors:
    """Each against the size of what was summed: the loss and d/d alpha cross zero, so their own size means nothing.

    loss: |error| over the sum of the magnitudes of its terms. grad_alpha: the largest such ratio of any channel.
    grad_mean: the largest |error| over the largest |gradient|. None where the provider does not compute it.
    """

    loss: float
    grad_mean: float | None
    grad_alpha: float | None

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


class Oracle:
    """Equation 5 and its gradients in fp64, a slice of the batch at a time, for reduction="mean".

    mask: A weight for each position, in the shape of mean without its channels; None: 1 each.
    """

    def __init__(
        self,
        case: Case,
        mean: torch.Tensor,
        target: torch.Tensor,
        alpha: torch.Tensor,
        eps: float,
        mask: torch.Tensor | None = None,
    ) -> None:
        self.case, self.mean, self.target = case, mean.detach(), target.detach()
        self.weights = None if mask is None else mask.unsqueeze(case.channel_dim)
        self.alpha = alpha.detach().double()
        zero = torch.zeros((), dtype=torch.float64, device=alpha.device)
        self.variance = torch.logaddexp(self.alpha, zero) + eps
        dims = [dim for dim in range(mean.dim()) if dim != case.channel_dim % mean.dim()]
        self.sum_sq = torch.zeros_like(self.alpha)
        for part in self.parts():
            r = self.residual(part)
            self.sum_sq += self.weighted(r * r, part).sum(dims)
        count = case.elements // case.channels if mask is None else float(mask.double().sum())
        self.terms = count * case.channels
        logs, squares = count / 2 * self.variance.log(), self.sum_sq / (2 * self.variance)
        self.loss = (logs + squares).sum() / self.terms
        self.loss_scale = (logs.abs() + squares).sum() / self.terms
        slope = torch.sigmoid(self.alpha) / self.terms
        upper, lower = count / (2 * self.variance), self.sum_sq / (2 * self.variance.square())
        self.grad_alpha, self.grad_alpha_scale = (upper - lower) * slope, (upper + lower) * slope

    def parts(self) -> list[slice]:
        step = max(CHUNK_ELEMENTS // max(self.case.elements // self.case.shape[0], 1), 1)
        return [slice(start, start + step) for start in range(0, self.case.shape[0], step)]

    def residual(self, part: slice) -> torch.Tensor:
        return self.mean[part].double() - self.target[part].double()

    def weighted(self, values: torch.Tensor, part: slice) -> torch.Tensor:
        """The values times their positions' weights."""
        return values if self.weights is None else values * self.weights[part].double()

    def errors(
        self,
        loss: torch.Tensor,
        grads: tuple[torch.Tensor, torch.Tensor] | None = None,
        incoming: float = 1.0,
    ) -> Errors:
        """Compare a loss, and (d/d mean, d/d alpha) where there are any, with what they should be."""
        loss_error = float((loss.detach().double() - self.loss).abs() / self.loss_scale)
        if grads is None:
            return Errors(loss_error, None, None)
        grad_mean, grad_alpha = grads
        scale = (incoming / self.terms) / self.case.per_channel(self.variance)
        # torch's maximum, unlike Python's, lets no NaN pass
        worst = largest = torch.zeros((), dtype=torch.float64, device=grad_mean.device)
        for part in self.parts():
            exact = self.weighted(self.residual(part), part) * scale
            worst = torch.maximum(worst, (grad_mean[part].double() - exact).abs().max())
            largest = torch.maximum(largest, exact.abs().max())
        alpha_error = (grad_alpha.double() - incoming * self.grad_alpha).abs() / (
            abs(incoming) * self.grad_alpha_scale
        )
        return Errors(loss_error, float(worst / largest), float(alpha_error.max()))
