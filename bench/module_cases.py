"""The cases of whole modules: VIDLoss on the papers' pairs of layers, and distillation steps."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.cases import RESNET_GROUP1, SCALER_FACTOR, Case
from bench.machine import multiplies_in
from vidfast.report.results import COMPILE, COMPILED_DEFAULT, HEAD

# Whole modules differ by a few percent: with seven rounds the chance of a difference where there is none is 1.6%.
FEWEST_OF_MODULES = 7
# The shape of the teacher's feature and the student's channels: WRN-40-2 -> WRN-16-1, ResNet-34 -> ResNet-18.
PAIRS: tuple[tuple[tuple[int, ...], int], ...] = (
    ((128, 64, 16, 16), 32),
    ((128, 32, 32, 32), 16),
    ((128, 128, 8, 8), 64),
    ((32, 256, 14, 14), 256),
)
# A large map, and the tokens of ViT-B from those of ViT-S: rows of a matrix, linear layers.
LARGE_PAIR = (RESNET_GROUP1, 128)
TOKEN_PAIR = ((32 * 197, 768), 384)
# What is asked of a GPU, in order of value: a pair, and whether under bf16 autocast.
DEVICE_HEADS: tuple[tuple[tuple[tuple[int, ...], int], bool], ...] = (
    (PAIRS[0], True),
    (LARGE_PAIR, True),
    (TOKEN_PAIR, True),
    (PAIRS[1], True),
    (PAIRS[0], False),
    (LARGE_PAIR, False),
    (PAIRS[3], True),
    (PAIRS[2], True),
    (PAIRS[1], False),
    (TOKEN_PAIR, False),
    (PAIRS[3], False),
    (PAIRS[2], False),
)
# The same in sizes for an emulated device.
SMALL_DEVICE_HEADS: tuple[tuple[tuple[tuple[int, ...], int], bool], ...] = (
    (((2, 16, 8, 8), 8), False),
    (((2, 16, 8, 8), 8), True),
    (((6, 12), 5), False),
)
# Compiling two networks, forward and backward, takes minutes of two cores.
COMPILED_STEPS = frozenset({COMPILE, COMPILED_DEFAULT})


def under_autocast(case: Case, dtype: torch.dtype) -> Case:
    """The case in mixed precision; fp16 only under the scaler's factor.

    Without instructions for products in that dtype a step takes seconds: then it is measured at one incoming gradient,
    with the few samples that slow rows have.
    """
    gradients = (SCALER_FACTOR,) if dtype is torch.float16 else case.gradients
    if multiplies_in(dtype, case.device):
        return replace(case, autocast=dtype, gradients=gradients)
    return replace(case, autocast=dtype, gradients=gradients[:1], fewest=0)


def pair_case(suite: str, pair: tuple[tuple[int, ...], int], device: str) -> Case:
    """A pair of layers: maps, or rows of a matrix whose last dimension is the channels."""
    shape, student = pair
    return Case(
        suite,
        shape,
        channel_dim=-1 if len(shape) == 2 else 1,
        device=device,
        fewest=FEWEST_OF_MODULES,
        note=f"from {student}",
        extra={"student_channels": student},
    )


def vid_loss_cases(suite: str, full: bool, device: str) -> list[Case]:
    """The teacher's feature, and the student's channels beside it, in fp32 and under bf16 autocast.

    In full one of them under fp16 autocast too, which on a CPU without instructions for it torch computes in loops.
    """
    plain = [pair_case(suite, pair, device) for pair in (PAIRS if full else PAIRS[:1])]
    cases = [*plain, *(under_autocast(case, torch.bfloat16) for case in plain)]
    if full and multiplies_in(torch.float16, device):
        cases.append(under_autocast(plain[0], torch.float16))
    return cases


def head_cases(device: str, small: bool = False) -> list[Case]:
    """What decides about the head on a GPU, in order of value, at g = 1.

    Args:
        device: Where their tensors are.
        small: SMALL_DEVICE_HEADS instead.
    """
    cases = []
    for pair, autocast in SMALL_DEVICE_HEADS if small else DEVICE_HEADS:
        case = replace(pair_case(HEAD, pair, device), gradients=(1.0,), fewest=0)
        cases.append(under_autocast(case, torch.bfloat16) if autocast else case)
    return cases


def training_case(
    suite: str, shape: tuple[int, ...], device: str, networks: tuple[str, str], note: str, **extra: object
) -> Case:
    """A distillation step; the case's tensor is the widest tapped map. `networks`: teacher and student."""
    teacher, student = networks
    facts = {"teacher": teacher, "student": student, **extra}
    return Case(suite, shape, device=device, fewest=FEWEST_OF_MODULES, note=note, extra=facts)


def training_cases(suite: str, full: bool, device: str) -> list[Case]:
    """The papers' two settings, in full also compiled whole (the first) and under bf16 autocast.

    Two cores get 8 of ImageNet's images. Without instructions for products in bf16 a step under autocast takes a
    minute and says nothing of one that is trained with, so it is left out there.
    """
    images = 8 if torch.device(device).type == "cpu" else 64
    cifar = training_case(
        suite,
        (128, 32, 32, 32),
        device,
        ("wrn-40-2", "wrn-16-1"),
        "WRN-40-2 to WRN-16-1",
        regressor="conv3",
        side=32,
        classes=100,
    )
    imagenet = training_case(
        suite,
        (images, 256, 14, 14),
        device,
        ("resnet-34-imagenet", "resnet-18-imagenet"),
        "ResNet-34 to ResNet-18 at 224",
        regressor="conv2",
        side=224,
        classes=1000,
    )
    imagenet = replace(imagenet, skip=COMPILED_STEPS)
    plain = [cifar, imagenet] if full else [replace(cifar, gradients=(1.0,), skip=COMPILED_STEPS)]
    if not multiplies_in(torch.bfloat16, device):
        return plain
    return [*plain, *(replace(case, autocast=torch.bfloat16, gradients=(1.0,)) for case in plain)]


def small_training_cases(suite: str, full: bool, device: str) -> list[Case]:
    """A distillation step of a size for an emulated device."""
    del full
    case = training_case(
        suite,
        (2, 16, 8, 8),
        device,
        ("wrn-10-1", "wrn-10-1"),
        "WRN-10-1 to WRN-10-1",
        regressor="conv3",
        side=8,
        classes=4,
    )
    return [replace(case, gradients=(1.0,), fewest=0, skip=COMPILED_STEPS)]
