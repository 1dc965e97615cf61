"""The teacher's type and place."""

from __future__ import annotations

import copy
import gc
import pickle
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import PAIRS, SmallNet
from torch import Tensor, nn
from training_runs import QUICK

from vidfast.distill import KD, VID, Distiller
from vidfast.distill.data import Images
from vidfast.distill.files import CheckpointError
from vidfast.distill.trainer import Trainer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_teacher_in_another_type_is_a_copy(images: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
    teacher = SmallNet(6)
    earlier = Distiller(SmallNet(4).eval(), teacher, [VID(PAIRS)], example=images)
    expected = earlier(images, labels).loss
    later = Distiller(SmallNet(4), teacher, [VID(PAIRS)], example=images, teacher_dtype=dtype)
    assert later.teacher is not teacher
    assert later.teacher is not None
    assert {p.dtype for p in later.teacher.parameters()} == {dtype}
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert not set(map(id, teacher.parameters())) & set(map(id, later.teacher.parameters()))
    later(images, labels).loss.backward()
    assert torch.equal(earlier(images, labels).loss, expected)
    # One that is of the type already is used as it is.
    assert Distiller(SmallNet(4), teacher, teacher_dtype=torch.float32).teacher is teacher


def test_a_copied_teacher_follows_what_is_loaded_or_trained(images: Tensor, labels: Tensor) -> None:
    a, b = SmallNet(4), SmallNet(6)
    ab, ba = (
        Distiller(s, t, [VID(PAIRS), KD()], example=images, teacher_dtype=torch.bfloat16)
        for s, t in ((a, b), (b, a))
    )
    for _ in range(2):
        for distiller in (ab, ba):
            optimizer = torch.optim.SGD(distiller.parameter_groups(lr=0.1))
            distiller(images, labels).loss.backward()
            optimizer.step()
    ab.teacher_activations(images)
    assert ab.teacher is not None
    for name, value in b.state_dict().items():
        assert torch.equal(ab.teacher.state_dict()[name], value.to(ab.teacher.state_dict()[name].dtype)), name
    other = SmallNet(6)
    b.load_state_dict(other.state_dict())
    expected = Distiller(SmallNet(4), other, [KD()], example=images, teacher_dtype=torch.bfloat16)
    assert torch.equal(ab.teacher_activations(images).logits, expected.teacher_activations(images).logits)
    # It keeps no weights alive, and a copy of the Distiller follows nothing.
    copied = pickle.loads(pickle.dumps(copy.deepcopy(ab)))
    place = weakref.ref(b.first[0].weight)
    with torch.no_grad():
        b.fc.weight.zero_()
    assert not torch.equal(copied.teacher_activations(images).logits, ab.teacher_activations(images).logits)
    del b, ba, distiller, optimizer
    gc.collect()
    assert place() is None
    ab(images, labels)


def test_complex_buffers_and_whole_numbers_stay_what_they_are(images: Tensor) -> None:
    class Rotary(SmallNet):
        def __init__(self) -> None:
            super().__init__(6)
            self.register_buffer(
                "turns", torch.polar(torch.ones(2), torch.tensor([0.5, 1.0])), persistent=False
            )
            self.register_buffer("places", torch.arange(3))

    teacher = Rotary()
    found = Distiller(SmallNet(4), teacher, [KD()], example=images, teacher_dtype=torch.bfloat16).teacher
    assert found is not None
    assert torch.equal(found.turns, teacher.turns)
    assert found.places.dtype == torch.int64


def test_a_teacher_of_numbers_runs_outside_of_autocast() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(9, 4), nn.Linear(4, 3)
            self.seen = list[bool]()

        def forward(self, tokens: Tensor) -> Tensor:
            self.seen.append(torch.is_autocast_enabled("cpu"))
            out: Tensor = self.fc(self.embed(tokens).mean(1))
            return out

    tokens, teacher = torch.randint(0, 9, (2, 5)), Tokens()
    distiller = Distiller(Tokens(), teacher, [KD()], example=tokens, teacher_dtype=torch.float32)
    for inputs in (tokens, (tokens,), {"tokens": tokens}):
        with torch.autocast("cpu", torch.bfloat16):
            distiller(inputs)
    assert teacher.seen == [False] * 4


def test_a_fixed_type_survives_a_change_of_the_rest_without_rounding(images: Tensor) -> None:
    teacher = SmallNet(6).to(torch.bfloat16)
    with torch.no_grad():
        teacher.fc.weight.fill_(1e30)  # no fp16 number
    distiller = Distiller(SmallNet(4), teacher, [VID(PAIRS)], example=images, teacher_dtype=torch.bfloat16)
    distiller.half()
    assert {p.dtype for p in distiller.student.parameters()} == {torch.float16}
    assert bool((teacher.fc.weight == torch.tensor(1e30, dtype=torch.bfloat16)).all())


class Refuses(SmallNet):
    """Quantised networks of transformers refuse .to()."""

    def to(self, *args: Any, **options: Any) -> Any:
        raise ValueError("`.to` is not supported")


class NotCopied(SmallNet):
    def __deepcopy__(self, memo: object) -> Any:
        raise TypeError("cannot be copied")


def test_teachers_that_cannot_be_moved_or_converted(images: Tensor, labels: Tensor) -> None:
    distiller = Distiller(SmallNet(4), Refuses(6), [VID(PAIRS)], example=images)
    distiller.to("cpu")
    distiller(images, labels).loss.backward()
    quantised = SmallNet(6)
    quantised.is_loaded_in_4bit = True  # type: ignore[assignment]
    distiller = Distiller(SmallNet(4), quantised, [VID(PAIRS)], example=images)
    distiller.double()
    assert {p.dtype for p in quantised.parameters()} == {torch.float32}
    with pytest.raises(
        ValueError, match=r"teacher_dtype=torch.bfloat16 cannot convert.*weights are quantised"
    ):
        Distiller(SmallNet(4), quantised, teacher_dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"copying it failed with TypeError: cannot be copied.*convert it yourself"
    ):
        Distiller(SmallNet(4), NotCopied(6), teacher_dtype=torch.bfloat16)


@pytest.mark.parametrize("way", ["disk_offload", "cpu_offload", "dispatch_model"])
def test_a_teacher_that_accelerate_has_placed(small_data: Images, tmp_path: Path, way: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(5)
    plain = SmallNet(6)
    placed = copy.deepcopy(plain)
    folder = tempfile.mkdtemp(dir=tmp_path)
    if way == "disk_offload":
        accelerate.disk_offload(placed, folder, execution_device="cpu")
    elif way == "cpu_offload":
        accelerate.cpu_offload(placed, execution_device="cpu")
    else:
        parts = {"first": "cpu", "second": "disk", "drop": "cpu", "fc": "disk"}
        placed = accelerate.dispatch_model(placed, parts, main_device="cpu", offload_dir=folder)
    losses = []
    for teacher in (plain, placed):
        torch.manual_seed(7)
        distiller = Distiller(SmallNet(4), teacher, [VID(PAIRS), KD()], example=small_data.images[:2])
        distiller.to("cpu").to(memory_format=torch.channels_last)
        run = tmp_path / f"run {len(losses)}"
        history = Trainer(distiller, small_data, QUICK, folder=run, progress=False).fit()
        losses.append([row["loss"] for row in history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    with pytest.raises(ValueError, match=r"whose weights are offloaded by Accelerate"):
        Distiller(SmallNet(4), placed, teacher_dtype=torch.bfloat16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_another_teachers_checkpoint_is_told_wherever_the_weights_are(
    small_data: Images, tmp_path: Path
) -> None:
    """Offloaded weights are no tensors with values, and quantised ones are not read as others are."""
    accelerate = pytest.importorskip("accelerate")

    def offloaded(network: nn.Module) -> nn.Module:
        found: nn.Module = accelerate.disk_offload(
            network, tempfile.mkdtemp(dir=tmp_path), execution_device="cpu"
        )
        return found

    def quantised(network: nn.Module) -> nn.Module:
        found: nn.Module = torch.ao.quantization.quantize_dynamic(network, {nn.Linear})
        return found

    for change in (offloaded, quantised):
        folder = tmp_path / change.__name__
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            teacher = change(SmallNet(6).eval())
            distiller = Distiller(SmallNet(4), teacher, [KD()], example=small_data.images[:2])
            trainer = Trainer(distiller, small_data, QUICK, folder=folder, progress=False)
            if seed == 1:
                trainer.fit(resume=True)
            else:
                with pytest.raises(CheckpointError, match="other teacher weights"):
                    trainer.fit(resume=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["plain", "script", "trace", "frozen", "export", "fx", "int8"])
def test_teachers_as_they_are_delivered_teach_by_their_logits(
    small_data: Images, tmp_path: Path, kind: str
) -> None:
    """Graphs of TorchScript and torch.export have no layers that can be tapped; KD needs none, nor does the Trainer."""
    torch.manual_seed(5)
    plain = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 3)
    ).eval()
    images = small_data.images[:4]
    make: dict[str, Callable[[], nn.Module]] = {
        "plain": lambda: plain,
        "script": lambda: torch.jit.script(plain),
        "trace": lambda: torch.jit.trace(plain, images),
        "frozen": lambda: torch.jit.freeze(torch.jit.script(plain)),
        "export": lambda: torch.export.export(
            plain, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        ).module(),
        "fx": lambda: torch.fx.symbolic_trace(plain),
        "int8": lambda: torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}),
    }
    rows = []
    for teacher in (plain, make[kind]()):
        torch.manual_seed(7)
        distiller = Distiller(SmallNet(4), teacher, [KD()], example=images)
        distiller.train()
        trainer = Trainer(
            distiller,
            small_data,
            QUICK,
            evaluate={"t": small_data},
            folder=tmp_path / str(len(rows)),
            progress=False,
        )
        rows.append([row["loss"] for row in trainer.fit()])
    assert rows[1] == pytest.approx(rows[0], rel=0.05 if kind == "int8" else 1e-5)
