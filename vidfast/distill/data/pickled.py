"""Pickles of dictionaries, lists, strings, numbers and uint8 arrays, read without running anything.

A pickle is a program that may call any function it names. Here the few names that numpy's arrays need lead to
the stand-ins below, every other name is an error, and numpy's own functions are never reached.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from .base import DataError


class _Array:
    """What stands for an array while its pickle is read: `__setstate__` gives its shape and bytes."""

    value: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: object) -> None:
        match state:
            case (_, tuple() as shape, _UInt8(), bool() | int() as by_columns, bytes() | str() as raw):
                self.value = _array(raw, shape, by_columns=bool(by_columns))
            case _:
                raise pickle.UnpicklingError("an array whose elements are not uint8, or no array")


class _UInt8:
    """What stands for the dtype uint8."""

    def __setstate__(self, state: object) -> None:
        """The byte order and the like, of which uint8 has none."""


def _dtype(kind: object, *flags: object) -> _UInt8:
    if kind not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"an array of {kind!r}, wanted uint8 ('u1')")
    return _UInt8()


def _array(raw: object, shape: object, *, by_columns: bool) -> np.ndarray[Any, Any]:
    if isinstance(raw, str):  # Python 2's str, read as latin-1
        raw = raw.encode("latin-1")
    if (
        not isinstance(raw, (bytes, bytearray))
        or not isinstance(shape, tuple)
        or not all(type(size) is int and size >= 0 for size in shape)
        or prod(shape) != len(raw)
    ):
        raise pickle.UnpicklingError("an array whose bytes do not fit its shape")
    return np.frombuffer(bytes(raw), np.uint8).reshape(shape, order="F" if by_columns else "C")


def _reconstruct(*arguments: object) -> _Array:
    return _Array()


def _frombuffer(raw: object, dtype: object, shape: object, order: object) -> _Array:
    if not isinstance(dtype, _UInt8):
        raise pickle.UnpicklingError("an array whose elements are not uint8")
    array = _Array()
    array.value = _array(raw, shape, by_columns=order == "F")
    return array


def _encode(text: object, encoding: object) -> bytes:
    """How Python 3 writes bytes in Python 2's pickles."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes in an encoding other than latin1")
    return text.encode("latin-1")


class _Function:
    """A function that a pickle may call and, unlike a plain one, set no attribute of."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it gives a function a state")


ALLOWED: dict[tuple[str, str], Any] = {
    # numpy 1 and numpy 2 call the same module differently.
    ("numpy.core.multiarray", "_reconstruct"): _Function(_reconstruct),
    ("numpy._core.multiarray", "_reconstruct"): _Function(_reconstruct),
    ("numpy.core.numeric", "_frombuffer"): _Function(_frombuffer),
    ("numpy._core.numeric", "_frombuffer"): _Function(_frombuffer),
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Function(_dtype),
    ("_codecs", "encode"): _Function(_encode),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which no array needs; nothing of it was run"
            ) from None


def load_arrays(data: bytes, where: str) -> Any:
    """The value of a pickle of any protocol, Python 2's included, with str keys and numpy arrays.

    Raises DataError, naming `where` it is from, for a pickle that is damaged, holds anything else, or names
    anything to be called.
    """
    try:
        # latin-1, in which every byte is a character: Python 2's str held bytes and text alike.
        return _plain(_Unpickler(io.BytesIO(data), encoding="latin-1").load())
    except RecursionError:
        raise DataError(f"{where}: a pickle nested too deep") from None
    except Exception as error:  # whatever a damaged pickle leads to
        raise DataError(f"{where}: not a pickle of arrays that can be trusted: {error}") from error


def _plain(value: Any) -> Any:
    """The arrays for their stand-ins, and str for the bytes that keys are where Python 3 wrote them."""
    if isinstance(value, dict):
        return {k.decode("latin-1") if isinstance(k, bytes) else k: _plain(v) for k, v in value.items()}
    if isinstance(value, _Array):
        if value.value is None:
            raise pickle.UnpicklingError("an array without a value")
        return value.value
    return value
