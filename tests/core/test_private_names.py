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
from vidfast._torch import BATCH_NORMS, CONVOLUTIONS

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


def test_a_module_without_lists_of_hooks_may_have_some(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _torch.has_hook(nn.ReLU())
    monkeypatch.setattr(_torch, "_HAS_HOOK_LISTS", False)
    assert _torch.has_hook(nn.ReLU())


def test_the_classes_that_stand_in_are_all_that_have_a_public_name() -> None:
    for base, stand_in in (
        (nn.modules.conv._ConvNd, CONVOLUTIONS),
        (nn.modules.batchnorm._BatchNorm, BATCH_NORMS),
    ):
        kinds = {
            kind for name in dir(nn) if isinstance(kind := getattr(nn, name), type) and issubclass(kind, base)
        }
        for kind in kinds:
            assert issubclass(kind, stand_in) or kind.__name__.startswith("Lazy"), kind


# Every private name that vidfast can do without, and the module of torch that may have it.
DISPENSABLE = {
    "_has_any_global_hook": "torch.nn.modules.module",
    "_get_current_graph_task_keep_graph": "torch._C._autograd",
    "_get_fp32_precision_getter": "torch._C",
    "_will_engine_execute_node": "torch._C",
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
    "test_heteroscedastic_autograd.py::test_what_else_uses_a_half_adds_to_it",
    "test_heteroscedastic_autograd.py::test_gradients_that_are_asked_for_by_name",
    "test_heteroscedastic_autograd.py::test_a_second_backward_gives_the_first_s_numbers",
    "test_head_parts.py::test_any_set_of_gradients",
    "test_head_parts.py::test_backward_again_and_by_another_factor",
    "test_head_parts.py::test_anything_else_goes_module_by_module",
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

# Not torch's: of namedtuples, of Python, and Accelerate's mark on the layers that it has placed.
OTHERS = {"_replace", "_asdict", "_fields", "_getframe", "_exit", "_hf_hook"}
# Methods of torch's classes that a subclass is meant to override, and so to call.
OVERRIDDEN = {"_load_from_state_dict", "_apply"}
PRIVATE = re.compile(r"_[A-Za-z]\w*")


def rooted_at(node: ast.expr) -> str:
    """The name that a chain of attributes begins with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def is_torchs(name: str) -> bool:
    """Whether tensors, modules or autograd's contexts have it."""
    return any(hasattr(kind, name) for kind in (torch.Tensor, nn.Identity(), torch.autograd.Function))


def private_names_in(source: str) -> set[str]:
    """Private names that a file asks of something, or imports, and has not made itself."""
    own, asked = set[str](), set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and rooted_at(node) not in ("self", "cls"):
            asked.add(node.attr)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
        elif (
            isinstance(node, ast.ImportFrom) and not node.level and not f"{node.module}".startswith("vidfast")
        ):
            asked |= {*f"{node.module}".split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names if not alias.name.startswith("vidfast"))
            asked |= {part for name in names for part in name.split(".")}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            asked |= {str(x.value) for x in node.args[1:2] if isinstance(x, ast.Constant)}
    private = {name for name in asked if PRIVATE.fullmatch(name)} - OTHERS - OVERRIDDEN
    return {name for name in private if name not in own or is_torchs(name)}


SOURCES = {path: path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "_torch.py"}


def test_only_one_file_uses_private_names_of_torch() -> None:
    found = {path.name: names for path, source in SOURCES.items() if (names := private_names_in(source))}
    assert not found


@pytest.mark.parametrize("path", ["raw.py", "autograd.py", "backends/cuda.py", "distill/taps.py"])
@pytest.mark.parametrize(
    "line",
    [
        "x._base",
        "x._version",
        "torch._C.DispatchKey",
        "torch._C._is_tracing()",
        "import torch._dynamo as d",
        "from torch._dynamo import config",
        "from torch._subclasses.fake_tensor import FakeTensor",
        "getattr(x, '_version', 0)",
        "x._is_zerotensor()",
        "module._forward_hooks",
    ],
)
def test_a_private_name_would_be_seen(path: str, line: str) -> None:
    """The counterpart: what is asserted above can fail, in files as they are."""
    assert private_names_in(f"{SOURCES[PACKAGE / path]}\n{line}\n"), line


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
