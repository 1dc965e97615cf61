"""Tokens as maps and as signals: "grid", "sequence" and their options, with masks, and what is no grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from paired_losses import MASKED, PAIRED, batch_of, leaf, loss_of
from torch import Tensor

from vidfast.distill import AT, Activations, Batch, Infomax, TokenGrid, TokenSequence, UnknownNameError
from vidfast.distill.kinds import UNKNOWN, Kind


def grid_and_map(prefix: int, channel_dim: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """A student's tokens, the same as a map without those in front, and a teacher's map of twice the size."""
    tokens = torch.randn(4, 3, prefix + 12, dtype=torch.float64)
    as_map = tokens[:, :, prefix:].reshape(4, 3, 3, 4).contiguous().requires_grad_()
    tokens = (tokens if channel_dim == 1 else tokens.mT).contiguous().requires_grad_()
    return tokens, as_map, torch.randn(4, 5, 6, 8, dtype=torch.float64)


@pytest.mark.parametrize("prefix", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("name", PAIRED)
def test_tokens_are_compared_with_a_map_as_the_map_that_they_are(name: str, prefix: int) -> None:
    tokens, as_map, teacher = grid_and_map(prefix)
    expected, gradients = loss_of(name, batch_of(as_map, teacher))
    for options in (
        {"channel_dim": -1, "tokens": "grid"},
        {"channel_dim": (-1, 1), "tokens": TokenGrid(prefix=prefix)},
        {"channel_dim": (-1, None), "tokens": TokenGrid(size=(3, 4))},
    ):
        found, others = loss_of(name, batch_of(tokens, teacher), **options)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        inner = others[0][:, prefix:].mT.reshape(4, 3, 3, 4)
        torch.testing.assert_close(inner, gradients[0], rtol=1e-9, atol=1e-11)
        assert not others[0][:, :prefix].any()


@pytest.mark.parametrize("name", PAIRED)
def test_a_map_is_compared_with_tokens_too(name: str) -> None:
    torch.manual_seed(3)
    student, teacher = (
        torch.randn(4, 3, 6, 8, dtype=torch.float64, requires_grad=True),
        torch.randn(4, 13, 5).double(),
    )
    expected, _ = loss_of(name, batch_of(student, teacher[:, 1:].mT.reshape(4, 5, 3, 4)))
    found, _ = loss_of(name, batch_of(student, teacher), channel_dim=-1, tokens="grid")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_two_grids_of_other_sizes_meet_at_the_smaller_one() -> None:
    student, teacher = torch.randn(2, 17, 3, requires_grad=True), torch.randn(2, 65, 5)
    found, _ = loss_of("at", batch_of(student.double(), teacher.double()), channel_dim=-1, tokens="grid")
    maps = [x[:, 1:].mT.reshape(2, -1, n, n).double() for x, n in ((student, 4), (teacher, 8))]
    expected, _ = loss_of("at", batch_of(*maps))
    torch.testing.assert_close(found, expected)


def test_sequences_of_other_lengths_are_pooled_along_their_axis() -> None:
    student, teacher = torch.randn(2, 9, 3, requires_grad=True).double(), torch.randn(2, 4, 5).double()
    options: dict[str, Any] = {"channel_dim": -1, "tokens": TokenSequence(prefix=1)}
    found, _ = loss_of("vid", batch_of(student, torch.cat([teacher[:, :1], teacher], 1)), **options)
    expected, _ = loss_of("vid", batch_of(student[:, 1:].mT, teacher.mT), channel_dim=1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("length", "kind", "shape", "expected"),
    [
        (196, UNKNOWN, None, (0, (14, 14))),
        (197, UNKNOWN, None, (1, (14, 14))),
        (198, UNKNOWN, (7, 7), (2, (14, 14))),
        (201, UNKNOWN, None, (5, (14, 14))),
        (200, UNKNOWN, None, (4, (14, 14))),
        (50, UNKNOWN, None, (1, (7, 7))),
        (99, UNKNOWN, (7, 14), (1, (7, 14))),
        (1, UNKNOWN, None, (0, (1, 1))),
        (9, Kind(prefix=5, grid=(2, 2)), None, (5, (2, 2))),
        (4, Kind(prefix=5, grid=(2, 2)), None, (0, (2, 2))),
        (13, Kind(prefix=1, grid=(3, 4)), (6, 8), (1, (3, 4))),
        (17, Kind(prefix=1), None, (1, (4, 4))),
        (65, Kind(prefix=1, grid=(4, 4)), None, (1, (8, 8))),
    ],
)  # fmt: skip
def test_grids_are_found_by_kind_and_by_count(length: int, kind: Kind, shape: Any, expected: Any) -> None:
    assert TokenGrid().find(length, kind, shape) == expected


@pytest.mark.parametrize(
    ("grid", "length", "message"),
    [
        (
            TokenGrid(),
            9,
            r"in one way alone.*got 9 tokens",
        ),  # 3 x 3, or 2 x 2 behind a class token and four registers
        (TokenGrid(), 12, "a square grid with a usual number before it"),
        (TokenGrid(prefix=2), 197, "a square grid with 2 before it"),
        (TokenGrid(size=(7, 7)), 40, r"a grid \(7, 7\)"),
        (TokenGrid(prefix=0, size=(7, 7)), 50, r"a grid \(7, 7\) with 0 before it"),
        (TokenSequence(prefix=5), 5, "wanted more tokens than the 5"),
    ],
)
def test_what_is_no_grid_or_could_be_two_is_an_error(grid: Any, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid.find(length, UNKNOWN, None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TokenGrid(prefix=-1), lambda: TokenGrid(prefix=True), lambda: TokenGrid(size=(0, 3)),
        lambda: TokenGrid(size=(3,)), lambda: TokenGrid(size=4), lambda: TokenSequence(prefix=1.5),
    ],
)  # fmt: skip
def test_adaptors_with_options_out_of_range(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"wanted (prefix|size)"):
        make()


@pytest.mark.parametrize("tokens", ["rows", 3, True, ("grid", None)])
def test_other_adaptors_are_refused(tokens: Any) -> None:
    with pytest.raises(
        (TypeError, UnknownNameError), match=r"wanted tokens as|unknown adaptor of tokens 'rows'"
    ):
        AT({"a": "x"}, tokens=tokens)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_a_mask_of_tokens_becomes_one_of_their_grid(name: str, where: str) -> None:
    """NaN under a weight of 0 in the tokens; the same as a mask (B, height, width) on maps."""
    mask = torch.ones(4, 12)
    mask[0, :5] = mask[2] = 0
    tokens = torch.randn(4, 13, 3, dtype=torch.float64)
    tokens[:, 1:] = tokens[:, 1:].masked_fill(mask[..., None] == 0, math.nan)
    tokens[0, 0] = math.nan
    other = torch.randn(4, 5, 3, 4, dtype=torch.float64)
    as_map = tokens[:, 1:].mT.reshape(4, 3, 3, 4)
    sides = (tokens, other) if where == "student" else (other, tokens)
    maps = (as_map, other) if where == "student" else (other, as_map)
    expected, _ = loss_of(name, batch_of(leaf(maps[0]), maps[1], mask=mask.reshape(4, 3, 4)))
    whole = torch.cat([torch.ones(4, 1), mask], 1)
    for given in (whole, whole[..., None], whole > 0, mask.reshape(4, 1, 3, 4)):
        batch = batch_of(leaf(sides[0]), sides[1], mask=given)
        found, gradients = loss_of(name, batch, channel_dim=-1, tokens="grid")
        torch.testing.assert_close(found, expected)
        assert all(g.isfinite().all() for g in gradients)


def test_infomax_of_a_vision_transformers_tokens() -> None:
    """The tokens as a map, up to the input's size: the same as for the map itself."""
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    tokens = torch.randn(2, 17, 4, dtype=torch.float64)
    losses = []
    for feature, options in (
        (tokens, {"channel_dim": -1, "tokens": "grid"}),
        (tokens[:, 1:].mT.reshape(2, 4, 4, 4), {}),
    ):
        torch.manual_seed(0)
        method = Infomax("a", **options)  # type: ignore[arg-type]
        batch = Batch(images, None, Activations({"a": leaf(feature)}, torch.zeros(2, 1)), None)
        method.build(batch)
        losses.append(method.double()(batch, 1.0))
    torch.testing.assert_close(*losses)
    batch = Batch(images, None, Activations({"a": tokens}, torch.zeros(2, 1)), None)
    with pytest.raises(ValueError, match="student layer 'a' -> input: wanted channel_dim"):
        Infomax("a").build(batch)
    with pytest.raises(ValueError, match=r"student layer 'a' -> input: .*tokens='grid'"):
        Infomax("a", channel_dim=-1).build(batch)
    with pytest.raises(ValueError, match="of the student's layers"):
        Infomax("a", channel_dim=(1, -1))  # type: ignore[arg-type]


def test_grids_of_images_that_are_not_square() -> None:
    """By the images, where both sides are tokens: 36 x 64 in patches of 4 is 9 x 16, and not 12 x 12; in each batch."""
    method = AT({"a": "x"}, channel_dim=-1, tokens="grid")
    for height, width in ((36, 64), (64, 36), (32, 32)):
        tokens = [torch.randn(2, (height // patch) * (width // patch), 3) for patch in (4, 2)]
        batch = batch_of(*tokens)
        batch = Batch(torch.randn(2, 3, height, width), None, batch.student, batch.teacher)
        if not method.built:
            method.build(batch)
        maps = [x.mT.reshape(2, 3, height // p, width // p) for x, p in zip(tokens, (4, 2), strict=True)]
        torch.testing.assert_close(method(batch, 1.0), AT({"a": "x"})(batch_of(*maps), 1.0))
    # a network made for square images, called with others
    kind = Kind(tokens=-1, prefix=1, grid=(4, 4))
    assert TokenGrid().find(17, kind, (32, 128)) == (1, (2, 8))
    assert TokenGrid().find(17, kind, (64, 64)) == (1, (4, 4))
