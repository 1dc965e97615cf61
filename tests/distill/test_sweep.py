"""The field's networks with each other, by every method: the loss of their features put in order by hand, or an error.

Networks of timm, torchvision and transformers, small or for small images; a few pairs in every run, all with --slow.
Text and images are not paired: a Distiller gives both networks the same inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from declared_operators import declare_torchvision
from torch import Tensor, nn

from vidfast.distill import (
    AT,
    ITRD,
    KD,
    METHODS,
    MIMKD,
    NST,
    VID,
    VIDLP,
    Activations,
    Batch,
    Distiller,
    FitNet,
    Infomax,
    LwF,
    Method,
)


class Kind(NamedTuple):
    """How a network is made; the layer to compare; where the penultimate vector is; how many tokens are no patches."""

    make: Callable[[], nn.Module]
    layer: str
    penultimate: str
    prefix: int | None = None
    reads_text: bool = False


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=5, **options)


def torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(pytest.importorskip("torchvision").models, name)(num_classes=5)


def transformers(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        library = pytest.importorskip("transformers")
        sizes = {"num_attention_heads": 2, "intermediate_size": 32, "num_labels": 5, **options}
        config = getattr(library, f"{name.split('For')[0]}Config")(**sizes)
        network: nn.Module = getattr(library, name)(config)
        return network

    return make


NETWORKS = {
    "resnet18": Kind(timm("resnet18"), "layer3", "fc.input"),
    "vit_tiny": Kind(timm("vit_tiny_patch16_224", img_size=64, depth=3), "blocks.1", "head.input", 1),
    "convnext_atto": Kind(timm("convnext_atto"), "stages.2", "head.fc.input"),
    "mobilenetv3": Kind(timm("mobilenetv3_small_050"), "blocks.4", "classifier.input"),
    "torchvision resnet18": Kind(torchvision("resnet18"), "layer3", "fc.input"),
    "torchvision vgg11_bn": Kind(torchvision("vgg11_bn"), "features.25", "classifier.6.input"),
    "transformers vit": Kind(
        transformers(
            "ViTForImageClassification", hidden_size=48, num_hidden_layers=2, image_size=64, patch_size=8
        ),
        "vit.layers.1",
        "classifier.input",
        1,
    ),
    "small bert": Kind(
        transformers("BertForSequenceClassification", vocab_size=50, hidden_size=32, num_hidden_layers=2),
        "bert.encoder.layer.1",
        "classifier.input",
        0,
        True,
    ),
    "bert": Kind(
        transformers("BertForSequenceClassification", vocab_size=50, hidden_size=48, num_hidden_layers=3),
        "bert.encoder.layer.2",
        "classifier.input",
        0,
        True,
    ),
}

PAIRED: dict[str, Callable[..., Method]] = {
    "vid": VID, "vid_heteroscedastic": METHODS["vid_heteroscedastic"], "vid_student_t": METHODS["vid_student_t"],
    "vid_mixture": METHODS["vid_mixture"], "fitnet": FitNet, "at": AT, "nst": NST, "itrd": ITRD, "mimkd": MIMKD,
}  # fmt: skip
OF_LOGITS: dict[str, Callable[[str], Method]] = {"kd": lambda _: KD(), "vid_lp": VIDLP, "lwf": LwF}

IN_EVERY_RUN = [
    ("resnet18", "vit_tiny"),
    ("vit_tiny", "torchvision resnet18"),
    ("transformers vit", "vit_tiny"),
    ("mobilenetv3", "convnext_atto"),
    ("small bert", "bert"),
]
ALL = [
    pytest.param(
        *pair,
        marks=[] if pair in IN_EVERY_RUN else pytest.mark.slow(reason="all 53 pairs take some minutes"),
        id=" <- ".join(pair),
    )
    for pair in itertools.product(NETWORKS, NETWORKS)
    if NETWORKS[pair[0]].reads_text == NETWORKS[pair[1]].reads_text
]


def test_every_method_is_here() -> None:
    assert {*PAIRED, *OF_LOGITS, "infomax"} == {
        name for name in METHODS if METHODS[name].__module__.startswith("vidfast.")
    }


def inputs_of(kind: Kind) -> Any:
    torch.manual_seed(0)
    if kind.reads_text:
        return {
            "input_ids": torch.randint(0, 50, (4, 12)),
            "attention_mask": torch.ones(4, 12, dtype=torch.long),
        }
    return torch.randn(4, 3, 64, 64)


def in_order(x: Tensor, prefix: int | None, as_map: bool) -> Tensor:
    """(B, C, *positions): of tokens (B, L, C) all along one axis, or those of patches as a square map."""
    if prefix is None:
        return x
    if not as_map:
        return x.mT
    side = int((x.shape[1] - prefix) ** 0.5)
    return x[:, prefix:].mT.reshape(len(x), -1, side, side)


def by_hand(term: Any, make: Callable[[], Method], student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of such a method on two features in order, with the numbers that the term has learned."""
    none = torch.zeros(1)
    batch = Batch(None, None, Activations({"a": student}, none), Activations({"x": teacher}, none))
    other = make()
    other.build(batch)
    with torch.no_grad():
        for mine, its in zip(other.parameters(), term.parameters(), strict=True):
            mine.copy_(its.reshape(mine.shape))
        return other.eval()(batch, other.weight)


@pytest.mark.parametrize(("student", "teacher"), ALL)
def test_every_method_on_every_pair(student: str, teacher: str) -> None:
    declare_torchvision()
    mine, theirs = NETWORKS[student], NETWORKS[teacher]
    torch.manual_seed(1)
    networks = mine.make(), theirs.make()
    inputs, labels = inputs_of(mine), torch.tensor([0, 3, 1, 4])
    tokens = [kind.prefix is not None for kind in (mine, theirs)]
    for name, make in PAIRED.items():
        for adaptor in (None, "grid"):
            if adaptor and mine.reads_text:
                continue
            # 17 tokens and 65, or tokens and a map: what compares positions wants them to be maps
            alike = tokens == [False, False] or (
                tokens == [True, True] and (mine.reads_text or student == teacher)
            )
            if adaptor is None and not alike and name != "itrd":
                with pytest.raises(ValueError, match=rf"'{mine.layer}' -> '{theirs.layer}'.*tokens='grid'"):
                    distil(networks, make({mine.layer: theirs.layer}), inputs, labels)
                continue
            distiller = distil(networks, make({mine.layer: theirs.layer}, tokens=adaptor), inputs, labels)
            with torch.no_grad():
                distiller.eval()
                found = distiller(inputs).terms[name]
                of_student = distiller._run(inputs, None).student.taps[mine.layer]
                of_teacher = distiller.teacher_activations(inputs).taps[theirs.layer]
            expected = by_hand(
                distiller.terms[name],
                lambda make=make: make({"a": "x"}, channel_dim=1),  # type: ignore[misc]
                in_order(of_student, mine.prefix, bool(adaptor)),
                in_order(of_teacher, theirs.prefix, bool(adaptor)),
            )
            torch.testing.assert_close(
                found, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    for make_term in OF_LOGITS.values():
        distil(networks, make_term(mine.penultimate), inputs, labels)
    if not mine.reads_text:
        distil(networks, Infomax(mine.layer, tokens="grid"), inputs, labels)


def distil(networks: tuple[nn.Module, nn.Module], term: Method, inputs: Any, labels: Tensor) -> Distiller:
    """One step; everything that the term made has a gradient."""
    distiller = Distiller(*networks, [term], example=inputs).train()
    losses = distiller(inputs, labels)
    assert losses.loss.isfinite()
    losses.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in term.parameters())
    distiller.zero_grad()
    return distiller
