"""torch.compile of the Distiller, of the student, and in the Trainer.

With the backend "aot_eager", which traces and splits forward and backward as the default does and then runs torch's
own kernels: what it must show is that taps, terms and gradients are the same, not how inductor generates code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from plain_network import PlainNet, plain_data, plain_distiller
from small_networks import PAIRS, SmallNet
from torch import Tensor, nn
from torch._dynamo.utils import counters

from vidfast.distill import VID, Distiller, Losses, TapError
from vidfast.distill.trainer import Trainer, TrainOptions

BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def made(change: Callable[[nn.Module], nn.Module] = lambda network: network) -> Distiller:
    torch.manual_seed(3)
    student, teacher = SmallNet(4), SmallNet(6)
    return Distiller(change(student), teacher, [VID(PAIRS)], example=plain_data().images[:2])


def step(call: Any, distiller: Distiller) -> tuple[Losses, dict[str, Tensor]]:
    images = plain_data(12)
    losses = call(images.images, images.labels)
    losses.loss.backward()
    found = {n.replace("_orig_mod.", ""): p.grad for n, p in distiller.named_parameters()}
    distiller.zero_grad()
    return losses, found


def assert_same(found: tuple[Losses, dict[str, Tensor]], expected: tuple[Losses, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0].loss, expected[0].loss, rtol=1e-6, atol=1e-6)
    assert list(found[0].terms) == list(expected[0].terms)
    assert list(found[1]) == list(expected[1])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_whole_distiller_compiles_into_one_graph() -> None:
    eager, distiller = made(), made()
    compiled = torch.compile(distiller, backend=BACKEND, fullgraph=True)
    for _ in range(2):  # the second one runs what the first one compiled
        assert_same(step(compiled, distiller), step(eager, eager))


@pytest.mark.parametrize("way", ["torch.compile(student)", "student.compile()", "student.compile() later"])
def test_a_compiled_student(way: str) -> None:
    def in_place(network: nn.Module) -> nn.Module:
        network.compile(backend=BACKEND)
        return network

    wrap = {
        "torch.compile(student)": lambda network: torch.compile(network, backend=BACKEND),
        "student.compile()": in_place,
    }
    eager, distiller = made(), made(wrap.get(way, lambda network: network))
    # The probe does not compile anything.
    assert counters["stats"]["unique_graphs"] == 0
    if way not in wrap:
        in_place(distiller.student)
    for _ in range(2):
        assert_same(step(distiller, distiller), step(eager, eager))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_the_trainer_compiles_both_networks_and_leaves_them_as_they_were() -> None:
    images = plain_data()
    options = TrainOptions(steps=6, batch_size=8, eval_every=3, device="cpu")
    results = []
    for compiled in (False, BACKEND):
        distiller = plain_distiller(images)
        trainer = Trainer(
            distiller,
            images,
            replace(options, compile=compiled),
            evaluate={"test": plain_data(20)},
            progress=False,
        )
        results.append((trainer.fit(), distiller.state_dict()))
        assert distiller.student._compiled_call_impl is None
        assert distiller.teacher is not None
        assert distiller.teacher._compiled_call_impl is None
    assert counters["stats"]["unique_graphs"] >= 2
    for row, expected in zip(results[1][0], results[0][0], strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    assert list(results[1][1]) == list(results[0][1])
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_an_in_place_change_is_found_by_the_probe_although_compiled() -> None:
    class Modifies(PlainNet):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.first[1] = nn.ReLU(inplace=True)

    student = torch.compile(Modifies(4), backend=BACKEND)
    with pytest.raises(RuntimeError, match=r"'first.0' was modified in place"):
        Distiller(student, PlainNet(6), [VID({"first.0": "first"})], example=plain_data().images[:2])


# ---- graphs that are made without taps

EVALUATED = ["before the Distiller", "before the Distiller, in training", "after it, before its first call"]


@pytest.mark.parametrize("way", ["torch.compile(student)", "student.compile()"])
@pytest.mark.parametrize("when", EVALUATED)
def test_a_student_that_was_compiled_and_run_says_what_to_do(way: str, when: str) -> None:
    data = plain_data(12)
    torch.manual_seed(3)
    student, teacher = SmallNet(4), SmallNet(6)
    if way == "student.compile()":
        student.compile(backend=BACKEND)
    else:
        student = torch.compile(student, backend=BACKEND)

    def run(training: bool) -> None:
        student.train(training)
        with torch.set_grad_enabled(training):
            student(data.images)
        student.train()

    if when.startswith("before"):
        run(training="training" in when)
    statistics = {n.replace("_orig_mod.", ""): v.clone() for n, v in student.state_dict().items()}
    distiller = Distiller(student, teacher, [VID(PAIRS)], example=data.images[:2])
    if when.startswith("after"):
        run(training=False)

    def call() -> Losses:
        if "in training" in when:
            return distiller(data.images, data.labels)
        distiller.eval()
        with torch.no_grad():
            return distiller(data.images, data.labels)

    eager = made()
    eager.load_state_dict({**eager.state_dict(), **{f"student.{n}": v for n, v in statistics.items()}})
    if when.startswith("before"):
        with pytest.raises(
            TapError, match=r"'first' was not called.*torch.compile made a graph of the student"
        ):
            call()
        torch.compiler.reset()
    student.load_state_dict({n: statistics[n.replace("_orig_mod.", "")] for n in student.state_dict()})
    if "in training" in when:
        assert_same(step(distiller, distiller), step(eager, eager))
    else:
        torch.testing.assert_close(call().terms["task"], eager.eval()(data.images, data.labels).terms["task"])
        assert call().terms["vid"].isfinite()


def test_a_student_compiled_after_the_distiller_was_made_and_run_before_its_first_call() -> None:
    data = plain_data(12)
    distiller = made()
    distiller.student.compile(backend=BACKEND)
    distiller.eval()
    with torch.no_grad():
        distiller.student(data.images)
        with pytest.raises(TapError, match=r"call torch.compiler.reset\(\) once, after the Distiller"):
            distiller(data.images, data.labels)
        torch.compiler.reset()
        found = distiller(data.images, data.labels).terms
        expected = made().eval()(data.images, data.labels).terms
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_networks_that_teach_each_other_compile() -> None:
    """Each is in training mode as a student and in eval mode as a teacher, in one graph with fullgraph=True."""
    data, found = plain_data(12), []
    for compiled in (False, True):
        torch.manual_seed(3)
        a, b = SmallNet(4), SmallNet(6)
        pair = [Distiller(s, t, [VID(PAIRS)], example=data.images[:2]) for s, t in ((a, b), (b, a))]
        calls: list[Any] = [
            torch.compile(d, backend=BACKEND, fullgraph=True) if compiled else d for d in pair
        ]
        losses = []
        for _ in range(3):
            for call in calls:
                loss = call(data.images, data.labels).loss
                loss.backward()
                losses.append(float(loss.detach()))
            assert all(module.training for network in (a, b) for module in network.modules())
        found.append((losses, a.state_dict(), b.state_dict()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for eager, compiled_state in zip(found[0][1:], found[1][1:], strict=True):
        for name, value in eager.items():
            torch.testing.assert_close(compiled_state[name], value, rtol=1e-5, atol=1e-6)
    assert int(found[1][1]["first.1.num_batches_tracked"]) == 3


def test_a_hook_that_comes_later_is_seen_in_a_compiled_network_too() -> None:
    data = plain_data(12)
    results = []
    for compiled in (False, True):
        distiller = made()
        if compiled:
            distiller.student.compile(backend=BACKEND)
        for factor in (3, 2):
            distiller.student.first.register_forward_hook(lambda module, args, output, by=factor: by * output)
            results.append(distiller.eval()(data.images, data.labels).loss)
            torch.compiler.reset()  # graphs do not look for hooks again
    torch.testing.assert_close(results[:2], results[2:], rtol=1e-5, atol=1e-6)
