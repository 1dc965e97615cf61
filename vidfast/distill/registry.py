"""Names for things a person may choose: methods, networks, data sets, regressors.

Every kind has one `Registry`. The files of a package are imported by `discover`, so adding a method, a
network or a data set is adding a file; user code registers with the same decorator.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar, cast

T = TypeVar("T")
Thing = TypeVar("Thing")


class UnknownNameError(ValueError):
    """A name that is not registered; the text lists what is near and what there is."""


def near_matches(name: str, known: Iterable[str], count: int = 3) -> str:
    """The names that `name` was probably meant to be, as text for an error message."""
    known = [k for k in known if k]
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    # Layer names differ in their last parts more than a string distance likes: group1.0 for groups.1.
    close += [k for k in known if k not in close and name and (k.startswith(name) or k.endswith("." + name))]
    if close:
        return "did you mean " + ", ".join(map(repr, close[:count])) + "?"
    shown = ", ".join(map(repr, known[:12])) + (", ..." if len(known) > 12 else "")
    return f"there are {shown}" if known else "there are none"


class Registry(Generic[T]):
    """A mapping from names to things of one `kind`, whose errors help."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, T] = {}

    def register(self, name: str) -> Callable[[Thing], Thing]:
        """A decorator that enters a class or a function as `name`, and keeps its type.

        Raises ValueError when another thing has that name.
        """

        # What is decorated is a T, but of its own type: a method's class, whose signature callers see. A type
        # variable cannot be bound to another, so that is not checked.
        def enter(thing: Thing) -> Thing:
            entered = cast(T, thing)
            if self._things.get(name, entered) is not entered:
                raise ValueError(f"{self.kind} {name!r} is registered already, as {self._things[name]!r}")
            self._things[name] = entered
            return thing

        return enter

    def __getitem__(self, name: str) -> T:
        try:
            return self._things[name]
        except KeyError:
            raise UnknownNameError(
                f"unknown {self.kind} {name!r}: {near_matches(name, self._things)}"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._things))


def discover(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that its files register what they hold."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
