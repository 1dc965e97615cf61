"""Random calls of gaussian_nll: a case is drawn from one integer and prints as one line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from guarded import LAYOUTS, REPEATING, SENTINELS
from saved_hooks import HOOKS, ONE_FUNCTION

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
ALPHA_LAYOUTS = ("contiguous", "sliced", "column", "expanded", "flipped", "shifted")
VALUES = ("normal", "normal", "normal", "normal", "large", "tiny", "extreme alpha", "inf", "nan", "equal")
EPS = (1e-5, 1e-5, 1e-5, 1e-12, 1e-8, 1e-3, 0.5, 100.0, 1e-30)
REDUCTIONS = ("mean", "sum", "batchmean", "mean", "none")
STRATEGIES = ("auto", "one_pass", "two_pass")
G = (1.0, 1.0, -1.0, 3.5, 0.125, -0.7, 1024.0, 0.0)
INCOMING = ("plain", "product", "slice", "negated")  # how g arrives; product: from g * loss
WEIGHTS = (1.0, 1.0, -2.25, 0.01, 0.0)
# A mask: its dtype, and its shape beside mean's. Floats are fractional weights.
MASKS = ("none", "none", "bool", "bool", "uint8", "int64", "fp32", "fp64", "bf16")
MASK_SHAPES = ("positions", "positions", "kept dimension", "sample", "broadcast", "strided")
# How the call is made and differentiated; execute.py has a function for each.
PATHS = (
    "grad",
    "grad",
    "backward",
    "twice",
    "two at once",
    "create_graph",
    "checkpoint",
    "reentrant checkpoint",
    "same in threads",
    "others in threads",
    "no_grad",
    "inference_mode",
    "inference inputs",
)
WITHOUT_GRADIENT = ("no_grad", "inference_mode")
OUTPUTS = (
    "plain",
    "guarded",
    "kept",
)  # kept: by vidfast.memory, which otherwise serves large gradients alone
WANTED = ("m", "a", "ma", "ma", "mt", "mta", "t", "ta")
LONG = (15, 16, 17, 31, 32, 33, 63, 64, 65, 130, 255, 257, 513, 1000)
VERY_LONG = (4097, 16385, 40_000)
MOST_CHANNELS = 40_000


@dataclass(frozen=True)
class Case:
    """Everything about a call but the numbers, which follow from the seed too."""

    seed: int
    shape: tuple[int, ...]
    channel_dim: int
    mean: str
    target: str
    alpha: str
    mean_layout: str
    target_layout: str
    alpha_layout: str
    aliased: bool  # target is mean's own memory
    values: str
    sentinel: str
    eps: float
    reduction: str
    full: bool
    weight: float
    g: float
    incoming: str
    strategy: str
    inplace: bool
    wanted: str  # of mean, target and alpha, those that require grad
    asked: str  # of these, those whose gradient is asked for
    path: str
    hook: str
    outputs: str
    threads: int
    mask: str
    mask_shape: str
    selected: float  # about which share of the positions counts
    weight_on_device: bool

    @property
    def channel(self) -> int:
        return self.channel_dim % len(self.shape)

    @property
    def channels(self) -> int:
        return self.shape[self.channel_dim]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def one_pass(self) -> bool:
        """Whether d/d mean is made in forward."""
        if "m" not in self.wanted or self.path in WITHOUT_GRADIENT or self.reduction == "none":
            return False
        chosen = self.strategy == "auto" and "t" not in self.wanted and self.mean != "fp16"
        return chosen or self.strategy == "one_pass"


def _shape(rng: Random) -> tuple[int, ...]:
    rank = rng.randint(1, 5)
    shape = [rng.choice((1, 1, 2, 3, 4, 5, 7, 8, 9)) for _ in range(rank)]
    if rng.random() < 0.45:  # past vectors, runs and tiles, or past a task
        at = rng.randrange(rank)
        shape = [min(n, 4) for n in shape]
        shape[at] = rng.choice(VERY_LONG if rng.random() < 0.08 else LONG)
        while math.prod(shape) > 60_000:
            shape[max((d for d in range(rank) if d != at), key=lambda d: shape[d])] = 1
    while math.prod(shape) > 60_000:
        shape[shape.index(max(shape))] = 1
    return tuple(shape)


def make_case(seed: int) -> Case:
    """The case of this seed."""
    rng = Random(seed)
    shape = _shape(rng)
    channel_dim = rng.randint(-len(shape), len(shape) - 1)
    if shape[channel_dim] > MOST_CHANNELS:
        shape = tuple(min(n, MOST_CHANNELS) for n in shape)
    mean, target, alpha = (rng.choice(list(DTYPES)) for _ in range(3))
    mean_layout = rng.choice(list(LAYOUTS))
    target_layout = mean_layout if rng.random() < 0.3 else rng.choice(list(LAYOUTS))
    aliased = rng.random() < 0.05
    if aliased:
        target, target_layout = mean, mean_layout
    reduction = rng.choice(REDUCTIONS)
    if reduction == "batchmean" and channel_dim % len(shape) == 0:
        reduction = "sum"
    strategy = rng.choice(STRATEGIES)
    wanted = rng.choice(WANTED)
    if strategy == "one_pass":
        wanted = wanted.replace("t", "") or "m"
        if mean == "fp16":
            strategy = "two_pass"  # what auto would take: one_pass may leave fp16's range on its way
    path = rng.choice(PATHS)
    hook = rng.choice(HOOKS) if rng.random() < 0.6 else "none"
    values = rng.choice(VALUES)
    if reduction == "none":
        path, hook, values = "grad", "none", "normal"
    if path in WITHOUT_GRADIENT:
        hook = "none"
    if path == "inference inputs":
        wanted = wanted.replace("t", "") or "a"
    if hook in ONE_FUNCTION and "checkpoint" in path:
        path = "twice"  # a checkpoint has hooks of its own on these tensors
    if path == "create_graph" and values != "normal":
        path = "twice"
    everything = path in ("backward", "checkpoint", "reentrant checkpoint")
    return Case(
        seed=seed, shape=shape, channel_dim=channel_dim, mean=mean, target=target, alpha=alpha,
        mean_layout=mean_layout, target_layout=target_layout, alpha_layout=rng.choice(ALPHA_LAYOUTS),
        aliased=aliased, values=values, sentinel=rng.choice(SENTINELS),
        eps=rng.choice(EPS), reduction=reduction, full=rng.random() < 0.5, weight=rng.choice(WEIGHTS),
        g=rng.choice(G), incoming=rng.choice(INCOMING), strategy=strategy,
        inplace=rng.random() < 0.45 and mean_layout not in REPEATING,
        wanted=wanted, asked=wanted if everything else part_of(rng, wanted),
        path=path, hook=hook, outputs=rng.choice(OUTPUTS), threads=rng.choice((1, 2, 2, 3)),
        **_positions(seed, shape, channel_dim % len(shape)),
    )  # fmt: skip


def _positions(seed: int, shape: tuple[int, ...], channel: int) -> dict[str, Any]:
    """The mask and where the weight is: drawn apart, so that the rest of a seed's case is what it always was."""
    rng = Random(f"{seed} positions")
    mask_shape = rng.choice(MASK_SHAPES)
    if mask_shape == "sample" and (channel == 0 or len(shape) < 3):
        mask_shape = "positions"
    return {
        "mask": rng.choice(MASKS), "mask_shape": mask_shape, "selected": rng.choice((0.0, 0.05, 0.5, 0.5, 0.9, 1.0)),
        "weight_on_device": rng.random() < 0.25,
    }  # fmt: skip


def part_of(rng: Random, wanted: str) -> str:
    """All of the inputs that require grad, or only some of them."""
    part = "".join(x for x in wanted if rng.random() < 0.5)
    return part if part and rng.random() < 0.4 else wanted
