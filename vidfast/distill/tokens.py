"""Tokens (B, L, D) as features with positions in space or in time, so that they can be compared with maps.

"grid"      TokenGrid()       the tokens of patches in rows and columns: (B, D, height, width)
"sequence"  TokenSequence()   all tokens along one axis: (B, D, L)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vidfast._torch import constant_while_traced

from .kinds import Kind
from .registry import Registry

# How many tokens networks put before those of the patches: none, a class token, a distillation token or four
# registers besides, registers alone.
USUAL = (0, 1, 2, 4, 5)


@dataclass(frozen=True)
class TokenGrid:
    """The tokens of patches as a map, row by row, without those before them.

    prefix: how many tokens come first that are no patches: class tokens, registers. None: as the network's class tells,
        else by count: 0, 1, 2, 4 or 5, if that leaves a grid of the wanted shape.
    size: (height, width) in patches. None: as the network's class tells, else of the shape of the map on the other
        side, else square.

    Raises ValueError for numbers out of range.
    """

    prefix: int | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check_prefix(self.prefix)
        if self.size is not None:
            whole = isinstance(self.size, (tuple, list)) and len(self.size) == 2
            if not whole or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.size):
                raise ValueError(
                    f"wanted size as (height, width) in patches, 1 or more each, got {self.size!r}"
                )
            object.__setattr__(self, "size", tuple(self.size))

    def find(
        self, length: int, kind: Kind, shape: Sequence[int] | None = None
    ) -> tuple[int, tuple[int, ...]]:
        """How many tokens are left out, and the rest's (height, width).

        length: L. kind: what the network's class tells. shape: the sizes of the map on the other side, if there is one.

        Raises ValueError where that cannot be told, or does not fit.
        """
        like = None if shape is None else tuple(shape)
        return _grid_of(length, self.prefix, self.size, kind.prefix, kind.grid, like)


@dataclass(frozen=True)
class TokenSequence:
    """All tokens along one axis, as a signal in time: two of different lengths are average-pooled to the shorter.

    prefix: how many tokens at the start are left out. Raises ValueError for a number out of range.
    """

    prefix: int = 0

    def __post_init__(self) -> None:
        _check_prefix(self.prefix)

    def find(
        self, length: int, kind: Kind, shape: Sequence[int] | None = None
    ) -> tuple[int, tuple[int, ...]]:
        """How many tokens are left out, and the rest's length. Raises ValueError where none is left."""
        if length <= self.prefix:
            raise ValueError(f"wanted more tokens than the {self.prefix} that are left out, got {length}")
        return self.prefix, (length - self.prefix,)


Adaptor = TokenGrid | TokenSequence
Tokens = str | TokenGrid | TokenSequence | None


def resolve_tokens(tokens: object) -> Adaptor | None:
    """An adaptor by name or as given. Raises UnknownNameError for an unknown name, TypeError for anything else."""
    if isinstance(tokens, str):
        return ADAPTORS[tokens]
    if tokens is not None and not isinstance(tokens, (TokenGrid, TokenSequence)):
        raise TypeError(
            f"wanted tokens as 'grid', 'sequence', a TokenGrid, a TokenSequence or None, got {tokens!r}"
        )
    return tokens


def spread(x: Tensor, prefix: int, size: Sequence[int]) -> Tensor:
    """(B, D, prefix + product of size) -> (B, D, *size), a view of strided features."""
    return x[:, :, prefix:].view(*x.shape[:2], *size)


@constant_while_traced
def _grid_of(
    length: int,
    prefix: int | None,
    size: tuple[int, int] | None,
    told_prefix: int | None,
    told_grid: tuple[int, int] | None,
    shape: tuple[int, ...] | None,
) -> tuple[int, tuple[int, ...]]:
    """`TokenGrid.find` of numbers: a graph is made for one number of tokens."""
    found: list[tuple[int, tuple[int, int]]] = []
    if size is not None:
        found = [(length - math.prod(size), size)]
    else:
        prefixes: tuple[int, ...] = USUAL if prefix is None else (prefix,)
        if prefix is None and told_prefix is not None:
            # Before the class token is put in front, and after it. Images of another shape than the network was made
            # for have another grid.
            told = 0 if told_grid is None else math.prod(told_grid)
            counts = length in (told, told + told_prefix)
            if told_grid is not None and counts and _is_of_shape(told_grid, shape):
                return length - told, told_grid
            prefixes = tuple(dict.fromkeys((told_prefix, 0)))
        # Exactly of the map's shape, if any is; else as near as sizes that are rounded on the way down.
        for exactly in (True, False):
            grids = ((n, _grid(length - n, shape, exactly)) for n in prefixes)
            # One patch behind other tokens is a guess that nothing speaks for.
            found += [(n, grid) for n, grid in grids if grid and (grid != (1, 1) or n == 0 or prefix == n)]
            if found:
                break
    if prefix is not None:
        found = [(n, grid) for n, grid in found if n == prefix]
    if len(found) == 1 and found[0][0] >= 0:
        return found[0]
    square = shape is None or len(set(shape)) == 1
    like = "a square grid" if square else f"a grid of the shape of {shape}"
    wanted = like if size is None else f"a grid {size}"
    before = "a usual number before it (0, 1, 2, 4 or 5)" if prefix is None else f"{prefix} before it"
    several = f" in one way alone, and not {found}," if len(found) > 1 else ""
    raise ValueError(
        f"wanted tokens that are {wanted} with {before},{several} got {length} tokens; give "
        "tokens=TokenGrid(prefix=, size=(height, width))"
    )


def _grid(count: int, shape: Sequence[int] | None, exactly: bool) -> tuple[int, int] | None:
    """(height, width) of `count` patches in the shape of a map, square if there is none; None if there is no such."""
    if count < 1:
        return None
    high, wide = shape if shape is not None and len(shape) == 2 else (1, 1)
    height = math.isqrt(count) if high == wide else round(math.sqrt(count * high / wide))
    if height < 1 or count % height:
        return None
    width = count // height
    exact = height * wide == width * high
    fits = exact or (not exactly and high != wide and _is_of_shape((height, width), shape))
    return (height, width) if fits else None


def _is_of_shape(grid: tuple[int, int], shape: Sequence[int] | None) -> bool:
    """Whether a grid is of the shape of a map, but for sizes that are rounded: 7 x 4 beside 14 x 7, not a row more."""
    if shape is None or len(shape) != 2:
        return True
    return abs(grid[0] * shape[1] - grid[1] * shape[0]) < max(*shape, *grid)


def _check_prefix(prefix: int | None) -> None:
    if prefix is not None and (isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0):
        raise ValueError(f"wanted prefix as a whole number of 0 or more, got {prefix!r}")


ADAPTORS: Registry[Adaptor] = Registry("adaptor of tokens")
ADAPTORS.register("grid")(TokenGrid())
ADAPTORS.register("sequence")(TokenSequence())
