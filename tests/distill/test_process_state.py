"""A training's result follows from its options alone, and the process is left as it was found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from company import of_accelerate, unfinished_cycle
from small_networks import SmallNet
from torch import Tensor
from training_runs import QUICK, assert_same, made, train

from vidfast.distill import Distiller
from vidfast.distill.data import Images, random_shift
from vidfast.distill.trainer import Trainer

pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def another(**options: Any) -> Callable[[pytest.MonkeyPatch], object]:
    def make(_: pytest.MonkeyPatch) -> object:
        from accelerate import Accelerator

        return Accelerator(cpu=True, **options)

    return make


def setting(name: str, value: str) -> Callable[[pytest.MonkeyPatch], object]:
    return lambda patch: patch.setenv(f"ACCELERATE_{name}", value)


BESIDE: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "an unfinished cycle": lambda _: unfinished_cycle(),
    "an Accelerator that divides by 4": another(gradient_accumulation_steps=4),
    "an Accelerator in bf16": another(mixed_precision="bf16"),
    "4 parts in the environment": setting("GRADIENT_ACCUMULATION_STEPS", "4"),
    "bf16 in the environment": setting("MIXED_PRECISION", "bf16"),
    "the CPU in the environment": setting("USE_CPU", "true"),
    "a compiler in the environment": setting("DYNAMO_BACKEND", "INDUCTOR"),
    "split batches in the environment": setting("SPLIT_BATCHES", "true"),
}


def the_data() -> Images:
    generator, labels = torch.Generator().manual_seed(2), torch.arange(30) % 3
    return Images(torch.randn(30, 1, 8, 8, generator=generator) + labels[:, None, None, None], labels)


def trainer_of(data: Images, distiller: Distiller, progress: Any = False) -> Trainer:
    return Trainer(
        distiller, data, QUICK, evaluate={"test": data}, augment=random_shift(1), progress=progress
    )


@pytest.fixture(scope="module")
def alone() -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train(the_data())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("when", ["before the Trainer", "between Trainer and fit", "in the middle of fit"])
@pytest.mark.parametrize("beside", BESIDE)
def test_what_is_learned_follows_from_the_options_alone(
    alone: tuple[Any, Any], beside: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, kept = the_data(), list[object]()

    def come() -> None:
        with torch.random.fork_rng():
            kept.append(BESIDE[beside](monkeypatch))

    class Watch:
        def update(self, n: int) -> None:
            if when.startswith("in") and not kept:
                come()

    if when.startswith("before"):
        come()
    distiller = made(data)
    trainer = trainer_of(data, distiller, Watch())
    if when.startswith("between"):
        come()
    before = of_accelerate()
    history = trainer.fit()
    assert len(kept) == 1
    if not when.startswith("in"):
        assert of_accelerate() == before
    assert history == alone[0]
    assert_same(distiller.state_dict(), alone[1])


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("around", [torch.bfloat16, torch.float16, None])
def test_an_autocast_around_fit_does_not_count(precision: Any, around: torch.dtype | None) -> None:
    """Neither its type nor the weights that it keeps in 16 bits until its block ends."""
    data, results = the_data(), []
    options = replace(QUICK, mixed_precision=precision)
    for inside in (False, True):
        distiller = made(data)
        trainer = Trainer(distiller, data, options, evaluate={"test": data}, progress=False)
        with torch.autocast("cpu", around, enabled=around is not None) if inside else nullcontext():
            if inside:
                distiller(data.images, data.labels)  # weights of before the training
                distiller.load_state_dict(made(data).state_dict())
            results.append((trainer.fit(), distiller.state_dict(), trainer.accuracy(data)))
    assert results[0][0] == results[1][0]
    assert_same(results[0][1], results[1][1])
    assert results[0][2] == results[1][2] == results[0][0][-1]["test_accuracy"]


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients_around_fit_do_not_count(
    alone: tuple[Any, Any], around: Callable[[], Any]
) -> None:
    distiller = made(the_data())
    trainer = trainer_of(the_data(), distiller)
    with around():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        history = trainer.fit()
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert history == alone[0]
    assert_same(distiller.state_dict(), alone[1])


def test_an_accelerator_that_comes_later_is_free_in_its_options(small_data: Images) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    trainer = Trainer(made(small_data), small_data, replace(QUICK, mixed_precision="bf16"), progress=False)
    assert AcceleratorState._shared_state == {}
    trainer.fit()
    later = Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=2)
    assert (later.mixed_precision, later.gradient_accumulation_steps) == ("no", 2)
    Trainer(made(small_data), small_data, QUICK, progress=False).fit()
    assert (later.mixed_precision, later.gradient_accumulation_steps) == ("no", 2)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_network_in_an_accelerators_precision_is_refused(small_data: Images, role: str) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        networks = {"student": SmallNet(4), "teacher": SmallNet(6)}
        networks[role] = accelerator.prepare(networks[role])
        distiller = Distiller(**networks)
        if precision == "no":
            Trainer(distiller, small_data, QUICK, progress=False)
            continue
        with pytest.raises(ValueError, match=rf"a {role} as it was before.*unwrap_model\({role}"):
            Trainer(distiller, small_data, QUICK, progress=False)
        accelerator.unwrap_model(networks[role], keep_fp32_wrapper=False)
        Trainer(distiller, small_data, QUICK, progress=False)


def test_the_trainer_needs_no_accelerate() -> None:
    code = (
        "import sys; sys.modules['accelerate'] = None; sys.path.insert(0, 'tests/distill'); import torch; "
        "from training_runs import train; from vidfast.distill.data import Images; "
        "print(len(train(Images(torch.randn(9, 1, 8, 8), torch.arange(9) % 3))[0]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout == "3\n", done.stderr


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_what_accelerate_launch_shards_is_refused(
    small_data: Images, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match="each hold the whole networks, got `accelerate launch` with"):
        Trainer(made(small_data), small_data, QUICK, progress=False)


def test_trainers_side_by_side_keep_their_precision(small_data: Images) -> None:
    """The first Trainer's fit comes after the second one was made."""
    seen: dict[str, set[torch.dtype]] = {"no": set(), "bf16": set()}
    trainers = []
    for precision, dtypes in seen.items():
        distiller = made(small_data)
        distiller.student.first[0].register_forward_hook(lambda m, a, out, to=dtypes: to.add(out.dtype))
        options = replace(QUICK, mixed_precision=precision, steps=2)
        trainers.append(Trainer(distiller, small_data, options, progress=False))
        dtypes.clear()
    for trainer in trainers:
        trainer.fit()
        trainer.accuracy(small_data)
    assert seen == {"no": {torch.float32}, "bf16": {torch.bfloat16}}
