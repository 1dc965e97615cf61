"""MIMKD: mutual information maximisation knowledge distillation (Shrivastava, Qi and Ordonez, arXiv 2110.15946).

Maximises the Jensen-Shannon lower bound on the mutual information of teacher and student at three levels. With
a learned critic T(t, s), pairs (t, s) of the same image and pairs (t', s) of different images,

    bound = - mean softplus(-T(t, s)) - mean softplus(T(t', s)),        loss = - sum over levels w * bound.

    global   t and s are the last pair's features, averaged over their positions
    local    t is the teacher's averaged vector, s each position of the student's map; of the last pair
    feature  t and s are the positions of two maps of the same size; every pair

The bound and the levels are the paper's. The rest could not be verified against it and is ours: the critics,
the weights of the levels, the negatives (the batch rolled by one, so one negative for each positive), and
which layers enter at which level.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vidfast.vid import match_spatial

from ..choices import Critic
from ..layouts import ChannelDim
from ..tokens import Tokens
from ..weighting import Factor, times
from .base import METHODS
from .itrd import pooled
from .pairs import PairedMethod, Pairs, place, wide

CRITICS = ("separable", "concat")
LEVELS = ("global", "local", "feature")


def positions(x: Tensor) -> Tensor:
    """(B, P, C) of (B, C, *spatial): a vector for every position; P = 1 for vectors."""
    return x.flatten(2).mT if x.dim() > 2 else x[:, None]


def _mlp(fan_in: int, hidden: int, fan_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(fan_in, hidden), nn.ReLU(), nn.Linear(hidden, fan_out))


class SeparableCritic(nn.Module):
    """T(t, s) = phi(t) . psi(s) / sqrt(E) with two-layer perceptrons phi and psi into E dimensions."""

    def __init__(self, teacher_channels: int, student_channels: int, hidden: int) -> None:
        super().__init__()
        self.phi = _mlp(teacher_channels, hidden, hidden)
        self.psi = _mlp(student_channels, hidden, hidden)
        self.scale = 1 / math.sqrt(hidden)

    def forward(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """T of the matched and of the mismatched pairs, (B, P) each; teacher may have one position."""
        phi, psi = wide(self.phi(teacher)), wide(self.psi(student))
        return (phi * psi).sum(2) * self.scale, (phi.roll(1, 0) * psi).sum(2) * self.scale


class ConcatCritic(nn.Module):
    """T(t, s) = f([t, s]) with one two-layer perceptron f, as its first layer's two halves (nothing is joined)."""

    def __init__(self, teacher_channels: int, student_channels: int, hidden: int) -> None:
        super().__init__()
        self.teacher = nn.Linear(teacher_channels, hidden, bias=False)
        self.student = nn.Linear(student_channels, hidden)
        self.head = nn.Linear(hidden, 1)

    def forward(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """T of the matched and of the mismatched pairs, (B, P) each; teacher may have one position."""
        t, s = self.teacher(teacher), self.student(student)
        matched, mismatched = self.head(F.relu(t + s)), self.head(F.relu(t.roll(1, 0) + s))
        return wide(matched).squeeze(2), wide(mismatched).squeeze(2)


def negative_bound(matched: Tensor, mismatched: Tensor) -> Tensor:
    """The bound's negative, from the critic's values, fp32 or fp64: 2 log 2 for a critic that says nothing."""
    # logaddexp(x, 0) is softplus without F.softplus's cut-off at 20
    zero = matched.new_zeros(())
    return torch.logaddexp(-matched, zero).mean() + torch.logaddexp(mismatched, zero).mean()


@METHODS.register("mimkd")
class MIMKD(PairedMethod):
    """The negative Jensen-Shannon bounds on mutual information, weighted over three levels.

    pairs: {student layer: teacher layer} in order of depth. The last pair is also what the global and local
        levels look at. Where two maps differ in size, the feature level has both average-pooled to the smaller
        along each axis (`vidfast.vid.match_spatial`); the local level sees the student's map as it is.
    global_weight, local_weight, feature_weight: the levels' weights; 0 leaves a level out. All 1 is ours.
    critic: "separable", a scaled dot product of two embeddings, or "concat", a perceptron on both. Ours.
    hidden: the critics' width. Ours.
    channel_dim, tokens: where the channels are, and what tokens become, as for every `PairedMethod`.

    The critics are learned along with the student and take no part afterwards; every level and pair has its
    own. Vectors (B, C) count as maps of one position.

    Raises ValueError for options out of range, features that do not match, and a batch of one, which has no
    negatives.
    """

    default_name: ClassVar[str] = "mimkd"
    per_pair: ClassVar[tuple[str, ...]] = ("critics",)
    critics: nn.ModuleList

    def __init__(
        self,
        pairs: Pairs,
        *,
        global_weight: float = 1.0,
        local_weight: float = 1.0,
        feature_weight: float = 1.0,
        critic: Critic = "separable",
        hidden: int = 256,
        channel_dim: ChannelDim = None,
        tokens: Tokens = None,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(pairs, channel_dim=channel_dim, tokens=tokens, pools=False, weight=weight, name=name)
        self.compares_positions = bool(feature_weight)
        self.level_weights = dict(
            zip(LEVELS, (float(global_weight), float(local_weight), float(feature_weight)), strict=True)
        )
        for level, value in self.level_weights.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"wanted a finite {level}_weight of 0 or more, got {value}")
        if not any(self.level_weights.values()):
            raise ValueError("wanted at least one of the levels' weights above 0, got 0 for all")
        if len(self.pairs) > 1 and not feature_weight:
            raise ValueError(
                f"wanted one pair where feature_weight is 0, as only the last is looked at, got {self.pairs}"
            )
        if critic not in CRITICS:
            raise ValueError(f"wanted critic 'separable' or 'concat', got {critic!r}")
        if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
            raise ValueError(f"wanted an int of 1 or more as hidden, got {hidden!r}")
        self.critic, self.hidden = critic, hidden

    def build_pair(self, student: Tensor, teacher: Tensor) -> None:
        kind = SeparableCritic if self.critic == "separable" else ConcatCritic
        views = self.views(len(self.critics), student, teacher)
        # "global" is no attribute name, but a ModuleDict's key it may be
        critics = {level: kind(t.shape[2], s.shape[2], self.hidden) for level, (t, s) in views.items()}
        self.critics.append(place(nn.ModuleDict(critics), student))

    def pair_loss(self, index: int, student: Tensor, teacher: Tensor, factor: Factor) -> Tensor:
        if student.shape[0] < 2 or student.shape[0] != teacher.shape[0]:
            raise ValueError(
                "wanted a batch of 2 or more, the same on both sides, as the negatives are other images, got "
                f"{student.shape[0]} and {teacher.shape[0]} (drop_last=True drops a last batch of one)"
            )
        critics = self.critics[index]
        assert isinstance(critics, nn.ModuleDict)
        total = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
        for level, (t, s) in self.views(index, student, teacher).items():
            # The critics are of the student's type; a teacher may run in another.
            matched, mismatched = critics[level](t.to(s.dtype), s)
            total = total + times(negative_bound(matched, mismatched), factor * self.level_weights[level])
        return total

    def views(self, index: int, student: Tensor, teacher: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """(teacher, student), (B, P, C) each, for every level at which pair number `index` takes part."""
        found = {}
        if index == len(self.pairs) - 1:
            vector = pooled(teacher)[:, None]
            if self.level_weights["global"]:
                found["global"] = (vector, pooled(student)[:, None])
            if self.level_weights["local"]:
                found["local"] = (vector, positions(student))
        if self.level_weights["feature"]:
            s, t = match_spatial(student, teacher)
            found["feature"] = (positions(t), positions(s))
        return found

    def extra_repr(self) -> str:
        weights = ", ".join(f"{level}_weight={value:g}" for level, value in self.level_weights.items())
        return f"{super().extra_repr()}, {weights}, critic={self.critic}, hidden={self.hidden}"
