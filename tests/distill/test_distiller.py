"""Distiller: what it owns, what it leaves alone, and what its loss is made of."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import PAIRS, SmallNet
from torch import Tensor, nn
from torch.nn import functional as F

from vidfast.distill import (
    METHODS,
    VID,
    Activations,
    Batch,
    Distiller,
    FitNet,
    Method,
    ParameterGroup,
    TapError,
    UnknownNameError,
)


class Hint(Method):
    """A user's method: 1/2 ||t - W s||^2, averaged over elements."""

    def __init__(self, layer: str, **options: Any) -> None:
        super().__init__(**options)
        self.student_layers = self.teacher_layers = (layer,)
        self.layer = layer

    def build(self, batch: Batch) -> None:
        s, t = batch.student.taps[self.layer], batch.from_teacher.taps[self.layer]
        self.regressor = nn.Conv2d(s.shape[1], t.shape[1], 1)

    def forward(self, batch: Batch, factor: float) -> Tensor:
        r = batch.from_teacher.taps[self.layer] - self.regressor(batch.student.taps[self.layer])
        return factor * 0.5 * r.pow(2).mean()


@pytest.fixture
def distiller(student: SmallNet, teacher: SmallNet, images: Tensor) -> Distiller:
    return Distiller(student, teacher, [VID(PAIRS, weight=2.0), Hint("first", weight=0.5)], example=images)


def test_loss_is_the_weighted_sum_of_its_terms(distiller: Distiller, images: Tensor, labels: Tensor) -> None:
    distiller.eval()
    losses = distiller(images, labels)
    assert list(losses.terms) == ["task", "vid", "hint"]
    assert float(losses.loss.detach()) == pytest.approx(
        sum(float(v) for v in losses.terms.values()), rel=1e-6
    )
    torch.testing.assert_close(losses.terms["task"], F.cross_entropy(losses.logits, labels).detach())
    torch.testing.assert_close(losses.logits, distiller.student(images))
    assert not any(term.requires_grad for term in losses.terms.values())
    # Every term is proportional to its weight, and the whole to scale, the task's term included.
    distiller.terms["vid"].weight = 6.0
    heavier = distiller(images, labels).terms
    assert float(heavier["vid"]) == pytest.approx(3 * float(losses.terms["vid"]), rel=1e-5)
    assert float(heavier["hint"]) == pytest.approx(float(losses.terms["hint"]), rel=1e-6)
    for name, value in distiller(images, labels, scale=0.25).terms.items():
        assert float(value) == pytest.approx(0.25 * float(heavier[name]), rel=1e-5)


def test_without_labels_the_teacher_alone_teaches(distiller: Distiller, images: Tensor) -> None:
    assert list(distiller(images).terms) == ["vid", "hint"]


def test_without_terms_it_is_the_student_alone(student: SmallNet, images: Tensor, labels: Tensor) -> None:
    alone = Distiller(student.eval(), task_weight=0.3)
    losses = alone(images, labels)
    torch.testing.assert_close(losses.loss, 0.3 * F.cross_entropy(student(images), labels))
    with pytest.raises(ValueError, match="nothing to learn from"):
        alone(images)


def test_the_probe_leaves_no_trace(student: SmallNet, teacher: SmallNet, images: Tensor) -> None:
    student.train()
    student.second[1].eval()
    modes = [m.training for m in student.modules()]
    before = copy.deepcopy((student.state_dict(), teacher.state_dict()))
    random_state = torch.get_rng_state()
    # Without terms that draw their parameters at random, the random state must be what it was.
    Distiller(student, teacher, [NoParameters("first")], example=images)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in student.modules()] == modes
    for old, new in zip(before, (student.state_dict(), teacher.state_dict()), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
        assert any("running_mean" in key for key in old)
        assert any("num_batches_tracked" in key for key in old)


class NoParameters(Hint):
    def build(self, batch: Batch) -> None:
        # Dropout in the student would draw from the random state in training mode.
        assert not batch.student.logits.requires_grad


def test_everything_learned_is_in_parameters_groups_and_state(distiller: Distiller) -> None:
    names = {name for name, _ in distiller.named_parameters()}
    assert {n for n in names if n.startswith("student.")} == {
        f"student.{n}" for n, _ in distiller.student.named_parameters()
    }
    assert {n for n in names if not n.startswith("student.")} == {
        "terms.vid.regressors.0.0.weight",
        "terms.vid.regressors.0.2.weight",
        "terms.vid.regressors.0.4.weight",
        "terms.vid.regressors.1.0.weight",
        "terms.vid.regressors.1.2.weight",
        "terms.vid.regressors.1.4.weight",
        "terms.vid.likelihoods.0.alpha",
        "terms.vid.likelihoods.1.alpha",
        "terms.hint.regressor.weight",
        "terms.hint.regressor.bias",
    }
    grouped = [id(p) for group in distiller.parameter_groups(0.1) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in distiller.parameters())
    assert names <= set(distiller.state_dict())
    assert not any("teacher" in key for key in distiller.state_dict())


def test_a_method_that_hides_a_parameter_is_refused(student: SmallNet, teacher: SmallNet) -> None:
    class Hides(Hint):
        def parameter_groups(self) -> list[ParameterGroup]:
            return [ParameterGroup([self.regressor.weight])]

    with pytest.raises(RuntimeError, match=r"'terms.hides.regressor.bias' is in 0 parameter groups"):
        Distiller(student, teacher, [Hides("first")], example=torch.zeros(1, 1, 8, 8))


def test_what_is_frozen_now_is_in_the_groups_and_trains_once_it_is_unfrozen(
    student: SmallNet, teacher: SmallNet, images: Tensor, labels: Tensor
) -> None:
    student.first.requires_grad_(False)
    vid = VID(PAIRS)
    distiller = Distiller(student, teacher, [vid], example=images)
    vid.likelihoods.requires_grad_(False)
    optimizer = torch.optim.SGD(distiller.parameter_groups(0.1, weight_decay=0.1))
    watched = {"first": student.first[0].weight, "alpha": vid.likelihoods[0].alpha}

    def moved() -> set[str]:
        before = {name: p.detach().clone() for name, p in watched.items()}
        distiller(images, labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {name for name, p in watched.items() if not torch.equal(p, before[name])}

    assert moved() == set()
    distiller.requires_grad_(True)
    assert moved() == {"first", "alpha"}


def test_the_teacher_is_frozen(distiller: Distiller, images: Tensor, labels: Tensor) -> None:
    teacher = distiller.teacher
    assert teacher is not None
    before = copy.deepcopy(teacher.state_dict())
    own = {id(p) for p in distiller.parameters()}
    assert not own & {id(p) for p in teacher.parameters()}
    distiller.train()
    assert distiller.student.training
    teacher.train()
    teacher.second.eval()
    modes = [module.training for module in teacher.modules()]
    optimizer = torch.optim.SGD(distiller.parameter_groups(0.1), lr=0.1)
    for _ in range(2):
        distiller(images, labels).loss.backward()
        optimizer.step()
    assert [module.training for module in teacher.modules()] == modes
    assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in before.items())


def test_the_teacher_moves_along_and_is_replaced_by_nobody(distiller: Distiller) -> None:
    distiller.double()
    assert distiller.teacher is not None
    for module in (distiller.student, distiller.teacher, distiller.terms):
        assert {p.dtype for p in module.parameters()} == {torch.float64}
    distiller.to("meta")
    assert all(p.is_meta for p in distiller.teacher.parameters())
    with pytest.raises(AttributeError, match=r"teacher is fixed"):
        distiller.teacher = nn.Identity()
    assert "teacher" not in dict(distiller.named_children())


def test_works_in_fp64_and_bf16_autocast(distiller: Distiller, images: Tensor, labels: Tensor) -> None:
    distiller.eval()
    expected = float(distiller(images, labels).loss)
    with torch.autocast("cpu", torch.bfloat16):
        losses = distiller(images, labels)
        losses.loss.backward()
    assert float(losses.loss.detach()) == pytest.approx(expected, rel=0.02)
    double = distiller.double()(images.double(), labels)
    assert double.terms["vid"].dtype == torch.float64
    assert float(double.loss) == pytest.approx(expected, rel=1e-5)


def test_state_dict_round_trip(
    distiller: Distiller, teacher: SmallNet, images: Tensor, labels: Tensor
) -> None:
    optimizer = torch.optim.SGD(distiller.parameter_groups(0.1), lr=0.1)
    distiller(images, labels).loss.backward()
    optimizer.step()
    other = Distiller(
        SmallNet(4, 0.3),
        copy.deepcopy(teacher),
        [VID(PAIRS, weight=2.0), Hint("first", weight=0.5)],
        example=images,
    )
    other.load_state_dict(distiller.state_dict())
    assert torch.equal(other.eval()(images, labels).loss, distiller.eval()(images, labels).loss)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_independent(distiller: Distiller, images: Tensor, labels: Tensor, way: str) -> None:
    distiller.eval()
    expected = distiller(images, labels).loss
    other = copy.deepcopy(distiller) if way == "deepcopy" else pickle.loads(pickle.dumps(distiller))
    torch.testing.assert_close(other(images, labels).loss, expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    torch.testing.assert_close(distiller(images, labels).loss, expected)


def test_a_student_in_place_of_another_is_tapped_and_judged_as_the_first(
    distiller: Distiller, images: Tensor, labels: Tensor
) -> None:
    before, distiller.student = distiller.student, SmallNet(4).eval()
    losses = distiller(images, labels)
    losses.loss.backward()
    torch.testing.assert_close(losses.logits, distiller.student(images))
    assert before.first[0].weight.grad is None
    assert distiller.student.first[0].weight.grad is not None
    # Also where no assignment tells of it.
    distiller.add_module("student", SmallNet(4).eval())
    torch.testing.assert_close(distiller(images, labels).logits, distiller.student(images))
    distiller.student = nn.Sequential(SmallNet(4))
    with pytest.raises(
        UnknownNameError, match=r"student \(Sequential\) has no layer 'first': did you mean '0.first'"
    ):
        distiller(images, labels)
    distiller.student = distiller.teacher
    with pytest.raises(ValueError, match="share the parameter"):
        distiller(images, labels)


def test_removed_taps_leave_the_networks_bare(distiller: Distiller, images: Tensor) -> None:
    distiller.remove_taps()
    for network in (distiller.student, distiller.teacher):
        assert network is not None
        assert not any(m._forward_hooks for m in network.modules())
    distiller.student(images)
    with pytest.raises(RuntimeError, match=r"taps were removed by remove_taps\(\)"):
        distiller(images)


@pytest.mark.parametrize(
    "terms",
    [
        lambda: [VID({"first": "secnd"})],
        lambda: [VID(PAIRS), Failing("first")],
        lambda: [VID(PAIRS), FitNet([("first", "first"), ("fc", "second")])],
    ],
)
def test_a_failed_construction_leaves_no_hooks_and_terms_that_can_be_used(
    student: SmallNet, teacher: SmallNet, images: Tensor, terms: Any
) -> None:
    made = terms()
    with pytest.raises(ValueError, match=r"secnd|cannot|pair 'fc' -> 'second'"):
        Distiller(student, teacher, made, example=images)
    for network in (student, teacher):
        assert not any(m._forward_hooks for m in network.modules())
    assert not any(term.built for term in made)


class Failing(Hint):
    def build(self, batch: Batch) -> None:
        raise ValueError("cannot")


def test_inputs_modified_in_place_are_refused(images: Tensor, labels: Tensor) -> None:
    class Modifies(SmallNet):
        active = False

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.relu_() if self.active else images)

    student, teacher = Modifies(4), Modifies(6)
    distiller = Distiller(student, teacher, [VID(PAIRS)], example=images)
    distiller(images, labels)
    for network, role in ((teacher, "teacher"), (student, "student")):
        network.active = True
        for inputs in (images.clone(), (images.clone(),), {"images": images.clone()}):
            with pytest.raises(RuntimeError, match=rf"the {role} \(Modifies\) modified its inputs in place"):
                distiller(inputs, labels)
        network.active = False
    # Nobody else reads the inputs of a student without terms.
    student.active = True
    Distiller(student)(images.clone(), labels)


def test_kept_activations_of_the_teacher_are_used(
    distiller: Distiller, images: Tensor, labels: Tensor
) -> None:
    distiller.eval()
    expected = distiller(images, labels)
    assert distiller.teacher is not None
    distiller.teacher.train()
    kept = distiller.teacher_activations(images)
    assert set(kept.taps) == {"first", "second"}
    assert not kept.logits.requires_grad
    distiller.teacher.forward = None  # type: ignore[assignment]
    losses = distiller(images, labels, teacher=kept)
    assert torch.equal(losses.loss, expected.loss)
    # A part of the batch, as a loader of kept activations would give it.
    part = Activations({name: t[:2] for name, t in kept.taps.items()}, kept.logits[:2])
    distiller(images[:2], labels[:2], teacher=part).loss.backward()
    with pytest.raises(ValueError, match="this batch of 6, got those of 2"):
        distiller(images, labels, teacher=part)
    with pytest.raises(ValueError, match="lack 'second'"):
        distiller(images, labels, teacher=Activations({"first": kept.taps["first"]}, kept.logits))
    with pytest.raises(TypeError, match=r"what teacher_activations\(\) gave as teacher=, got dict"):
        distiller(images, labels, teacher=kept.taps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no teacher"):
        Distiller(distiller.student).teacher_activations(images)


def test_kept_activations_get_no_gradient(distiller: Distiller, images: Tensor, labels: Tensor) -> None:
    kept = distiller.teacher_activations(images)
    leaves = {name: t.clone().requires_grad_() for name, t in kept.taps.items()}
    distiller(images, labels, teacher=Activations(leaves, kept.logits)).loss.backward()
    assert all(t.grad is None for t in leaves.values())


def test_a_tap_that_gets_no_gradient_is_refused(images: Tensor, labels: Tensor) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(SmallNet):
        def forward(self, images: Tensor) -> Tensor:
            features = checkpoint(self.second, self.first(images), use_reentrant=True).mean((2, 3))
            logits: Tensor = self.fc(features)
            return logits

    distiller = Distiller(Checkpointed(4), SmallNet(6), [VID(PAIRS)], example=images)
    with pytest.raises(TapError, match=r"'second'.*ran without gradients"):
        distiller(images, labels)


def test_inputs_may_be_tuples_and_mappings_and_outputs_objects(images: Tensor, labels: Tensor) -> None:
    class TwoInputs(SmallNet):
        def forward(self, images: Tensor, shift: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"logits": super().forward(images + shift), "other": shift}

    shift = torch.ones(())
    distiller = Distiller(
        TwoInputs(4).eval(), TwoInputs(6), [VID(PAIRS)], example={"images": images, "shift": shift}
    )
    by_name = distiller({"images": images, "shift": shift}, labels)
    by_place = distiller((images, shift), labels)
    torch.testing.assert_close(by_name.loss, by_place.loss)
    torch.testing.assert_close(by_name.logits, SmallNet.forward(distiller.student, images + shift))


def test_own_logits_and_task_loss(images: Tensor) -> None:
    class Returns(SmallNet):
        def forward(self, images: Tensor) -> Any:
            return [super().forward(images)]

    with pytest.raises(TypeError, match="logits=function"):
        Distiller(Returns(4))(images, torch.zeros(6))
    distiller = Distiller(
        Returns(4).eval(), logits=lambda out: out[0], task_loss=lambda z, y: (z.mean(1) - y).abs().mean()
    )
    assert distiller(images, torch.zeros(6)).loss.ndim == 0


def test_in_place_modification_is_named_and_cured_by_clone_taps(images: Tensor) -> None:
    student = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(128, 3))
    teacher = copy.deepcopy(student)
    with pytest.raises(RuntimeError, match=r"layer '0' was modified in place"):
        Distiller(student, teacher, [VID({"0": "0"})], example=images)
    distiller = Distiller(student, teacher, [VID({"0": "0"})], example=images, clone_taps=True)
    distiller(images).loss.backward()
    assert student[0].weight.grad is not None


def test_wrong_use_is_refused(student: SmallNet, teacher: SmallNet, images: Tensor) -> None:
    with pytest.raises(TypeError, match=r"wanted nn.Modules"):
        Distiller("resnet")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="wanted Method objects"):
        Distiller(student, teacher, [nn.Linear(1, 1)], example=images)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="wanted a sequence of Method objects as terms, got one VID"):
        Distiller(student, teacher, VID(PAIRS), example=images)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'vid' needs a teacher"):
        Distiller(student, None, [VID(PAIRS)], example=images)
    with pytest.raises(ValueError, match="two terms are called 'vid'"):
        Distiller(student, teacher, [VID(PAIRS), VID(PAIRS)], example=images)
    with pytest.raises(ValueError, match="wanted example="):
        Distiller(student, teacher, [VID(PAIRS)])
    with pytest.raises(ValueError, match="finite task_weight"):
        Distiller(student, task_weight=float("inf"))
    with pytest.raises(UnknownNameError, match=r"student \(SmallNet\) has no layer 'firts'.*'first'"):
        Distiller(student, teacher, [VID({"firts": "first"})], example=images)
    with pytest.raises(UnknownNameError, match=r"teacher.*'secnd'.*'second'"):
        Distiller(student, teacher, [VID({"first": "secnd"})], example=images)
    with pytest.raises(ValueError, match=r"share the parameter 'first.0.weight'"):
        Distiller(student, student, [VID(PAIRS)], example=images)
    term = VID(PAIRS)
    Distiller(student, teacher, [term], example=images)
    with pytest.raises(ValueError, match="belongs to another Distiller"):
        Distiller(student, teacher, [term], example=images)


def test_two_terms_of_one_method_with_names_of_their_own(
    student: SmallNet, teacher: SmallNet, images: Tensor
) -> None:
    terms = [VID({"first": "first"}, name="low"), VID({"second": "second"}, name="high")]
    assert list(Distiller(student, teacher, terms, example=images)(images).terms) == ["low", "high"]


def test_methods_of_users_register_like_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "_things", METHODS._things.copy())
    assert METHODS["vid"] is VID
    METHODS.register("test-only-hint")(Hint)
    assert METHODS["test-only-hint"] is Hint
    with pytest.raises(ValueError, match="registered already"):
        METHODS.register("vid")(Hint)


def test_empty_batches_losses_that_are_no_scalars_and_odd_scales(images: Tensor) -> None:
    labels = torch.zeros(len(images), dtype=torch.int64)
    distiller = Distiller(SmallNet(4))
    with pytest.raises(ValueError, match="the batch is empty"):
        distiller(images[:0], labels[:0])
    half = distiller(images, labels, scale=np.float32(0.5))
    assert half.loss == 0.5 * distiller(images, labels).loss
    assert distiller(images, labels, scale=torch.tensor(0.5)).loss == half.loss
    unreduced = Distiller(SmallNet(4), task_loss=torch.nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match="task_loss that gives a scalar"):
        unreduced(images, labels)
