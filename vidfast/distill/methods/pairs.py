"""What methods that compare pairs of layers share: naming the pairs, and bringing their features together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vidfast.vid import match_spatial

from ..weighting import fed, fitted, fitted_pair
from .base import Batch, Method

Pairs = Mapping[str, str] | Sequence[tuple[str, str]]


def parse_pairs(pairs: Pairs) -> tuple[tuple[str, str], ...]:
    """(student layer, teacher layer) for each pair. Raises ValueError for none, TypeError for anything else."""
    if not isinstance(pairs, Iterable):
        raise TypeError(f"wanted {{student layer: teacher layer}} or a sequence of such pairs, got {pairs!r}")
    listed = tuple(pairs.items() if isinstance(pairs, Mapping) else pairs)
    if not listed:
        raise ValueError("wanted at least one pair {student layer: teacher layer}, got none")
    for pair in listed:
        if not isinstance(pair, (tuple, list)) or [type(layer) for layer in pair] != [str, str]:
            raise TypeError(
                f"wanted {{student layer: teacher layer}} or a sequence of such pairs, got {pairs!r}"
            )
    return tuple((student, teacher) for student, teacher in listed)


class PairedMethod(Method):
    """A method that is a sum over pairs of layers, one of the student and one of the teacher.

    Implement `pair_loss`, and `build_pair` where there are parameters to make.

    per_pair: the names of the attributes that hold them, an nn.ModuleList each, to which `build_pair` appends one
        module. They are there, empty, from the start, and empty again after a `build` that failed.
    pairs: {student layer: teacher layer}, or a sequence of such pairs when a layer occurs twice.
    pools: average-pool both features of a pair to the smaller size along each axis
        (`vidfast.vid.match_spatial`) where they differ; False: hand them over as they are.
    channel_dim: where the features' channels are, for masks: 1, or -1 for channels last.

    Raises ValueError, naming the pair, for features that do not fit.
    """

    per_pair: ClassVar[tuple[str, ...]] = ()
    channel_dim: int = 1

    def __init__(
        self, pairs: Pairs, *, pools: bool = True, weight: float = 1.0, name: str | None = None
    ) -> None:
        super().__init__(weight=weight, name=name)
        self.pairs = parse_pairs(pairs)
        self.pools = pools
        self.student_layers = tuple(student for student, _ in self.pairs)
        self.teacher_layers = tuple(teacher for _, teacher in self.pairs)
        self._clear()

    def build_pair(self, student: Tensor, teacher: Tensor) -> None:
        """Check one pair's features, (B, C, *spatial) each, and make what parameters it needs. Called in order."""

    # Any: as in Method.forward.
    def pair_loss(self, index: int, student: Tensor, teacher: Tensor, factor: Any) -> Tensor:
        """`factor` times the loss of pair number `index`, a scalar; `teacher` is detached.

        A class with `takes_mask` also takes mask=, of the teacher's number of dimensions with 1 in the place of the
        channels, sizes of 1 or the teacher's, and is given it where the batch has one.
        """
        raise NotImplementedError

    def build(self, batch: Batch) -> None:
        self._clear()
        try:
            for student_layer, teacher_layer in self.pairs:
                try:
                    self.build_pair(*self.features(batch, student_layer, teacher_layer))
                except ValueError as error:
                    raise ValueError(f"pair {student_layer!r} -> {teacher_layer!r}: {error}") from None
        except BaseException:
            self._clear()
            raise

    def _clear(self) -> None:
        for name in self.per_pair:
            setattr(self, name, nn.ModuleList())

    def forward(self, batch: Batch, factor: Any) -> Tensor:
        losses = []
        for index, (student_layer, teacher_layer) in enumerate(self.pairs):
            try:
                if batch.mask is None:
                    student, teacher = self.features(batch, student_layer, teacher_layer)
                    loss = self.pair_loss(index, student, teacher, factor)
                else:
                    student, teacher, mask = self.masked(batch, batch.mask, student_layer, teacher_layer)
                    # only methods that take masks have this argument
                    loss = self.pair_loss(index, student, teacher, factor, mask=mask)  # type: ignore[call-arg]
                losses.append(loss)
            except ValueError as error:
                raise ValueError(f"pair {student_layer!r} -> {teacher_layer!r}: {error}") from None
        total: Tensor = sum(losses[1:], losses[0])
        return total

    def features(self, batch: Batch, student_layer: str, teacher_layer: str) -> tuple[Tensor, Tensor]:
        """A pair's features after the spatial rule, the teacher's detached."""
        student = batch.student.taps[student_layer]
        teacher = batch.from_teacher.taps[teacher_layer].detach()
        return match_spatial(student, teacher) if self.pools else (student, teacher)

    def masked(
        self, batch: Batch, mask: Tensor, student_layer: str, teacher_layer: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`features`, and the mask at the teacher's positions."""
        student = batch.student.taps[student_layer]
        teacher = batch.from_teacher.taps[teacher_layer].detach()
        if self.pools:
            return fitted_pair(student, teacher, mask)
        return fed(student, teacher, mask, self.channel_dim), teacher, fitted(mask, teacher, self.channel_dim)

    def pair_names(self) -> list[str]:
        """ "student layer -> teacher layer" for each pair."""
        return [f"{student} -> {teacher}" for student, teacher in self.pairs]

    def extra_repr(self) -> str:
        return f"{', '.join(self.pair_names())}; {super().extra_repr()}"


def wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it is: fp16's squares overflow at 256, and bf16 keeps 8 bits of a sum."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def place(module: nn.Module, like: Tensor) -> nn.Module:
    """`module` on the device of a feature and in its dtype; in fp32 where autocast alone made that dtype."""
    dtype = wide(like).dtype if torch.is_autocast_enabled(like.device.type) else like.dtype
    return module.to(like.device, dtype)
