"""What users write, with every public name: it runs, and checkers find nothing in it (test_typing.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import vidfast
from vidfast.distill import (
    AT,
    ITRD,
    KD,
    METHODS,
    MIMKD,
    NST,
    REGRESSORS,
    VID,
    VIDLP,
    Activations,
    Batch,
    ConvBNReLU,
    Distiller,
    FeatureNetwork,
    FitNet,
    HeteroscedasticVID,
    Infomax,
    Losses,
    LwF,
    Method,
    MixtureVID,
    PairedMethod,
    ParameterGroup,
    PointwiseStack,
    StudentTVID,
    TapError,
    Taps,
    TokenGrid,
    TokenSequence,
    TransposedStack,
    UnknownNameError,
    UpsampledStack,
)
from vidfast.distill.models import build


def losses() -> Tensor:
    """The losses alone."""
    mean = torch.randn(4, 8, 6, 6, requires_grad=True)
    target = torch.randn(4, 8, 6, 6)
    nll = vidfast.GaussianNLL(8, init_var=1.0, reduction="batchmean", strategy="two_pass", backend="auto")
    vid = vidfast.VIDLoss(8, 16, 8, weight=0.5, reduction="mean", backend="reference")
    total = assert_type(nll(mean, target), Tensor) + assert_type(vid(input=mean, target=target), Tensor)
    total = total + assert_type(vidfast.gaussian_nll(mean, target, nll.alpha, weight=0.1), Tensor)
    total = total + assert_type(vidfast.functional.gaussian_nll(mean, target, nll.alpha), Tensor)
    each = vidfast.HeteroscedasticNLL(transform="exp", eps=0.0, beta=0.5, channel_dim=1)
    raw = torch.randn(4, 8, 6, 6, requires_grad=True)
    total = total + assert_type(each(mean, target, raw, mask=target[:, 0] > 0), Tensor)
    total = total + assert_type(vidfast.heteroscedastic_nll(mean, target, raw, transform="softplus"), Tensor)
    total = total + assert_type(vidfast.functional.heteroscedastic_nll(mean, target, raw, weight=0.5), Tensor)
    variance = assert_type(vidfast.variance_of(raw), Tensor)
    assert_type(vidfast.functional.variance_of(raw, transform="identity"), Tensor)
    total = total + assert_type(
        vidfast.GaussianNLLLoss(full=True, check=False)(mean, target, variance), Tensor
    )
    total = total + assert_type(vidfast.functional.gaussian_nll_loss(mean, target, 0.5, full=True), Tensor)
    layer = torch.nn.Linear(mean.shape[1], mean.shape[1])
    head = vidfast.vid_head(mean.detach(), target, nll.alpha, [layer.weight], [layer.bias], reduction="sum")
    total = total + 0.0 * assert_type(head, Tensor)
    with torch.no_grad():
        per_element = assert_type(vidfast.log_likelihood_map(mean, target, nll.alpha), Tensor)
    vidfast.empty_cache()
    print(vidfast.__version__, vidfast.info()["torch"], per_element.shape)
    return total


@METHODS.register("typing-test-hint")
class Hint(Method):
    """A method of the user's own."""

    def __init__(self, layer: str, *, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight=weight, name=name)
        self.student_layers = self.teacher_layers = (layer,)
        self.regressor: nn.Module = nn.Identity()

    def build(self, batch: Batch) -> None:
        student = assert_type(batch.student, Activations).taps[self.student_layers[0]]
        teacher = batch.from_teacher.taps[self.teacher_layers[0]]
        self.regressor = PointwiseStack(depth=1)(student.shape, teacher.shape)

    def forward(self, batch: Batch, factor: float) -> Tensor:
        layer = self.student_layers[0]
        predicted: Tensor = self.regressor(batch.student.taps[layer])
        return (predicted - batch.from_teacher.taps[layer]).square().mean() * factor

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup(list(self.parameters()), lr_factor=0.5, name="hint")]


class Distance(PairedMethod):
    """A method of the user's own over pairs of layers."""

    def pair_loss(self, index: int, student: Tensor, teacher: Tensor, factor: float) -> Tensor:
        return (student.mean(1) - teacher.mean(1)).abs().mean() * factor


@REGRESSORS.register("typing-test-linear")
def linear(student_shape: Sequence[int], teacher_shape: Sequence[int]) -> nn.Module:
    """A mean function of the user's own."""
    return nn.Conv2d(student_shape[1], teacher_shape[1], 1)


def terms() -> list[Method]:
    """Every method, with options by name."""
    pairs = {"group2": "group2", "group3": "group3"}
    last = [("group3", "group3")]
    own = assert_type(Hint("group3", weight=0.1), Hint)
    vid = assert_type(VID(pairs, regressor="conv2", reduction="batchmean", backend="cpu", weight=0.1), VID)
    return [
        vid,
        own,
        Distance(pairs, name="distance"),
        VIDLP("pool", init_var=1.0, reduction="mean"),
        HeteroscedasticVID(last, regressor="typing-test-linear"),
        StudentTVID(last, nu=6.0, learn_nu=True, regressor=linear),
        MixtureVID(last, components=2, regressor=PointwiseStack(depth=2, width=0.5)),
        Infomax("group1", regressor=UpsampledStack(depth=1)),
        KD(temperature=2.0, weight=0.5),
        FitNet(pairs, reduction="sum", weight=1e-3),
        AT(pairs, weight=10.0),
        NST(pairs),
        LwF("pool", form="softened", temperature=2.0),
        ITRD([("pool", "pool")], l_corr=1.0),
        MIMKD([("pool", "pool")], critic="concat", hidden=8),
    ]


def distil() -> Losses:
    """One step."""
    student = build("wrn-10-1", in_channels=1, num_classes=3, image_size=(8, 8))
    teacher = build("wrn-10-1", in_channels=1, num_classes=3, image_size=(8, 8))
    images, labels = torch.randn(6, 1, 8, 8), torch.randint(3, (6,))
    distiller = Distiller(student, teacher, terms(), example=images, task_weight=0.5)
    optimizer = torch.optim.SGD(distiller.parameter_groups(lr=0.01, weight_decay=5e-4), momentum=0.9)
    kept = assert_type(distiller.teacher_activations(images), Activations)
    result = assert_type(distiller(images, labels, scale=0.5, teacher=kept), Losses)
    assert_type(result.loss, Tensor).backward()
    optimizer.step()
    for name, term in result.terms.items():
        print(f"{name} {term.item():.3f}")
    assert_type(student(images), Tensor)
    weighed = Distiller(student, teacher, [KD()], example=images)
    selected = torch.arange(6) < 4
    share = selected.sum() / 6
    assert_type(weighed(images, labels, mask=selected, scale=share, task_scale=share), Losses)
    return result


class Tagger(nn.Module):
    """Tokens (B, L, 4) -> logits (B, L, 3); with is_feat=True its features too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, tokens: Tensor, is_feat: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        hidden = self.embed(tokens)
        logits: Tensor = self.head(hidden)
        return ([hidden], logits) if is_feat else logits


def tokens() -> Losses:
    """Tokens, the element of a tuple, a layer's input, features that a network returns."""
    batch, labels = torch.randn(2, 17, 4), torch.ones(2, 17, dtype=torch.long)
    student = FeatureNetwork(Tagger(6), example=batch)
    teacher = FeatureNetwork(Tagger(8), count=1)
    terms: list[Method] = [
        VID({"feat.0": "feat.0"}, channel_dim=-1, tokens="grid"),
        AT({"network.head.input": "feat.0"}, channel_dim=(-1, -1), tokens=TokenGrid(prefix=1)),
        NST({"feat.0": "feat.0"}, channel_dim=-1, tokens=TokenSequence(prefix=1)),
        KD(class_dim=-1, ignore_index=0),
    ]
    distiller = Distiller(
        student, teacher, terms, example=batch, logits=(None, lambda output: output), task_weight=0.0
    )
    distiller.task_loss = lambda z, y: nn.functional.cross_entropy(z.mT, y)
    return assert_type(distiller(batch, labels), Losses)


def taps() -> dict[str, Tensor]:
    """Layers by name, and what goes wrong."""
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    watched = Taps(network, ["0"])
    found: dict[str, Tensor] = {}
    try:
        with watched.recording() as activations:
            network(torch.randn(2, 3))
            found = activations()
    except TapError as error:
        print(error)
    watched.remove()
    try:
        assert_type(METHODS["vidd"], type[Method])
    except UnknownNameError as error:
        print(error)
    print(TransposedStack(width=0.5)((2, 4), (2, 8, 4, 4)))
    print(assert_type(ConvBNReLU(relu=False)((2, 4, 8, 8), (2, 8, 4, 4)), nn.Sequential))
    return found


def main() -> None:
    torch.manual_seed(0)
    losses().backward()
    assert distil().loss.isfinite()
    assert tokens().loss.isfinite()
    assert not taps(), "the ReLU wrote over what was tapped"


if __name__ == "__main__":
    main()
