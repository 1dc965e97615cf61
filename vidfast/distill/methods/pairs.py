"""What methods that compare pairs of layers share: naming the pairs, and bringing their features together.

Where channels are, and what tokens become, is said to a term once, and is dealt with here (`layouts.py`): a method's
`pair_loss` gets features of one form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vidfast.vid import match_spatial

from ..inputs import image_size, tensors_of
from ..layouts import ChannelDim, Layout, check_channel_dim, layout_of, said
from ..tokens import Tokens, resolve_tokens
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
    compares_positions: whether both features of a pair must have as many axes of positions. Set it in `__init__` where
        that depends on options.
    pairs: {student layer: teacher layer}, or a sequence of such pairs when a layer occurs twice.
    channel_dim: where the features' channels are: 1, or -1 for channels last, as a transformer's (B, L, D); or a pair
        (student's, teacher's). None: as the layers' classes tell (`kinds.py`), else 1, but features of three dimensions
        of which nothing is told are an error. For tokens on one side and a map on the other, one number is the
        tokens'.
    tokens: what tokens become: "grid" a map, without the class token and registers, to be compared with maps; or
        "sequence", or an adaptor with options of its own (`tokens.py`). None: they stay tokens.
    pools: average-pool both features of a pair to the smaller size along each axis
        (`vidfast.vid.match_spatial`) where they differ; False: hand them over as they are.
    takes_last: whether `pair_loss` takes two features with their channels last as they are; it finds in
        `dim(index)`, 1 or -1, where they are. False: it always gets (B, C, *positions).

    Raises ValueError for another channel_dim and, naming the pair, for features that do not fit; TypeError or
    UnknownNameError for other tokens.
    """

    per_pair: ClassVar[tuple[str, ...]] = ()
    compares_positions: bool = True

    def __init__(
        self,
        pairs: Pairs,
        *,
        channel_dim: ChannelDim = None,
        tokens: Tokens = None,
        pools: bool = True,
        takes_last: bool = False,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight=weight, name=name)
        self.pairs = parse_pairs(pairs)
        self.channel_dim = check_channel_dim(channel_dim)
        self.tokens = resolve_tokens(tokens)
        self.pools, self.takes_last = pools, takes_last
        self.compares_positions = pools
        self.student_layers = tuple(student for student, _ in self.pairs)
        self.teacher_layers = tuple(teacher for _, teacher in self.pairs)
        self._layouts: list[Layout] = []
        self._clear()

    def build_pair(self, student: Tensor, teacher: Tensor) -> None:
        """Check one pair's features, as `pair_loss` gets them, and make what parameters it needs. Called in order."""

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
            self._find_layouts(batch)
            for index, pair in enumerate(self.pairs):
                try:
                    self.build_pair(*self.features(batch, index))
                except ValueError as error:
                    raise _of_pair(pair, error) from None
        except BaseException:
            self._clear()
            raise

    def _clear(self) -> None:
        self._layouts = []
        for name in self.per_pair:
            setattr(self, name, nn.ModuleList())

    def forward(self, batch: Batch, factor: Any) -> Tensor:
        if not self._layouts:  # not built, as where there is nothing to learn
            self._find_layouts(batch)
        losses = []
        for index, pair in enumerate(self.pairs):
            try:
                if batch.mask is None:
                    student, teacher = self.features(batch, index)
                    loss = self.pair_loss(index, student, teacher, factor)
                else:
                    student, teacher, mask = self.masked(batch, batch.mask, index)
                    # only methods that take masks have this argument
                    loss = self.pair_loss(index, student, teacher, factor, mask=mask)  # type: ignore[call-arg]
                losses.append(loss)
            except ValueError as error:
                raise _of_pair(pair, error) from None
        total: Tensor = sum(losses[1:], losses[0])
        return total

    def dim(self, index: int) -> int:
        """The channels' dimension, 1 or -1, of what `pair_loss` gets for pair number `index`."""
        if index < len(self._layouts):
            return self._layouts[index].dim
        return self.channel_dim if isinstance(self.channel_dim, int) else 1

    def features(self, batch: Batch, index: int) -> tuple[Tensor, Tensor]:
        """The features of pair number `index` in one form, pooled to one size where `pools`; the teacher's detached."""
        student, teacher = self._layouts[index].brought(
            *self._tapped(batch, self.pairs[index]), self._image(batch)
        )
        if self.pools and not self._layouts[index].last:
            return match_spatial(student, teacher)
        return student, teacher

    def masked(self, batch: Batch, mask: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """`features`, and the mask at the teacher's positions."""
        layout, tapped = self._layouts[index], self._tapped(batch, self.pairs[index])
        image = self._image(batch)
        mask = layout.brought_mask(mask, *tapped, image)
        student, teacher = layout.brought(*tapped, image)
        if self.pools and not layout.last:
            return fitted_pair(student, teacher, mask)
        return fed(student, teacher, mask, layout.dim), teacher, fitted(mask, teacher, layout.dim)

    def _find_layouts(self, batch: Batch) -> None:
        found, samples, image = [], _samples(batch), self._image(batch)
        for pair in self.pairs:
            try:
                layout = layout_of(
                    self._tapped(batch, pair),
                    pair,
                    (batch.student.kinds, batch.from_teacher.kinds),
                    self.channel_dim,
                    self.tokens,
                    takes_last=self.takes_last,
                    compares_positions=self.compares_positions,
                    batch=samples,
                    image=image,
                )
            except ValueError as error:
                raise _of_pair(pair, error) from None
            found.append(layout)
        self._layouts = found

    def _image(self, batch: Batch) -> tuple[int, ...] | None:
        """The (height, width) of inputs that are images, where tokens may become a grid of their shape."""
        return None if self.tokens is None else image_size(batch.inputs)

    @staticmethod
    def _tapped(batch: Batch, pair: tuple[str, str]) -> tuple[Tensor, Tensor]:
        """A pair's features as their layers gave them, the teacher's detached."""
        student, teacher = pair
        return batch.student.taps[student], batch.from_teacher.taps[teacher].detach()

    def pair_names(self) -> list[str]:
        """ "student layer -> teacher layer" for each pair."""
        return [f"{student} -> {teacher}" for student, teacher in self.pairs]

    def extra_repr(self) -> str:
        given = said(self.channel_dim, self.tokens)
        return f"{', '.join(self.pair_names())}; {super().extra_repr()}{given}"


def _samples(batch: Batch) -> int | None:
    """How many samples there are: as many inputs as logits; None where that is not so."""
    count = next((len(x) for x in tensors_of(batch.inputs) if x.dim()), None)
    return count if batch.student.logits.dim() and count == len(batch.student.logits) else None


def _of_pair(pair: tuple[str, str], error: ValueError) -> ValueError:
    return ValueError(f"pair {pair[0]!r} -> {pair[1]!r}: {error}")


def wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it is: fp16's squares overflow at 256, and bf16 keeps 8 bits of a sum."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def place(module: nn.Module, like: Tensor) -> nn.Module:
    """`module` on the device of a feature and in its dtype; in fp32 where autocast alone made that dtype."""
    dtype = wide(like).dtype if torch.is_autocast_enabled(like.device.type) else like.dtype
    return module.to(like.device, dtype)
