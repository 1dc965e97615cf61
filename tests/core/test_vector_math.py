"""exp, log and log1p of every instruction set: the bounds that csrc/cpu/vector_math.h states."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vidfast import memory

# In units in the last place, of results that are normal numbers.
ULPS = {"exp": 1.0, "exp_of_negative": 1.0, "log": 1.0, "log_of_normal": 1.0, "log1p": 2.0}
EXACT = {"exp": np.exp, "exp_of_negative": np.exp, "log": np.log, "log_of_normal": np.log, "log1p": np.log1p}


def computed(name: str, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    memory._C.cpu_vector_function(name, x.dtype is torch.float64, x.data_ptr(), out.data_ptr(), x.numel())
    return out


def domain(name: str, x: Tensor) -> Tensor:
    tiny = torch.finfo(x.dtype).tiny
    keep = {
        "exp": x == x,
        "exp_of_negative": (x <= 0) & (x >= (-87 if x.dtype is torch.float32 else -708)),
        "log": x >= 0,
        "log_of_normal": x >= tiny,
        "log1p": (x >= 0) & (x <= 1),
    }[name]
    return x[keep]


def error_in_ulps(got: Tensor, want: np.ndarray) -> np.ndarray:
    """Of results that are normal numbers."""
    info = np.finfo(got.numpy().dtype)
    value = got.numpy().astype(np.longdouble)
    with np.errstate(all="ignore"):
        _, exponent = np.frexp(want)
        unit = np.ldexp(np.longdouble(1), exponent - info.nmant - 1)
        error = np.abs(value - want) / unit
    return error[(np.abs(want) >= info.tiny) & (np.abs(want) <= info.max)]


@pytest.mark.parametrize("name", ULPS)
def test_fp32_within_the_stated_ulps(isa: str, name: str) -> None:
    """Every 509th number of all that there are; the bound was measured over every one."""
    everything = torch.arange(-(2**31), 2**31, 509, dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = domain(name, everything)
    # fp64 is exact enough: a unit of fp32 has 29 bits more
    want = EXACT[name](x.numpy().astype(np.float64)).astype(np.longdouble)
    error = error_in_ulps(computed(name, x), want)
    assert error.size > 1000
    assert error.max() <= ULPS[name]
    assert error.max() > 0.45, "an error below half a unit is no measurement"


@pytest.mark.parametrize("name", ULPS)
def test_fp64_within_the_stated_ulps(isa: str, name: str) -> None:
    random = np.random.default_rng(0)
    if name == "log1p":
        parts = [random.uniform(0, 1, 200_000), np.exp(-random.uniform(0, 300, 50_000))]
    elif name.startswith("exp"):
        parts = [random.uniform(-745, 709.7, 200_000), random.uniform(-1, 1, 50_000)]
    else:
        parts = [np.exp(random.uniform(-700, 700, 200_000)), 1 + random.normal(0, 1e-3, 50_000)]
    x = domain(name, torch.from_numpy(np.concatenate(parts)))
    assert x.numel() > 10_000
    error = error_in_ulps(computed(name, x), EXACT[name](x.numpy().astype(np.longdouble)))
    assert error.max() <= ULPS[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ends(isa: str, dtype: torch.dtype) -> None:
    inf, nan = math.inf, math.nan
    info = torch.finfo(dtype)
    subnormal = info.tiny * info.eps * 4

    def of(name: str, *values: float) -> list[float]:
        return computed(name, torch.tensor(values, dtype=dtype)).tolist()

    assert of("exp", inf, -inf, 0.0, 1e4, -1e4) == [inf, 0.0, 1.0, inf, 0.0]
    assert of("exp_of_negative", -inf, 0.0, -1e4, -87.1 if dtype is torch.float32 else -708.1) == [
        0.0,
        1.0,
        0.0,
        0.0,
    ]
    assert of("log", inf, 0.0, 1.0) == [inf, -inf, 0.0]
    assert of("log", subnormal)[0] == pytest.approx(math.log(subnormal), rel=1e-6)
    assert of("log_of_normal", inf, 1.0) == [inf, 0.0]
    assert of("log1p", 0.0, subnormal) == [0.0, subnormal]
    for name in ULPS:
        assert math.isnan(of(name, nan)[0]), name
    if dtype is torch.float64:  # payloads must not become exponents
        quiet = torch.tensor([0x7FF8000000000123], dtype=torch.int64).view(torch.float64)
        assert all(bool(computed(name, quiet).isnan()) for name in ULPS)


def test_a_subnormal_exponential_is_rounded(isa: str) -> None:
    x = torch.linspace(-103.9, -87.4, 1001)
    got = computed("exp", x).double()
    assert ((got - x.double().exp()).abs() <= 2.0**-149).all()


def test_an_unknown_name(isa: str) -> None:
    with pytest.raises(ValueError, match="must be that of a vector function, got sin"):
        computed("sin", torch.zeros(1))
