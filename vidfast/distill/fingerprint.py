"""What a run was: enough of it to see that a checkpoint belongs to another one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from .distiller import Distiller
from .stream import kept_random_state, seed_everything

_LOOKED_AT = 8
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def fingerprint(distiller: Distiller, data: Dataset[Any], size: int) -> dict[str, Any]:
    """Plain values that are equal for two runs that learn the same thing from the same data.

    The networks' classes, every term by name with its repr, the data's length and a digest of 8 of its items.
    Items that are not the same when read twice in one random state are left out of the comparison.
    """
    return {
        "student": _class_of(distiller.student),
        "teacher": _class_of(distiller.teacher),
        "terms": {name: _ADDRESS.sub("", repr(term)) for name, term in distiller.terms.items()},
        "images": size,
        "data": _digest(data, size),
    }


def differences(old: Any, new: Mapping[str, Any]) -> list[str]:
    """What differs between a checkpoint's fingerprint and this run's, in words."""
    if not isinstance(old, Mapping) or not isinstance(old.get("terms"), Mapping):
        return ["nothing that tells what was trained"]
    found = [
        f"the {role} {old.get(role)} and not {new[role]}"
        for role in ("student", "teacher")
        if old.get(role) != new[role]
    ]
    before, now = old["terms"], new["terms"]
    if list(before) != list(now):
        found.append(f"the terms {list(before)} and not {list(now)}")
    else:
        found += [f"the term {name!r} with other options" for name in now if before[name] != now[name]]
    if old.get("images") != new["images"]:
        found.append(f"{old.get('images')} images and not {new['images']}")
    elif None not in (old.get("data"), new["data"]) and old.get("data") != new["data"]:
        found.append("other images")
    return found


def _class_of(network: nn.Module | None) -> str:
    # torch.compile(network) is another class around the same network.
    network = getattr(network, "_orig_mod", network)
    return "none" if network is None else f"{type(network).__module__}.{type(network).__qualname__}"


def _digest(data: Dataset[Any], size: int) -> str | None:
    indices = sorted({i * (size - 1) // max(1, _LOOKED_AT - 1) for i in range(_LOOKED_AT)})
    with kept_random_state():
        once, twice = (_digest_of(data, indices) for _ in range(2))
    return once if once == twice else None


def _digest_of(data: Dataset[Any], indices: list[int]) -> str:
    digest = hashlib.sha256()
    for index in indices:
        seed_everything(index)
        _add(digest, default_collate([data[index]]))
    return digest.hexdigest()[:16]


def _add(digest: Any, item: Any) -> None:
    if isinstance(item, Tensor):
        digest.update(f"{item.dtype}{tuple(item.shape)}".encode())
        digest.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(item, (tuple, list)):
        for part in item:
            _add(digest, part)
    else:
        digest.update(_ADDRESS.sub("", repr(item)).encode())
