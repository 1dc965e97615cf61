"""A trained teacher: trained once, kept in a cache under a name that follows from everything that made it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.base import ImageData
from ..distiller import Distiller
from ..files import CheckpointError, load_checkpoint, save_checkpoint
from ..models.base import TappedNetwork, build
from ..trainer import Row, Trainer, TrainOptions

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
        "options": {k: v for k, v in asdict(options).items() if not k.endswith("_every") and k not in FREE},
    }
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:12]
    return cache / f"teacher-{data.name}-{network}-{digest}.pt"


FREE = ("device", "workers")


def trained_teacher(
    network: str,
    data: ImageData,
    options: TrainOptions,
    *,
    cache: Path | None,
    progress: bool | tqdm[Any] = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[TappedNetwork, Row, bool]:
    """The teacher, its last row of metrics (with test_accuracy), and whether it came from the cache.

    Its weights start from options.seed. A damaged file in the cache is said so and replaced; a cache that
    cannot be written is said so and done without.
    """
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(options.seed)
        teacher = build(network, in_channels=data.in_channels, num_classes=data.num_classes)
    path = None if cache is None else cache_path(cache, network, data, options)
    if path is not None and path.exists():
        try:
            state = load_checkpoint(path, ("network", "metrics"))
            teacher.load_state_dict(state["network"])
            return teacher.eval(), dict(state["metrics"]), True
        except (CheckpointError, RuntimeError) as error:
            say(f"training the teacher anew, the cached one cannot be used: {str(error).splitlines()[0]}")
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
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(path, {"network": teacher.state_dict(), "metrics": metrics})
        except OSError as error:
            say(f"the teacher is not cached: {error}")
    return teacher, metrics, False
