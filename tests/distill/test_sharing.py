"""What student and teacher may share, and networks that are both."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from network_states import modes
from small_networks import PAIRS, SmallNet
from torch import Tensor, nn

from vidfast.distill import KD, VID, Distiller


def test_two_networks_that_teach_each_other_both_learn(images: Tensor, labels: Tensor) -> None:
    """Each is the teacher in eval mode while the other learns, and BatchNorm counts in both."""
    a, b = SmallNet(4, dropout=0.5), SmallNet(6, dropout=0.5)
    ab, ba = (Distiller(s, t, [VID(PAIRS), KD()], example=images) for s, t in ((a, b), (b, a)))
    optimizers = [torch.optim.SGD(d.parameter_groups(lr=0.05)) for d in (ab, ba)]
    ab.train()
    ba.train()
    seen: list[bool] = []
    b.drop.register_forward_hook(lambda module, args, out: seen.append(module.training))
    for _ in range(5):
        (ab(images, labels).loss + ba(images, labels).loss).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert seen == [False, True] * 5
    for network in (a, b):
        assert all(modes(network).values())
        # As a teacher it does not count: one count a step, as a student.
        assert int(network.first[1].num_batches_tracked) == 5


def test_modules_without_parameters_may_be_shared(images: Tensor, labels: Tensor) -> None:
    shared = nn.Dropout(0.5)
    student, teacher = SmallNet(4), SmallNet(6)
    student.drop = teacher.drop = shared
    distiller = Distiller(student, teacher, [KD()], example=images)
    distiller.train()
    seen: list[bool] = []
    shared.register_forward_hook(lambda module, args, out: seen.append(module.training))
    distiller(images, labels)
    assert seen == [False, True]
    assert shared.training


class Adapted(nn.Module):
    """A backbone, an adapter and a classifier, as where several adapters share one base."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.adapter, self.fc = base, nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.adapter(self.base(x)))
        return out


SHARED: dict[str, Callable[[SmallNet, SmallNet], object]] = {
    "the same memory after load_state_dict(assign=True)": lambda s, t: t.load_state_dict(
        s.state_dict(), assign=True
    ),
    "the same memory in another Parameter": lambda s, t: setattr(
        t.first[0], "weight", nn.Parameter(s.first[0].weight.data, requires_grad=False)
    ),
    "the same Parameter in another layer": lambda s, t: setattr(t.fc, "bias", s.fc.bias),
    "a part of the teacher": lambda s, t: setattr(s, "second", t.second),
}


@pytest.mark.parametrize("way", SHARED)
def test_shared_parameters_that_are_trained_are_refused(images: Tensor, way: str) -> None:
    student, teacher = SmallNet(4), SmallNet(4)
    SHARED[way](student, teacher)
    for options in ({}, {"teacher_dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match=r"share the parameter '\S+', which is trained"):
            Distiller(student, teacher, [KD()], example=images, **options)


def test_a_term_with_a_layer_of_the_teacher_is_refused(images: Tensor) -> None:
    teacher = SmallNet(4)
    terms = [VID({"first": "second"}, regressor=lambda s, t: teacher.second)]
    with pytest.raises(ValueError, match=r"share the parameter 'second.0.weight', which is trained"):
        Distiller(SmallNet(4), teacher, terms, example=images)


def test_shared_statistics_and_buffers_do_not_move(images: Tensor, labels: Tensor) -> None:
    student, teacher = SmallNet(4), SmallNet(4)
    teacher.first[1].running_mean = student.first[1].running_mean
    distiller = Distiller(student, teacher, [KD()], example=images)
    with pytest.raises(
        RuntimeError, match=r"share the layer 'first.1' \(BatchNorm2d\), and it is in training mode"
    ):
        distiller(images, labels)
    student.first[1].eval()
    distiller(images, labels)
    shared = nn.InstanceNorm2d(4, track_running_stats=True)
    student.first[1] = teacher.first[1] = shared
    distiller = Distiller(student, teacher, [KD()], example=images)
    with pytest.raises(RuntimeError, match=r"share the layer 'first.1' \(InstanceNorm2d\)"):
        distiller(images, labels)
    normed = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)).requires_grad_(False)
    x, y = torch.randn(6, 6), labels
    distiller = Distiller(Adapted(normed), Adapted(normed), [KD()], example=x)
    with pytest.raises(
        RuntimeError, match=r"share the buffer 'base.parametrizations.weight.0._[uv]', and a run of"
    ):
        distiller(x, y)
    normed.eval()
    distiller(x, y)


def test_a_shared_backbone_is_allowed_while_it_is_frozen() -> None:
    base = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).requires_grad_(False)
    x, y = torch.randn(6, 6), torch.tensor([0, 1, 2, 0, 1, 2])
    distiller = Distiller(Adapted(base), Adapted(base), [VID({"base": "base"}), KD()], example=x)
    before = copy.deepcopy(base.state_dict())
    distiller.train()
    with pytest.raises(
        RuntimeError, match=r"share the layer 'base.1' \(BatchNorm1d\), and it is in training mode"
    ):
        distiller(x, y)
    base.eval()
    optimizer = torch.optim.SGD(distiller.parameter_groups(lr=0.1, weight_decay=0.1), momentum=0.9)
    for _ in range(3):
        distiller(x, y).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    base[0].weight.requires_grad_(True)
    with pytest.raises(
        RuntimeError, match=r"share the parameter 'base.0.weight', and it requires a gradient since"
    ):
        distiller(x, y)
    with pytest.raises(ValueError, match=r"share the parameter 'base.0.weight', which is trained"):
        Distiller(Adapted(base), Adapted(base), [KD()], example=x)
