"""What stands in for a private name of torch that the installed torch lacks."""

from __future__ import annotations

import ast
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


# ---- nothing else uses one

# Not torch's: of namedtuples and of Python.
OTHERS = {"_replace", "_asdict", "_fields", "_getframe", "_exit"}
# Methods of torch's classes that a subclass is meant to override, and so to call.
OVERRIDDEN = {"_load_from_state_dict", "_apply"}
# accelerate's, without which its state outlives a run.
ACCELERATES = {"_shared_state", "_reset_state"}


def private_names_in(source: str) -> set[str]:
    """Names with an underscore in front that are asked of something, or imported."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {part for part in (node.module or "").split(".") if part.startswith("_")}
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            found |= {str(x.value) for x in node.args[1:2] if isinstance(x, ast.Constant)}
    return {name for name in found if re.fullmatch(r"_[A-Za-z]\w*", name)}


def names_made_in(source: str) -> set[str]:
    """What a file defines or assigns: of a module, of a class, of `self` or `ctx`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def test_only_one_file_uses_private_names_of_torch() -> None:
    sources = {path: path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "_torch.py"}
    own = set().union(*map(names_made_in, sources.values())) | {"_C", "_torch", "_version"}
    allowed = own | OTHERS | OVERRIDDEN | ACCELERATES
    found = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path, source in sources.items()
        for name in private_names_in(source) - allowed
    }
    assert not found


def test_a_private_name_would_be_seen() -> None:
    """The counterpart: what is asserted above can fail."""
    for line in ("x._base", "torch._C", "from torch._dynamo import config", "getattr(x, '_version', 0)"):
        assert private_names_in(line), line


# ---- all of them at once

# `_torch` in which every name is one that the installed torch lacks.
STANDING_IN = r"""
import importlib.util, pathlib, re, sys, types
path = pathlib.Path(importlib.util.find_spec("vidfast").origin).with_name("_torch.py")
source = path.read_text()
changed = source.replace("found: T = getattr(place, name, stand_in)", "found: T = stand_in")
changed = re.sub(r'= getattr\(\w+, "_\w+", None\)', "= None", changed)
assert source.count("= None") + 3 <= changed.count("= None") and "found: T = stand_in" in changed
module = types.ModuleType("vidfast._torch")
module.__file__ = str(path)
sys.modules["vidfast._torch"] = module
exec(compile(changed, str(path), "exec"), module.__dict__)
import pytest
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
# Plain programs: no mode, hook or transform is around them, and nothing is written over twice.
PLAIN_PROGRAMS = (
    "test_values.py",
    "test_backward.py::test_a_second_backward_gives_the_firsts_numbers",
    "test_backward.py::test_gradients_one_at_a_time",
    "test_derivatives.py::test_second_derivatives_are_the_references",
    "test_modules.py",
    "test_vid_loss.py",
)


def test_plain_programs_run_where_torch_has_none_of_them() -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", STANDING_IN, *(str(here / name) for name in PLAIN_PROGRAMS)],
        capture_output=True, text=True, cwd=here.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout
