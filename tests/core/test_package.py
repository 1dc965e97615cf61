"""What is installed: names, versions, types, and what importing it costs."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vidfast

ROOT = Path(__file__).parents[2]


def python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_versions_agree() -> None:
    from vidfast import _C

    assert vidfast.__version__ == importlib.metadata.version("vidfast")
    assert _C.version == ".".join(vidfast.__version__.split(".")[:3])


def project() -> dict[str, Any]:
    """The table [project] of pyproject.toml."""
    toml = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    table: dict[str, Any] = toml.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def test_triton_is_an_extra_and_no_dependency() -> None:
    """torch's GPU builds bring the one they pin; beside a CPU build it is a gigabyte that finds no GPU."""
    extras = project()["optional-dependencies"]
    assert [name for name in project()["dependencies"] if name.startswith("triton")] == []
    (triton,) = extras["triton"]
    assert triton.startswith("triton;")
    assert triton in extras["test"], "make test interprets and compiles the kernels"


def test_without_triton_everything_else_works(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, vidfast
x = torch.ones(2, 3)
vidfast.gaussian_nll(x, 2 * x, x[0])
print(vidfast.info()["backends"]["triton"]["reason"])
"""
    assert "pip install 'vidfast[triton]'" in python(code, tmp_path)


def test_the_package_is_typed() -> None:
    assert vidfast.__file__ is not None
    assert (Path(vidfast.__file__).parent / "py.typed").is_file()


def test_public_names() -> None:
    wanted = {"GaussianNLL", "VIDLoss", "gaussian_nll", "info", "log_likelihood_map", "__version__"}
    assert wanted <= set(vidfast.__all__)
    for name in vidfast.__all__:
        assert hasattr(vidfast, name)
    for name in wanted - {"__version__"}:
        assert getattr(vidfast, name).__doc__


def test_imports_from_anywhere_and_runs(tmp_path: Path) -> None:
    code = "import torch, vidfast; x = torch.ones(2, 3); print(vidfast.gaussian_nll(x, x, x[0], backend='cpu').item())"
    assert float(python(code, tmp_path)) > 0


def test_import_pulls_in_nothing_heavy(tmp_path: Path) -> None:
    """Beyond what torch itself imports: no Triton, no plotting, no training libraries, none of our other rooms."""
    code = """
import sys, json, torch
torchs = set(sys.modules)
import vidfast
ours = set(sys.modules) - torchs
vidfast.gaussian_nll(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(3))
print(json.dumps([sorted(ours), sorted(set(sys.modules) - torchs)]))
"""
    imported, called = json.loads(python(code, tmp_path))
    assert "vidfast.nll" in imported
    heavy = (
        "triton",
        "matplotlib",
        "sklearn",
        "scipy",
        "accelerate",
        "pandas",
        "tqdm",
        "safetensors",
        "torch._dynamo",
        "torch._inductor",
    )
    assert not [m for m in called if m.split(".")[0] in heavy or m.startswith(heavy)]
    others = ("vidfast.distill", "vidfast.cli", "vidfast.report")
    assert not [m for m in called if m.startswith(others)]
    assert not [m for m in imported if m.startswith(("vidfast.backends.triton", "vidfast.backends.cuda"))]


def test_importing_leaves_autograds_engine_and_so_cuda_alone(tmp_path: Path) -> None:
    """The engine's first pass initialises CUDA, and no process that is forked afterwards can use it."""
    code = """
import torch
asked = []
class Watched:
    def __getattr__(self, name):
        asked.append(name)
        raise AttributeError(name)
torch.autograd.Variable._execution_engine = Watched()
import vidfast, vidfast.distill, vidfast.functional
vidfast.gaussian_nll(torch.ones(2, 3, requires_grad=True), torch.ones(2, 3), torch.ones(3))
print(asked)
try:
    torch.ones(1, requires_grad=True).backward()
except AttributeError:
    print(asked)
"""
    before, after = python(code, tmp_path).splitlines()
    assert before == "[]"
    assert after != "[]", "the counterpart: a backward pass is noticed"


def test_the_extension_is_free_of_torch(tmp_path: Path) -> None:
    """It loads and answers in a process without torch, and brings no OpenMP runtime of its own."""
    from vidfast import _C

    code = f"""
import sys, importlib.util
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.cpu_isa() in ("baseline", "avx2", "avx512", "avx512_bf16")
assert "torch" not in sys.modules
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
assert not [name for name in ("libtorch", "libgomp", "libomp", "libiomp") if name in maps]
"""
    python(code, tmp_path)
