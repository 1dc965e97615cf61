"""A trained teacher: trained once, kept in a cache under a name that follows from everything that made it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from ..data.base import ImageData
from ..distiller import Distiller
from ..files import CheckpointError, load_checkpoint, save_checkpoint
from ..models.base import TappedNetwork, build
from ..processes import is_main
from ..trainer import Progress, Row, Trainer, TrainOptions

# Raise it when a change makes a teacher trained before differ from one trained now.
CACHE_FORMAT = 1


def default_cache() -> Path:
    """VIDFAST_CACHE, or vidfast under the user's cache folder."""
    own = os.environ.get("VIDFAST_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vidfast"


def cache_path(cache: Path, network: str, data: ImageData, options: TrainOptions) -> Path:
    """Where the teacher with these options is kept. Where it was trained, and how often looked at, is left out."""
    made_by = {
        "format": CACHE_FORMAT,
        "network": network,
        "data": data.name,
        "images": len(data.train),
        "options": options.what_counts(),
    }
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:12]
    return cache / f"teacher-{data.name}-{network}-{digest}.pt"


def trained_teacher(
    network: str,
    data: ImageData,
    options: TrainOptions,
    *,
    cache: Path | None,
    progress: bool | Progress = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[TappedNetwork, Row, bool]:
    """The teacher, its last row of metrics (with test_accuracy), and whether it came from the cache.

    Its weights start from options.seed. A damaged file in the cache is said so and replaced; a cache that
    cannot be written is said so and done without.
    """

    def initial() -> TappedNetwork:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(options.seed)
            return build(
                network,
                in_channels=data.in_channels,
                num_classes=data.num_classes,
                image_size=data.image_size,
            )

    teacher = initial()
    path = None if cache is None else cache_path(cache, network, data, options)
    if path is not None and path.exists():
        try:
            return _cached(path, teacher)
        except (CheckpointError, RuntimeError, TypeError, AttributeError) as error:
            say(f"training the teacher anew, the cached one cannot be used: {str(error).splitlines()[0]}")
            # Some of its weights may be the damaged file's.
            teacher = initial()
    trainer = Trainer(
        Distiller(teacher),
        data.train,
        options,
        evaluate={"test": data.test, "validation": data.validation},
        augment=data.augment,
        progress=progress,
    )
    metrics = trainer.fit()[-1]
    teacher.cpu().eval()
    if path is not None and is_main():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(path, {"network": teacher.state_dict(), "metrics": metrics})
        except OSError as error:
            say(f"the teacher is not cached: {error}")
    return teacher, metrics, False


def _cached(path: Path, teacher: TappedNetwork) -> tuple[TappedNetwork, Row, bool]:
    """The teacher with the weights of a cached file, as `trained_teacher` returns it."""
    state = load_checkpoint(path, ("network", "metrics"))
    metrics = state["metrics"]
    if not isinstance(metrics, dict) or not isinstance(metrics.get("test_accuracy"), float):
        raise CheckpointError(f"{path}: its metrics lack test_accuracy")
    teacher.load_state_dict(state["network"])
    return teacher.eval(), dict(metrics), True
