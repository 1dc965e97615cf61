"""Where logits are found: in student and teacher, by function or by name, in training as in the probe."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from typing import Any

import pytest
import torch
from declared_operators import declare_torchvision
from small_networks import SmallNet
from torch import Tensor, nn

from vidfast.distill import KD, VID, Distiller, FeatureNetwork, TapError

IMAGES, LABELS = torch.linspace(-1, 1, 4 * 64).reshape(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
Outputs = namedtuple("Outputs", ["logits", "aux"])


class Returns(SmallNet):
    """Its logits among other things."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__(width)
        self.how = how

    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        others = {"feats": [images]}
        return {"tuple": (logits, others), "dict": {"z": logits, **others}, "second": [others, logits]}[
            self.how
        ]


@pytest.mark.parametrize(
    ("student", "teacher", "logits"),
    [
        ("tuple", "tuple", "[0]"),
        ("tuple", "tuple", lambda out: out[0]),
        ("dict", "dict", "[z]"),
        ("tuple", "dict", ("[0]", "[z]")),
        ("second", None, ("[1]", None)),
        (None, "tuple", (None, lambda out: out[0])),
    ],
)
def test_student_and_teacher_may_differ(student: Any, teacher: Any, logits: Any) -> None:
    networks = [
        SmallNet(width) if how is None else Returns(width, how) for width, how in ((3, student), (4, teacher))
    ]
    distiller = Distiller(*networks, [KD()], example=IMAGES, logits=logits)
    plain = [SmallNet(3), SmallNet(4)]
    for one, other in zip(plain, networks, strict=True):
        one.load_state_dict(other.state_dict())
    expected = Distiller(*plain, [KD()], example=IMAGES)
    torch.testing.assert_close(distiller(IMAGES, LABELS).loss, expected(IMAGES, LABELS).loss)
    again = copy.deepcopy(distiller)
    torch.testing.assert_close(again(IMAGES, LABELS).loss, distiller(IMAGES, LABELS).loss)


def test_a_name_is_kept_in_a_file() -> None:
    distiller = Distiller(
        Returns(3, "tuple"), Returns(4, "tuple"), [KD()], example=IMAGES, logits="[0]"
    ).eval()
    again = pickle.loads(pickle.dumps(distiller))
    torch.testing.assert_close(again(IMAGES, LABELS).loss, distiller(IMAGES, LABELS).loss)


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (None, TypeError, r"got a tuple of 2; give Distiller\(..., logits=function\).*logits='\[0\]'"),
        ("logits", ValueError, r"the name of an element .*'\[0\]'.*got 'logits'"),
        (
            "[2]",
            TypeError,
            r"of the teacher \(Returns\): logits='\[2\]': .* no element \[2\]; give a pair",
        ),
        (
            "[1]",
            TypeError,
            "find one Tensor in what the teacher returns, a tuple of 2, got a dict of 'feats'",
        ),
        (3, TypeError, "wanted logits as a function"),
        (("[0]",), TypeError, "a pair"),
        (("[0]", "[0]", "[0]"), TypeError, "a pair"),
    ],
)
def test_logits_that_are_not_found(logits: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Distiller(Returns(3, "tuple"), Returns(4, "tuple"), [KD()], example=IMAGES, logits=logits)


class Supervised(SmallNet):
    """More than logits in training mode, as GoogLeNet and distilled DeiTs."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__(width)
        self.aux = nn.Linear(2 * width, 3)
        self.how, self.calls = how, [0]

    def forward(self, images: Tensor) -> Any:
        self.calls[0] += 1
        features = self.second(self.first(images)).mean((2, 3))
        logits, aux = self.fc(self.drop(features)), self.aux(features)
        if not self.training:
            return (logits + aux) / 2 if self.how == "tuple" else logits
        return (logits, aux) if self.how == "tuple" else Outputs(logits, aux)


def both(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else (out[0] + out[1]) / 2


def test_heads_of_deep_supervision_are_seen_in_the_probe() -> None:
    """Not in the first step, after whatever came before it."""
    teacher = SmallNet(4)
    for how, logits in (("tuple", None), ("named", lambda out: out[0]), ("tuple", lambda out: out)):
        with pytest.raises(ValueError, match=r"in training mode too.*returns.*lambda out: out if isinstance"):
            Distiller(Supervised(3, how), teacher, [KD()], example=IMAGES, logits=logits)
    for how, pick in (("tuple", (both, None)), ("named", None)):
        distiller = Distiller(Supervised(3, how), teacher, [KD()], example=IMAGES, logits=pick)
        for mode in (True, False):
            losses = distiller.train(mode)(IMAGES, LABELS)
            assert losses.logits.shape == (4, 3)
            losses.loss.backward()


class ByProperty(Supervised):
    """Reads its mode in a property, within a generator."""

    @property
    def many(self) -> bool:
        return any(self.training for _ in range(1))

    def forward(self, images: Tensor) -> Any:
        features = self.second(self.first(images)).mean((2, 3))
        logits = self.fc(features)
        return (logits, self.aux(features)) if self.many else logits


def test_modes_that_are_read_in_a_property_are_seen() -> None:
    with pytest.raises(ValueError, match=r"in training mode too.*a tuple of 2"):
        Distiller(ByProperty(3, "tuple"), SmallNet(4), [KD()], example=IMAGES)


def test_maps_of_another_size_in_training_are_fine() -> None:
    class Segments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 3, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.first(x)
            return y if self.training else nn.functional.interpolate(y, scale_factor=2)

    distiller = Distiller(Segments(), Segments(), [VID({"first": "first"})], example=IMAGES)
    assert distiller(IMAGES).logits.shape == (4, 3, 4, 4)


def test_the_look_at_training_leaves_no_trace() -> None:
    student = Supervised(3, "named")
    student.drop.eval()
    before = copy.deepcopy(student.state_dict())
    modes = [m.training for m in student.modules()]
    Distiller(student, SmallNet(4), [VID({"first": "first"})], example=IMAGES)
    assert student.calls == [2]
    assert [m.training for m in student.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


class Counts(SmallNet):
    """What training mode changes in networks that people have: buffers in each way, a codebook, plain attributes."""

    def __init__(self) -> None:
        super().__init__(3)
        for name in ("added", "reassigned", "by_data"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("later", None)
        self.codebook = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.steps, self.called = 0, [0]

    def forward(self, images: Tensor) -> Tensor:
        self.called[0] += 1
        if self.training:
            self.added += 1
            self.reassigned = self.reassigned + 1
            self.by_data.data.fill_(1)
            self.later = torch.ones(())
            self.codebook.data += 1
            self.steps, self.kept = self.steps + 1, images
        return super().forward(images)


def test_buffers_are_as_before_and_plain_networks_run_once() -> None:
    counts = Counts()
    Distiller(counts, SmallNet(4), [KD()], example=IMAGES)
    assert counts.called == [2]
    assert counts.added == counts.reassigned == counts.by_data == counts.steps == 0
    assert counts.later is None
    assert not hasattr(counts, "kept")
    assert not counts.codebook.any()
    assert dict(counts.named_buffers())["reassigned"] is counts.reassigned
    counts.train()(IMAGES)
    assert counts.reassigned == counts.steps == counts.later == 1
    given_in_eval_mode = Counts().eval()
    Distiller(given_in_eval_mode, SmallNet(4), [KD()], example=IMAGES)
    assert given_in_eval_mode.called == [1]

    class Plain(SmallNet):
        called = 0

        def forward(self, images: Tensor) -> Tensor:
            self.called += 1
            return super().forward(images)

    plain = Plain(3)
    Distiller(plain, SmallNet(4), [KD()], example=IMAGES)
    assert plain.called == 1


def test_a_student_that_cannot_run_so_is_left_to_its_first_step() -> None:
    class WantsTargets(SmallNet):
        def forward(self, images: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("training needs targets")
            return super().forward(images)

    distiller = Distiller(WantsTargets(3), SmallNet(4), [KD()], example=IMAGES).eval()
    assert distiller(IMAGES, LABELS).loss.isfinite()


def test_torchvisions_googlenet_and_timms_distilled_deit() -> None:
    declare_torchvision()
    models, timm = pytest.importorskip("torchvision").models, pytest.importorskip("timm")
    images = torch.randn(2, 3, 64, 64)
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.Flatten(), nn.LazyLinear(3))
    teacher(images)
    googlenet = models.googlenet(num_classes=3, aux_logits=True, init_weights=False)
    distiller = Distiller(googlenet, teacher, [KD()], example=images)
    assert distiller(images, torch.tensor([0, 1])).logits.shape == (2, 3)
    deit = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=1, num_classes=3)
    deit.set_distilled_training()
    with pytest.raises(ValueError, match=r"VisionTransformerDistilled\) in training mode.*a tuple of 2"):
        Distiller(deit, teacher, [KD()], example=images)
    distiller = Distiller(deit, teacher, [KD()], example=images, logits=(both, None))
    distiller(images, torch.tensor([0, 1])).loss.backward()


class Features(nn.Module):
    """As distillation repositories write their networks: forward(x, is_feat=True)."""

    def __init__(self, width: int, order: str = "features first") -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, width, 3, 2, 1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.fc, self.order = nn.Linear(2 * width, 3), order

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Any:
        before = self.conv1(x)
        first = before.relu()
        second = self.conv2(first).relu()
        pooled = second.mean((2, 3))
        logits = self.fc(pooled)
        features = [before if preact else first, second, pooled]
        if not is_feat:
            return logits
        if self.order == "by name":
            return logits, {"one": features[0], "two": second, "pooled": pooled}
        return (features, logits) if self.order == "features first" else (logits, features)


@pytest.mark.parametrize("order", ["features first", "logits first", "by name"])
@pytest.mark.parametrize("options", [{}, {"preact": True}])
def test_features_that_a_network_returns_are_layers(order: str, options: dict[str, Any]) -> None:
    networks = [Features(3, order), Features(4, order)]
    state = torch.get_rng_state()
    student, teacher = (FeatureNetwork(n, example=IMAGES, **options) for n in networks)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(student.feat) == 3
    pairs = {"feat.0": "feat.0", "feat.1": "feat.1"}
    distiller = Distiller(student, teacher, [VID(pairs), KD()], example=IMAGES)
    losses = distiller(IMAGES, LABELS)
    losses.loss.backward()
    torch.testing.assert_close(losses.logits, networks[0](IMAGES))
    seen: list[Tensor] = []
    student.feat[0].register_forward_hook(lambda _m, _a, out: seen.append(out))
    student(IMAGES)
    before = networks[0].conv1(IMAGES)
    torch.testing.assert_close(seen[0], before if options else before.relu())
    assert set(student.state_dict()) == {f"network.{key}" for key in networks[0].state_dict()}


def test_features_without_an_example_and_with_inputs_by_name() -> None:
    student = FeatureNetwork(Features(3), count=3)
    by_name = FeatureNetwork(Features(3), example={"x": IMAGES})
    assert len(by_name.feat) == 3
    assert student(IMAGES).shape == by_name(x=IMAGES).shape == (4, 3)
    with pytest.raises(
        ValueError, match="wanted 2 features from Features, as there are layers, got 3; give count="
    ):
        FeatureNetwork(Features(3), count=2)(IMAGES)
    with pytest.raises(
        TypeError, match=r"wanted a list of features and the logits from Wrong.*\[1\]\[feats\]\[0\]"
    ):
        FeatureNetwork(Wrong(), example=IMAGES)
    for options in ({}, {"example": IMAGES, "count": 3}, {"count": 0}, {"count": True}):
        with pytest.raises(ValueError, match=r"wanted (example|count)"):
            FeatureNetwork(Features(3), **options)
    with pytest.raises(
        TypeError, match=r"wanted a network with forward\(x, is_feat=True\), got Linear, whose forward"
    ):
        FeatureNetwork(nn.Linear(1, 1), count=1)
    with pytest.raises(TypeError, match=r"wanted an nn\.Module, got function"):
        FeatureNetwork(lambda x: x, count=1)  # type: ignore[arg-type]


class Wrong(nn.Module):
    def forward(self, x: Tensor, is_feat: bool) -> Tensor:
        return x


def test_a_feature_that_is_asked_for_and_is_not_there() -> None:
    with pytest.raises(Exception, match=r"no layer 'feat.7'"):
        Distiller(
            FeatureNetwork(Features(3), count=3), Features(4), [VID({"feat.7": "conv1"})], example=IMAGES
        )
    with pytest.raises(TapError, match="returned a tuple of 2"):
        Distiller(
            nn.Sequential(Both()), Features(4), [VID({"0": "conv1"})], example=IMAGES, logits=("[0]", None)
        )


class Both(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean((2, 3)), x
