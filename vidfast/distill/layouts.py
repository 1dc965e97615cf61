"""Where the channels of a pair's features are, and how both are brought to one form.

A feature comes as its layer gives it: a vector (B, C), a map (B, C, *spatial) or (B, *spatial, C), tokens (B, L, D) or
(B, D, L), tokens with their batch second. A method sees one of two forms: (B, C, *positions) on both sides, or, where
it can take that and both sides have it, channels last on both. All are views, and methods do not look at layouts.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .kinds import UNKNOWN, Kind
from .tokens import Adaptor, spread
from .weighting import tokens_of

Shape = tuple[int, ...] | None
# Of both sides, or (student's, teacher's); None: as the layer's class tells, else 1, which three dimensions are not.
ChannelDim = int | None | tuple[int | None, int | None]


def check_channel_dim(channel_dim: object) -> ChannelDim:
    """Raises ValueError for what is neither 1, -1, None nor a pair of these."""
    if channel_dim is None or _is_dim(channel_dim):
        return channel_dim  # type: ignore[return-value]
    if isinstance(channel_dim, (tuple, list)) and len(channel_dim) == 2:
        student, teacher = channel_dim
        if all(dim is None or _is_dim(dim) for dim in (student, teacher)):
            return student, teacher
    raise ValueError(
        f"wanted channel_dim 1 or -1, None, or a pair of these for (student, teacher), got {channel_dim!r}"
    )


def said(channel_dim: ChannelDim, tokens: Adaptor | None) -> str:
    """What of these two was given, for a term's repr."""
    given = "" if channel_dim is None else f", channel_dim={channel_dim}"
    return given if tokens is None else f"{given}, tokens={tokens}"


def _is_dim(dim: object) -> bool:
    return isinstance(dim, int) and not isinstance(dim, bool) and dim in (1, -1)


@dataclass
class Side:
    """How one side's feature becomes (B, C, *positions).

    dim: the channels' dimension, 1 or -1. batch_dim: that of the samples. tokens: what gives tokens their positions,
        None for features that are no tokens or stay as they are.

    Where a method takes `shape`, it is that of which a grid of tokens is: the other side's map's, or the images'.
    """

    dim: int
    batch_dim: int = 0
    kind: Kind = UNKNOWN
    tokens: Adaptor | None = None
    _found: dict[tuple[int, Shape], tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    def batch_first(self, x: Tensor) -> Tensor:
        return x if self.batch_dim == 0 else x.transpose(0, self.batch_dim)

    def channels_first(self, x: Tensor, shape: Shape = None) -> Tensor:
        """The feature as (B, C, *positions), a view."""
        x = self.batch_first(x)
        x = x if self.dim == 1 else x.movedim(-1, 1)
        return x if self.tokens is None else spread(x, *self.places(x.shape[2], shape))

    def places(self, length: int, shape: Shape) -> tuple[int, tuple[int, ...]]:
        """How many of the tokens are left out, and the sizes of the rest."""
        assert self.tokens is not None
        # index: plain numbers, where torch.compile traces with sizes that may change
        of = (operator.index(length), None if shape is None else tuple(map(operator.index, shape)))
        if of not in self._found:
            self._found[of] = self.tokens.find(of[0], self.kind, of[1])
        return self._found[of]

    def length(self, x: Tensor) -> int | None:
        """How many tokens a feature has that is given positions; None for any other."""
        # of three axes the one that is neither the batch's nor the channels'
        return None if self.tokens is None else self.batch_first(x).shape[3 - self.dim % 3]

    def sizes(self, x: Tensor, shape: Shape = None) -> tuple[int, ...]:
        """The sizes of the feature's positions, as `channels_first` gives them."""
        length = self.length(x)
        if length is not None:
            return self.places(length, shape)[1]
        x = self.batch_first(x)
        return tuple(x.shape[2:] if self.dim == 1 else x.shape[1:-1])


@dataclass
class Layout:
    """Both sides of a pair.

    last: whether the method gets both with their channels last. as_many: whether both are tokens, one for one.
    """

    student: Side
    teacher: Side
    last: bool = False
    as_many: bool = False

    @property
    def dim(self) -> int:
        """The channels' dimension of what the method gets."""
        return -1 if self.last else 1

    def shapes(self, student: Tensor, teacher: Tensor, image: Shape) -> tuple[Shape, Shape]:
        """Of what shape a grid of the student's and the teacher's tokens is: the other side's map's or the images'."""
        if self.student.tokens is None and self.teacher.tokens is None:
            return None, None
        if self.student.tokens is None and student.dim() == 4:
            return image, self.student.sizes(student)
        if self.teacher.tokens is None and teacher.dim() == 4:
            return self.teacher.sizes(teacher), image
        return image, image

    def brought(self, student: Tensor, teacher: Tensor, image: Shape = None) -> tuple[Tensor, Tensor]:
        """Both features in the form that the method gets, of a batch with images of this (height, width).

        Raises ValueError where their numbers of tokens differ, or are no grid's.
        """
        if self.as_many and self.student.sizes(student) != self.teacher.sizes(teacher):
            raise ValueError(_not_as_many(student, teacher))
        if self.last:
            return self.student.batch_first(student), self.teacher.batch_first(teacher)
        ours, theirs = self.shapes(student, teacher, image)
        return self.student.channels_first(student, ours), self.teacher.channels_first(teacher, theirs)

    def brought_mask(self, mask: Tensor, student: Tensor, teacher: Tensor, image: Shape = None) -> Tensor:
        """A mask of positions as `vidfast.distill.weighting` reads it for what `brought` gives.

        Weights of tokens become weights of a grid where the tokens do; weights with 1 in the place of channels that are
        last get it where the channels are brought.
        """
        shapes = self.shapes(student, teacher, image)
        for side, x, shape in ((self.teacher, teacher, shapes[1]), (self.student, student, shapes[0])):
            length = side.length(x)
            if length is not None:
                weights = tokens_of(mask, length)
                if weights is not None:
                    return spread(weights[:, None], *side.places(length, shape))
        ends_in_one = mask.dim() == teacher.dim() > 2 and mask.shape[-1] == 1 and self.teacher.dim == -1
        return mask.movedim(-1, 1) if ends_in_one and not self.last and mask.shape[1] != 1 else mask


def layout_of(
    features: tuple[Tensor, Tensor],
    layers: tuple[str, str],
    kinds: tuple[Mapping[str, Kind], Mapping[str, Kind]],
    channel_dim: ChannelDim,
    tokens: Adaptor | None,
    *,
    takes_last: bool,
    compares_positions: bool,
    batch: int | None = None,
    image: Shape = None,
) -> Layout:
    """How a pair's features are brought to one form, from those of one batch.

    features, layers: the student's and the teacher's, as the layers gave them.
    kinds: what the layers' classes tell, by layer, of the student's and of the teacher's.
    takes_last: whether the method takes both with their channels last.
    compares_positions: whether it wants as many axes of positions on both sides.
    batch: how many samples there are, where that is known. image: the (height, width) of inputs that are images.

    Raises ValueError for three dimensions of which nothing is said or told, and for features that cannot be compared.
    """
    student, teacher = features
    given = channel_dim if isinstance(channel_dim, tuple) else _of_each(channel_dim, features)
    sides = [
        side_of(role, layer, x, own.get(layer, UNKNOWN), dim, tokens, batch)
        for role, layer, x, own, dim in zip(
            ("student", "teacher"), layers, features, kinds, given, strict=True
        )
    ]
    layout = Layout(sides[0], sides[1])
    shapes = layout.shapes(student, teacher, image)
    sizes = [side.sizes(x, shape) for side, x, shape in zip(sides, features, shapes, strict=True)]
    adapted = any(side.tokens is not None for side in sides)
    tokens_alone = not adapted and student.dim() == teacher.dim() == 3 and -1 in (sides[0].dim, sides[1].dim)
    layout.as_many = compares_positions and tokens_alone
    if compares_positions and len(sizes[0]) != len(sizes[1]):
        raise ValueError(_other_axes(student, teacher, adapted))
    if layout.as_many and sizes[0] != sizes[1]:
        raise ValueError(_not_as_many(student, teacher))
    both_last = all(side.dim == -1 and x.dim() > 2 for side, x in zip(sides, features, strict=True))
    # Maps of different sizes are pooled, which wants their channels first.
    layout.last = (
        takes_last and both_last and not adapted and (sizes[0] == sizes[1] or not compares_positions)
    )
    return layout


def side_of(
    role: str,
    layer: str,
    x: Tensor,
    kind: Kind,
    dim: int | None,
    tokens: Adaptor | None,
    batch: int | None = None,
) -> Side:
    """One side, from its feature and what is said of it.

    dim: what the caller says; None for what the layer's class tells, and else 1.
    batch: how many samples there are, where that is known. Tokens (L, B, D) are told by it.

    Raises ValueError for fewer than two dimensions, for three of which neither says anything, and for a map of a
    library that has both kinds, which looks as if its channels were last.
    """
    if x.dim() < 2:
        raise ValueError(
            f"wanted features (batch, channels, ...), got {tuple(x.shape)} of the {role}'s {layer!r}"
        )
    if x.dim() == 2:
        return Side(1)
    if x.dim() > 3:
        if dim is None and x.dim() == 4 and kind.may_be_last(x.shape):
            raise ValueError(
                f"wanted channel_dim for a feature that may be (B, H, W, C), got {tuple(x.shape)} of the {role}'s "
                f"layer {layer!r} without it: give channel_dim=-1, or 1 for (B, C, H, W), or a pair (student's, "
                "teacher's)"
            )
        return Side(dim or kind.maps or 1)
    dim = dim or kind.tokens
    if dim is None:
        raise ValueError(
            f"wanted channel_dim for features of three dimensions, got {tuple(x.shape)} of the {role}'s layer "
            f"{layer!r} without it: give channel_dim=-1 for tokens (B, L, channels), channel_dim=1 for (B, channels, "
            "positions), or a pair (student's, teacher's)"
        )
    # Not windows of images, of which there is a multiple of the samples.
    second = dim == -1 and batch is not None and batch > 1 and x.shape[0] % batch and x.shape[1] == batch
    return Side(dim, 1 if second else kind.batch_dim, kind, tokens)


def _of_each(dim: int | None, features: Sequence[Tensor]) -> tuple[int | None, int | None]:
    """One number for two sides: where these are tokens and a map, it is the tokens'."""
    student, teacher = (x.dim() for x in features)
    if 3 in (student, teacher) and max(student, teacher) > 3:
        return (dim if student == 3 else None), (dim if teacher == 3 else None)
    return dim, dim


def _other_axes(student: Tensor, teacher: Tensor, adapted: bool) -> str:
    """What to do about features with other numbers of axes of positions."""
    shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
    if not adapted and sorted((student.dim(), teacher.dim())) == [3, 4]:
        return (
            f"wanted positions of one kind, got tokens and a map, {shapes}: give tokens='grid', which makes a map of "
            "the tokens, or a TokenGrid with the number of those that are no patches"
        )
    return (
        f"wanted features with as many axes of positions, got {shapes}: pair layers before the pooling, or pool both; "
        "from a vector to a map VID and FitNet have regressor='transposed'"
    )


def _not_as_many(student: Tensor, teacher: Tensor) -> str:
    """What to do about tokens of other numbers."""
    return (
        f"wanted as many tokens on both sides, got {tuple(student.shape)} and {tuple(teacher.shape)}: give "
        "tokens='grid' for patches of images, whose maps are brought to one size, or tokens='sequence' for signals "
        "in time"
    )
