"""Distiller(..., mask=): what reaches the terms, parts of a batch, processes, graphs, and what is refused."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from masked_network import gradients, inputs, token_data, token_distiller
from process_programs import join
from small_networks import PAIRS, SmallNet
from torch import Tensor, nn

from vidfast import distill
from vidfast.distill import KD, METHODS, VID, Batch, Distiller, Method
from vidfast.distill import processes as library_processes
from vidfast.distill.weighting import fitted, weighted


def maps(*terms: Method) -> Distiller:
    """Networks on images (6, 1, 8, 8), with features of 8x8 and 4x4."""
    torch.manual_seed(1)
    terms = terms or (VID(PAIRS), KD(), distill.Infomax("first"), distill.LwF("drop"))
    return Distiller(SmallNet(4), SmallNet(6), terms, example=torch.randn(6, 1, 8, 8)).eval()


def test_tokens_that_are_padding_do_not_count() -> None:
    """Their features are NaN; the terms are those of the tokens alone, each a sample of one token."""
    tokens, mask = token_data()
    found, alone = token_distiller(tokens), token_distiller(tokens)
    losses = found(inputs(tokens, mask), mask=mask)
    losses.loss.backward()
    few = tokens[mask][:, None]
    expected = alone(inputs(few, torch.ones(few.shape[:2])))
    expected.loss.backward()
    torch.testing.assert_close(losses.terms, expected.terms, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(found), gradients(alone), rtol=1e-9, atol=1e-10)
    assert list(losses.terms) == ["vid", "vid_student_t", "fitnet", "kd"]


def test_a_mask_of_the_images_size_is_brought_to_every_pair(images: Tensor, labels: Tensor) -> None:
    distiller = maps()
    mask = torch.rand(6, 8, 8) > 0.4
    mask[2] = False
    found = distiller(images, labels, mask=mask).terms
    whole = distiller(images, labels).terms
    assert torch.equal(found["task"], whole["task"])
    assert all(found[name] != whole[name] for name in ("vid", "kd", "infomax", "lwf"))
    # Selecting whole samples is leaving the others out.
    samples = torch.tensor([True, True, False, True, False, True])
    fewer = distiller(images[samples], labels[samples]).terms
    for given in (samples, samples[:, None, None].expand(6, 8, 8), samples.reshape(6, 1, 1, 1)):
        found = distiller(images, labels, mask=given).terms
        for name in ("vid", "kd", "infomax", "lwf"):
            torch.testing.assert_close(found[name], fewer[name], rtol=1e-4, atol=1e-6)
    kept = distiller.teacher_activations(images)
    of_kept = distiller(images, labels, mask=samples, teacher=kept).terms
    assert all(torch.equal(of_kept[name], value) for name, value in found.items() if name != "infomax")


def test_nothing_selected_is_0_and_reaches_every_parameter() -> None:
    tokens, mask = token_data()
    distiller = token_distiller(tokens)
    nothing = torch.zeros_like(mask)
    losses = distiller(inputs(tokens, nothing), mask=nothing, scale=torch.tensor(0.0) / 0)
    assert losses.loss == 0
    losses.loss.backward()
    found = gradients(distiller)
    assert list(found) == [name for name, _ in distiller.named_parameters()]
    assert not any(g.any() for g in found.values())


# ---- parts of a batch


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_parts_of_other_sizes_make_the_whole_by_their_shares(reduction: str, dtype: torch.dtype) -> None:
    tokens, mask = token_data()
    whole, parts = token_distiller(tokens, reduction), token_distiller(tokens, reduction)
    weights = mask.to(dtype) * torch.arange(1, 9, dtype=dtype)[:, None]
    weights[3] = 0  # the second part has nothing
    total = weights.sum()
    scale: Any = 1.0 if reduction == "mean" else 1 / total
    loss = whole(inputs(tokens, weights), mask=weights, scale=scale).loss
    loss.backward()
    found = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
        scale = weights[part].sum() / total if reduction == "mean" else 1 / total
        of_part = parts(inputs(tokens[part], weights[part]), mask=weights[part], scale=scale).loss
        of_part.backward()
        found += of_part.detach()
    tolerance = 1e-10 if dtype is torch.float64 else 1e-6  # a share of integers is fp32
    torch.testing.assert_close(found, loss.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradients(parts), gradients(whole), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [torch.tensor(0.25), torch.tensor([0.25], dtype=torch.float64)])
def test_a_scale_that_is_a_tensor_reaches_every_term(scale: Tensor, images: Tensor, labels: Tensor) -> None:
    terms: list[Method] = [
        VID(PAIRS), distill.VIDLP("drop"), distill.HeteroscedasticVID(PAIRS), distill.StudentTVID(PAIRS),
        distill.MixtureVID(PAIRS), distill.Infomax("first"), KD(), distill.FitNet(PAIRS), distill.AT(PAIRS),
        distill.NST(PAIRS), distill.LwF("drop"), distill.LwF("drop", "softened", name="softened"),
        distill.ITRD({"drop": "drop"}), distill.MIMKD(PAIRS),
    ]  # fmt: skip
    assert {type(term) for term in terms} == {METHODS[name] for name in METHODS}
    distiller = maps(*terms)
    by_number, by_tensor = (distiller(images, labels, scale=s) for s in (0.25, scale))
    assert by_tensor.loss.dtype is torch.float32
    for name, value in by_number.terms.items():
        assert by_tensor.terms[name].dtype is value.dtype
        torch.testing.assert_close(by_tensor.terms[name], value, rtol=1e-5, atol=1e-7)
    assert torch.equal(scale, torch.full_like(scale, 0.25))
    parameters = list(distiller.parameters())
    expected = torch.autograd.grad(by_number.loss, parameters)
    for found, g in zip(torch.autograd.grad(by_tensor.loss, parameters), expected, strict=True):
        torch.testing.assert_close(found, g, rtol=1e-4, atol=1e-6)


# ---- two processes, of which one has nothing


def masked_steps(rank: int, world: int) -> list[dict[str, Tensor]]:
    """The gradients of two steps, then the weights. All tokens of the second step are padding."""
    tokens, mask = token_data()
    mask[1::2] = False  # what the second process has
    distiller = token_distiller(tokens)
    model: Any = nn.parallel.DistributedDataParallel(distiller) if world > 1 else distiller
    optimizer = torch.optim.SGD(distiller.parameter_groups(lr=0.1))
    found = []
    for select in (mask, torch.zeros_like(mask)):
        own, own_mask = tokens[rank::world], select[rank::world]
        total = own_mask.sum()
        if world > 1:
            torch.distributed.all_reduce(total)
        parts = list(zip(own.tensor_split(2), own_mask.tensor_split(2), strict=True))
        for i, (part, part_mask) in enumerate(parts):
            with model.no_sync() if world > 1 and i == 0 else nullcontext():
                share = part_mask.sum() * world / total
                loss = model(inputs(part, part_mask), mask=part_mask, scale=share).loss
                loss.backward()
        found.append(gradients(distiller))
        optimizer.step()
        optimizer.zero_grad()
    return [*found, {name: p.detach() for name, p in distiller.named_parameters()}]


def in_one_of_two(rank: int, port: int, folder: str) -> None:
    join(rank, port)
    library_processes.join("cpu")
    torch.save(masked_steps(rank, 2), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_process_without_tokens_trains_on(tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.start_processes(in_one_of_two, (port, str(tmp_path)), nprocs=2, start_method="fork")
    assert "RANK" not in os.environ
    expected = masked_steps(0, 1)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for of_first, of_second, alone in zip(first, second, expected, strict=True):
        for name, value in alone.items():
            assert torch.equal(of_first[name], of_second[name]), name
            torch.testing.assert_close(of_first[name], value, rtol=1e-6, atol=1e-9, msg=name)
    assert any(g.any() for g in first[0].values())
    assert not any(g.any() for g in first[1].values())


# ---- graphs


def test_a_masked_distiller_compiles_into_one_graph(images: Tensor, labels: Tensor) -> None:
    torch._dynamo.reset()
    distiller = maps(VID(PAIRS), distill.MixtureVID(PAIRS), distill.FitNet(PAIRS), KD(), distill.LwF("drop"))
    compiled = torch.compile(distiller, backend="aot_eager", fullgraph=True)
    parameters = list(distiller.parameters())
    for seed in range(2):
        torch.manual_seed(seed)
        mask, scale = torch.rand(6, 8, 8) > 0.5, torch.rand(())
        results = [call(images, labels, mask=mask, scale=scale) for call in (distiller, compiled)]
        torch.testing.assert_close(results[1].terms, results[0].terms, rtol=1e-5, atol=1e-6)
        eager, other = (torch.autograd.grad(r.loss, parameters) for r in results)
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


# ---- what is refused


class Own(Method):
    """A user's method, which reads no mask."""

    def forward(self, batch: Batch, factor: float) -> Tensor:
        return factor * batch.student.logits.square().mean()


class OwnMasked(Own):
    """And one that does."""

    takes_mask = True

    def forward(self, batch: Batch, factor: float) -> Tensor:
        if batch.mask is None:
            return super().forward(batch, factor)
        mask = fitted(batch.mask, batch.student.logits)
        return factor * weighted(batch.student.logits.square(), mask)


class OwnVID(VID):
    """Says nothing of masks, which VID takes."""

    def pair_loss(self, index: int, student: Tensor, teacher: Tensor, factor: float) -> Tensor:  # type: ignore[override]
        return factor * (student.mean() - teacher.mean()).square()


class OtherDefault(VID):
    """Computes what VID does."""

    default_name = "other"


NO_MASKS: dict[str, Callable[[], Method]] = {
    "at": lambda: distill.AT(PAIRS),
    "nst": lambda: distill.NST(PAIRS),
    "itrd": lambda: distill.ITRD({"drop": "drop"}),
    "mimkd": lambda: distill.MIMKD(PAIRS),
    "own": Own,
    "vid": lambda: OwnVID(PAIRS),
}


@pytest.mark.parametrize("name", NO_MASKS)
def test_a_mask_for_a_term_that_takes_none_is_refused_before_anything_runs(name: str, images: Tensor) -> None:
    distiller = maps(KD(), NO_MASKS[name]())
    calls = []
    distiller.student.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=rf"wanted terms that take a mask, got '{name}' .*takes_mask = True"):
        distiller(images, mask=torch.ones(6))
    assert not calls
    assert distiller(images).loss.isfinite()


def test_methods_of_ones_own_that_take_masks(images: Tensor) -> None:
    distiller = maps(OwnMasked(), OtherDefault(PAIRS))
    mask = torch.tensor([1, 1, 0, 0, 0, 0])
    found, fewer = distiller(images, mask=mask).terms, distiller(images[:2]).terms
    torch.testing.assert_close(found, fewer, rtol=1e-4, atol=1e-6)


BAD_MASKS: dict[str, tuple[Any, type[Exception], str]] = {
    "a list": ([1, 0], TypeError, "wanted mask as a Tensor or None, got list"),
    "complex": (torch.ones(6, dtype=torch.complex64), TypeError, "mask must be bool, integers"),
    "with a gradient": (torch.ones(6, requires_grad=True), ValueError, "must not require grad"),
    "negative": (torch.tensor([1, 1, 1, 1, 1, -2]), ValueError, "must not be negative"),
    "on another device": (torch.ones(6, device="meta"), ValueError, r"inputs' device, cpu.*mask.to\('cpu'\)"),
    "a number": (torch.tensor(1), ValueError, r"wanted a mask \(B, \*positions\)"),
    "another batch": (torch.ones(5), ValueError, r"pair 'first' -> 'first'.*got \(5,\)"),
    "too small": (torch.ones(6, 3, 3), ValueError, r"pair 'first' -> 'first'.*got \(6, 3, 3\)"),
    "of one pair alone": (torch.ones(6, 4, 4), ValueError, r"pair 'first' -> 'first'.*got \(6, 4, 4\)"),
    "of tokens": (torch.ones(6, 8), ValueError, r"pair 'first' -> 'first'.*got \(6, 8\)"),
    "with channels": (torch.ones(6, 3, 8, 8), ValueError, r"pair 'first' -> 'first'.*got \(6, 3, 8, 8\)"),
}


@pytest.mark.parametrize("what", BAD_MASKS)
def test_masks_that_do_not_fit_are_refused(what: str, images: Tensor) -> None:
    mask, kind, message = BAD_MASKS[what]
    with pytest.raises(kind, match=message):
        maps(VID(PAIRS))(images, mask=mask)


def test_whose_positions_a_mask_does_not_fit_is_named(images: Tensor) -> None:
    mask = torch.ones(6, 3, 3)
    with pytest.raises(
        ValueError, match=r"student layer 'first' -> input: wanted a mask of this feature's size"
    ):
        maps(distill.Infomax("first"))(images, mask=mask)
    with pytest.raises(ValueError, match=r"student layer 'drop': wanted a mask.*\(5,\)"):
        maps(distill.VIDLP("drop"))(images, mask=mask[:5, 0, 0])
    with pytest.raises(ValueError, match=r"logits of 'kd': wanted a mask.*\(5,\)"):
        maps(KD())(images, mask=mask[:5, 0, 0])
    tokens, _ = token_data()
    distiller = token_distiller(tokens)
    with pytest.raises(ValueError, match=r"pair 'seen' -> 'seen': wanted a mask.*\(8, 6\).*\(8, 5\)"):
        distiller(inputs(tokens, torch.ones(8, 6)), mask=torch.ones(8, 5))


def test_masks_of_tokens() -> None:
    """One number a token, with or without a dimension for the channels; or several that divide evenly."""
    tokens, _ = token_data()
    distiller = token_distiller(tokens)
    mask = torch.rand(8, 6) < 0.5
    given = inputs(tokens, torch.ones(8, 6))
    want = distiller(given, mask=mask).terms
    torch.testing.assert_close(distiller(given, mask=mask.unsqueeze(-1)).terms, want)
    torch.testing.assert_close(distiller(given, mask=mask.repeat_interleave(2, 1)).terms, want)
    one = mask[:1].unsqueeze(-1)
    torch.testing.assert_close(
        distiller(given, mask=one).terms, distiller(given, mask=mask[:1].expand(8, 6)).terms
    )
    with pytest.raises(ValueError, match=r"wanted a mask.*\(8, 9\)"):
        distiller(given, mask=torch.ones(8, 9))


def test_a_mask_without_terms_is_refused(images: Tensor) -> None:
    alone = distill.Distiller(maps(KD()).student, None, [], example=images)
    with pytest.raises(ValueError, match="wanted terms that take a mask, got a Distiller without terms"):
        alone(images, torch.zeros(6, dtype=torch.long), mask=torch.ones(6))


def test_scales_that_are_no_number_are_refused(images: Tensor) -> None:
    distiller = maps(KD())
    for wrong in (None, "1", True):
        with pytest.raises(TypeError, match="wanted scale as a number or a Tensor of one, got"):
            distiller(images, scale=wrong)
    with pytest.raises(TypeError, match=r"wanted scale as a number or a Tensor of one real number.*\(2,\)"):
        distiller(images, scale=torch.ones(2))
    with pytest.raises(TypeError, match=r"one real number, got torch\.bool"):
        distiller(images, scale=torch.tensor(True))
    with pytest.raises(ValueError, match=r"scale without gradient.*scale.detach\(\)"):
        distiller(images, scale=torch.ones((), requires_grad=True))
    with pytest.raises(ValueError, match="on the inputs' device, cpu, got one on meta"):
        distiller(images, scale=torch.ones((), device="meta"))
