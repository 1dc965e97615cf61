"""WRN weights of other repositories load under our names and compute the same."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_wrn import ForeignWRN, randomised
from torch import Tensor, nn

from vidfast.distill.models import build, renamed_wrn

STYLES = {"RepDistiller": ("block", "convShortcut"), "xfer": ("layer", "conv_shortcut")}
WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "state_dict": lambda state: state,
    "checkpoint": lambda state: {"epoch": 240, "model": state, "accuracy": 0.7},
    "DataParallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "both": lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
}


def assert_same_step(ours: nn.Module, theirs: nn.Module) -> None:
    """Logits in eval mode; gradients and running statistics of a step in training mode."""
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 6, 2, 3])
    with torch.no_grad():
        expected = theirs.eval()(images)
        torch.testing.assert_close(ours.eval()(images), expected, rtol=1e-5, atol=1e-5)
        assert float(expected.std()) > 1e-2
    for network in (ours, theirs):
        nn.functional.cross_entropy(network.train()(images), labels).backward()
    gradients = renamed_wrn({**theirs.state_dict(), **{n: p.grad for n, p in theirs.named_parameters()}})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)
    after = renamed_wrn(theirs.state_dict())
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, after[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [(10, 1), (16, 2)], ids=["10-1", "16-2"])
def test_the_renamed_weights_compute_the_same(style: str, size: tuple[int, int]) -> None:
    theirs = randomised(ForeignWRN(*size, 7, *STYLES[style]))
    ours = build(f"wrn-{size[0]}-{size[1]}", in_channels=3, num_classes=7)
    ours.load_state_dict(renamed_wrn(theirs.state_dict()), strict=True)
    assert_same_step(ours, theirs)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_checkpoints_and_wrapped_networks_load(wrapping: str) -> None:
    state = randomised(ForeignWRN(10, 2, 5)).state_dict()
    renamed = renamed_wrn(WRAPPINGS[wrapping](dict(state)))
    assert renamed.keys() == build("wrn-10-2", in_channels=3, num_classes=5).state_dict().keys()
    assert all(tensor is not None and tensor.shape for name, tensor in renamed.items() if "num" not in name)
    assert renamed["group2.0.shortcut.weight"] is state["block2.layer.0.convShortcut.weight"]


def test_a_file_with_options_in_it_loads(tmp_path: Path) -> None:
    """RepDistiller's *_last.pth hold argparse's Namespace, which torch.load has to be told of."""
    network = randomised(ForeignWRN(10, 1, 5))
    path = tmp_path / "wrn_10_1_last.pth"
    torch.save({"opt": argparse.Namespace(model_s="wrn_10_1"), "model": network.state_dict()}, path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(path)
    build("wrn-10-1", in_channels=3, num_classes=5).load_state_dict(renamed_wrn(state))


def test_what_vid_learned_within_a_student_is_left_out() -> None:
    state = ForeignWRN(10, 1, 5, *STYLES["xfer"]).state_dict()
    learned = {"branch1.0.weight": torch.ones(2, 1, 1, 1), "variance_param3": torch.ones(2, 1, 1)}
    assert renamed_wrn({**state, **learned}).keys() == renamed_wrn(state).keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layer1.0.conv1.weight": 1, "layer1.0.bn1.weight": 1},
            "got 'layer1.0.conv1.weight', 'layer1.0.bn1.w",
        ),
        ({"block4.layer.0.conv1.weight": 1}, "got 'block4"),
        ({f"x{n}": 1 for n in range(5)}, "got 'x0', 'x1', 'x2' and 2 more"),
        ({"fc.weight": None}, "got none for 'fc.weight'"),
    ],
)
def test_other_networks_are_refused(change: dict[str, Any], message: str) -> None:
    state = {**ForeignWRN(10, 1, 5).state_dict(), **change}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(ValueError, match=rf"wanted the names of a wide residual network .* {message}"):
        renamed_wrn(state)


def test_what_is_no_such_state_is_refused() -> None:
    with pytest.raises(ValueError, match="load one that is this library's already as it is"):
        renamed_wrn(build("wrn-10-1", in_channels=3, num_classes=5).state_dict())
    with pytest.raises(ValueError, match=r"got none for 'stem\.weight'"):
        renamed_wrn({})
    for wrong in ([], nn.Linear(1, 1), {"model": nn.Linear(1, 1)}):
        with pytest.raises(TypeError, match="wanted the state_dict of a network, or a checkpoint"):
            renamed_wrn(wrong)  # type: ignore[arg-type]


def test_a_network_of_another_size_is_named_by_load_state_dict() -> None:
    state = renamed_wrn(ForeignWRN(10, 1, 5).state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for fc\.weight"):
        build("wrn-10-1", in_channels=3, num_classes=6).load_state_dict(state)
