"""Pickles of arrays: those of Python 2 and of every protocol of Python 3, and those that would run something."""

from __future__ import annotations

import os
import pickle
import subprocess
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cifar_files import python2_pickle

from vidfast.distill.data import DataError
from vidfast.distill.data import pickled as pickled_module
from vidfast.distill.data.pickled import load_arrays

ARRAY = np.arange(2 * 300, dtype=np.uint8).reshape(2, 300)


@pytest.mark.parametrize("order", ["C", "F"])
def test_python_2(order: Any) -> None:
    array = ARRAY.copy(order)
    value = load_arrays(python2_pickle({b"data": array, b"labels": [3, 500], b"name": b"\xe9t\xe9"}), "here")
    assert value["labels"] == [3, 500]
    assert value["name"] == "été"
    assert value["data"].dtype == np.uint8
    assert np.array_equal(value["data"], array)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
def test_python_3_and_the_numpy_here(protocol: int, order: Any) -> None:
    written = {b"data": ARRAY.copy(order), "labels": [3, 500, -1], "more": (1.5, None, True, b"\xff\x00")}
    value = load_arrays(pickle.dumps(written, protocol), "here")
    assert np.array_equal(value.pop("data"), ARRAY)
    assert value == {"labels": [3, 500, -1], "more": (1.5, None, True, b"\xff\x00")}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_1_and_numpy_2_name_their_modules_differently(protocol: int) -> None:
    data = pickle.dumps({"data": ARRAY}, protocol)
    here = b"numpy._core" if b"numpy._core" in data else b"numpy.core"
    if protocol < 4:  # names end in a newline; later they carry their length
        for other in (b"numpy._core", b"numpy.core"):
            assert np.array_equal(load_arrays(data.replace(here, other), "here")["data"], ARRAY)
    for module in ("multiarray", "numeric"):
        names = {key[1] for key in pickled_module.ALLOWED if key[0] == f"numpy.core.{module}"}
        assert (
            names == {key[1] for key in pickled_module.ALLOWED if key[0] == f"numpy._core.{module}"} != set()
        )


class Runs:
    """What unpickles by calling a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_create_a_file_is_refused_and_creates_none(tmp_path: Path, protocol: int) -> None:
    made = tmp_path / "made"
    for bad in (
        Runs(os.system, f"touch {made}"),
        Runs(subprocess.check_call, ["touch", str(made)]),
        Runs(open, str(made), "w"),
        Runs(eval, f"open({str(made)!r}, 'w')"),
        Runs(os.mkdir, str(made)),
        Runs(np.save, str(made), ARRAY),
    ):
        data = pickle.dumps({"data": ARRAY, "labels": [bad]}, protocol)
        with pytest.raises(
            DataError, match=r"^here: not a .* names \S+, which no array needs; nothing of it was run"
        ):
            load_arrays(data, "here")
    assert not made.exists()
    # It would have created one otherwise.
    pickle.loads(pickle.dumps(Runs(os.mkdir, str(made)), protocol))
    assert made.exists()


def reference(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


@pytest.mark.parametrize(
    "data",
    [
        # Names near the allowed ones.
        reference("numpy", "load") + b".",
        reference("numpy.core.multiarray", "fromfile") + b".",
        reference("builtins", "getattr") + b".",
        reference("_codecs", "lookup") + b".",
        # A dotted name, which protocol 4 resolves attribute by attribute.
        b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__class__\x93.",
        b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.data\x93.",
        # An allowed function is given a state: attributes of it, as `BUILD` sets them.
        b"\x80\x02" + reference("_codecs", "encode") + b"}U\x0c__defaults__K\x01sb.",
        b"\x80\x02" + reference("_codecs", "encode") + b"N}U\x08__name__K\x01s\x86b.",
        # The class that stands for an array is given one.
        b"\x80\x02" + reference("numpy", "ndarray") + b"}U\x05valueK\x01sb.",
        # Another codec, another dtype, an array of objects.
        b"\x80\x02" + reference("_codecs", "encode") + b"U\x01aU\x03hex\x86R.",
        pickle.dumps(np.zeros(3)),
        pickle.dumps(np.zeros(3), 5),
        pickle.dumps(np.array([{}, []], dtype=object)),
        # A shape that does not fit, one that is huge, an array that never gets a value.
        python2_pickle({b"data": ARRAY}).replace(b"K\x02J", b"K\x03J"),
        python2_pickle({b"data": ARRAY}).replace(b"K\x02J\x2c\x01\x00\x00", b"K\x02J\xff\xff\xff\x7f"),
        b"\x80\x02}U\x04data" + reference("numpy.core.multiarray", "_reconstruct") + b")Rs.",
        pickle.dumps(OrderedDict(data=1)),
        # A persistent name, a name from copyreg's table, nothing, noise, a pickle that ends early.
        b"Pname\n.",
        b"\x80\x02\x82\x01.",
        b"",
        b"\x00\xff" * 50,
        pickle.dumps({"data": ARRAY})[:-200],
    ],
)  # fmt: skip
def test_other_pickles_are_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^here: not a pickle of arrays that can be trusted"):
        load_arrays(data, "here")


def test_a_pickle_nested_deeply_is_an_error_or_its_value() -> None:
    depth = 100_000
    data = b"\x80\x02" + b"(" * depth + b"t" * depth + b"."
    value = load_arrays(data, "here")
    for _ in range(depth - 1):
        (value,) = value
    assert value == ()
