"""What docs/migration.md says of other repositories' formula, networks and checkpoints; its programs run."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from declared_operators import declare_torchvision
from foreign_wrn import ForeignWRN, randomised
from method_checks import batch_of
from migration_page import PAGE, programs, regressor, renamed_terms, run, scope_of, their_kd, their_loss
from small_networks import PAIRS, SmallNet
from torch import Tensor, nn

from vidfast import VIDLoss
from vidfast.distill import KD, VID, Distiller, PointwiseStack
from vidfast.distill.models import build, renamed_wrn

IN, MID, OUT = 4, 6, 5


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-6)


def test_every_program_is_known_here() -> None:
    counts = {"RepDistiller": 5, "torchdistill": 1, "mdistiller": 2, "xfer": 2}
    assert {section: len(programs(section)) for section in counts} == counts
    assert PAGE.read_text().count("```python") == sum(counts.values())


# The formula and the checkpoints


@pytest.mark.parametrize(
    ("prefix", "name", "shape"),
    [
        ("", "log_scale", (OUT,)),
        ("regressor_dict.regressor1.", "soft_plus_param", (OUT,)),
        ("", "alpha", (1, OUT, 1, 1)),
    ],
)
def test_their_checkpoints_give_their_loss(prefix: str, name: str, shape: tuple[int, ...]) -> None:
    theirs, parameter = regressor(IN, MID, OUT), torch.randn(shape)
    state = {f"{prefix}regressor.{key}": value for key, value in theirs.state_dict().items()}
    state |= {f"{prefix}{name}": parameter}
    if prefix:
        state |= {"student_model.fc.weight": torch.zeros(1)}
        sizes = {"in_channels": IN, "middle_channels": MID, "out_channels": OUT}
        loss = run(programs("torchdistill")[0], scope_of(state=state, **sizes))["loss"]
    else:
        loss = VIDLoss(IN, MID, OUT)
        loss.load_state_dict(state)
    student, teacher = torch.randn(3, IN, 6, 6), torch.randn(3, OUT, 6, 6)
    close(loss(student, teacher), their_loss(theirs(student), teacher, parameter.flatten()))


@pytest.mark.parametrize("name", ["log_scale", "soft_plus_param", "alpha"])
@pytest.mark.parametrize("shape", [(12,), (1, 12, 1, 1), (12, 1, 1)])
def test_a_distiller_takes_their_variances_by_any_name_and_shape(
    name: str, shape: tuple[int, ...], images: Tensor
) -> None:
    distiller = Distiller(SmallNet(4), SmallNet(6), [VID({"second": "second"})], example=images)
    state = distiller.state_dict()
    del state["terms.vid.likelihoods.0.alpha"]
    parameter = torch.randn(shape)
    distiller.load_state_dict({**state, f"terms.vid.likelihoods.0.{name}": parameter})
    torch.testing.assert_close(distiller.terms["vid"].likelihoods[0].alpha.data, parameter.flatten())


def test_a_checkpoint_without_variances_keeps_the_initial_one() -> None:
    theirs = regressor(IN, OUT, OUT)
    state = {f"module.regressors.1.{key}": value for key, value in theirs.state_dict().items()}
    made: list[VIDLoss] = []

    def recorded(*sizes: int) -> VIDLoss:
        made.append(VIDLoss(*sizes))
        return made[0]

    run(programs("mdistiller")[1], scope_of(state=state, pair=1, s=IN, t=OUT) | {"VIDLoss": recorded})
    student, teacher = torch.randn(3, IN, 6, 6), torch.randn(3, OUT, 6, 6)
    initial = torch.full((OUT,), math.log(math.exp(5.0 - 1e-5) - 1.0))
    close(made[0](student, teacher), their_loss(theirs(student), teacher, initial))


def test_a_distiller_takes_their_regressors_and_gives_their_loss(images: Tensor, labels: Tensor) -> None:
    """RepDistiller's three weights, its hidden width, and the renaming of its keys."""
    student, teacher = SmallNet(4).eval(), SmallNet(6)
    terms = [
        VID(PAIRS, weight=0.5, regressor=PointwiseStack(depth=3, width=1.0)),
        KD(temperature=4.0, weight=0.9),
    ]
    distiller = Distiller(student, teacher, terms, example=images, task_weight=0.1)
    theirs = {0: VIDLoss(4, 6, 6), 1: VIDLoss(8, 12, 12)}
    for loss in theirs.values():
        nn.init.normal_(loss.log_scale)
    renamed = {f"student.{key}": value for key, value in student.state_dict().items()}
    distiller.load_state_dict({**renamed, **renamed_terms(theirs)})
    losses = distiller(images, labels)
    teacher.eval()
    with torch.no_grad():
        features = [[net.first(images), net.second(net.first(images))] for net in (student, teacher)]
        vid = sum(
            their_loss(loss.regressor(s), t, loss.log_scale)
            for loss, s, t in zip(theirs.values(), *features, strict=True)
        )
        kd = 16 * their_kd(student(images), teacher(images), 4.0)
        task = nn.functional.cross_entropy(student(images), labels)
    close(losses.loss, 0.1 * task + 0.9 * kd + 0.5 * vid)


# RepDistiller


@pytest.fixture
def pictures() -> Tensor:
    """Of the size that their networks are made for."""
    return torch.randn(4, 3, 32, 32)


LABELS = torch.tensor([0, 1, 2, 0])


def theirs_of_rep_distiller(pictures: Tensor, **names: Any) -> dict[str, Any]:
    """What their training loop has at hand, for a WRN-10-1 taught by a WRN-10-2."""
    student, teacher = randomised(ForeignWRN(10, 1, 3)), randomised(ForeignWRN(10, 2, 3)).eval()
    criteria = nn.ModuleList(VIDLoss(c, 2 * c, 2 * c) for c in (16, 32, 64))
    for loss in criteria:
        nn.init.normal_(loss.log_scale)
    return scope_of(
        model_s=student,
        model_t=teacher,
        criterion_kd=criteria,
        criterion_cls=nn.functional.cross_entropy,
        criterion_div=lambda s, t: 16 * their_kd(s, t, 4.0),
        trainable_list=nn.ModuleList([student, criteria]),
        input=pictures,
        target=LABELS,
        images=pictures,
        labels=LABELS,
        gamma=0.3,
        alpha=0.7,
        beta=0.5,
        opt=SimpleNamespace(learning_rate=0.05, momentum=0.9, weight_decay=5e-4),
        **names,
    )


def test_variances_get_a_group_of_their_own(pictures: Tensor) -> None:
    scope = run(programs("RepDistiller")[0], theirs_of_rep_distiller(pictures))
    decayed, free = scope["optimizer"].param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (5e-4, 0.0)
    assert [p.shape for p in free["params"]] == [(32,), (64,), (128,)]
    assert len(decayed["params"]) + 3 == len(list(scope["trainable_list"].parameters()))


def test_the_distiller_gives_what_their_loop_gives(pictures: Tensor) -> None:
    _, loop, ours, _, _ = programs("RepDistiller")
    scope = run(loop, theirs_of_rep_distiller(pictures))
    expected = scope["loss"]
    run(ours, scope)
    missing, unexpected = scope["distiller"].load_state_dict(
        renamed_terms(dict(enumerate(scope["criterion_kd"]))), strict=False
    )
    assert not unexpected
    assert all(name.startswith("student.") for name in missing)
    close(scope["distiller"](pictures, LABELS).loss, expected)


def test_their_wrn_loads_as_the_page_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = randomised(ForeignWRN(40, 2, 100)).eval()
    (tmp_path / "wrn_40_2_vanilla").mkdir()
    torch.save(
        {"epoch": 240, "model": network.state_dict()}, tmp_path / "wrn_40_2_vanilla/ckpt_epoch_240.pth"
    )
    monkeypatch.chdir(tmp_path)
    teacher = run(programs("RepDistiller")[3], scope_of())["teacher"].eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), network(images), rtol=1e-4, atol=1e-4)


def test_their_fitnet_is_a_convolution_with_batch_norm_and_relu() -> None:
    fitnet = eval(programs("RepDistiller")[4], scope_of())
    s, t = torch.randn(4, 3, 16, 16), torch.randn(4, 5, 8, 8)
    batch = batch_of({"feat.2": s}, {"feat.2": t})
    fitnet.build(batch)
    theirs = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.ReLU())
    names = dict(zip(("conv", "bn"), theirs, strict=False))
    fitnet.load_state_dict(
        {f"regressors.0.{n}.{k}": v for n, m in names.items() for k, v in m.state_dict().items()}
    )
    close(fitnet(batch, fitnet.weight), 100 * nn.functional.mse_loss(theirs(s), t))


class Stage(nn.Module):
    """A stage of theirs: the features, and what they were before the ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        before = self.conv(x)
        return torch.relu(before), before


class StagedNet(nn.Module):
    """Stages of two outputs, and a block whose ReLU is a function before the pool."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1, self.block2 = Stage(1, width), nn.Conv2d(width, width, 3, padding=1)
        self.pool2, self.fc = nn.MaxPool2d(2), nn.Linear(width, 3)

    def features(self, x: Tensor) -> list[Tensor]:
        first, _ = self.layer1(x)
        return [first, torch.relu(self.block2(first))]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.pool2(self.features(x)[-1]).mean((2, 3)))
        return logits


def test_what_no_layer_returns_is_tapped_by_element_and_by_input(images: Tensor, labels: Tensor) -> None:
    student, teacher = StagedNet(4).eval(), StagedNet(6).eval()
    names = ("layer1[0]", "pool2.input")
    vid = VID({name: name for name in names})
    distiller = Distiller(student, teacher, [vid], example=images)
    with torch.no_grad():
        expected = sum(
            their_loss(vid.regressors[n](s), t, vid.likelihoods[n].alpha)
            for n, (s, t) in enumerate(zip(student.features(images), teacher.features(images), strict=True))
        )
    close(distiller(images, labels).terms["vid"], expected)


# mdistiller


class WithFeatures(nn.Module):
    """A network that returns (logits, features)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = ForeignWRN(10, width, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        features, logits = self.network(x, is_feat=True)
        return logits, {"feats": features[:-1], "pooled_feat": features[-1]}


def test_networks_that_return_features_give_their_loss(pictures: Tensor) -> None:
    student, teacher = WithFeatures(1), WithFeatures(2).eval()
    scope = scope_of(student=student, teacher=teacher, images=pictures)
    distiller = run(programs("mdistiller")[0], scope)["distiller"]
    losses = distiller(pictures, LABELS)
    logits, found = student(pictures)
    with torch.no_grad():
        wanted = teacher(pictures)[1]["feats"]
    vid = distiller.terms["vid"]
    expected = nn.functional.cross_entropy(logits, LABELS)
    for n in range(3):
        mean = vid.regressors[n](found["feats"][n + 1])
        expected = expected + their_loss(mean, wanted[n + 1], vid.likelihoods[n].alpha)
    close(losses.loss, expected)


def test_the_two_networks_may_have_their_logits_in_two_places(pictures: Tensor) -> None:
    student, teacher = ForeignWRN(10, 1, 3), WithFeatures(1).eval()
    distiller = Distiller(
        student, teacher, [KD(weight=1.0)], example=pictures, logits=(lambda output: output, "[0]")
    )
    with torch.no_grad():
        expected = 16 * their_kd(student(pictures), teacher(pictures)[0], 4.0)
    close(distiller(pictures).loss, expected)


# xfer


def test_xfer_is_two_convolutions_and_a_variance_of_5_0134(
    pictures: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = randomised(ForeignWRN(10, 1, 3, "layer", "conv_shortcut"))
    teacher = randomised(ForeignWRN(10, 2, 3, "layer", "conv_shortcut")).eval()
    scope = scope_of(images=pictures, renamed_wrn=renamed_wrn)
    mapping, loading = programs("xfer")
    for role, width, network in (("student", 1, theirs), ("teacher", 2, teacher)):
        scope[role] = build(f"wrn-10-{width}", in_channels=3, num_classes=3)
        scope[role].load_state_dict(renamed_wrn(network.state_dict()))
    distiller = run(mapping, scope)["distiller"]
    assert round(scope["start"], 4) == 5.0134
    assert {group["weight_decay"] for group in scope["optimizer"].param_groups} == {5e-4}
    assert not scope["optimizer"].defaults["nesterov"]
    # where it starts: softplus(5), as their parameter does, and nothing added
    alphas = [likelihood.alpha for likelihood in distiller.terms["vid"].likelihoods]
    for alpha in alphas:
        torch.testing.assert_close(alpha.data, torch.full_like(alpha, math.log1p(math.exp(5.0))))

    channels = (32, 64, 128)
    branches = [
        nn.Sequential(nn.Conv2d(c // 2, c, 1, bias=False), nn.Conv2d(c, c, 1, bias=False)) for c in channels
    ]
    parameters = [torch.randn(c, 1, 1) for c in channels]
    state = dict(theirs.state_dict())
    for n, (branch, parameter) in enumerate(zip(branches, parameters, strict=True), 1):
        state |= {f"branch{n}.{key}": value for key, value in branch.state_dict().items()}
        state[f"variance_param{n}"] = parameter
    torch.save(state, tmp_path / "student_with_transfer.th")
    monkeypatch.chdir(tmp_path)
    run(loading, scope)
    losses = distiller.train()(pictures, LABELS)

    (found, logits), (wanted, taught) = (network(pictures, is_feat=True) for network in (theirs, teacher))
    expected = nn.functional.cross_entropy(logits, LABELS) + 4 * their_kd(logits, taught, 2.0)
    for n in range(3):
        mean, alpha = branches[n](found[n + 1]), parameters[n].flatten()
        expected = expected + 0.1 * their_loss(mean, wanted[n + 1].detach(), alpha, eps=0.0)
    close(losses.loss, expected)


@pytest.mark.parametrize("variance", [4e-5, 1e-3, 5.0134, 1e4])
def test_an_eps_of_1e_12_is_none_in_fp32(variance: float) -> None:
    exact = torch.tensor(variance, dtype=torch.float32)
    assert exact + torch.tensor(1e-12) == exact


# torchdistill


class TheirKDLoss:
    """torchdistill's, by its formula."""

    def __init__(self, temperature: float, alpha: float | None = None, beta: float | None = None) -> None:
        self.temperature, self.alpha = temperature, alpha
        self.beta = 1 - alpha if beta is None and alpha is not None else beta

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        soft = their_kd(student, teacher, self.temperature)
        if not self.alpha or labels is None:
            return soft
        assert self.beta is not None
        hard = nn.functional.cross_entropy(student, labels)
        return self.alpha * hard + self.beta * self.temperature**2 * soft


class ItselfKDLoss:
    """torchdistill's own."""

    def __init__(self, temperature: float, alpha: float | None = None, beta: float | None = None) -> None:
        declare_torchvision()
        losses = pytest.importorskip("torchdistill.losses.mid_level")
        self.loss = losses.KDLoss("out", "output", "out", "output", temperature, alpha, beta)

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        loss: Tensor = self.loss({"out": {"output": student}}, {"out": {"output": teacher}}, labels)
        return loss


@pytest.mark.parametrize("their_kind", [TheirKDLoss, ItselfKDLoss], ids=["formula", "torchdistill"])
@pytest.mark.parametrize("options", [{"alpha": 0.3}, {"alpha": 1.0}, {"alpha": 0.3, "beta": 2.0}])
def test_kd_loss_with_labels(
    their_kind: Any, options: dict[str, float], images: Tensor, labels: Tensor
) -> None:
    student, teacher, temperature = SmallNet(4).eval(), SmallNet(6).eval(), 3.0
    alpha = options["alpha"]
    kd = KD(temperature, weight=options.get("beta", 1 - alpha))
    distiller = Distiller(student, teacher, [kd], example=images, task_weight=alpha)
    expected = their_kind(temperature, **options)(student(images), teacher(images), labels)
    close(distiller(images, labels).loss, expected)


@pytest.mark.parametrize("their_kind", [TheirKDLoss, ItselfKDLoss], ids=["formula", "torchdistill"])
@pytest.mark.parametrize(
    ("options", "labelled"),
    [
        ({"alpha": 0}, True),
        ({"alpha": 0.0, "beta": 2.0}, True),
        ({"beta": 2.0}, True),
        ({"alpha": 0.3}, False),
    ],
)
def test_kd_loss_without_labels_has_no_squared_temperature(
    their_kind: Any, options: dict[str, float], labelled: bool, images: Tensor, labels: Tensor
) -> None:
    student, teacher, temperature = SmallNet(4).eval(), SmallNet(6).eval(), 3.0
    distiller = Distiller(student, teacher, [KD(temperature, weight=1 / temperature**2)], example=images)
    given = labels if labelled else None
    close(distiller(images).loss, their_kind(temperature, **options)(student(images), teacher(images), given))
