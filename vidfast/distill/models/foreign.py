"""Weights of wide residual networks from other repositories, renamed for the one in wrn.py.

RepDistiller, mdistiller and repositories that share their wrn.py call the parts of a WRN conv1, block1 to block3 with
a `layer` of blocks in each, bn1 and fc; xfer, the VID paper's own code, says layer1 to layer3 for the groups and
conv_shortcut for convShortcut. The networks are the same function for images of 32x32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_NORM = r"weight|bias|running_mean|running_var|num_batches_tracked"
_RENAMED = (
    (re.compile(r"conv1\.weight"), "stem.weight"),
    (re.compile(rf"bn1\.({_NORM})"), r"bn.\1"),
    (re.compile(r"fc\.(weight|bias)"), r"fc.\1"),
    (
        re.compile(rf"(?:block|layer)([123])\.layer\.(\d+)\.(bn[12]\.(?:{_NORM})|conv[12]\.weight)"),
        r"group\1.\2.\3",
    ),
    (
        re.compile(r"(?:block|layer)([123])\.layer\.(\d+)\.(?:convShortcut|conv_shortcut)\.weight"),
        r"group\1.\2.shortcut.weight",
    ),
)
# xfer's students have VID's regressors and variances within.
_DISTILLATION = re.compile(r"branch[123]\.\d+\.weight|variance_param[123]")
_NEEDED = ("stem.weight", "group1.0.conv1.weight", "group3.0.conv2.weight", "bn.running_var", "fc.weight")


def renamed_wrn(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a WRN of RepDistiller, mdistiller or xfer by the names of :class:`~.wrn.WideResNet`.

        student = build("wrn-16-2", in_channels=3, num_classes=100)
        student.load_state_dict(renamed_wrn(torch.load("wrn_16_2_best.pth")))

    Depth, width and classes must be those of the network that it was; `load_state_dict` says so if they are not.
    What VID learned within xfer's students (branch1, variance_param1, ...) is left out.

    Args:
        state: Its state_dict, also one still inside a checkpoint's "model", and with the "module." of DataParallel
            before every name.

    Returns:
        The same tensors, not copied.

    Raises:
        TypeError: `state` is no mapping.
        ValueError: There is a name that such a network does not have, or one that it has is missing.
    """
    inner = state.get("model", state) if isinstance(state, Mapping) else state
    if not isinstance(inner, Mapping):
        raise TypeError(
            f"wanted the state_dict of a network, or a checkpoint with one as 'model', got {type(inner).__name__}"
        )
    names = {str(name): tensor for name, tensor in inner.items()}
    if names and all(name.startswith("module.") for name in names):
        names = {name.removeprefix("module."): tensor for name, tensor in names.items()}
    renamed: dict[str, Tensor] = {}
    unfit = []
    for name, tensor in names.items():
        for pattern, ours in _RENAMED:
            found = pattern.fullmatch(name)
            if found is not None:
                renamed[found.expand(ours)] = tensor
                break
        else:
            if _DISTILLATION.fullmatch(name) is None:
                unfit.append(name)
    missing = [name for name in _NEEDED if name not in renamed]
    if unfit or missing:
        got = ", ".join(map(repr, unfit[:3])) + (f" and {len(unfit) - 3} more" if len(unfit) > 3 else "")
        raise ValueError(
            "wanted the names of a wide residual network of RepDistiller, mdistiller or xfer ('conv1.weight', "
            "'block1.layer.0.bn1.weight' or 'layer1.layer.0.bn1.weight', ..., 'bn1.weight', 'fc.weight'), got "
            f"{got or f'none for {missing[0]!r}'}; take the network's own state_dict out of a larger one, and load one "
            "that is this library's already as it is"
        )
    return renamed
