"""What is measured: one Case per tensor shape, dtype, layout and thread count."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch

from bench.masks import Mask

# fp16 is trained with a loss scaler, whose factor is the incoming gradient: 2**16 is torch.amp.GradScaler's first.
# At g = 1 every provider's fp16 gradient (about 1/N) is below the smallest subnormal, so that row says nothing.
SCALER_FACTOR = 65536.0
# A term's weight applied outside the loss: anything but 1.
WEIGHTED = 0.37

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Case:
    """One measurement: every provider of it runs on the same tensors, in the same rounds."""

    suite: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    channel_dim: int = 1
    device: str = "cpu"
    threads: int | None = None
    cold: bool = True
    gradients: tuple[float, ...] = (1.0, WEIGHTED)
    # Samples of each contender that this case needs at least, however slow they are.
    fewest: int = 0
    skip: frozenset[str] = frozenset()
    # Starts the profiler once for each contender: seconds, so only where the launches are what is asked for.
    count_launches: bool = False
    note: str = ""
    # Of a whole module: its forward runs under torch.autocast of this dtype; `dtype` is then that of what it is given.
    autocast: torch.dtype | None = None
    # Which positions count: masks.of_case draws it.
    mask: Mask | None = None
    extra: dict[str, object] = field(default_factory=dict, hash=False, compare=False)

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def channels(self) -> int:
        return self.shape[self.channel_dim]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of one tensor of this shape: one pass."""
        return self.elements * self.dtype.itemsize

    @property
    def title(self) -> str:
        parts = ["x".join(str(extent) for extent in self.shape), DTYPE_NAMES[self.dtype]]
        if self.layout != "contiguous":
            parts.append(self.layout)
        if self.channel_dim != 1:
            parts.append(f"channel_dim={self.channel_dim}")
        if self.threads is not None:
            parts.append(f"threads={self.threads}")
        if self.mask is not None:
            parts.append(self.mask.title)
        if self.note:
            parts.append(self.note)
        if self.autocast is not None:
            parts.append(f"autocast {DTYPE_NAMES[self.autocast]}")
        return " ".join(parts)

    @property
    def key(self) -> str:
        return f"{self.suite}: {self.title}"

    def precision(self) -> AbstractContextManager[object]:
        """What a module's forward is called in: autocast, or nothing. Backward belongs outside of it."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, self.autocast)

    def per_channel(self, values: torch.Tensor) -> torch.Tensor:
        """Shape `values` (C,) so that it broadcasts over this case's tensors."""
        view = [1] * len(self.shape)
        view[self.channel_dim] = -1
        return values.view(view)


# The shapes that the issue of this library's speed is decided on: CIFAR's widest map, ResNet's third group,
# its first group (205 MB a tensor), WRN-16-1's last group, ImageNet's logits.
CIFAR_MAP = (128, 64, 32, 32)
RESNET_GROUP3 = (64, 256, 14, 14)
RESNET_GROUP1 = (64, 256, 56, 56)
WRN_GROUP3 = (128, 16, 8, 8)
LOGITS = (128, 1000)
TINY = (2, 4, 2, 2)
# On large maps eager code takes up to seconds a step: the reference, which is eager too, would only repeat it.
SLOW = frozenset({"reference"})
# Where eager code takes longest one eager formula is enough; the widest of CIFAR's maps has both, in fp32.
SLOWEST = SLOW | {"torch.nn.GaussianNLLLoss"}

# The matched layers of WRN-40-2 -> WRN-16-1 (stem and three groups of the teacher, batch 128), of
# ResNet-34 -> ResNet-18 (groups 3 and 4, batch 64), a segmentation map at stride 4 of 513 pixels, and ViT-B tokens.
LAYER_PAIRS = ((128, 16, 32, 32), (128, 32, 32, 32), (128, 64, 16, 16), (128, 128, 8, 8), (64, 512, 7, 7))
SEGMENTATION = (4, 256, 129, 129)
TOKENS = (32, 197, 768)


def with_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The case in another dtype; fp16 only under the scaler's factor."""
    return replace(
        case, dtype=dtype, gradients=(SCALER_FACTOR,) if dtype is torch.float16 else case.gradients
    )


def loss_cases(suite: str, full: bool, device: str) -> list[Case]:
    """The cases of the loss step and of the forward pass."""
    group3 = Case(suite, RESNET_GROUP3, device=device)
    cases = [
        Case(suite, CIFAR_MAP, device=device, skip=SLOW),
        group3,
        replace(group3, layout="channels_last"),
        Case(suite, WRN_GROUP3, device=device),
        Case(suite, LOGITS, device=device),
    ]
    if not full:
        return [*cases, with_dtype(group3, torch.bfloat16)]
    group1 = Case(suite, RESNET_GROUP1, device=device, skip=SLOWEST)
    segmentation = Case(suite, SEGMENTATION, device=device, skip=SLOWEST)
    tokens = Case(suite, TOKENS, channel_dim=-1, device=device, skip=SLOW)
    wide = [Case(suite, shape, device=device, skip=SLOW) for shape in LAYER_PAIRS]
    widest = replace(cases[0], skip=SLOWEST)
    wide += [segmentation, tokens, replace(widest, layout="channels_last")]
    halves = [
        with_dtype(case, dtype)
        for dtype in (torch.bfloat16, torch.float16)
        for case in (group3, replace(group3, layout="channels_last"))
    ]
    rest = (
        widest,
        replace(group1, gradients=(1.0,)),
        segmentation,
        tokens,
        Case(suite, LOGITS, device=device),
    )
    halves += [with_dtype(case, torch.bfloat16) for case in rest]
    return [cases[0], group1, *cases[1:], *wide, *halves]


def scaling_cases(suite: str, full: bool, device: str) -> list[Case]:
    """One extent at a time: batch, channels, map."""
    batches: Sequence[int] = (1, 8, 64, 128) if full else (8, 64)
    channels: Sequence[int] = (4, 32, 256, 1024) if full else (32, 256)
    sides: Sequence[int] = (1, 7, 14, 28, 56) if full else (7, 28)

    def points() -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from (("B", (batch, 64, 28, 28)) for batch in batches)
        yield from (("C", (32, channel, 14, 14)) for channel in channels)
        yield from (("HW", (32, 128, side, side)) for side in sides)

    return [
        Case(suite, shape, device=device, gradients=(1.0,), note=axis, extra={"axis": axis})
        for axis, shape in points()
    ]


def thread_cases(suite: str, full: bool, device: str) -> list[Case]:
    """One large map for every number of threads up to the machine's own."""
    if torch.device(device).type != "cpu":
        return []
    most = torch.get_num_threads()
    counts = sorted({1, *(2**power for power in range(most.bit_length())), most} & set(range(1, most + 1)))
    return [
        Case(suite, CIFAR_MAP, device=device, threads=count, gradients=(1.0,), extra={"axis": "threads"})
        for count in counts
    ]


def all_scaling_cases(suite: str, full: bool, device: str) -> list[Case]:
    return [*scaling_cases(suite, full, device), *thread_cases(suite, full, device)]


def forward_cases(suite: str, full: bool, device: str) -> list[Case]:
    """The forward pass on the decisive shapes, in fp32 and, in full, in the half precisions of one of them."""
    group3 = Case(suite, RESNET_GROUP3, device=device, gradients=(1.0,))
    cases = [replace(group3, shape=CIFAR_MAP), group3, replace(group3, shape=LOGITS)]
    if not full:
        return cases[1:2]
    cases += [replace(group3, shape=RESNET_GROUP1, skip=SLOW)]
    cases += [replace(group3, layout="channels_last"), replace(group3, shape=WRN_GROUP3)]
    return [*cases, *(replace(group3, dtype=dtype) for dtype in (torch.bfloat16, torch.float16))]


# What a GPU's kernels are measured on, in order of value, since GPU time may end at any point: shape, dtype,
# channels_last. ResNet's first and third group, CIFAR's widest map, ResNets' last groups, small maps, logits, tokens, a
# segmentation map, the remaining layers of the papers' pairs.
DEVICE_POINTS: tuple[tuple[tuple[int, ...], torch.dtype, bool], ...] = (
    (RESNET_GROUP1, torch.bfloat16, False),
    (RESNET_GROUP1, torch.float32, False),
    (RESNET_GROUP1, torch.bfloat16, True),
    (RESNET_GROUP1, torch.float32, True),
    (CIFAR_MAP, torch.bfloat16, False),
    (CIFAR_MAP, torch.float32, False),
    (RESNET_GROUP3, torch.bfloat16, False),
    (RESNET_GROUP3, torch.float32, False),
    (RESNET_GROUP3, torch.bfloat16, True),
    ((64, 512, 7, 7), torch.bfloat16, False),
    ((64, 2048, 7, 7), torch.bfloat16, False),
    ((128, 64, 16, 16), torch.bfloat16, False),
    (WRN_GROUP3, torch.float32, False),
    (LOGITS, torch.float32, False),
    (TOKENS, torch.bfloat16, False),
    (SEGMENTATION, torch.bfloat16, False),
    (CIFAR_MAP, torch.bfloat16, True),
    (RESNET_GROUP1, torch.float16, False),
    ((128, 32, 32, 32), torch.bfloat16, False),
    ((128, 128, 8, 8), torch.bfloat16, False),
    ((128, 16, 32, 32), torch.float32, False),
    (RESNET_GROUP3, torch.float16, True),
)
# The same regimes in sizes that an emulated device takes in its stride.
SMALL_DEVICE_POINTS: tuple[tuple[tuple[int, ...], torch.dtype, bool], ...] = (
    ((1, 2, 32, 33), torch.bfloat16, False),
    ((3, 4, 7, 7), torch.float16, False),
    ((2, 8, 5, 5), torch.float32, True),
)


def device_cases(suite: str, device: str, small: bool = False, indices: Sequence[int] = ()) -> list[Case]:
    """The points on a GPU.

    Args:
        suite: The name of the cases' suite.
        device: Where their tensors are.
        small: SMALL_DEVICE_POINTS instead, all of them.
        indices: Which of DEVICE_POINTS; all if there is none.
    """
    points = SMALL_DEVICE_POINTS if small else DEVICE_POINTS
    return [
        Case(
            suite,
            shape,
            dtype,
            "channels_last" if last else "contiguous",
            channel_dim=-1 if shape == TOKENS else 1,
            device=device,
            gradients=(1.0,),
        )
        for shape, dtype, last in (points if small or not indices else [points[i] for i in indices])
    ]


def kernel_cases(suite: str, full: bool, device: str) -> list[Case]:
    """Where the data exceed the cache, the kernel must keep the copy's rate; and the small ones, for the record."""
    if torch.device(device).type == "cuda":
        return device_cases(suite, device, indices=() if full else (0, 1, 2, 6))
    large = Case(suite, CIFAR_MAP, device=device, gradients=(1.0,))
    group3 = replace(large, shape=RESNET_GROUP3)
    cases = [large, group3, replace(group3, layout="channels_last"), replace(large, dtype=torch.bfloat16)]
    if not full:
        return cases
    cases += [
        replace(large, shape=RESNET_GROUP1),
        replace(large, shape=WRN_GROUP3),
        replace(large, shape=LOGITS),
    ]
    cases += [
        replace(large, layout="channels_last"),
        replace(large, shape=RESNET_GROUP1, dtype=torch.bfloat16),
    ]
    return [*cases, replace(large, dtype=torch.float16), replace(large, shape=(64, 512, 7, 7))]


def overhead_cases(suite: str, full: bool, device: str) -> list[Case]:
    """Thirty-two elements, always in the cache: what is left is the host."""
    return [Case(suite, TINY, device=device, cold=False, count_launches=True)]
