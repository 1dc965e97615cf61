"""Where channels are: one loss whatever the layout, nothing taken for something else without a word, tokens as maps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from method_batches import pair
from paired_losses import MASKED, PAIRED, batch_of, features, leaf, loss_of
from torch import Tensor, nn

from vidfast.distill import (
    AT,
    METHODS,
    VID,
    Distiller,
    FitNet,
    Infomax,
    PairedMethod,
    PointwiseStack,
    TokenGrid,
)
from vidfast.distill.kinds import UNKNOWN, Kind


def test_every_paired_method_is_here() -> None:
    assert set(PAIRED) == {name for name in METHODS if issubclass(METHODS[name], PairedMethod)}


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Any]] = {
    "both last": (lambda x: x.movedim(1, -1), lambda x: x.movedim(1, -1), -1),
    "student last": (lambda x: x.movedim(1, -1), lambda x: x, (-1, 1)),
    "teacher last": (lambda x: x, lambda x: x.movedim(1, -1), (1, -1)),
}


@pytest.mark.parametrize("places", [(6,), (2, 4)], ids=["tokens", "maps"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PAIRED)
def test_the_same_features_give_the_same_loss_wherever_their_channels_are(
    name: str, layout: str, places: tuple[int, ...]
) -> None:
    """(B, L, D) and (B, D, L), and as classes tell it: to 1e-10, with all gradients."""
    s, t = features(*places)
    expected, gradients = loss_of(name, batch_of(s, t), channel_dim=1)
    turn_s, turn_t, said = LAYOUTS[layout]
    turned_s = turn_s(s).detach().contiguous().requires_grad_()
    turned_t = turn_t(t).contiguous()
    told = tuple(Kind(tokens=d, maps=d) for d in (said if isinstance(said, tuple) else (said, said)))
    for kinds, options in (((UNKNOWN, UNKNOWN), {"channel_dim": said}), (told, {})):
        found, others = loss_of(name, batch_of(turned_s, turned_t, kinds), **options)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        others[0] = others[0] if turn_s(s).shape == s.shape else others[0].movedim(-1, 1)
        for ours, theirs in zip(others, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", PAIRED)
def test_tokens_with_their_batch_second(name: str) -> None:
    s, t = features(6)
    expected, gradients = loss_of(name, batch_of(s, t), channel_dim=1)
    kind = Kind(tokens=-1, batch_dim=1)
    turned = s.detach().permute(2, 0, 1).contiguous().requires_grad_()
    found, others = loss_of(name, batch_of(turned, t.permute(2, 0, 1), (kind, kind)))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(others[0].permute(1, 2, 0), gradients[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", PAIRED)
def test_three_dimensions_need_channel_dim(name: str) -> None:
    s, t = features(6)
    with pytest.raises(
        ValueError, match=r"'a' -> 'x': wanted channel_dim .* got \(4, 3, 6\) of the student's layer"
    ):
        PAIRED[name]().build(pair(s, t))
    with pytest.raises(
        ValueError, match=r"got \(4, 5, 6\) of the teacher's layer 'x' without it: give channel_dim=-1"
    ):
        PAIRED[name](channel_dim=(1, None)).build(pair(s, t))


def test_a_distiller_says_so_and_the_networks_layers_tell() -> None:
    class Plain(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embed, self.layer = (
                nn.Linear(2, width),
                nn.TransformerEncoderLayer(width, 2, 8, batch_first=True),
            )

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(self.embed(x)).mean(1)
            return y[:, :2]

    x = torch.randn(3, 7, 2)
    student, teacher = Plain(4), Plain(6)
    with pytest.raises(ValueError, match="wanted channel_dim"):
        Distiller(student, teacher, [AT({"embed": "embed"})], example=x)
    told = Distiller(student, teacher, [VID({"layer": "layer"}), AT({"layer": "layer"})], example=x)
    said = Distiller(
        student,
        teacher,
        [VID({"layer": "layer"}, channel_dim=-1), AT({"layer": "layer"}, channel_dim=-1)],
        example=x,
    )
    said.terms.load_state_dict(told.terms.state_dict())
    for one in (told, said):
        one.eval()
    torch.testing.assert_close(told(x).terms, said(x).terms)
    assert isinstance(told.terms["vid"].regressors[0][0], nn.Linear)  # type: ignore[index, union-attr]


@pytest.mark.parametrize("channel_dim", [0, 2, True, "last", (1,), (1, 0), (1, -1, 1)])
@pytest.mark.parametrize("name", [*PAIRED, "infomax"])
def test_other_dimensions_are_refused(name: str, channel_dim: Any) -> None:
    make = PAIRED.get(name, lambda **o: Infomax("a", **o))
    with pytest.raises(ValueError, match="wanted channel_dim 1 or -1, None"):
        make(channel_dim=channel_dim)


@pytest.mark.parametrize(
    ("name", "student", "teacher", "message"),
    [
        ("vid", (2, 17, 3), (2, 5, 4, 4), "tokens and a map.*give tokens='grid'"),
        ("at", (2, 5, 4, 4), (2, 17, 3), "tokens and a map.*give tokens='grid'"),
        ("mimkd", (2, 17, 3), (2, 5, 4, 4), "tokens and a map.*give tokens='grid'"),
        ("vid", (2, 17, 3), (2, 26, 3), "as many tokens on both sides.*tokens='grid'.*tokens='sequence'"),
        ("nst", (2, 17, 3), (2, 26, 3), "as many tokens on both sides"),
        ("vid", (2, 3), (2, 5, 4, 4), "as many axes of positions.*regressor='transposed'"),
        ("fitnet", (2, 17, 3), (2, 5), "as many axes of positions"),
    ],
)
def test_features_that_nothing_brings_together_are_refused_with_the_way_out(
    name: str, student: tuple[int, ...], teacher: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=f"pair 'a' -> 'x': .*{message}"):
        PAIRED[name](channel_dim=-1).build(pair(torch.randn(student), torch.randn(teacher)))


def test_a_dimension_that_is_said_counts_beside_a_vector_too() -> None:
    """One number is the tokens' beside a map alone."""
    s, t = torch.randn(4, 3, 6, 6, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    expected, _ = loss_of("itrd", batch_of(leaf(s), t))
    for channel_dim in (-1, (-1, 1), (-1, None)):
        found, _ = loss_of("itrd", batch_of(leaf(s.movedim(1, -1)), t), channel_dim=channel_dim)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["at", "vid"])
def test_other_numbers_of_tokens_are_refused_after_the_probe_too(name: str) -> None:
    method = PAIRED[name](channel_dim=-1)
    method.build(pair(torch.randn(2, 17, 3), torch.randn(2, 17, 5)))
    method(pair(torch.randn(2, 9, 3), torch.randn(2, 9, 5)), 1.0)
    with pytest.raises(ValueError, match=r"'a' -> 'x': wanted as many tokens.*\(2, 17, 3\) and \(2, 26, 5\)"):
        method(pair(torch.randn(2, 17, 3), torch.randn(2, 26, 5)), 1.0)


def test_what_averages_positions_takes_tokens_and_a_map() -> None:
    s, t = torch.randn(4, 17, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 5, 4, 4).double()
    found, _ = loss_of("itrd", batch_of(s, t), channel_dim=-1)
    expected, _ = loss_of("itrd", batch_of(s.mean(1), t.mean((2, 3))))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", MASKED)
def test_masks_where_one_side_alone_has_its_channels_last(name: str) -> None:
    s, t = features(6)
    mask = torch.rand(4, 6) * (torch.rand(4, 6) < 0.7)
    expected, _ = loss_of(name, batch_of(s, t, mask=mask), channel_dim=1)
    for given in (mask, mask[..., None]):
        found, _ = loss_of(name, batch_of(s, t.mT, mask=given), channel_dim=(1, -1))
        torch.testing.assert_close(found, expected)


def test_maps_with_channels_last_of_other_sizes_are_pooled() -> None:
    s, t = torch.randn(2, 3, 8, 4, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 4, 4).double()
    expected, _ = loss_of("vid", batch_of(s, t))
    found, _ = loss_of("vid", batch_of(leaf(s.movedim(1, -1)), t.movedim(1, -1)), channel_dim=-1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("regressor", ["upsampled", "conv_bn_relu", "transposed"])
def test_regressors_of_maps_get_maps(regressor: str) -> None:
    torch.manual_seed(2)
    size = (1, 1) if regressor == "transposed" else (4, 4)
    s, t = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 4, 4).double()
    expected, _ = loss_of("vid", batch_of(s, t), regressor=regressor)
    options: dict[str, Any] = {"regressor": regressor, "channel_dim": -1}
    found, _ = loss_of("vid", batch_of(leaf(s.movedim(1, -1)), t.movedim(1, -1)), **options)
    torch.testing.assert_close(found, expected)


def test_a_function_of_the_callers_gets_tokens_as_they_are() -> None:
    seen: list[tuple[Any, Any]] = []

    def make(student: Any, teacher: Any) -> nn.Module:
        seen.append((tuple(student), tuple(teacher)))
        return nn.Linear(student[-1], teacher[-1])

    FitNet({"a": "x"}, regressor=make, channel_dim=-1).build(pair(torch.randn(2, 6, 3), torch.randn(2, 6, 5)))
    assert seen == [((2, 6, 3), (2, 6, 5))]
    stack = FitNet({"a": "x"}, regressor=PointwiseStack(2), channel_dim=-1)
    stack.build(pair(torch.randn(2, 6, 3), torch.randn(2, 6, 5)))
    assert isinstance(stack.regressors[0][0], nn.Linear)  # type: ignore[index]


def test_what_is_said_is_told_again() -> None:
    """Resuming compares terms by their repr and plain attributes."""
    assert "channel_dim=-1, tokens=TokenGrid(prefix=1, size=None)" in repr(
        AT({"a": "x"}, channel_dim=-1, tokens=TokenGrid(prefix=1))
    )
    assert "channel_dim" not in repr(AT({"a": "x"}))


def test_a_built_term_is_copied_with_its_layouts() -> None:
    s, t = features(6)
    method = VID({"a": "x"}, channel_dim=(1, -1))
    batch = batch_of(s, t.mT)
    method.build(batch)
    method.double()
    torch.testing.assert_close(copy.deepcopy(method)(batch, 1.0), method(batch, 1.0))
