"""What stands in for a private name of torch that the installed torch lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from vidfast import _torch

REGISTER = {
    "forward": nn.modules.module.register_module_forward_hook,
    "forward pre": nn.modules.module.register_module_forward_pre_hook,
    "backward": nn.modules.module.register_module_full_backward_hook,
    "backward pre": nn.modules.module.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("has_the_name", [True, False], ids=["torch 2.7", "torch 2.6"])
@pytest.mark.parametrize("register", REGISTER.values(), ids=REGISTER.keys())
def test_a_hook_for_all_modules_is_noticed(
    register: Callable[[Any], Any], has_the_name: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_the_name:
        monkeypatch.setattr(_torch, "_has_any_global_hook", None)
    elif _torch._has_any_global_hook is None:
        pytest.skip(f"torch {torch.__version__} has no such name")
    assert _torch.any_global_hook() is False
    handle = register(lambda *_: None)
    try:
        assert _torch.any_global_hook() is True
    finally:
        handle.remove()
    assert _torch.any_global_hook() is False
