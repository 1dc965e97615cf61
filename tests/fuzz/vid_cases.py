"""Random calls of VIDLoss: the regressor and its loss, fused or module by module."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from cases import DTYPES, EPS, INCOMING, OUTPUTS, PATHS, WITHOUT_GRADIENT, part_of
from guarded import LAYOUTS, SENTINELS
from saved_hooks import HOOKS, ONE_FUNCTION

PARTS = (None, 1, 2, 3)  # samples of a part; None: as many as the library likes
ARRANGEMENTS = ("kernel", "planes", "rows", "columns")
INPUTS = "sa012"  # student, alpha, and the three weights


@dataclass(frozen=True)
class VidCase:
    """Everything about a call but the numbers, which follow from the seed too."""

    seed: int
    batch: int
    channels: tuple[int, int, int]  # of student, hidden activations and target
    student_size: tuple[int, ...]
    teacher_size: tuple[int, ...]
    student: str
    teacher: str
    module: str
    student_layout: str
    teacher_layout: str
    weights_last: bool  # weights in channels_last
    values: str
    sentinel: str
    eps: float
    reduction: str
    weight: float
    g: float
    incoming: str
    inplace: bool
    arrangement: str | None  # by the kernel, or in parts and how these are stored; None: as the library likes
    part: int | None
    wanted: str
    asked: str
    path: str
    hook: str
    outputs: str
    threads: int

    @property
    def may_be_fused(self) -> bool:
        """Whether the regressor and the loss are one Function."""
        plain = self.inplace and self.module == "fp32" and self.teacher != "fp64"
        return plain and self.wanted != "a" and self.path not in WITHOUT_GRADIENT


def make_case(seed: int) -> VidCase:
    """The case of this seed."""
    rng = Random(seed)
    rank = rng.choice((0, 1, 2, 2, 2, 3))
    size = tuple(rng.choice((1, 2, 3, 5, 7)) for _ in range(rank))
    if rank and rng.random() < 0.2:
        size = (rng.choice((31, 64, 130, 257)), *(min(n, 2) for n in size[1:]))
    other = tuple(rng.choice((n, n + 1, 2 * n)) for n in size) if rng.random() < 0.25 else size
    wanted = "".join(k for k in INPUTS if rng.random() < 0.7) or "s"
    path = rng.choice(PATHS)
    if path == "reentrant checkpoint" and "s" not in wanted:
        wanted = "s" + wanted
    hook = rng.choice(HOOKS) if rng.random() < 0.6 and path not in WITHOUT_GRADIENT else "none"
    if hook in ONE_FUNCTION and "checkpoint" in path:
        path = "twice"
    if path == "create_graph":
        path = "grad"  # first derivatives are its only ones
    everything = path in ("backward", "checkpoint", "reentrant checkpoint")
    swapped = rng.random() < 0.5
    return VidCase(
        seed=seed, batch=rng.choice((1, 2, 3, 4, 7, 16)),
        channels=(rng.choice((1, 3, 5, 16)), rng.choice((1, 4, 8, 17)), rng.choice((1, 2, 6, 16))),
        student_size=other if swapped else size, teacher_size=size if swapped else other,
        student=rng.choice(("fp32", "fp32", *DTYPES)), teacher=rng.choice(("fp32", *DTYPES)),
        module=rng.choice(("fp32", "fp32", "fp32", "fp64")),
        student_layout=rng.choice(list(LAYOUTS)), teacher_layout=rng.choice(list(LAYOUTS)),
        weights_last=rng.random() < 0.3,
        values=rng.choice(("normal", "normal", "normal", "extreme alpha", "nan")),
        sentinel=rng.choice(SENTINELS), eps=rng.choice(EPS),
        reduction=rng.choice(("mean", "sum", "batchmean")),
        weight=rng.choice((1.0, 1.0, -2.25, 0.01)), g=rng.choice((1.0, 1.0, -1.0, 3.5, 0.125, 1024.0, 0.0)),
        incoming=rng.choice(INCOMING), inplace=rng.random() < 0.85, arrangement=rng.choice((None, *ARRANGEMENTS)),
        part=rng.choice(PARTS), wanted=wanted, asked=wanted if everything else part_of(rng, wanted),
        path=path, hook=hook, outputs=rng.choice(OUTPUTS), threads=rng.choice((1, 2, 2, 3)),
    )  # fmt: skip
