"""Taps: what they record, when they refuse, and that they leave the network as it was."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from vidfast.distill import TapError, Taps, UnknownNameError


def record(network: nn.Module, taps: Taps, inputs: Tensor) -> dict[str, Tensor]:
    with taps.recording() as activations:
        network(inputs)
        return activations()


def test_records_what_the_layers_return(student: nn.Module, images: Tensor) -> None:
    student.eval()
    found = record(student, Taps(student, ["first", "second.0"]), images)
    first = student.first(images)
    assert list(found) == ["first", "second.0"]
    torch.testing.assert_close(found["first"], first, rtol=0, atol=0)
    torch.testing.assert_close(found["second.0"], student.second[0](first), rtol=0, atol=0)


def test_gradients_flow_through_a_tap(student: nn.Module, images: Tensor) -> None:
    record(student, Taps(student, ["first"]), images)["first"].sum().backward()
    assert student.first[0].weight.grad is not None
    assert student.second[0].weight.grad is None


def test_holds_nothing_outside_of_recording(student: nn.Module, images: Tensor) -> None:
    taps = Taps(student, ["first"])
    record(student, taps, images)
    student(images)
    assert all(tap.output is None for tap in taps._taps)
    with taps.recording() as activations, pytest.raises(TapError, match="'first' was not called"):
        activations()


def test_nothing_is_held_after_an_exception(student: nn.Module, images: Tensor) -> None:
    taps = Taps(student, ["first"])

    def fail() -> None:
        with taps.recording():
            student(images)
            raise KeyError("elsewhere")

    with pytest.raises(KeyError):
        fail()
    assert all(tap.output is None and not tap.recording for tap in taps._taps)


def test_a_lone_str_is_no_sequence_of_names(student: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"wanted the names of layers, such as \['first'\], got one str"):
        Taps(student, "first")


@pytest.mark.parametrize(
    ("wanted", "hint"), [("frist", "first"), ("second.9", "second.0"), ("secnd.0", "second.0")]
)
def test_unknown_layer_lists_near_matches(student: nn.Module, wanted: str, hint: str) -> None:
    with pytest.raises(UnknownNameError, match=rf"no layer '{wanted}'.*did you mean.*'{hint}'"):
        Taps(student, ["first", wanted], role="student")


def test_unknown_layer_that_is_near_nothing_lists_what_there_is(student: nn.Module) -> None:
    with pytest.raises(UnknownNameError, match="there are 'first'"):
        Taps(student, ["qqqqqqqqqq"])


def test_the_network_itself_is_no_layer(student: nn.Module) -> None:
    with pytest.raises(UnknownNameError):
        Taps(student, [""])


class ModifiesInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(1, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.relu(self.norm(x)))
        return out


@pytest.mark.parametrize("grad", [True, False])
def test_in_place_modification_afterwards_is_an_error_naming_the_layer(images: Tensor, grad: bool) -> None:
    network = ModifiesInPlace()
    taps = Taps(network, ["norm"])
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(TapError, match=r"'norm' was modified in place.*clone=True"),
    ):
        record(network, taps, images)


def test_tapping_the_layer_that_modifies_in_place_is_fine(images: Tensor) -> None:
    network = ModifiesInPlace().eval()
    found = record(network, Taps(network, ["relu"]), images)
    torch.testing.assert_close(found["relu"], network.norm(images).relu())


def test_clone_records_the_value_before_the_modification(images: Tensor) -> None:
    network = ModifiesInPlace().eval()
    found = record(network, Taps(network, ["norm"], clone=True), images)["norm"]
    torch.testing.assert_close(found, network.norm(images))
    assert (found < 0).any()
    found.sum().backward()
    assert network.norm.weight.grad is not None


class CallsTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.layer(x))
        return out


def test_a_layer_called_twice_is_an_error(images: Tensor) -> None:
    network = CallsTwice()
    with pytest.raises(TapError, match=r"'layer' \(Conv2d\) was called twice"):
        record(network, Taps(network, ["layer"]), images)


def test_a_layer_that_returns_a_tuple_is_an_error() -> None:
    network = nn.Sequential(nn.LSTM(3, 4))
    with pytest.raises(TapError, match=r"'0' \(LSTM\) returned a tuple of 2, wanted one Tensor"):
        record(network, Taps(network, ["0"]), torch.randn(2, 5, 3))


@pytest.mark.parametrize("clone", [False, True])
def test_in_inference_mode_taps_work_as_without_gradients(images: Tensor, clone: bool) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    taps = Taps(network, ["0"], clone=clone)
    with torch.no_grad():
        expected = record(network, taps, images)["0"]
    with torch.inference_mode():
        found = record(network, taps, images)["0"]
    assert found.is_inference()
    assert torch.equal(found, expected)


def test_a_network_that_enters_inference_mode_itself_is_an_error(student: nn.Module, images: Tensor) -> None:
    taps = Taps(student, ["first"])
    student.forward = torch.inference_mode()(student.forward)  # type: ignore[method-assign]
    with torch.no_grad(), pytest.raises(TapError, match=r"'first' made its output under.*no_grad"):
        record(student, taps, images)


def test_a_shared_layer_has_all_its_names(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    network.alias = network[0]
    network.forward = lambda x: nn.Sequential.__getitem__(network, 0)(x)  # type: ignore[method-assign]
    found = record(network, Taps(network, ["0", "alias"]), images)
    assert found["0"] is found["alias"]


def test_hooks_are_on_the_layers_while_recording_and_at_no_other_time(
    student: nn.Module, images: Tensor
) -> None:
    taps = Taps(student, ["first", "second"])

    def hooks() -> list[int]:
        return [len(layer._forward_hooks) for layer in (student.first, student.second)]

    assert hooks() == [0, 0]
    with taps.recording():
        assert hooks() == [1, 1]
    assert hooks() == [0, 0]
    with pytest.raises(ZeroDivisionError), taps.recording():
        raise ZeroDivisionError
    assert hooks() == [0, 0]


def test_removed_taps_record_nothing(student: nn.Module, images: Tensor) -> None:
    taps = Taps(student, ["first", "second"])
    taps.remove()
    taps.remove()
    with pytest.raises(TapError, match="taps were removed"):
        record(student, taps, images)


def test_a_tapped_network_is_copied_and_pickled(student: nn.Module, images: Tensor) -> None:
    student.eval()
    taps = Taps(student, ["first"])
    expected = student(images)
    torch.testing.assert_close(copy.deepcopy(student)(images), expected)
    stored = io.BytesIO()
    torch.save(student, stored)
    stored.seek(0)
    torch.testing.assert_close(torch.load(stored, weights_only=False)(images), expected)
    # A copy that runs while the original records does not disturb it.
    other = copy.deepcopy(student)
    with taps.recording() as activations:
        other(torch.zeros_like(images))
        student(images)
        found = activations()["first"]
    torch.testing.assert_close(found, student.first(images))


def test_activation_checkpointing_may_call_a_layer_again_in_backward(images: Tensor) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.layer, x, use_reentrant=False)
            return out

    network = Checkpointed()
    found = record(network, Taps(network, ["layer"]), images.requires_grad_())
    found["layer"].pow(2).sum().backward()
    assert network.layer.weight.grad is not None


class Reentrant(nn.Module):
    """A layer inside a reentrant checkpoint, which runs it without gradients, and one outside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 1)
        self.layer = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        out: Tensor = checkpoint(self.layer, self.stem(x), use_reentrant=True)
        return out


def test_a_tap_inside_a_reentrant_checkpoint_is_an_error(images: Tensor) -> None:
    network = Reentrant()
    with pytest.raises(TapError, match=r"'layer' \(Conv2d\) ran without gradients.*use_reentrant=False"):
        record(network, Taps(network, ["layer"]), images)
    record(network, Taps(network, ["stem"]), images)["stem"].sum().backward()
    assert network.stem.weight.grad is not None


def test_without_gradients_a_reentrant_checkpoint_and_frozen_layers_are_fine(images: Tensor) -> None:
    network = Reentrant()
    with torch.no_grad():
        assert record(network, Taps(network, ["layer"]), images)["layer"].shape == (6, 2, 8, 8)
    frozen = nn.Sequential(nn.Conv2d(1, 2, 1).requires_grad_(False), nn.Conv2d(2, 2, 1))
    assert not record(frozen, Taps(frozen, ["0"]), images)["0"].requires_grad


# ---- what the layer's caller gets


def doubled(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return 2 * output


@pytest.mark.parametrize("when", ["before the taps", "after the taps", "both"])
def test_a_tap_sees_what_other_hooks_made_of_the_output(images: Tensor, when: str) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    if when != "after the taps":
        network[0].register_forward_hook(doubled)
    taps = Taps(network, ["0"])
    if when != "before the taps":
        network[0].register_forward_hook(doubled)
    seen: list[Tensor] = []
    network[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for _ in range(2):
        found = record(network, taps, images)["0"]
        assert found is seen[-1]


def test_a_replaced_layer_is_tapped_where_it_was(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    taps = Taps(network, ["0"])
    network[0] = nn.Conv2d(1, 5, 1)
    assert record(network, taps, images)["0"].shape[1] == 5
    del network[0]
    taps = Taps(network, ["0"])
    del network[0]
    with pytest.raises(UnknownNameError, match="has no layer '0' any more"):
        record(network, taps, images)


class ReadsWeights(nn.Module):
    """Reads a layer's weights without calling it, as nn.MultiheadAttention does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight)


def test_a_layer_that_is_never_called_says_what_may_be_the_case(images: Tensor) -> None:
    network = ReadsWeights()
    with pytest.raises(TapError, match=r"reads its weights without calling it.*tap a layer that is called"):
        record(network, Taps(network, ["layer"]), images)


def test_outputs_that_are_no_tensor_say_what_to_do() -> None:
    x = torch.randn(2, 5, 4)
    attention = nn.ModuleDict({"attend": nn.MultiheadAttention(4, 2, batch_first=True)})
    attention.forward = lambda x: attention["attend"](x, x, x)[0]  # type: ignore[method-assign]
    for network, layer in ((nn.Sequential(nn.LSTM(4, 3)), "0"), (attention, "attend")):
        with pytest.raises(
            TapError, match=rf"'{layer}' .* returned a tuple of 2.*nn.Identity\(\) through which"
        ):
            record(network, Taps(network, [layer]), x)


def test_transformer_layers_run_their_layers_while_tapped() -> None:
    """In eval mode and without gradients torch goes a shorter way, past the layers, where there are no hooks."""
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        found = record(encoder, Taps(encoder, ["layers.0.linear1", "layers.1"]), x)
    assert found["layers.0.linear1"].shape == (3, 5, 16)
    torch.testing.assert_close(found["layers.1"], encoder(x), rtol=1e-5, atol=1e-5)


# ---- networks that run no hooks


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "kind", ["script", "trace", "frozen", "loaded", "export", "a scripted layer", "unflattened"]
)
def test_networks_that_run_no_hooks_are_refused_when_the_taps_are_made(images: Tensor, kind: str) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(nn.ReLU()), nn.Flatten()).eval()

    def loaded() -> nn.Module:
        stored = io.BytesIO()
        torch.jit.save(torch.jit.script(network), stored)
        stored.seek(0)
        found: nn.Module = torch.jit.load(stored)
        return found

    make = {
        "script": lambda: torch.jit.script(network),
        "trace": lambda: torch.jit.trace(network, images),
        "frozen": lambda: torch.jit.freeze(torch.jit.script(network)),
        "loaded": loaded,
        "export": lambda: torch.export.export(network, (images,)).module(),
        "a scripted layer": lambda: nn.Sequential(torch.jit.script(network[0]), nn.Flatten()),
        "unflattened": lambda: torch.export.unflatten(torch.export.export(network, (images,))),
    }
    other = make[kind]()
    why = "a graph" if kind == "export" else "TorchScript"
    if kind == "unflattened":  # its layers are called again
        torch.testing.assert_close(record(other, Taps(other, ["0"]), images)["0"], network[0](images))
        return
    with pytest.raises(TapError, match=rf"layer '0' cannot be tapped: the teacher is {why}.*such as KD"):
        Taps(other, ["0"], role="teacher")
    Taps(other, [], role="teacher")


def test_symbolic_traces_call_their_layers(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(nn.ReLU(), nn.ReLU()), nn.Flatten())
    traced = torch.fx.symbolic_trace(network)
    found = record(traced, Taps(traced, ["0", "1.0"]), images)
    torch.testing.assert_close(found["1.0"], network[0](images).relu())
    # A block whose layers the trace calls is itself not called.
    with pytest.raises(TapError, match="layer '1' cannot be tapped"):
        Taps(traced, ["1"])
