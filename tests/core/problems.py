"""The shapes and layouts of the suite, each with the reason why it is there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (FP16, BF16, FP32, FP64)


def short(dtype: torch.dtype) -> str:
    return {FP16: "fp16", BF16: "bf16", FP32: "fp32", FP64: "fp64"}[dtype]


# The instruction sets of the CPU back end, of which a processor has the first ones.
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")


def _nan(x: Tensor, *shape: int) -> Tensor:
    return x.new_full(shape, math.nan)


# Each takes dense values and gives them back in another place; what lies between them is NaN, so that a
# kernel that reads a neighbour is found out.
def _contiguous(x: Tensor) -> Tensor:
    return x.clone()


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _batch_slice(x: Tensor) -> Tensor:
    big = _nan(x, 2 * x.shape[0] + 1, *x.shape[1:])
    out = big[1::2]
    return out.copy_(x)


def _channel_slice(x: Tensor) -> Tensor:
    big = _nan(x, x.shape[0], x.shape[1] + 3, *x.shape[2:])
    return big[:, 2 : 2 + x.shape[1]].copy_(x)


def _aligned_channel_slice(x: Tensor) -> Tensor:
    big = _nan(x, x.shape[0], x.shape[1] + 32, *x.shape[2:])
    return big[:, 16 : 16 + x.shape[1]].copy_(x)


def _channels_last_slice(x: Tensor) -> Tensor:
    big = _nan(x, x.shape[0], *x.shape[2:], x.shape[1] + 5).movedim(-1, 1)
    return big[:, 1 : 1 + x.shape[1]].copy_(x)


def _last_slice(x: Tensor) -> Tensor:
    big = _nan(x, *x.shape[:-1], x.shape[-1] + 3)
    return big[..., 1 : 1 + x.shape[-1]].copy_(x)


def _spatial_slice(x: Tensor) -> Tensor:
    big = _nan(x, *x.shape[:-1], x.shape[-1] + 2)
    return big[..., 1:-1].copy_(x)


def _shifted(x: Tensor) -> Tensor:
    return _nan(x, x.numel() + 3)[1 : 1 + x.numel()].view(x.shape).copy_(x)


def _shifted_channels_last(x: Tensor) -> Tensor:
    return _shifted(x.movedim(1, -1).contiguous()).movedim(-1, 1)


def _reversed_order(x: Tensor) -> Tensor:
    dims = tuple(reversed(range(x.dim())))
    return x.permute(dims).contiguous().permute(dims)


def _channels_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _transposed_plane(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _expanded_batch(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def _expanded_channel(x: Tensor) -> Tensor:
    return x[:, :1].expand(x.shape)


def _strange(x: Tensor) -> Tensor:
    """Every stride doubled: no dimension is dense."""
    out = _nan(x, *(2 * n for n in x.shape))[tuple(slice(None, None, 2) for _ in x.shape)]
    return out.copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "channels_last": _channels_last,
    "batch_slice": _batch_slice,
    "channel_slice": _channel_slice,
    "aligned_channel_slice": _aligned_channel_slice,
    "channels_last_slice": _channels_last_slice,
    "last_slice": _last_slice,
    "spatial_slice": _spatial_slice,
    "shifted": _shifted,
    "shifted_channels_last": _shifted_channels_last,
    "reversed_order": _reversed_order,
    "channels_first": _channels_first,
    "transposed_plane": _transposed_plane,
    "expanded_batch": _expanded_batch,
    "expanded_channel": _expanded_channel,
    "strange": _strange,
}


@dataclass(frozen=True)
class Case:
    name: str
    why: str
    shape: tuple[int, ...]
    channel_dim: int = 1
    mean_layout: str = "contiguous"
    target_layout: str | None = None  # mean's

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        return self.shape[self.channel_dim]

    def tensors(
        self,
        dtype: torch.dtype = FP32,
        target_dtype: torch.dtype | None = None,
        alpha_dtype: torch.dtype = FP32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """mean, target and alpha: normal values, variances from about 0.05 to 6."""
        random = np.random.default_rng(seed)
        mean, target = (torch.from_numpy(random.standard_normal(self.shape)) for _ in range(2))
        alpha = torch.from_numpy(random.uniform(-3, 6, self.channels)).to(alpha_dtype)
        lay_mean = LAYOUTS[self.mean_layout]
        lay_target = LAYOUTS[self.target_layout or self.mean_layout]
        return (
            lay_mean(mean.to(device, dtype)),
            lay_target(target.to(device, target_dtype or dtype)),
            alpha.to(device),
        )


CASES = (
    # planes: neighbouring elements of one channel
    Case("plane_1", "inner extent 1 in a contiguous map, rows wide enough to stand alone", (6, 257, 1, 1)),
    Case("plane_49", "7x7: odd, neither aligned nor a multiple of a vector", (5, 24, 7, 7)),
    Case("plane_196", "14x14: aligned in fp32, not in bf16", (4, 10, 14, 14)),
    Case("plane_1024", "32x32: every row aligned", (2, 3, 32, 32)),
    Case("plane_31", "the largest plane that is walked as rows on the CPU", (3, 40, 31)),
    Case("plane_32", "the smallest plane that is walked as a plane on the CPU", (3, 40, 32)),
    Case("plane_33", "one more than a vector's multiple", (3, 5, 33)),
    Case("plane_16385", "one element more than a task: the second piece has length 1", (2, 3, 16385)),
    Case("plane_1000001", "odd, many tasks in one plane, one batch", (1, 2, 1_000_001)),
    Case("channels_1", "one channel: the whole tensor is one plane", (5, 1, 9, 11)),
    Case("channels_1_long", "one channel across many tasks", (7, 1, 61, 67)),
    Case("channels_3", "three channels, a batch of one", (1, 3, 40, 41)),
    Case("channels_257_plane", "channels past a block of 256", (2, 257, 6, 6)),
    Case("channels_257_5x5", "5x5: small planes with an odd number of channels", (3, 257, 5, 5)),
    Case("small_2x2", "planes shorter than a vector", (64, 16, 2, 2)),
    Case("small_3x3", "odd planes shorter than a vector", (33, 16, 3, 3)),
    Case("small_5x5", "odd planes, wide rows", (9, 64, 5, 5)),
    Case("small_8x8", "8x8: planes that share a program", (16, 16, 8, 8)),
    Case("batch_1", "nothing to sum over the batch", (1, 64, 8, 8)),
    # channel-fastest
    Case("logits", "(B, N): the widest rows, several column tiles", (33, 1000)),
    Case("logits_one_row", "a batch of one: one row", (1, 1000)),
    Case("rows_tail", "narrow rows joined 32 at a time, 5 left over", (37, 10)),
    Case("rows_tail_planes", "rows of small planes joined, some left over", (35, 7, 2, 2)),
    Case("rows_fewer_than_joined", "fewer rows than would be joined", (3, 10)),
    Case("rows_width_1", "C=1, inner 1: a vector", (1027, 1)),
    Case("rows_width_2", "two channels interleaved", (1027, 2)),
    Case("rows_255", "one column less than rows that are not joined", (70, 255)),
    Case("rows_257", "one column more: an odd width is never aligned twice", (70, 257)),
    Case("rows_513", "one column more than a tile", (65, 513)),
    Case("rows_many", "more rows than a row block, and a run of less than 64 left", (3001, 48)),
    Case("transformer", "(B, L, D) with the channels last", (3, 17, 96), channel_dim=-1),
    Case("vector", "one dimension, all of it channels", (129,), channel_dim=0),
    Case("channels_in_front", "channel_dim=0: one outer index", (5, 7, 11), channel_dim=0),
    Case("one_element", "the smallest problem", (1, 1)),
    Case("conv_1d", "(B, C, L)", (4, 6, 37)),
    Case("conv_3d", "(B, C, D, H, W)", (2, 5, 3, 4, 7)),
    # places
    Case("channels_last", "channels_last: not copied", (3, 20, 7, 5), 1, "channels_last"),
    Case("channels_last_3d", "channels_last_3d", (2, 20, 3, 4, 5), 1, "channels_last"),
    Case("channels_last_narrow", "channels_last with joined rows", (3, 6, 7, 5), 1, "channels_last"),
    Case("channels_last_1", "C=1 in channels_last is a plane again", (3, 1, 7, 5), 1, "channels_last"),
    Case("batch_slice", "every second sample: an outer stride of its own", (3, 6, 8, 8), 1, "batch_slice"),
    Case("batch_slice_rows", "strided narrow rows cannot be joined", (19, 10), 1, "batch_slice"),
    Case("batch_slice_1", "one channel with a stride between samples", (5, 1, 40), 1, "batch_slice"),
    Case("channel_slice", "some channels of a bigger map", (3, 6, 7, 7), 1, "channel_slice"),
    Case("channel_slice_aligned", "the same, rows on 16 bytes", (3, 16, 2, 2), 1, "aligned_channel_slice"),
    Case("channels_last_slice", "some channels of a bigger channels_last map", (3, 20, 4, 5), 1, "channels_last_slice"),
    Case("token_slice", "some features of bigger tokens", (3, 9, 33), -1, "last_slice"),
    Case("misaligned", "a slice one element off: no vector is aligned", (3, 6, 16, 16), 1, "shifted"),
    Case("misaligned_mean", "only mean is off", (3, 6, 16, 16), 1, "shifted", "contiguous"),
    Case("misaligned_target", "only target is off", (3, 6, 16, 16), target_layout="shifted"),
    Case("misaligned_rows", "channels_last, one element off", (3, 64, 4, 4), 1, "shifted_channels_last"),
    Case("one_strided", "mean is a batch slice, target is not", (3, 6, 8, 8), 1, "batch_slice", "contiguous"),
    Case("other_strided", "target is a channel slice, mean is not", (3, 6, 8, 8), target_layout="channel_slice"),
    Case("rows_one_strided", "narrow rows, only target's apart", (37, 10), target_layout="batch_slice"),
    Case("target_channels_last", "target is copied to mean's layout", (3, 6, 7, 5), target_layout="channels_last"),
    Case("target_contiguous", "mean's layout wins here too", (3, 6, 7, 5), 1, "channels_last", "contiguous"),
    Case("target_transposed", "another order of the plane", (3, 6, 7, 5), target_layout="transposed_plane"),
    Case("transposed_plane", "a permuted plane, alike in both", (3, 6, 7, 5), 1, "transposed_plane"),
    Case("channels_first_memory", "(C, B, H, W): the batch is inside the plane", (3, 6, 7, 5), 1, "channels_first"),
    Case("reversed_memory", "(W, H, C, B) in memory", (3, 6, 7, 5), 1, "reversed_order"),
    Case("reversed_logits", "a transposed matrix of logits", (13, 29), 1, "reversed_order"),
    Case("spatial_slice", "a cut-out of the plane is copied", (3, 6, 7, 5), 1, "spatial_slice"),
    Case("expanded_mean", "a mean that repeats is copied", (3, 6, 7, 5), 1, "expanded_batch", "contiguous"),
    Case("expanded_target", "a target that repeats is copied", (3, 6, 7, 5), target_layout="expanded_batch"),
    Case("expanded_channels", "channels that repeat are copied", (3, 6, 7, 5), 1, "expanded_channel", "contiguous"),
    Case("strange", "no dimension is dense", (3, 6, 7, 5), 1, "strange"),
)  # fmt: skip

BY_NAME = {case.name: case for case in CASES}

# One for each way through the kernels, for tests that cross them with something else.
WAYS = tuple(
    BY_NAME[name]
    for name in (
        "plane_49", "plane_1024", "small_3x3", "rows_tail", "rows_257", "channels_last", "channel_slice", "misaligned",
    )
)  # fmt: skip
