"""What the classes of layers tell of their features, and that the rest is left to be said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from declared_operators import declare_torchvision
from torch import Tensor, nn

from vidfast.distill import AT, Distiller, Taps
from vidfast.distill.kinds import UNKNOWN, Kind
from vidfast.distill.layouts import side_of

LAST = Kind(tokens=-1)
SECOND = Kind(tokens=-1, batch_dim=1)
FIRST = Kind(tokens=1, maps=1)


def kinds(network: nn.Module, *names: str) -> dict[str, Kind]:
    return Taps(network, names).kinds()


@pytest.mark.parametrize(
    ("layer", "name", "expected"),
    [
        (nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), "0", LAST),
        (nn.TransformerEncoderLayer(8, 2, 8), "0", SECOND),
        (nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), "0.linear2", LAST),
        (nn.TransformerDecoderLayer(8, 2, 8), "0", SECOND),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1), "0", LAST),
        (nn.Transformer(8, 2, 1, 1, 8, batch_first=True), "0.decoder.layers.0", LAST),
        (nn.MultiheadAttention(8, 2, batch_first=True), "0[0]", LAST),
        (nn.MultiheadAttention(8, 2, batch_first=True), "0[1]", UNKNOWN),
        (nn.MultiheadAttention(8, 2), "0.input", SECOND),
        (nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), "0.input[src_mask]", UNKNOWN),
        (nn.LSTM(8, 4, batch_first=True), "0[0]", LAST),
        (nn.LSTM(8, 4), "0[0]", SECOND),
        (nn.GRU(8, 4), "0[1]", UNKNOWN),
        (nn.Conv1d(2, 3, 1), "0", FIRST),
        (nn.BatchNorm1d(2), "0.input", FIRST),
        (nn.AvgPool2d(2), "0", FIRST),
        (nn.Linear(8, 8), "0", Kind(maps=-1)),
        (nn.LayerNorm(8), "0", Kind(maps=-1)),
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU()), "0", UNKNOWN),
        (nn.Identity(), "0", UNKNOWN),
    ],
)
def test_torchs_layers(layer: nn.Module, name: str, expected: Kind) -> None:
    assert kinds(nn.Sequential(layer), name) == {name: expected}


def imported(library: str) -> Any:
    declare_torchvision()
    return pytest.importorskip(library)


@pytest.mark.parametrize(
    ("model", "options", "wanted"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2},
         {"blocks.0": (-1, 1, (4, 4)), "blocks.1.mlp.fc2": (-1, 1, (4, 4)), "patch_embed": (-1, 1, (4, 4)),
          "norm": (-1, 1, (4, 4)), "patch_embed.proj": (1, None, None)}),
        ("vit_base_patch16_reg4_gap_256", {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 2},
         {"blocks.0": (-1, 4, (2, 2))}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 1}, {"blocks.0": (-1, 2, (2, 2))}),
        ("mixer_s32_224", {"img_size": 64}, {"blocks.0": (None, None, None)}),
    ],
)  # fmt: skip
def test_timms_vision_transformers(model: str, options: dict[str, Any], wanted: dict[str, Any]) -> None:
    network = imported("timm").create_model(model, num_classes=3, **options)
    for name, kind in kinds(network, *wanted).items():
        assert (kind.tokens, kind.prefix, kind.grid) == wanted[name], name


MAPS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "timm swin": (
        lambda: imported("timm").create_model("swin_tiny_patch4_window7_224", img_size=56, window_size=7, depths=(1, 1),
                                          embed_dim=24, num_heads=(1, 2), num_classes=3),
        ["patch_embed", "patch_embed.proj", "layers.0", "layers.1.downsample", "layers.1.blocks.0", "norm"],
    ),
    "timm convnext": (
        lambda: imported("timm").create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=3),
        ["stem", "stem.1", "stages.0", "stages.1.downsample.0", "stages.1.blocks.0"],
    ),
    "torchvision swin": (
        lambda: imported("torchvision").models.SwinTransformer([4, 4], 12, [1, 1], [2, 2], [7, 7], num_classes=3),
        ["features.0", "features.0.0", "features.0.2", "features.1", "features.2", "features.3.0", "norm", "permute"],
    ),
    "torchvision convnext": (
        lambda: imported("torchvision").models.convnext_tiny(num_classes=3),
        ["features.0", "features.0.1", "features.1", "features.1.0.block.2", "features.1.0.block.3"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("network", MAPS)
def test_maps_are_told_as_they_are(network: str) -> None:
    """By their sizes: the width of a map differs from its channels wherever it is looked at."""
    build, names = MAPS[network]
    module = build().eval()
    taps = Taps(module, names)
    with torch.no_grad(), taps.recording() as activations:
        module(torch.randn(1, 3, 56, 56))
        found: dict[str, Tensor] = activations()
    for name, kind in taps.kinds().items():
        shape = tuple(found[name].shape)
        assert len(shape) == 4, name
        first, last = shape[2] == shape[3], shape[1] == shape[2]
        assert first != last, (name, shape)
        assert (kind.maps or 1) == (1 if first else -1), (name, shape)


def test_transformers() -> None:
    transformers = imported("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    bert = transformers.BertForSequenceClassification(config)
    names = [
        "bert.encoder.layer.0",
        "bert.encoder.layer.0.output.dense",
        "bert[last_hidden_state]",
        "bert.embeddings",
    ]
    for name, kind in kinds(bert, *names, "classifier.input").items():
        assert kind.tokens == -1, name
    assert kinds(bert, "bert[pooler_output]")["bert[pooler_output]"].tokens is None
    speech = transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, conv_dim=(4, 4),
            conv_kernel=(3, 3), conv_stride=(2, 2), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        )
    )  # fmt: skip
    found = kinds(
        speech, "feature_extractor.conv_layers.0", "feature_extractor.conv_layers.1.conv", "encoder.layers.0"
    )
    assert [kind.tokens for kind in found.values()] == [None, 1, -1]


def test_what_nothing_tells_of_a_librarys_map_is_looked_at() -> None:
    """In an MLP of timm's, maps are (B, H, W, C) and nothing says so: an error, and no average over the wrong axes."""
    student, teacher = (imported("timm").create_model("edgenext_xx_small", num_classes=3) for _ in range(2))
    images = torch.randn(2, 3, 64, 64)
    name = "stages.0.blocks.0.mlp"
    with pytest.raises(
        ValueError,
        match=r"may be \(B, H, W, C\), got \(2, 16, 16, 24\) of the student's layer.*give channel_dim=-1",
    ):
        Distiller(student, teacher, [AT({name: "stages.0"})], example=images)
    Distiller(student, teacher, [AT({name: "stages.0"}, channel_dim=(-1, None))], example=images)


@pytest.mark.parametrize("channel_dim", [-1, (-1, -1)])
def test_tokens_with_their_batch_second_are_known_by_its_size(channel_dim: Any) -> None:
    class Sequence(nn.Module):
        def __init__(self, width: int, batch_first: bool) -> None:
            super().__init__()
            self.batch_first = batch_first
            self.embed, self.out, self.fc = nn.Linear(3, width), nn.Identity(), nn.Linear(width, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.embed(x)
            hidden = self.out(hidden if self.batch_first else hidden.transpose(0, 1))
            logits: Tensor = self.fc(hidden.mean(1 if self.batch_first else 0))
            return logits

    x = torch.randn(4, 7, 3)
    losses = []
    for batch_first in (True, False):
        torch.manual_seed(0)
        networks = Sequence(4, batch_first), Sequence(6, batch_first)
        distiller = Distiller(*networks, [AT({"out": "out"}, channel_dim=channel_dim)], example=x)
        losses.append(distiller(x).loss)
    torch.testing.assert_close(*losses)


def test_windows_and_single_samples_are_no_batch_in_second_place() -> None:
    s, t = torch.randn(64, 16, 3), torch.randn(64, 16, 5)
    for batch, size in ((16, 64), (1, 1)):
        side = side_of("student", "a", s[:size], UNKNOWN, -1, None, batch)
        assert side.batch_dim == 0
    assert side_of("student", "a", t[:7], UNKNOWN, -1, None, 16).batch_dim == 1


def test_torchvisions_vision_transformer() -> None:
    vit = imported("torchvision").models.VisionTransformer(16, 8, 1, 2, 8, 8, num_classes=3)
    found = kinds(
        vit, "encoder", "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_0.mlp", "conv_proj"
    )
    assert [(kind.tokens, kind.prefix) for kind in found.values()] == [(-1, 1)] * 3 + [(1, None)]


def timm(name: str) -> Callable[[], nn.Module]:
    return lambda: imported("timm").create_model(name)


# How it is made, layers that tell, and whether other maps (B, H, W, C) are in it, which must be said.
WIDE: dict[str, tuple[Callable[[], nn.Module], list[str], bool]] = {
    "swin": (
        lambda: imported("torchvision").models.SwinTransformer(
            [4, 4], 12, [1, 1], [2, 2], [7, 7], num_classes=3
        ),
        ["features.1", "features.3.0"],
        True,
    ),
    "resnet18": (timm("resnet18"), ["layer1", "layer2.0", "layer3.0.act1"], False),
    "convnext_atto": (timm("convnext_atto"), ["stem", "stages.1", "stages.2.blocks.0"], True),
    "mobilenetv3_small_050": (timm("mobilenetv3_small_050"), ["blocks.1", "blocks.3.0"], False),
    "mambaout_femto": (timm("mambaout_femto"), ["stem", "stages.0"], True),
}


@pytest.mark.parametrize("network", WIDE)
def test_no_map_of_wide_images_is_taken_for_another(network: str) -> None:
    """Two sizes of images tell where a layer's channels are; what its class tells agrees, or is asked for."""
    build, telling, mixed = WIDE[network]
    module = build().eval()
    names = [
        name for name, m in module.named_modules() if name and not name.startswith(("head", "classifier"))
    ]
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        module.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, name=name: shapes.setdefault(name, []).append(
                tuple(getattr(out, "shape", ()))
            )
        )
    with torch.no_grad():
        for size in ((64, 128), (96, 160)):
            module(torch.randn(2, 3, *size))
    asked = 0
    for name, kind in Taps(module, [n for n in names if len(shapes.get(n, ())) == 2]).kinds().items():
        before, after = shapes[name]
        if len(before) != 4 or before == after or before[0] != 2:
            continue
        last = before[1:3] != after[1:3] and before[3] == after[3]
        if kind.maps is None and kind.may_be_last(before):
            asked += 1
            assert name not in telling
        else:
            assert (kind.maps == -1) == last, (name, before, kind.maps)
    assert mixed or not asked
