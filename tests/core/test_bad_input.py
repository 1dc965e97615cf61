"""What a call refuses: the error names what was wanted and what came, and nothing is written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vidfast
from vidfast import backends

SHAPE = (4, 6, 5, 5)


def good() -> dict[str, Any]:
    return {"mean": torch.randn(SHAPE), "target": torch.randn(SHAPE), "alpha": torch.zeros(6)}


Changes = dict[str, Callable[[], Any]]


def both(*shape: int, channels: int | None = None, **kwargs: Any) -> Changes:
    """mean and target of that shape, and alpha to fit if asked."""
    changes: Changes = {key: lambda: torch.zeros(shape, **kwargs) for key in ("mean", "target")}
    if channels is not None:
        changes["alpha"] = lambda: torch.zeros(channels, **kwargs)
    return changes


def ones(dtype: torch.dtype, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.ones(shape or SHAPE).to(dtype)


def _lazy() -> Tensor:
    return nn.LazyLinear(3).weight


def _quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.randn(SHAPE), 0.1, 0, torch.qint8)


_no_batch: Changes = {
    "channel_dim": lambda: 0,
    "alpha": lambda: torch.zeros(4),
    "reduction": lambda: "batchmean",
}
_one_pass: Changes = {
    "target": lambda: torch.randn(SHAPE, requires_grad=True),
    "strategy": lambda: "one_pass",
}

BAD: dict[str, tuple[Changes, type[Exception], list[str]]] = {
    # shapes
    "shapes differ": ({"target": lambda: torch.randn(4, 6, 5, 4)}, ValueError, ["(4, 6, 5, 5)", "(4, 6, 5, 4)"]),
    "nothing is broadcast": ({"target": lambda: torch.randn(1, 6, 5, 5)}, ValueError, ["(4, 6, 5, 5)", "(1, 6, 5, 5)"]),
    "a dimension more": ({"mean": lambda: torch.randn(1, *SHAPE)}, ValueError, ["(1, 4, 6, 5, 5)", "(4, 6, 5, 5)"]),
    "alpha too long": ({"alpha": lambda: torch.zeros(7)}, ValueError, ["(6,)", "(7,)"]),
    "alpha too short": ({"alpha": lambda: torch.zeros(1)}, ValueError, ["(6,)", "(1,)"]),
    "alpha a scalar": ({"alpha": lambda: torch.zeros(())}, ValueError, ["(6,)", "()"]),
    "alpha a column": ({"alpha": lambda: torch.zeros(6, 1)}, ValueError, ["(6,)", "(6, 1)"]),
    "alpha per sample": ({"alpha": lambda: torch.zeros(4, 6, 1, 1)}, ValueError, ["(6,)", "(4, 6, 1, 1)"]),
    "alpha of one": ({"alpha": lambda: torch.zeros(1)}, ValueError, ["(6,)", "(1,)", "alpha.expand(C)"]),
    "alpha of another dimension": ({"alpha": lambda: torch.zeros(6, 1, 1, 1)}, ValueError, ["(6,)", "(6, 1, 1, 1)"]),
    "scalars": (both(), ValueError, ["channel_dim", "()"]),
    "one dimension": (both(6), ValueError, ["channel_dim=1", "(6,)"]),
    "empty mean alone": ({"mean": lambda: torch.zeros(0, 6, 5, 5)}, ValueError, ["(0, 6, 5, 5)", "(4, 6, 5, 5)"]),
    "empty, one channel less": (both(0, 5), ValueError, ["(5,)", "(6,)"]),
    # dtypes
    "integer mean": ({"mean": ones(torch.int64)}, TypeError, ["mean", "float32", "int64"]),
    "integer target": ({"target": ones(torch.int32)}, TypeError, ["target", "float32", "int32"]),
    "uint8 target": ({"target": ones(torch.uint8)}, TypeError, ["target", "uint8"]),
    "bool target": ({"target": ones(torch.bool)}, TypeError, ["target", "bool"]),
    "integer alpha": ({"alpha": ones(torch.int64, 6)}, TypeError, ["alpha", "int64"]),
    "complex mean": ({"mean": ones(torch.complex64)}, TypeError, ["mean", "complex64"]),
    "complex alpha": ({"alpha": ones(torch.complex64, 6)}, TypeError, ["alpha", "complex64"]),
    "float8 target": ({"target": ones(torch.float8_e5m2)}, TypeError, ["target", "float8"]),
    "quantized target": ({"target": _quantized}, TypeError, ["target", "qint8"]),
    # kinds of tensor
    "an array": ({"mean": lambda: np.zeros(SHAPE, dtype=np.float32)}, TypeError, ["mean", "Tensor", "ndarray"]),
    "a list": ({"target": lambda: [1.0, 2.0]}, TypeError, ["target", "Tensor", "list"]),
    "None": ({"alpha": lambda: None}, TypeError, ["alpha", "Tensor", "NoneType"]),
    "a number": ({"alpha": lambda: 0.5}, TypeError, ["alpha", "Tensor", "float"]),
    "sparse mean": ({"mean": lambda: torch.randn(SHAPE).to_sparse()}, ValueError, ["mean", "dense", "sparse_coo"]),
    "sparse target": ({"target": lambda: torch.randn(SHAPE).to_sparse()}, ValueError, ["target", "sparse_coo"]),
    "csr alpha": ({"alpha": lambda: torch.zeros(6).to_sparse()}, ValueError, ["alpha", "dense", "sparse"]),
    "mkldnn mean": ({"mean": lambda: torch.randn(SHAPE).to_mkldnn()}, ValueError, ["mean", "dense", "mkldnn"]),
    "meta mean": ({"mean": lambda: torch.randn(SHAPE, device="meta")}, ValueError, ["one device", "meta", "cpu"]),
    "meta alpha": ({"alpha": lambda: torch.zeros(6, device="meta")}, ValueError, ["one device", "meta", "cpu"]),
    "all meta": (both(*SHAPE, channels=6, device="meta"), ValueError, ["meta"]),
    "not initialised": ({"mean": _lazy}, ValueError, ["mean", "initialised"]),
    # options
    "eps 0": ({"eps": lambda: 0.0}, ValueError, ["eps", "positive", "0"]),
    "eps negative": ({"eps": lambda: -1e-5}, ValueError, ["eps", "positive", "-1e-05"]),
    "eps infinite": ({"eps": lambda: math.inf}, ValueError, ["eps", "finite", "inf"]),
    "eps NaN": ({"eps": lambda: math.nan}, ValueError, ["eps", "nan"]),
    "eps a string": ({"eps": lambda: "1e-5"}, TypeError, ["eps", "number", "str"]),
    "eps a bool": ({"eps": lambda: True}, TypeError, ["eps", "number", "bool"]),
    "eps a tensor": ({"eps": lambda: torch.tensor(1e-5)}, TypeError, ["eps", "number", "Tensor"]),
    "weight NaN": ({"weight": lambda: math.nan}, ValueError, ["weight", "finite", "nan"]),
    "weight infinite": ({"weight": lambda: -math.inf}, ValueError, ["weight", "finite", "inf"]),
    "weight two numbers": ({"weight": lambda: torch.ones(2)}, ValueError, ["weight", "one element", "(2,)"]),
    "weight with a gradient": (
        {"weight": lambda: torch.tensor(2.0, requires_grad=True)}, ValueError, ["weight", "must not require grad"],
    ),
    "weight None": ({"weight": lambda: None}, TypeError, ["weight", "number", "NoneType"]),
    "unknown reduction": ({"reduction": lambda: "average"}, ValueError, ["reduction", "batchmean", "'average'"]),
    "reduction None": ({"reduction": lambda: None}, ValueError, ["reduction", "'none'", "None"]),
    "unknown strategy": ({"strategy": lambda: "three_pass"}, ValueError, ["one_pass", "two_pass", "'three_pass'"]),
    "unknown backend": ({"backend": lambda: "gpu"}, ValueError, ["auto", "reference", *backends.NAMES, "'gpu'"]),
    "backend of another type": ({"backend": lambda: 3}, ValueError, ["backend", "3"]),
    "channel_dim too big": ({"channel_dim": lambda: 4}, ValueError, ["channel_dim=4", "(4, 6, 5, 5)"]),
    "channel_dim too small": ({"channel_dim": lambda: -5}, ValueError, ["channel_dim=-5", "(4, 6, 5, 5)"]),
    "channel_dim a string": ({"channel_dim": lambda: "1"}, TypeError, ["channel_dim", "str"]),
    "channel_dim a float": ({"channel_dim": lambda: 1.0}, TypeError, ["channel_dim", "float"]),
    "channel_dim None": ({"channel_dim": lambda: None}, TypeError, ["channel_dim", "NoneType"]),
    "another channel": ({"channel_dim": lambda: 0}, ValueError, ["(4,)", "(6,)", "dimension 0"]),
    "batchmean without a batch": (_no_batch, ValueError, ["batchmean", "channel_dim=0"]),
    "batchmean, counted back": ({**_no_batch, "channel_dim": lambda: -4}, ValueError, ["batchmean", "channel"]),
    "no kernel for none": ({"reduction": lambda: "none", "backend": lambda: "cpu"}, ValueError, ["none", "'cpu'"]),
    "one_pass for target": (_one_pass, ValueError, ["one_pass", "target", "two_pass"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_refused(name: str, inplace: bool) -> None:
    changes, error, words = BAD[name]
    given = {**good(), **{key: make() for key, make in changes.items()}}
    kept = {
        k: x.clone() for k, x in given.items() if isinstance(x, Tensor) and k in good() and k not in changes
    }
    if inplace and "mean" not in changes:
        given["mean"] = given["mean"].requires_grad_() * 1
    with pytest.raises(error) as caught:
        vidfast.gaussian_nll(**given, inplace=inplace)
    assert type(caught.value) is error
    text = str(caught.value)
    for word in words:
        assert word in text, f"{word!r} is missing in: {text}"
    for key, x in kept.items():
        assert torch.equal(given[key].detach(), x), f"{key} was written"


@pytest.mark.parametrize(
    "name",
    [
        "shapes differ", "alpha too long", "empty, one channel less", "integer target", "sparse mean",
        "an array", "eps 0", "channel_dim too big", "channel_dim a float", "all meta",
    ],
)  # fmt: skip
def test_log_likelihood_map_refuses_the_same(name: str) -> None:
    changes, error, words = BAD[name]
    given = {**good(), **{key: make() for key, make in changes.items()}}
    with pytest.raises(error, match=".*".join(re.escape(w) for w in words[:1])):
        vidfast.log_likelihood_map(**given)


@pytest.mark.parametrize("asked", ["auto", "reference", *backends.NAMES])
@pytest.mark.parametrize(
    "name",
    [
        "shapes differ",
        "nothing is broadcast",
        "alpha too short",
        "empty, one channel less",
        "integer mean",
        "eps 0",
    ],
)
def test_every_backend_refuses_the_same(name: str, asked: str) -> None:
    changes, error, _ = BAD[name]
    with pytest.raises(error):
        vidfast.gaussian_nll(**{**good(), **{key: make() for key, make in changes.items()}}, backend=asked)


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional"):
        vidfast.gaussian_nll(*good().values(), 1)  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        vidfast.GaussianNLL(3, 1)  # type: ignore[misc]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.randn(6, 3), torch.randn(6, 2)])
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        vidfast.gaussian_nll(nested, nested, torch.zeros(6))


MODULES: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "no channels": (lambda: vidfast.GaussianNLL(0), ValueError, ["num_channels", "0"]),
    "channels negative": (lambda: vidfast.GaussianNLL(-3), ValueError, ["num_channels", "-3"]),
    "channels a float": (lambda: vidfast.GaussianNLL(3.0), TypeError, ["num_channels", "int", "float"]),  # type: ignore[arg-type]
    "channels a bool": (lambda: vidfast.GaussianNLL(True), TypeError, ["num_channels", "int", "bool"]),
    "init_var is eps": (lambda: vidfast.GaussianNLL(3, init_var=1e-5), ValueError, ["variance", "eps=1e-05", "1e-05"]),
    "init_var below eps": (lambda: vidfast.GaussianNLL(3, init_var=0.1, eps=0.2), ValueError, ["0.2", "0.1"]),
    "init_var negative": (lambda: vidfast.GaussianNLL(3, init_var=-1), ValueError, ["variance", "-1"]),
    "init_var NaN": (lambda: vidfast.GaussianNLL(3, init_var=math.nan), ValueError, ["variance", "nan"]),
    "init_var infinite": (lambda: vidfast.GaussianNLL(3, init_var=math.inf), ValueError, ["variance", "inf"]),
    "init_var a string": (lambda: vidfast.GaussianNLL(3, init_var="5"), TypeError, ["var", "str"]),  # type: ignore[arg-type]
    "eps": (lambda: vidfast.GaussianNLL(3, eps=0), ValueError, ["eps", "0"]),
    "reduction": (lambda: vidfast.GaussianNLL(3, reduction="avg"), ValueError, ["reduction", "'avg'"]),
    "strategy": (lambda: vidfast.GaussianNLL(3, strategy="fast"), ValueError, ["strategy", "'fast'"]),
    "backend": (lambda: vidfast.GaussianNLL(3, backend="tpu"), ValueError, ["backend", "'tpu'"]),
    "weight": (lambda: vidfast.GaussianNLL(3, weight=math.inf), ValueError, ["weight", "inf"]),
    "channel_dim": (lambda: vidfast.GaussianNLL(3, channel_dim="last"), TypeError, ["channel_dim", "str"]),  # type: ignore[arg-type]
    "VIDLoss channels": (lambda: vidfast.VIDLoss(0, 2, 3), (ValueError), ["num_input_channels", "0"]),
    "VIDLoss mid": (lambda: vidfast.VIDLoss(1, -2, 3), ValueError, ["num_mid_channel", "-2"]),
    "VIDLoss target": (lambda: vidfast.VIDLoss(1, 2, 0), ValueError, ["num_target_channels", "0"]),
    "VIDLoss init_pred_var": (lambda: vidfast.VIDLoss(1, 2, 3, init_pred_var=1e-6), ValueError, ["variance", "1e-06"]),
    "VIDLoss eps": (lambda: vidfast.VIDLoss(1, 2, 3, eps=-1.0), ValueError, ["eps", "-1.0"]),
    "VIDLoss reduction": (lambda: vidfast.VIDLoss(1, 2, 3, reduction="none"), ValueError, ["reduction", "none"]),
    "VIDLoss backend": (lambda: vidfast.VIDLoss(1, 2, 3, backend="x"), ValueError, ["backend", "'x'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_modules_refuse(name: str) -> None:
    make, error, words = MODULES[name]
    with pytest.raises(error) as caught:
        make()
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"
