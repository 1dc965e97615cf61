"""The problems of a normal run: every way through the kernels once, on shapes as small as it allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from bounds import check_call
from interpreted import Interpreted
from masks import in_blocks, mask_for, spoilt
from places import Place
from problems import BF16, BY_NAME, CASES, FP16, FP32, FP64, Case, short
from torch import Tensor

# mean, target
PAIRS: tuple[tuple[torch.dtype, torch.dtype], ...] = (
    (FP32, FP32), (BF16, BF16), (FP16, FP16), (FP64, FP64),
    (FP32, BF16), (FP32, FP16), (BF16, FP32), (FP16, FP32), (FP16, BF16), (FP32, FP64),
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    case: Case
    mean: torch.dtype
    target: torch.dtype
    strategy: str = "one_pass"
    g: float = -2.5
    inplace: bool = False
    mask: str = ""  # bool or fp32: weights of positions; blocks: bool, of long stretches

    def __str__(self) -> str:
        dtypes = dict.fromkeys((short(self.mean), short(self.target)))
        how = "inplace" if self.inplace else self.strategy
        return "-".join(
            (
                self.case.name,
                *dtypes,
                how,
                *(["1"] if self.g == 1.0 else []),
                *([self.mask] if self.mask else []),
            )
        )

    def check(self, place: Place) -> None:
        """Forward and backward, every output against the oracle."""
        mask = self._mask()
        if mask is None:
            mean, target, alpha = self.case.tensors(self.mean, self.target)
        else:
            mean, target, alpha = spoilt(self.case, mask, dtype=self.mean, target_dtype=self.target)
        check_call(
            place, mean, target, alpha, g=self.g, strategy=self.strategy, inplace=self.inplace,
            channel_dim=self.case.channel_dim, mask=mask,
        )  # fmt: skip

    def _mask(self) -> Tensor | None:
        if not self.mask:
            return None
        if self.mask == "blocks":
            return in_blocks(self.case)
        return mask_for(self.case, {"bool": torch.bool, "fp32": FP32}[self.mask])


def check_any_order(backend: Interpreted, place: Place, case: Case) -> None:
    """The loss has the same bits in whatever order blocks run."""
    mean, target, alpha = case.tensors(FP32)
    results = []
    for seed in (0, 100, 200, 300):
        backend.seed = seed
        results.append(place.nll(mean, target, alpha))
    assert all(torch.equal(x, results[0]) for x in results)


def _case(name: str, why: str, shape: tuple[int, ...], *layouts: str) -> Case:
    return Case(name, why, shape, 1, *layouts)


SHORT_PLANES = _case("short_planes", "planes of 17x19: several samples are one chunk", (11, 3, 17, 19))
VECTORS = _case("vectors", "planes that are whole vectors", (3, 3, 24, 32))
PIECES = _case("pieces", "a plane of several chunks, the last a short one", (2, 2, 9001))
EDGES = _case("edges", "planes that begin and end between vectors", (3, 3, 17, 16), "shifted")
CUT_RUNS = _case("cut_runs", "joined rows of small planes, their runs cut by tiles", (40, 33, 7, 8))
WHOLE_RUNS = _case("whole_runs", "joined rows of one tile: a block adds a channel's runs", (67, 5, 2, 2))
LAST_ROW = BY_NAME["rows_tail"]
CHANNELS_LAST = BY_NAME["channels_last"]
ONE_CHANNEL = _case("one_channel", "a single plane with a tail", (5, 1, 17, 67))
MANY_CHANNELS = BY_NAME["rows_513"]  # several blocks of the finish, an odd width: no vectors
STRIDED = BY_NAME["batch_slice_rows"]
LONG_ROWS = _case("long_rows", "as many rows in a chunk as there are: the loop over batches", (1300, 24))

PROBLEMS = (
    Problem(SHORT_PLANES, FP32, FP32),
    Problem(SHORT_PLANES, BF16, BF16, "two_pass"),
    Problem(VECTORS, FP32, FP32),
    Problem(VECTORS, BF16, BF16, "two_pass"),
    Problem(PIECES, FP32, FP32, "two_pass"),
    Problem(PIECES, BF16, BF16, inplace=True),
    Problem(EDGES, FP32, FP32, inplace=True),
    Problem(EDGES, FP32, BF16, "two_pass"),
    Problem(CUT_RUNS, FP32, FP32),
    Problem(CUT_RUNS, BF16, BF16, "two_pass"),
    Problem(CUT_RUNS, FP64, FP64),
    Problem(WHOLE_RUNS, FP32, BF16),
    Problem(WHOLE_RUNS, FP16, BF16, "two_pass"),
    Problem(LAST_ROW, FP32, FP32, "two_pass"),
    Problem(LAST_ROW, BF16, BF16),
    Problem(CHANNELS_LAST, FP32, FP32, inplace=True),
    Problem(CHANNELS_LAST, FP16, BF16),
    Problem(ONE_CHANNEL, FP32, FP32, "two_pass"),
    Problem(ONE_CHANNEL, FP64, FP64),
    Problem(ONE_CHANNEL, FP16, BF16),
    Problem(MANY_CHANNELS, FP32, FP32, g=1.0),
    Problem(MANY_CHANNELS, BF16, BF16, "two_pass"),
    Problem(STRIDED, FP32, FP32, inplace=True),
    Problem(LONG_ROWS, FP32, FP32),
    Problem(LONG_ROWS, FP64, FP64, "two_pass", g=1.0),
)

# Planes and rows, vectors of weights and single ones, one weight a row and one a column.
MASKED = (
    Problem(VECTORS, FP32, FP32, mask="bool"),
    Problem(VECTORS, BF16, BF16, "two_pass", mask="fp32"),
    Problem(SHORT_PLANES, FP32, FP32, "two_pass", mask="fp32"),
    Problem(SHORT_PLANES, BF16, BF16, mask="bool"),
    Problem(PIECES, FP32, FP32, mask="blocks"),
    Problem(EDGES, FP32, FP32, inplace=True, mask="bool"),
    Problem(EDGES, FP32, BF16, "two_pass", mask="fp32"),
    Problem(ONE_CHANNEL, FP64, FP64, mask="fp32"),
    Problem(ONE_CHANNEL, FP16, BF16, mask="fp32"),
    Problem(CUT_RUNS, FP32, FP32, "two_pass", mask="bool"),
    Problem(CUT_RUNS, BF16, BF16, mask="fp32"),
    Problem(WHOLE_RUNS, FP32, BF16, mask="bool"),
    Problem(LAST_ROW, FP32, FP32, "two_pass", mask="fp32"),
    Problem(CHANNELS_LAST, FP32, FP32, inplace=True, mask="bool"),
    Problem(CHANNELS_LAST, FP16, BF16, mask="fp32"),
    Problem(MANY_CHANNELS, FP32, FP32, mask="bool"),
    Problem(STRIDED, FP32, FP32, inplace=True, mask="fp32"),
    Problem(LONG_ROWS, FP32, FP32, mask="blocks"),
    Problem(LONG_ROWS, FP64, FP64, "two_pass", mask="fp32"),
)

# Triton compiles each kernel anew for dtypes and strategies: fewer of them.
FOR_TRITON = (
    Problem(VECTORS, FP32, FP32),
    Problem(VECTORS, BF16, BF16, "two_pass"),
    Problem(SHORT_PLANES, FP32, BF16),
    Problem(PIECES, FP32, FP32, "two_pass"),
    Problem(EDGES, FP32, FP32, inplace=True),
    Problem(CUT_RUNS, FP32, FP32),
    Problem(CUT_RUNS, BF16, BF16, "two_pass"),
    Problem(WHOLE_RUNS, FP64, FP64),
    Problem(LAST_ROW, FP32, FP32, "two_pass"),
    Problem(CHANNELS_LAST, FP16, BF16),
    Problem(ONE_CHANNEL, FP64, FP64, "two_pass"),
    Problem(MANY_CHANNELS, FP32, FP32, g=1.0),
    Problem(STRIDED, BF16, BF16, inplace=True),
    Problem(LONG_ROWS, FP32, FP32),
)


def all_problems(case: Case) -> Iterator[Problem]:
    """Every pair of dtypes and strategy, for `--slow`."""
    for i, (mean, target) in enumerate(PAIRS):
        yield Problem(case, mean, target, g=1.0 if i % 4 == 3 else -2.5)
        yield Problem(case, mean, target, "two_pass")


# The biggest has two million elements, and takes a minute in fp32 alone.
SWEPT = tuple(case for case in CASES if case.numel <= 1 << 17)
