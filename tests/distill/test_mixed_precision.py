"""Lower precision: bf16 training against fp32, and a teacher in bf16."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from plain_network import PlainNet, plain_data, plain_distiller
from torch import Tensor, nn

from vidfast.distill import METHODS, VID, Distiller
from vidfast.distill.data import Images
from vidfast.distill.trainer import Trainer, TrainOptions

PAIRS = {"first": "first", "second": "second"}
# Stated in docs/distillation.md. bf16 has 8 bits: an activation is off by up to 0.4 % at each layer.
GRADIENT_TOLERANCE = 0.02
LOSS_TOLERANCE = 0.02


def gradients(distiller: Distiller, images: Images, *, autocast: bool) -> tuple[float, dict[str, Tensor]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = distiller(images.images, images.labels)
    losses.loss.backward()
    return float(losses.loss.detach()), {
        n: p.grad for n, p in distiller.named_parameters() if p.grad is not None
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


def test_one_step_in_bf16_is_that_in_fp32() -> None:
    images = plain_data()
    loss, expected = gradients(plain_distiller(images), images, autocast=False)
    lower, found = gradients(plain_distiller(images), images, autocast=True)
    assert lower == pytest.approx(loss, rel=LOSS_TOLERANCE)
    assert lower != loss
    assert_close(found, expected, GRADIENT_TOLERANCE)


def test_training_in_bf16_follows_training_in_fp32() -> None:
    images, rows = plain_data(), []
    for precision in ("no", "bf16"):
        options = TrainOptions(steps=40, batch_size=8, eval_every=10, mixed_precision=precision, device="cpu")
        rows.append(Trainer(plain_distiller(images), images, options, progress=False).fit())
    assert rows[0][-1]["loss"] < 0.9 * rows[0][0]["loss"]
    for full, lower in zip(*rows, strict=True):
        assert lower["loss"] == pytest.approx(full["loss"], rel=LOSS_TOLERANCE)


def test_accumulation_and_bf16_together_reach_the_kernel_with_a_gradient_of_one() -> None:
    images, seen = plain_data(), []
    distiller = plain_distiller(images, weight=3.0)
    for nll in distiller.terms["vid"].likelihoods:
        nll.register_forward_hook(
            lambda m, a, loss: loss.register_hook(lambda g: seen.append(float(g))) and None
        )
    options = TrainOptions(steps=2, batch_size=9, accumulation=3, mixed_precision="bf16", device="cpu")
    Trainer(distiller, images, options, progress=False).fit()
    assert seen == [1.0] * 2 * 3 * 2


def teacher_in(dtype: torch.dtype | None, images: Images) -> tuple[Distiller, nn.Module]:
    torch.manual_seed(3)
    student, teacher = PlainNet(4), PlainNet(6)
    distiller = Distiller(student, teacher, [VID(PAIRS)], example=images.images[:2], teacher_dtype=dtype)
    assert distiller.teacher is not None
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    return distiller, distiller.teacher


@pytest.mark.parametrize("autocast", [False, True])
def test_a_teacher_in_bf16(autocast: bool) -> None:
    images = plain_data()
    seen: dict[str, torch.dtype] = {}
    _, expected = gradients(teacher_in(None, images)[0], images, autocast=False)
    distiller, teacher = teacher_in(torch.bfloat16, images)
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in distiller.parameters()} == {torch.float32}
    for name in PAIRS:
        getattr(teacher, name).register_forward_hook(
            lambda m, a, out, name=name: seen.update({name: out.dtype})
        )
    _, found = gradients(distiller, images, autocast=autocast)
    assert seen == dict.fromkeys(PAIRS, torch.bfloat16)
    assert_close(found, expected, GRADIENT_TOLERANCE)
    # The teacher keeps its type when the rest changes.
    distiller.double()
    assert {p.dtype for p in distiller.parameters()} == {torch.float64}
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert distiller(images.images.double(), images.labels).terms["vid"].isfinite()


def test_a_teacher_in_fp16_under_bf16_autocast_stays_in_fp16() -> None:
    images = plain_data()
    distiller, teacher = teacher_in(torch.float16, images)
    seen: list[torch.dtype] = []
    teacher.first.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        distiller(images.images, images.labels)
    assert seen == [torch.float16]
    with pytest.raises(ValueError, match=r"floating-point teacher_dtype, got torch.int8"):
        teacher_in(torch.int8, images)


def test_named_and_several_inputs_are_cast_where_they_float() -> None:
    class Two(PlainNet):
        def forward(self, images: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
            assert shift.dtype == torch.int64
            return super().forward(images + shift)

    images = plain_data().images
    shift = torch.ones((), dtype=torch.int64)
    for example in ((images, shift), {"images": images, "shift": shift}):
        distiller = Distiller(Two(4), Two(6), [VID(PAIRS)], example=example, teacher_dtype=torch.bfloat16)
        assert distiller.teacher_activations(example).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["kd", "fitnet", "at", "nst"])
def test_the_other_methods_take_a_teacher_of_another_type(name: str) -> None:
    if name not in METHODS:
        pytest.skip(f"there is no {name}")
    images, results = plain_data(), []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(3)
        student, teacher = PlainNet(4), PlainNet(6)
        term = METHODS[name]() if name == "kd" else METHODS[name]({"first": "first"})
        distiller = Distiller(
            student, copy.deepcopy(teacher), [term], example=images.images[:2], teacher_dtype=dtype
        )
        results.append(gradients(distiller, images, autocast=False))
    assert results[1][0] == pytest.approx(results[0][0], rel=LOSS_TOLERANCE)
    assert_close(results[1][1], results[0][1], 0.1)


def test_channels_last_and_bf16_together() -> None:
    images, losses = plain_data(), []
    options = TrainOptions(steps=5, batch_size=8, mixed_precision="bf16", device="cpu")
    for channels_last in (False, True):
        chosen = replace(options, channels_last=channels_last)
        losses.append(Trainer(plain_distiller(images), images, chosen, progress=False).fit()[-1]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=LOSS_TOLERANCE)
