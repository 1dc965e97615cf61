"""ITRD: information theoretic representation distillation (Miles, Lopez Rodriguez and Mikolajczyk, 2021,
arXiv 2112.00459).

For penultimate features: teacher t (B, D) and student s (B, S), embedded by one linear layer into z (B, D).

Correlation. With every dimension standardised over the batch (unbiased variance), and C_d the student's
correlation with the teacher in dimension d,

    C_d = 1/B sum_b z_bd t_bd,      L_corr = log2 sum_d |C_d - 1|^(2 a).

Mutual information, of Renyi's order 2. With rows normalised to length 1, Gram matrices G_s = x x^T and
G_t = t t^T (B, B), and G_st their elementwise product, each divided by its trace,

    L_mi = ||G_s||_F^2 - ||G_st||_F^2         (the logarithms dropped, as in the authors' code).

There x is s itself where S = D, else z, as in the authors' code; it could be s always, as Gram matrices of any
two widths compare.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from vidfast.reference import no_autocast

from ..layouts import ChannelDim
from ..tokens import Tokens
from ..weighting import Factor, times
from .base import METHODS
from .pairs import PairedMethod, Pairs, place, wide


def pooled(x: Tensor) -> Tensor:
    """(B, C) of (B, C, *spatial): the mean over positions."""
    if x.dim() < 2:
        raise ValueError(f"wanted features (batch, channels, ...), got {tuple(x.shape)}")
    return x if x.dim() == 2 else x.flatten(2).mean(2)


def correlation_loss(student: Tensor, teacher: Tensor, alpha: float, eps: float) -> Tensor:
    """L_corr of features (B, D) each.

    By the Cauchy-Schwarz inequality and the unbiased variance |C_d| is at most 1 - 1/B, so the logarithm's
    argument is at least D B^(-2 a) and never 0, even for student = teacher; eps > 0 in the variance makes a
    constant dimension 0 rather than NaN, and its C_d too.
    """

    def standardised(x: Tensor) -> Tensor:
        centred = x - x.mean(0)
        variance = centred.square().sum(0) / (x.shape[0] - 1)
        return centred * torch.rsqrt(variance + eps)

    c = (standardised(student) * standardised(teacher)).mean(0)
    return (c - 1).abs().pow(2 * alpha).sum().log2()


def mutual_information_loss(student: Tensor, teacher: Tensor, eps: float) -> Tensor:
    """L_mi of features (B, D_s) and (B, D_t). eps under the norms and on the traces keeps rows of 0 at 0."""

    def gram(x: Tensor) -> Tensor:
        rows = x * torch.rsqrt(x.square().sum(1, keepdim=True) + eps)
        return rows @ rows.T

    def normalised(g: Tensor) -> Tensor:
        return g / (g.diagonal().sum() + eps)

    g_s, g_t = gram(student), gram(teacher)
    return normalised(g_s).square().sum() - normalised(g_s * g_t).square().sum()


@METHODS.register("itrd")
class ITRD(PairedMethod):
    """l_corr L_corr + l_mi L_mi, summed over pairs of layers; one pair of penultimate layers as published.

    pairs: {student layer: teacher layer}. Maps are averaged over their positions first.
    l_corr, l_mi: the two terms' weights; a term of weight 0 is not computed.
    alpha: the exponent a of the correlation term, above 1/2 (below it the gradient grows without bound as the
        correlation nears 1).
    embed_information: whether L_mi sees the embedded student or its features as they are. None: embedded where the
        widths differ alone, as in the authors' code; True: always; False: never.
    bias: whether the embedding has one. It matters to L_mi alone, where that embeds.
    eps: added to variances, squared lengths and traces; ours, 1e-6.
    channel_dim, tokens: where the channels are, and what tokens become, as for every `PairedMethod`. Tokens are
        averaged as they are unless said otherwise, a class token among them.

    The defaults l_corr=2, l_mi=1, alpha=1.01 are the authors' published example; their code's own defaults
    (2, 0.05, 1.5) disagree with it.

    Raises ValueError for options out of range, features of other shapes and a batch of one, TypeError for an
    embed_information that is neither a bool nor None.
    """

    default_name: ClassVar[str] = "itrd"
    per_pair: ClassVar[tuple[str, ...]] = ("embeddings",)
    embeddings: nn.ModuleList

    def __init__(
        self,
        pairs: Pairs,
        *,
        l_corr: float = 2.0,
        l_mi: float = 1.0,
        alpha: float = 1.01,
        embed_information: bool | None = None,
        bias: bool = True,
        eps: float = 1e-6,
        channel_dim: ChannelDim = None,
        tokens: Tokens = None,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(pairs, channel_dim=channel_dim, tokens=tokens, pools=False, weight=weight, name=name)
        for option, value in (("l_corr", l_corr), ("l_mi", l_mi)):
            if not 0 <= value < math.inf:
                raise ValueError(f"wanted a finite {option} of 0 or more, got {value}")
        if l_corr == l_mi == 0:
            raise ValueError("wanted l_corr or l_mi above 0, got 0 for both")
        if not 0.5 < alpha < math.inf:
            raise ValueError(f"wanted a finite alpha above 0.5, got {alpha}")
        if not 0 < eps < math.inf:
            raise ValueError(f"wanted a finite eps above 0, got {eps}")
        if not isinstance(embed_information, (bool, type(None))):
            raise TypeError(f"wanted embed_information as True, False or None, got {embed_information!r}")
        self.l_corr, self.l_mi, self.alpha = float(l_corr), float(l_mi), float(alpha)
        self.embed_information = embed_information
        self.bias, self.eps = bool(bias), float(eps)

    def build_pair(self, student: Tensor, teacher: Tensor) -> None:
        student, teacher = pooled(student), pooled(teacher)
        if self.l_corr or self._embeds_information(student, teacher):
            linear = nn.Linear(student.shape[1], teacher.shape[1], bias=self.bias)
            self.embeddings.append(place(linear, student))
        else:  # parameters without a gradient would stop DistributedDataParallel
            self.embeddings.append(nn.Identity())

    def _embeds_information(self, student: Tensor, teacher: Tensor) -> bool:
        if self.embed_information is None:
            return student.shape[1] != teacher.shape[1]
        return self.embed_information

    def pair_loss(self, index: int, student: Tensor, teacher: Tensor, factor: Factor) -> Tensor:
        student, teacher = pooled(student), wide(pooled(teacher))
        if student.shape[0] < 2 or student.shape[0] != teacher.shape[0]:
            raise ValueError(
                "wanted a batch of 2 or more for statistics over it, the same on both sides, got "
                f"{student.shape[0]} and {teacher.shape[0]} (drop_last=True drops a last batch of one)"
            )
        z = wide(self.embeddings[index](student))
        terms = []
        with no_autocast(z):  # the Gram matrices are matrix products
            if self.l_corr:
                loss = correlation_loss(z, teacher, self.alpha, self.eps)
                terms.append(times(loss, factor * self.l_corr))
            if self.l_mi:
                x = z if self._embeds_information(student, teacher) else wide(student)
                terms.append(times(mutual_information_loss(x, teacher, self.eps), factor * self.l_mi))
        total: Tensor = sum(terms[1:], terms[0])
        return total

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, l_corr={self.l_corr:g}, l_mi={self.l_mi:g}, alpha={self.alpha:g}, "
            f"embed_information={self.embed_information}, bias={self.bias}, eps={self.eps:g}"
        )
