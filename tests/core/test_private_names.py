"""What stands in for a private name of torch that the installed torch lacks."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vidfast
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


# Every private name that vidfast can do without, and the module of torch that may have it.
DISPENSABLE = {
    "_has_any_global_hook": "torch.nn.modules.module",
    "_get_current_graph_task_keep_graph": "torch._C._autograd",
    "_get_fp32_precision_getter": "torch._C",
}
# Likewise on a GPU; torch 2.6 itself imports this one.
DISPENSABLE_ON_GPU = {"_cuda_getCurrentRawStream"}
PACKAGE = Path(vidfast.__file__).parent
# What runs without them. A gradient is then never scaled in place: autograd does not say whether it may be.
SELECTED = (
    "test_backward.py::test_a_second_backward_gives_the_firsts_numbers",
    "test_backward.py::test_accumulating_through_a_retained_graph",
    "test_backward.py::test_gradients_one_at_a_time",
    "test_backward.py::test_activation_checkpointing",
    "test_inplace.py",
    "test_fused_regressor.py::test_any_set_of_gradients",
    "test_fused_regressor.py::test_backward_again_and_by_another_factor",
    "test_fused_regressor.py::test_anything_else_goes_module_by_module",
)
WITHOUT = """
import importlib, sys
for name, module in {names!r}.items():
    module = importlib.import_module(module)
    if hasattr(module, name):
        delattr(module, name)
import pytest
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_all_dispensable_names_are_listed() -> None:
    found = {
        name
        for source in PACKAGE.rglob("*.py")
        for name in re.findall(r'getattr\([\w.]+, "(_[a-z]\w+)", None\)', source.read_text())
    }
    assert found == {*DISPENSABLE, *DISPENSABLE_ON_GPU}


def test_the_core_works_without_all_of_them() -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(names=DISPENSABLE), *(str(here / name) for name in SELECTED)],
        capture_output=True, text=True, cwd=here.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout
