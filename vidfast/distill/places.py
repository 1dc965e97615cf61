"""What a tap's name says: a layer, or its input, and which element of what goes in or comes out.

    "layer3"                        what the layer returns
    "layer3[0]"                     the first element of the tuple or list that it returns
    "encoder[last_hidden_state]"    an element by its name: of a mapping, a named tuple, a dataclass
    "encoder[hidden_states][2]"     elements of elements
    "head.input"                    what the layer is called with: its first argument
    "head.input[1]", "head.input[mask]"   another argument, by its position or its name
    "[1][feats][0]"                 an element of what the network itself returns

A layer that is called "input" keeps its name: where `head` has such a layer, "head.input" is what that one returns.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Key = int | str

_NAME = re.compile(r"(?P<layer>[^\[\]]*)(?P<keys>(\[[^\[\]]+\])*)")
_INPUT = ".input"


@dataclass(frozen=True)
class Place:
    """One tap's name, taken apart.

    name: as it was given. layer: the module's name, "" for the network itself. is_input: what the layer is called with
        is meant. keys: the elements, from the outside in; of an input the first is the argument.
    """

    name: str
    layer: str
    is_input: bool = False
    keys: tuple[Key, ...] = ()


class NoSuchElementError(LookupError):
    """What was recorded has no such element; the text says what it is.

    value: what was asked for an element. depth: how many keys led to it.
    """

    def __init__(self, text: str, value: Any = None, depth: int = 0) -> None:
        super().__init__(text)
        self.value, self.depth = value, depth


def parse(name: str, modules: Container[str]) -> Place:
    """Take a tap's name apart.

    modules: the names of the network's modules, as of `named_modules()`. The layer found need not be among them: the
        caller looks it up.
    """
    if name in modules:
        return Place(name, name)
    match = _NAME.fullmatch(name)
    if match is None:
        return Place(name, name)
    layer = match["layer"]
    keys = tuple(_key(part) for part in re.findall(r"\[([^\[\]]+)\]", match["keys"]))
    if layer not in modules and layer.endswith(_INPUT):
        return Place(name, layer.removesuffix(_INPUT), True, keys)
    return Place(name, layer, False, keys)


def _key(text: str) -> Key:
    text = text.strip()
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def argument_of(place: Place, args: Sequence[Any], named: Mapping[str, Any]) -> tuple[Any, tuple[Key, ...]]:
    """The argument that an input's name means, and the keys that are left for its elements.

    Without a key it is the first argument by position, or the only one by name.

    Raises NoSuchElementError.
    """
    if not place.keys:
        if args:
            return args[0], ()
        if len(named) == 1:
            return next(iter(named.values())), ()
    else:
        key, rest = place.keys[0], place.keys[1:]
        if isinstance(key, str) and key in named:
            return named[key], rest
        if isinstance(key, int) and -len(args) <= key < len(args):
            return args[key], rest
    raise NoSuchElementError(f"was called with {_arguments(args, named)}")


def element_of(value: Any, keys: Sequence[Key]) -> Any:
    """The element of nested tuples, lists, mappings and objects that the keys lead to.

    Raises NoSuchElementError.
    """
    for depth, key in enumerate(keys):
        value = _step(value, key, depth)
    return value


def _step(value: Any, key: Key, depth: int) -> Any:
    if isinstance(value, Tensor):
        # Its element would be a sample.
        raise NoSuchElementError("is one Tensor, which has no elements here", value, depth)
    if isinstance(value, Mapping):
        for name in (key, str(key)):  # of a feature pyramid's levels the names are '0', '1', ...
            if name in value:
                return value[name]
        # The outputs of transformers are mappings that have positions too.
        if isinstance(key, int) and hasattr(value, "to_tuple"):
            value = value.to_tuple()
    if isinstance(value, (tuple, list)) and isinstance(key, int) and -len(value) <= key < len(value):
        return value[key]
    if isinstance(key, str) and not isinstance(value, Mapping) and key in _names(value):
        return getattr(value, key)
    raise NoSuchElementError(f"is {describe(value)}, which has no element [{key}]", value, depth)


def _names(value: Any) -> tuple[str, ...]:
    """The names of a named tuple's or a dataclass's elements, or of an object's public attributes."""
    names = getattr(value, "_fields", ()) or getattr(value, "__dataclass_fields__", ())
    names = names or getattr(value, "__dict__", ())
    return tuple(name for name in names if not name.startswith("_"))


def keys_of(value: Any) -> list[Key]:
    """The elements that a name may choose in a value, one level deep."""
    if isinstance(value, Tensor):
        return []
    if isinstance(value, Mapping):
        return [key for key in value if isinstance(key, (int, str)) and not {"[", "]"} & set(str(key))]
    if isinstance(value, (tuple, list)):
        return list(_names(value)) if hasattr(value, "_fields") else list(range(len(value)))
    return list(_names(value))


def elements_named(name: str, value: Any) -> list[str]:
    """The names, such as "layer3[0]", of those elements of a value that are Tensors, or hold some."""
    found = []
    for key in keys_of(value):
        element = element_of(value, (key,))
        if isinstance(element, Tensor):
            found.append(f"{name}[{key}]")
        elif isinstance(element, (tuple, list, Mapping)):
            found += elements_named(f"{name}[{key}]", element)
    return found


def arguments_named(name: str, args: Sequence[Any], named: Mapping[str, Any]) -> list[str]:
    """The names, such as "head.input[0]", of the arguments that are Tensors, or hold some."""
    found = [] if len(args) == 0 else elements_named(name, tuple(args))
    return found + elements_named(name, dict(named))


def describe(value: object) -> str:
    """A value in a few words: "a tuple of 2", "a dict of 'x', 'y'"."""
    kind = type(value).__name__
    kind = f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"
    if isinstance(value, Mapping):
        return f"{kind} of {', '.join(map(repr, list(value)[:6]))}"
    if isinstance(value, (tuple, list)):
        return f"{kind} of {len(value)}"
    return kind


def _arguments(args: Sequence[Any], named: Mapping[str, Any]) -> str:
    if not args and not named:
        return "no argument"
    by_position = f"{len(args)} by position" if args else "none by position"
    return f"{by_position}, {', '.join(map(repr, named)) if named else 'none'} by name"
