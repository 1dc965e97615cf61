"""What docs/migration.md says of other repositories' formula and checkpoints."""

from __future__ import annotations

import math

import pytest
import torch
from small_networks import PAIRS, SmallNet
from torch import Tensor, nn

from vidfast import VIDLoss
from vidfast.distill import KD, VID, Distiller, PointwiseStack

IN, MID, OUT = 4, 6, 5


def regressor() -> nn.Sequential:
    widths = ((IN, MID), (MID, MID), (MID, OUT))
    layers: list[nn.Module] = []
    for fan_in, fan_out in widths:
        layers += [nn.Conv2d(fan_in, fan_out, 1, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def their_loss(mean: Tensor, target: Tensor, parameter: Tensor) -> Tensor:
    variance = (torch.log(1.0 + torch.exp(parameter)) + 1e-5).view(1, -1, 1, 1)
    return (0.5 * ((mean - target) ** 2 / variance + torch.log(variance))).mean()


@pytest.mark.parametrize(
    ("prefix", "name", "shape"),
    [
        ("", "log_scale", (OUT,)),
        ("regressor_dict.regressor1.", "soft_plus_param", (OUT,)),
        ("", "alpha", (1, OUT, 1, 1)),
    ],
)
def test_their_checkpoints_give_their_loss(prefix: str, name: str, shape: tuple[int, ...]) -> None:
    theirs, parameter = regressor(), torch.randn(shape)
    state = {f"{prefix}regressor.{key}": value for key, value in theirs.state_dict().items()}
    state |= {f"{prefix}{name}": parameter, "student_model.fc.weight": torch.zeros(1)}
    loss = VIDLoss(IN, MID, OUT)
    wanted = "" if prefix else ("regressor.", name)
    loss.load_state_dict(
        {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix or wanted)}
    )
    student, teacher = torch.randn(3, IN, 6, 6), torch.randn(3, OUT, 6, 6)
    expected = their_loss(theirs(student), teacher, parameter.flatten())
    torch.testing.assert_close(loss(student, teacher), expected)


def test_a_checkpoint_without_variances_keeps_the_initial_one() -> None:
    theirs = regressor()
    state = {f"module.regressors.1.{key}": value for key, value in theirs.state_dict().items()}
    prefix = "module.regressors.1."
    loss = VIDLoss(IN, MID, OUT)
    ours = {
        f"regressor.{key[len(prefix) :]}": value for key, value in state.items() if key.startswith(prefix)
    }
    assert loss.load_state_dict(ours, strict=False).missing_keys == ["log_scale"]
    student, teacher = torch.randn(3, IN, 6, 6), torch.randn(3, OUT, 6, 6)
    initial = torch.full((OUT,), math.log(math.exp(5.0 - 1e-5) - 1.0))
    torch.testing.assert_close(loss(student, teacher), their_loss(theirs(student), teacher, initial))


def test_a_distiller_takes_their_regressors_and_gives_their_loss(images: Tensor, labels: Tensor) -> None:
    """RepDistiller's three weights, its hidden width, and the renaming of its keys."""
    student, teacher = SmallNet(4).eval(), SmallNet(6)
    terms = [
        VID(PAIRS, weight=0.5, regressor=PointwiseStack(depth=3, width=1.0)),
        KD(temperature=4.0, weight=0.9),
    ]
    distiller = Distiller(student, teacher, terms, example=images, task_weight=0.1)
    theirs = [VIDLoss(4, 6, 6), VIDLoss(8, 12, 12)]
    renamed = {f"student.{key}": value for key, value in student.state_dict().items()}
    for pair, loss in enumerate(theirs):
        nn.init.normal_(loss.log_scale)
        for key, value in loss.state_dict().items():
            stem = f"terms.vid.regressors.{pair}" if key.startswith("regressor.") else None
            name = key.removeprefix("regressor.")
            renamed[f"{stem}.{name}" if stem else f"terms.vid.likelihoods.{pair}.alpha"] = value
    distiller.load_state_dict(renamed)
    losses = distiller(images, labels)
    teacher.eval()
    with torch.no_grad():
        features = [[net.first(images), net.second(net.first(images))] for net in (student, teacher)]
        vid = sum(
            their_loss(loss.regressor(s), t, loss.log_scale)
            for loss, s, t in zip(theirs, *features, strict=True)
        )
        log_s, p_t = (student(images) / 4).log_softmax(1), (teacher(images) / 4).softmax(1)
        kd = nn.functional.kl_div(log_s, p_t, reduction="sum") * 16 / len(images)
        task = nn.functional.cross_entropy(student(images), labels)
    torch.testing.assert_close(losses.loss.detach(), 0.1 * task + 0.9 * kd + 0.5 * vid, rtol=1e-5, atol=1e-6)
