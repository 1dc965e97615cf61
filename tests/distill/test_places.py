"""Names of taps: layers, elements of what they return, their inputs; and what is said where there is none."""

from __future__ import annotations

import copy
import re
from collections import namedtuple
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from vidfast.distill import KD, VID, VIDLP, Distiller, LwF, TapError, Taps, UnknownNameError
from vidfast.distill.places import Place, parse

Named = namedtuple("Named", ["hidden", "more"])


class Both(NamedTuple):
    out: Tensor
    preact: Tensor


class Stage(nn.Module):
    """(after the ReLU, before it), as stages of distillation repositories' ResNets."""

    def __init__(self, fan_in: int, fan_out: int, kind: Any = tuple) -> None:
        super().__init__()
        self.conv, self.kind = nn.Conv2d(fan_in, fan_out, 3, 2, 1), kind

    def forward(self, x: Tensor) -> Any:
        before = self.conv(x)
        out = before.relu()
        if self.kind is dict:
            return {"out": out, "more": [before, {"preact": before}]}
        return self.kind((out, before)) if self.kind is tuple else self.kind(out, before)


class Net(nn.Module):
    def __init__(self, width: int, kind: Any = tuple) -> None:
        super().__init__()
        self.layer1, self.layer2 = Stage(1, width, kind), Stage(width, 2 * width)
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer1(x)
        first = first["out"] if isinstance(first, dict) else first[0]
        logits: Tensor = self.head(self.layer2(first)[0].mean((2, 3)))
        return logits


IMAGES, LABELS = torch.linspace(-1, 1, 4 * 64).reshape(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])


def record(network: nn.Module, names: list[str], **options: Any) -> dict[str, Tensor]:
    taps = Taps(network, names, **options)
    with taps.recording() as activations:
        network(IMAGES)
        return activations()


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("layer1", Place("layer1", "layer1")),
        ("layer1[0]", Place("layer1[0]", "layer1", False, (0,))),
        ("a.b[-1][x]['y']", Place("a.b[-1][x]['y']", "a.b", False, (-1, "x", "y"))),
        ("head.input", Place("head.input", "head", True)),
        ("head.input[1][0]", Place("head.input[1][0]", "head", True, (1, 0))),
        ("[1][feats][0]", Place("[1][feats][0]", "", False, (1, "feats", 0))),
        ("odd.input", Place("odd.input", "odd.input")),
        ("odd.input[0]", Place("odd.input[0]", "odd.input", False, (0,))),
    ],
)
def test_names_are_taken_apart(name: str, place: Place) -> None:
    """A layer called "input" is that layer."""
    assert parse(name, {"", "layer1", "a.b", "head", "odd", "odd.input"}) == place


def test_elements_and_inputs_are_what_the_network_computes() -> None:
    network = Net(2).eval()
    names = ["layer1[1]", "head.input", "layer1[0]", "layer2.input", "layer2[-1]", "head"]
    found = record(network, names)
    assert list(found) == names
    out, before = network.layer1(IMAGES)
    after, last = network.layer2(out)
    expected = [before, after.mean((2, 3)), out, out, last, network(IMAGES)]
    for name, value in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (dict, "layer1[more][1][preact]"),
        (dict, "layer1[more][0]"),
        (Both, "layer1[preact]"),
        (Both, "layer1[1]"),
        (Named, "layer1[more]"),
    ],
)
def test_elements_by_name_and_of_elements(kind: Any, name: str) -> None:
    network = Net(2, kind)
    torch.testing.assert_close(record(network, [name])[name], network.layer1.conv(IMAGES))


def test_the_networks_own_output() -> None:
    class Returns(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), {"feats": [self.layer1.conv(x)]}

    network = Returns(2)
    found = record(network, ["[1][feats][0]", "[0]"])
    torch.testing.assert_close(found["[1][feats][0]"], network.layer1.conv(IMAGES))
    torch.testing.assert_close(found["[0]"], network(IMAGES)[0])


class Plain:
    """An output that is none of Python's containers."""

    def __init__(self, x: Tensor) -> None:
        self.seen, self._cache = x, {"x": x}


class Gives(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, Given(how)

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x=x)
        return x.mean((2, 3))


class Given(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Any:
        return Plain(2 * x) if self.how == "object" else {"0": 2 * x, "1": x, "a]": x}


def test_outputs_of_other_kinds_and_a_lone_argument_by_name() -> None:
    """Every name that an error gives is one that works."""
    assert torch.equal(record(Gives("levels"), ["layer.input"])["layer.input"], IMAGES)
    for how, names in (("object", ["layer[seen]"]), ("levels", ["layer[0]", "layer[1]"])):
        for wrong in ("layer", "layer[y]"):
            with pytest.raises(TapError) as caught:
                record(Gives(how), [wrong])
            assert re.findall(r"'(layer\[\w+\])'", str(caught.value).split("wanted:")[1]) == names
        for name in names:
            assert record(Gives(how), [name])[name].shape == IMAGES.shape


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = Mix()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mix(x, 2 * x, scale=x + 1)
        return y


class Mix(nn.Module):
    def forward(self, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return a + b * scale


def test_arguments_by_position_and_by_name() -> None:
    found = record(Asks(), ["mix.input", "mix.input[1]", "mix.input[scale]"])
    assert torch.equal(found["mix.input"], IMAGES)
    assert torch.equal(found["mix.input[1]"], 2 * IMAGES)
    assert torch.equal(found["mix.input[scale]"], IMAGES + 1)


@pytest.mark.parametrize(
    ("network", "name", "message"),
    [
        (Net(2), "layer1", r"\(Stage\) returned a tuple of 2, wanted one Tensor; .*'layer1\[0\]', 'layer1\[1\]'"),
        (Net(2), "layer1[2]", r"'layer1\[2\]'.*a tuple of 2, which has no element \[2\].*'layer1\[0\]', 'layer1\[1\]'"),
        (Net(2), "layer1[0][1]", r"one Tensor, which has no elements.*tap 'layer1\[0\]'"),
        (Net(2), "head[0]", r"one Tensor, which has no elements.*tap 'head'"),
        (Net(2, dict), "layer1[preact]", r"a dict of 'out', 'more'.*'layer1\[out\]', 'layer1\[more\]\[0\]'"),
        (Net(2, dict), "layer1[more]", r"returned a list of 2, wanted one Tensor; .*'layer1\[more\]\[0\]'"),
        (Asks(), "mix.input[2]", r"with 2 by position, 'scale' by name; .*'mix.input\[0\]'.*'mix.input\[scale\]'"),
        (Asks(), "mix.input[0][0]", r"one Tensor, which has no elements.*tap 'mix.input\[0\]'"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_an_error_that_names_what_is(
    network: nn.Module, name: str, message: str
) -> None:
    with pytest.raises(TapError, match=message):
        record(network, [name])


@pytest.mark.parametrize("name", ["layer9[0]", "head.inputs", "layer1[0", "layer1]", "", "layer1[]"])
def test_names_of_no_layer_are_unknown(name: str) -> None:
    with pytest.raises(UnknownNameError, match="has no layer"):
        record(Net(2), [name])


class Overwrites(nn.Module):
    """A head that changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.head = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(128, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.conv(x))
        return y


def test_an_input_that_its_layer_modifies_is_an_error_or_a_copy() -> None:
    network = Overwrites()
    with pytest.raises(TapError, match=r"input of layer 'head' was modified in place.*clone=True"):
        record(network, ["head.input"])
    found = record(network, ["head.input"], clone=True)["head.input"]
    torch.testing.assert_close(found, network.conv(IMAGES))
    assert (found < 0).any()


def test_nothing_stays_on_the_network_or_alive() -> None:
    network = Net(2)
    taps = Taps(network, ["layer1[0]", "head.input"])
    with taps.recording() as activations:
        network(IMAGES)
        assert len(activations()) == 2
        assert network.head._forward_pre_hooks
    assert not network.head._forward_pre_hooks
    assert not network.layer1._forward_hooks
    assert all(not tap.outputs for tap in taps._taps)
    again = copy.deepcopy(taps)
    assert again.layers == taps.layers == ("layer1[0]", "head.input")


@pytest.mark.parametrize("compiles", ["whole", "network", "before"])
def test_elements_and_inputs_in_compiled_graphs(compiles: str) -> None:
    torch._dynamo.reset()
    student, teacher = Net(2), Net(3)
    plain = Distiller(copy.deepcopy(student), teacher, terms(), example=IMAGES)
    if compiles == "network":
        student.compile(backend="eager")
    compiled = torch.compile(student, backend="eager") if compiles == "before" else student
    one = Distiller(compiled, teacher, terms(), example=IMAGES)
    one.terms.load_state_dict(plain.terms.state_dict())
    called = torch.compile(one, backend="eager", fullgraph=True) if compiles == "whole" else one
    for _ in range(2):
        found, expected = called(IMAGES, LABELS), plain(IMAGES, LABELS)
        torch.testing.assert_close(found.terms, expected.terms)
    found.loss.backward()
    assert all(p.grad is not None for p in one.student.parameters())


def terms() -> list[Any]:
    return [
        VID({"layer1[0]": "layer1[1]", "layer2.input": "layer1[0]"}),
        VIDLP("head.input"),
        LwF("head.input"),
    ]


def test_the_penultimate_vector_of_a_network_without_a_layer_for_it() -> None:
    """The classifier's input, for the methods that read it: their loss is that on the vector itself."""
    student, teacher = Net(2), Net(3)
    distiller = Distiller(student, teacher, [LwF("head.input", weight=1.0), KD()], example=IMAGES)
    term: Any = distiller.terms["lwf"]
    losses = distiller(IMAGES)
    vector = student.layer2(student.layer1(IMAGES)[0])[0].mean((2, 3))
    expected = 0.5 * (term.head(vector) - teacher(IMAGES)).square().mean()
    torch.testing.assert_close(losses.terms["lwf"], expected.detach())
    losses.loss.backward()
    assert student.layer1.conv.weight.grad is not None


def test_recurrent_and_attention_layers() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 6, batch_first=True)
            self.attend = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.lstm(x[:, 0])
            z: Tensor = self.attend(y, y, y)[0].mean(1)
            return z

    found = record(Reads(), ["lstm[0]", "lstm[1][0]", "attend[0]", "attend.input[2]"])
    assert found["lstm[0]"].shape == found["attend[0]"].shape == (4, 8, 6)
    assert found["lstm[1][0]"].shape == (1, 4, 6)
    assert found["attend.input[2]"] is found["lstm[0]"]
