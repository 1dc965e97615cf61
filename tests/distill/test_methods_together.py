"""All methods in one Distiller: one forward pass of each network, and the same numbers whatever the mode."""

from __future__ import annotations

import copy

import pytest
import torch
from small_networks import PAIRS, SmallNet
from torch import Tensor, nn

from vidfast import distill
from vidfast.distill import Distiller, Method


@pytest.fixture
def distiller(images: Tensor) -> Distiller:
    terms = [
        distill.VID(PAIRS),
        distill.VIDLP("drop"),
        distill.HeteroscedasticVID(PAIRS),
        distill.StudentTVID(PAIRS),
        distill.MixtureVID(PAIRS),
        distill.Infomax("first"),
        distill.KD(),
        distill.FitNet(PAIRS, weight=1.0),
        distill.AT(PAIRS),
        distill.NST(PAIRS),
        distill.LwF("drop"),
        distill.LwF("drop", "softened", name="softened"),
        distill.ITRD({"drop": "drop"}),
        distill.MIMKD(PAIRS),
    ]
    return Distiller(SmallNet(4), SmallNet(6), terms, example=images, task_weight=0.1)


def test_no_method_is_missing_here(distiller: Distiller) -> None:
    exported = [thing for thing in vars(distill).values() if isinstance(thing, type)]
    methods = {m for m in exported if issubclass(m, Method) and m.default_name}
    assert {type(term) for term in distiller.terms.values()} == methods
    assert {distill.METHODS[m.default_name] for m in methods} == methods


def step(
    module: nn.Module, distiller: Distiller, images: Tensor, labels: Tensor
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Each term, and the gradient of every parameter of `distiller`, which `module` runs."""
    distiller.zero_grad()
    losses = module(images, labels)
    losses.loss.backward()
    return losses.terms, [p.grad.clone() for p in distiller.parameters() if p.grad is not None]


def test_terms_share_one_forward_pass_of_each_network(
    distiller: Distiller, images: Tensor, labels: Tensor
) -> None:
    calls = []
    for name, network in (("student", distiller.student), ("teacher", distiller.teacher)):
        assert network is not None
        network.register_forward_hook(lambda *_, name=name: calls.append(name))
    losses = distiller(images, labels)
    assert sorted(calls) == ["student", "teacher"]
    assert list(losses.terms) == ["task", *distiller.terms]
    torch.testing.assert_close(losses.loss.detach(), sum(losses.terms.values()))


def test_weights_and_scale_reach_every_term(distiller: Distiller, images: Tensor, labels: Tensor) -> None:
    distiller.eval()
    whole, quarter = distiller(images, labels).terms, distiller(images, labels, scale=0.25).terms
    for name, value in whole.items():
        assert abs(value) > 1e-7
        torch.testing.assert_close(quarter[name], 0.25 * value)


def test_a_term_is_described_alike_before_and_after_a_step(
    distiller: Distiller, images: Tensor, labels: Tensor
) -> None:
    """Resuming compares terms by their repr and plain attributes: a call must not leave its options in them."""

    def described() -> list[tuple[str, dict[str, object]]]:
        plain = (bool, int, float, str, tuple, type(None))
        return [
            (repr(term), {name: x for name, x in vars(term).items() if isinstance(x, plain)})
            for term in distiller.terms.values()
        ]

    before = described()
    distiller(images, labels, scale=0.5).loss.backward()
    assert described() == before


def test_all_compile_with_the_networks_into_one_graph(
    distiller: Distiller, images: Tensor, labels: Tensor
) -> None:
    """A host synchronisation or a break in any method would be an error here. It is about what can be traced, so
    the graph is then run as it is (backend "eager")."""
    distiller.eval()
    terms, gradients = step(distiller, distiller, images, labels)
    torch._dynamo.reset()
    compiled = torch.compile(distiller, backend="eager", fullgraph=True)
    others, other_gradients = step(compiled, distiller, images, labels)
    torch.testing.assert_close(others, terms, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other_gradients, gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_validation_in_inference_mode_is_that_without_gradients(
    distiller: Distiller, images: Tensor, labels: Tensor, autocast: bool
) -> None:
    """As Lightning validates; and the next step learns as if nothing had been."""
    distiller.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            torch.manual_seed(0)
            expected = distiller(images, labels).terms
        with torch.inference_mode():
            torch.manual_seed(0)
            found = distiller(images, labels).terms
            torch.manual_seed(0)
            of_copies = distiller(images.clone(), labels).terms  # inputs that inference mode made
            kept = distiller.teacher_activations(images)
            torch.manual_seed(0)
            of_kept = distiller(images, labels, teacher=kept).terms
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert torch.equal(of_copies[name], value), name
        assert torch.equal(of_kept[name], value), name
    gradients = []
    for before in (False, True):
        one = copy.deepcopy(distiller).eval()
        if before:
            with torch.inference_mode():
                one(images, labels)
        torch.manual_seed(0)
        gradients.append(step(one, one, images, labels)[1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bf16_autocast_is_near_fp32(distiller: Distiller, images: Tensor, labels: Tensor) -> None:
    distiller.eval()
    terms, _ = step(distiller, distiller, images, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        others, gradients = step(distiller, distiller, images, labels)
    assert all(value.dtype == torch.float32 for value in others.values())
    for name in terms:
        # KD's is a small difference of near-equal outputs, of which 8 bits leave little.
        torch.testing.assert_close(others[name], terms[name], rtol=0.05, atol=1e-3 if name == "kd" else 0)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)


def test_a_bf16_distiller_takes_a_step(distiller: Distiller, images: Tensor, labels: Tensor) -> None:
    half = copy.deepcopy(distiller).bfloat16().eval()
    terms, gradients = step(half, half, images.bfloat16(), labels)
    assert all(torch.isfinite(value) for value in terms.values())
    assert all(g.dtype == torch.bfloat16 and torch.isfinite(g).all() for g in gradients)
    assert len(gradients) == len(list(half.parameters()))
