"""What a Distiller asks of its terms: names of their own, complete parameter groups, and whether they take masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .methods.base import Method


def named(terms: Sequence[Method], *, has_teacher: bool) -> dict[str, nn.Module]:
    """The terms by name.

    Raises TypeError for what is no Method, ValueError for terms that are used already, that lack a teacher, or of one
    name.
    """
    found: dict[str, nn.Module] = {}
    for term in terms:
        if not isinstance(term, Method):
            raise TypeError(f"wanted Method objects as terms, got {type(term).__name__}")
        if term.built:
            raise ValueError(f"the term {term.name!r} belongs to another Distiller; make one for each")
        if term.needs_teacher and not has_teacher:
            raise ValueError(f"the term {term.name!r} needs a teacher, and there is none")
        if term.name in found or term.name == "task":
            raise ValueError(f"two terms are called {term.name!r}; give one of them another with name=")
        found[term.name] = term
    return found


def check_groups(module: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Every trainable parameter is in exactly one group: an alpha left out is VID turned into scaled MSE.

    Raises RuntimeError where that is not so.
    """
    grouped = Counter(id(p) for group in groups for p in group["params"])
    for name, parameter in module.named_parameters():
        times = grouped[id(parameter)]
        if times > 1 or (parameter.requires_grad and not times):
            raise RuntimeError(f"parameter {name!r} is in {times} parameter groups, wanted exactly one")


def refuse_masks(terms: nn.ModuleDict) -> None:
    """Raises ValueError where a term takes no mask, which it would leave out unseen, or there is no term."""
    if not terms:
        raise ValueError(
            "wanted terms that take a mask, got a Distiller without terms; the labels' term has its ignored labels"
        )
    for name, term in terms.items():
        if not getattr(term, "takes_mask", False):
            raise ValueError(
                f"wanted terms that take a mask, got {name!r} ({type(term).__name__}), which does not; give mask=None, "
                "or leave the term out. A method of your own, a subclass with a loss of its own too, says by "
                "takes_mask = True in its class that this leaves out what the mask does"
            )
