"""The order of the files: CONTRIBUTING's floors against the imports, and a call's way down through them."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from places import Place
from torch import Tensor

import vidfast
from vidfast import memory, recall

PACKAGE = Path(vidfast.__file__).parent
CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"


def entry_of(module: str) -> str:
    """The entry of CONTRIBUTING's floors for a module of vidfast: of some folders there is one for all files."""
    parts = module.split(".")[1:]
    if not parts:
        return "__init__"
    for whole in ("distill", "report"):
        if parts[0] == whole:
            return whole + "/"
    if parts[:2] == ["backends", "triton"]:
        return "backends/triton/"
    return "backends/" if parts == ["backends"] else "/".join(parts)


def floors() -> list[list[str]]:
    """The floors that CONTRIBUTING draws, the uppermost first."""
    text = CONTRIBUTING.read_text()
    drawn = re.search(r"<!-- floors -->\n\n((?:    .*\n)+)", text)
    assert drawn is not None, "CONTRIBUTING.md has no drawing of the floors"
    return [line.split() for line in drawn[1].splitlines()]


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """The modules of vidfast that a file imports, wherever in it: in functions and for types alone too."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (str(x.value) for x in node.args if isinstance(x, ast.Constant))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")
                base = ".".join([*above[: len(above) - node.level + 1], *base.split(".")]).rstrip(".")
            for alias in node.names:
                if f"{base}.{alias.name}" == "vidfast._C":
                    continue
                inner = PACKAGE.parent.joinpath(*f"{base}.{alias.name}".split("."))
                is_module = inner.with_suffix(".py").exists() or (inner / "__init__.py").exists()
                yield f"{base}.{alias.name}" if is_module else base


def arrows(inside: Path = PACKAGE) -> set[tuple[str, str]]:
    """(importing module, imported module)."""
    return {
        (module_of(path), other)
        for path in inside.rglob("*.py")
        for other in imported(path)
        if other.split(".")[0] == "vidfast" and other != "vidfast._C"
    }


def test_every_file_has_a_floor() -> None:
    drawn = [name for floor in floors() for name in floor]
    assert len(drawn) == len(set(drawn))
    there = {entry_of(module_of(path)) for path in PACKAGE.rglob("*.py")} - {"__main__"}
    assert there - set(drawn) == set(), "draw them between the floors of CONTRIBUTING.md"
    assert set(drawn) - there == set(), "they are drawn in CONTRIBUTING.md and not there"


def test_no_import_goes_up() -> None:
    floor_of = {name: number for number, floor in enumerate(floors()) for name in floor}
    upwards = []
    for module, other in sorted(arrows()):
        entry, wanted = entry_of(module), entry_of(other)
        if entry not in (wanted, "__main__") and floor_of[entry] >= floor_of[wanted]:
            upwards.append(f"{module} imports {other}")
    assert not upwards, upwards


@pytest.mark.parametrize("folder", ["backends/triton", "distill"])
def test_no_circle_inside_a_folder(folder: str) -> None:
    below: dict[str, set[str]] = {}
    inside = f"vidfast.{folder.replace('/', '.')}"
    for module, other in arrows(PACKAGE / folder):
        if other.startswith(f"{inside}.") and module != inside:
            below.setdefault(module, set()).add(other)

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path, module))}"
        for other in below.get(module, ()):
            visit(other, (*path, module))

    for module in below:
        visit(module, ())


class Walk:
    """The files of vidfast that are entered with `mean` in hand, until a native kernel is called."""

    def __init__(self, mean: Tensor) -> None:
        self.address = mean.data_ptr()
        self.entered: list[tuple[str, str]] = []
        self.arrived = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and "cpu_forward" in getattr(argument, "__name__", ""):
            self.arrived = True
        path = Path(frame.f_code.co_filename)
        if event != "call" or self.arrived or not path.is_relative_to(PACKAGE):
            return
        if any(self._is_mean(value) for value in frame.f_locals.values()):
            self.entered.append((entry_of(module_of(path)), frame.f_code.co_name))

    def _is_mean(self, value: Any) -> bool:
        if isinstance(value, tuple):
            return any(self._is_mean(x) for x in value)
        return type(value) is Tensor and value.data_ptr() == self.address

    def files(self) -> list[str]:
        """In order; functions of one file that follow one another are one entry."""
        # A back end is asked whether it takes the tensors; what it does with them is another entry.
        # The predicates of _torch.py, the lowest floor, are asked wherever one is needed.
        entered = [name for name, function in self.entered if function != "supports" and name != "_torch"]
        return [name for name, _ in groupby(entered)]


def walked(mean: Tensor, target: Tensor, alpha: Tensor, recalled: bool = False, **options: Any) -> Walk:
    vidfast.gaussian_nll(mean, target, alpha, backend="cpu", **options)  # what is imported late is there now
    if not recalled:
        recall._remembered.clear()
    walk = Walk(mean)
    sys.setprofile(walk)
    try:
        vidfast.gaussian_nll(mean, target, alpha, backend="cpu", **options)
    finally:
        sys.setprofile(None)
    return walk


@pytest.mark.skipif(memory._C is None, reason="the extension is not built")
@pytest.mark.parametrize("strategy", ["one_pass", "in place", "two_pass", "without gradients"])
@pytest.mark.parametrize("layout", ["contiguous", "target is copied"])
def test_a_call_enters_each_file_once(strategy: str, layout: str) -> None:
    mean, target, alpha = torch.randn(3, 6, 7, 5), torch.randn(3, 6, 7, 5), torch.zeros(6)
    if layout == "target is copied":
        target = target.to(memory_format=torch.channels_last)
    mean.requires_grad_(strategy != "without gradients")
    options: dict[str, Any] = {"strategy": strategy} if strategy in ("one_pass", "two_pass") else {}
    if strategy == "in place":
        mean, options = mean * 1, {"inplace": True}
    walk = walked(mean, target, alpha, **options)
    files = walk.files()
    assert walk.arrived
    assert len(files) == len(set(files)), f"a file is entered again: {files}"
    wanted = ["nll", "arguments", "dispatch", "autograd", "primitives", "backends/cpu"]
    assert [name for name in files if name in wanted] == wanted
    if layout == "contiguous":
        again = walked(mean, target, alpha, recalled=True, **options).files()
        wanted = ["nll", "recall", "autograd", "primitives", "backends/cpu"]
        assert [name for name in again if name in {*wanted, "arguments", "dispatch"}] == wanted
        assert len(again) == len(set(again))


def test_the_walk_sees_a_file_that_is_entered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counterpart: what is asserted above can fail."""
    from vidfast import autograd, nll

    right = autograd.run_strategy

    def wrong(mean: Tensor, *rest: Any) -> Tensor:
        nll.log_likelihood_map(mean.detach(), *rest[:2])
        return right(mean, *rest)

    monkeypatch.setattr(autograd, "run_strategy", wrong)
    mean = torch.randn(3, 6, requires_grad=True)
    files = walked(mean, torch.randn(3, 6), torch.zeros(6)).files()
    assert files.count("nll") == 2


def stack_above(
    kind: Any, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch, method: str = "forward_grad"
) -> list[str]:
    """The entries of the frames from a call down to a method of a back end's class, the outermost first."""
    stack: list[str] = []
    right = getattr(kind, method)

    def seen(*args: Any, **options: Any) -> None:
        frame: FrameType | None = None if stack else sys._getframe()  # of a head's parts the first
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(PACKAGE):
                stack.insert(0, entry_of(module_of(path)))
            frame = frame.f_back
        right(*args, **options)

    monkeypatch.setattr(kind, method, seen)
    call()
    floor_of = {name: number for number, floor in enumerate(floors()) for name in floor}
    assert all(a == b or floor_of[a] < floor_of[b] for a, b in pairwise(stack)), " > ".join(stack)
    return stack


def test_the_stack_above_a_kernel_goes_down(backend: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """From `gaussian_nll` to a back end's primitive every frame is in the same file or on a lower floor."""
    from vidfast import backends

    mean = torch.randn(3, 6, device=backend.device, requires_grad=True)
    kind = type(backends.load(backend.name))
    stack = stack_above(
        kind, lambda: backend.nll(mean, torch.randn_like(mean), mean.detach()[0]), monkeypatch
    )
    assert stack[0] == "nll"
    assert stack[-1] == "primitives"


@pytest.mark.skipif(memory._C is None, reason="the extension is not built")
@pytest.mark.parametrize("by_kernel", [True, False], ids=["kernel", "parts"])
def test_the_stack_above_a_heads_kernel_goes_down(monkeypatch: pytest.MonkeyPatch, by_kernel: bool) -> None:
    """Likewise from `vid_head`, by way of its folder."""
    from vidfast.backends.cpu import BACKEND, CpuBackend
    from vidfast.head import kernel

    if by_kernel and not BACKEND.has_head(torch.float32, 1):
        pytest.skip("this processor has no kernel for heads")
    monkeypatch.setattr(kernel, "takes", lambda *_: by_kernel)
    weight = torch.randn(6, 5, requires_grad=True)
    features = torch.randn(3, 5, 4), torch.randn(3, 6, 4)
    stack = stack_above(
        CpuBackend,
        lambda: vidfast.vid_head(*features, torch.zeros(6), weight),
        monkeypatch,
        "head" if by_kernel else "forward_grad",
    )
    assert [name for name, _ in groupby(stack)] == [
        "head/call",
        "head/way",
        "head/function",
        "head/compute",
        *(["head/kernel"] if by_kernel else ["head/parts", "primitives"]),
    ]
