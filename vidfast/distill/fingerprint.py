"""What a run was: enough of it to see that a checkpoint belongs to another one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from vidfast._torch import uncompiled

from .distiller import Distiller
from .options import TrainOptions
from .processes import Processes
from .stream import kept_random_state, seed_everything
from .teacher import weights_of

_LOOKED_AT = 8
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def fingerprint(
    distiller: Distiller, data: Dataset[Any], size: int, augment: object = None
) -> dict[str, Any]:
    """Plain values that are equal for two runs that learn the same thing from the same data.

    The networks' classes, a digest of the teacher's weights, every term by name with its repr and its plain
    attributes, the labels' loss and weight, the augmentation's name, the data's length and a digest of 8 of its
    items. Items that are not the same when read twice in one random state are left out of the comparison.
    """
    return {
        "student": _class_of(distiller.student),
        "teacher": _class_of(distiller.teacher),
        "teacher weights": _digest_of_weights(distiller.teacher),
        "teacher_dtype": str(distiller.teacher_dtype),
        "task": f"{distiller.task_weight:g} x {_loss(distiller.task_loss)}{_counted(distiller)}",
        "frozen": [name for name, p in distiller.named_parameters() if not p.requires_grad],
        "augmentation": _name_of(augment),
        "terms": {name: _described(term) for name, term in distiller.terms.items()},
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
    if old.get("frozen") != new["frozen"]:
        found.append("other parameters frozen")
    for what in ("teacher weights", "teacher_dtype", "task", "augmentation"):
        if old.get(what) != new[what]:
            # Digests tell a reader nothing.
            told = "other teacher weights" if what == "teacher weights" else None
            found.append(told or f"the {what} {old.get(what)} and not {new[what]}")
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


def refuse_unlike(processes: Processes, options: TrainOptions, run: Mapping[str, Any]) -> None:
    """Raises ValueError, in every process, where one was given something else than the first.

    run: the process's fingerprint.
    """
    found = processes.gather_objects((options.what_counts(), run))
    (first_options, first), others = found[0], []
    for index, (its_options, its_run) in enumerate(found):
        names = [name for name in its_options if its_options[name] != first_options[name]]
        if names or its_run != first:
            others.append(f"process {index} {', '.join([*names, *differences(its_run, first)])}")
    if others:
        raise ValueError(
            "wanted the same options, networks and data in all processes, got in "
            f"{'; in '.join(others)}, unlike in the first; make them alike, the networks from one seed or one file"
        )


def _name_of(thing: object) -> str:
    """A function's or module's name; what it closes over is not seen."""
    if thing is None or isinstance(thing, nn.Module):
        return "none" if thing is None else _ADDRESS.sub("", repr(thing))
    return str(getattr(thing, "__qualname__", None) or _ADDRESS.sub("", repr(thing)))


def _loss(task_loss: Any) -> str:
    """A loss with its options and a digest of its tensors, such as the weights of classes."""
    if not isinstance(task_loss, nn.Module):
        return _name_of(task_loss)
    return f"{_described(task_loss)} {_digest_of_weights(task_loss)}"


def _counted(distiller: Distiller) -> str:
    return "" if distiller.given_count is None else f", counted by {_name_of(distiller.given_count)}"


def _described(term: nn.Module) -> str:
    plain = {
        name: value
        for name, value in sorted(vars(term).items())
        if not name.startswith("_")
        and name not in ("training", "built")
        and isinstance(value, (bool, int, float, str, tuple, type(None)))
    }
    return f"{_ADDRESS.sub('', repr(term))} {plain}"


def _digest_of_weights(network: nn.Module | None) -> str:
    digest = hashlib.sha256()
    if network is not None:
        add_weights(digest, weights_of(network), kinds=True)
    return digest.hexdigest()[:16]


def add_weights(digest: Any, weights: Mapping[str, Any], *, kinds: bool = False) -> None:
    """Feed a digest of hashlib a network's state: names and values, wherever the tensors are and however laid out.

    kinds: dtypes and shapes too, for networks of which the digest's user knows nothing else.
    """
    for name, value in weights.items():
        digest.update(name.encode())
        # Quantised layers keep weight and bias as one value.
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, Tensor):
                _add_tensor(digest, part, kinds)


def _class_of(network: nn.Module | None) -> str:
    # torch.compile(network) is another class around the same network.
    kind = type(None if network is None else uncompiled(network))
    return "none" if network is None else f"{kind.__module__}.{kind.__qualname__}"


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
        _add_tensor(digest, item)
    elif isinstance(item, (tuple, list)):
        for part in item:
            _add(digest, part)
    else:
        digest.update(_ADDRESS.sub("", repr(item)).encode())


def _add_tensor(digest: Any, tensor: Tensor, kind: bool = True) -> None:
    if kind:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    values = tensor.detach().int_repr() if tensor.is_quantized else tensor.detach()
    digest.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
