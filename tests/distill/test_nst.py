"""NST against the paper's maximum mean discrepancy, channel by channel, and its memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from method_batches import assert_equal_with_gradients, batch_of, built, fp64, pair
from small_networks import PAIRS, SmallNet
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vidfast.distill import NST, Distiller
from vidfast.distill.methods import nst

LIMIT = 100_000_000


def formula(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared MMD of unit-length channel maps under k(x, y) = (x . y)^2, from every pair of channels."""

    def samples(features: Tensor) -> list[Tensor]:
        return [channel.flatten() / sum(v**2 for v in channel.flatten()) ** 0.5 for channel in features]

    def mean_kernel(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=xs[0].dtype)
        for x in xs:
            for y in ys:
                total = total + torch.dot(x, y) ** 2
        return total / (len(xs) * len(ys))

    total = torch.zeros((), dtype=student.dtype)
    for s, t in zip(map(samples, student), map(samples, teacher), strict=True):
        total = total + mean_kernel(s, s) + mean_kernel(t, t) - 2 * mean_kernel(s, t)
    return total / len(student)


SHAPES = {
    "fewer positions": (4, 6, (2, 2)),
    "fewer channels": (2, 3, (3, 4)),
    "1-D": (3, 2, (7,)),
    "3-D": (3, 3, (2, 1, 2)),
    "one channel": (1, 1, (5,)),
}


@pytest.mark.parametrize(("c_s", "c_t", "spatial"), SHAPES.values(), ids=SHAPES)
def test_value_and_gradient_are_the_formulas(c_s: int, c_t: int, spatial: tuple[int, ...]) -> None:
    student, teacher = fp64(2, c_s, *spatial, grad=True), fp64(2, c_t, *spatial)
    method = built(NST({"a": "x"}, channel_dim=1), pair(student, teacher))
    ours = method(pair(student, teacher), 0.7)
    assert_equal_with_gradients(ours, 0.7 * formula(student, teacher), [student])
    assert torch.autograd.gradcheck(lambda s: method(pair(s, teacher), 0.7), student)


@pytest.mark.parametrize(("c_s", "c_t", "positions"), [(3, 5, 4), (5, 3, 16), (4, 4, 4), (2, 7, 40)])
def test_both_forms_agree(c_s: int, c_t: int, positions: int) -> None:
    s, t = fp64(3, c_s, positions, grad=True), fp64(3, c_t, positions)
    assert_equal_with_gradients(nst.by_position_grams(s, t), nst.by_channel_grams(s, t), [s])


@pytest.mark.parametrize(
    ("c_s", "c_t", "positions", "form"),
    [(64, 64, 16, "position"), (4, 8, 64, "channel"), (32, 256, 64, "position"), (8, 8, 13, "position")],
)
def test_the_smaller_gram_matrices_are_formed(
    monkeypatch: pytest.MonkeyPatch, c_s: int, c_t: int, positions: int, form: str
) -> None:
    other = {"position": "by_channel_grams", "channel": "by_position_grams"}[form]
    monkeypatch.delattr(nst, other)
    student, teacher = torch.randn(2, c_s, positions), torch.randn(2, c_t, positions)
    assert torch.isfinite(NST({"a": "x"}, channel_dim=1)(pair(student, teacher), 1.0))


def test_pairs_add_up() -> None:
    student = {"a": fp64(2, 3, 4), "b": fp64(2, 5, 2, 2)}
    teacher = {"x": fp64(2, 4, 4), "y": fp64(2, 2, 2, 2)}
    expected = formula(student["a"], teacher["x"]) + formula(student["b"], teacher["y"])
    ours = NST({"a": "x", "b": "y"}, channel_dim=1)(batch_of(student, teacher), 1.0)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)


def test_both_sides_are_pooled_where_they_are_larger() -> None:
    student, teacher = fp64(2, 3, 4, 2), fp64(2, 2, 2, 4)
    small = student.reshape(2, 3, 2, 2, 2).mean(3), teacher.reshape(2, 2, 2, 2, 2).mean(4)
    ours = NST({"a": "x"})(pair(student, teacher), 1.0)
    torch.testing.assert_close(ours, formula(*small), rtol=1e-10, atol=0)


@pytest.mark.parametrize("positions", [(2, 2), (5, 5)], ids=["position Grams", "channel Grams"])
def test_a_channel_of_zeros_is_the_sample_zero_and_has_no_gradient(positions: tuple[int, int]) -> None:
    """Dead channels are common after a ReLU. They still count in the means over channels."""
    student, teacher = fp64(2, 3, *positions), fp64(2, 4, *positions)
    student[:, 1], teacher[:, 2] = 0, 0
    student.requires_grad_()
    loss = NST({"a": "x"})(pair(student, teacher), 1.0)
    (gradient,) = torch.autograd.grad(loss, student)

    s, t = student[:, [0, 2]], teacher[:, [0, 1, 3]]
    unit_s, unit_t = (x.flatten(2) / x.flatten(2).norm(dim=2, keepdim=True) for x in (s, t))
    terms = [(unit_s, unit_s, 9), (unit_t, unit_t, 16), (unit_s, unit_t, 12)]
    kernels = [torch.einsum("bip,bjp->bij", a, b).pow(2).sum((1, 2)).mean() / n for a, b, n in terms]
    torch.testing.assert_close(loss, kernels[0] + kernels[1] - 2 * kernels[2], rtol=1e-10, atol=0)
    assert gradient[:, 1].abs().max() == 0
    assert torch.isfinite(gradient).all()
    assert gradient[:, 0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", [(3, 3), (8, 8)], ids=["position Grams", "channel Grams"])
def test_half_precision_and_autocast_compute_in_fp32(dtype: torch.dtype, positions: tuple[int, int]) -> None:
    """A student near its teacher, where the products' 8 bits under autocast would be all that is left."""
    teacher = torch.randn(2, 6, *positions)
    student = (300 * (teacher + 0.02 * torch.randn_like(teacher))).to(dtype)
    teacher = teacher.to(dtype)
    expected = formula(student.double(), teacher.double())
    method = NST({"a": "x"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = method(pair(student, teacher), 1.0)
    for loss in (method(pair(student, teacher), 1.0), under_autocast):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-7)


def peak_bytes(run: Callable[[], object], folder: Path) -> int:
    """The most memory that `run` held at once beyond what was held before it, from the allocator's records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    trace = folder / "trace.json"
    recorded.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def test_the_measurement_sees_the_public_formulas_broadcast(tmp_path: Path) -> None:
    s, t = torch.randn(2, 32, 16), torch.randn(2, 32, 16)
    broadcast = 2 * 32 * 32 * 16 * 4
    peak = peak_bytes(lambda: (s.unsqueeze(2) * t.unsqueeze(1)).sum(-1).square().mean(), tmp_path)
    assert broadcast <= peak < 2 * broadcast


@pytest.mark.parametrize("channels", [(256, 256), (64, 256)], ids=str)
def test_memory_is_bounded_forward_and_backward(channels: tuple[int, int], tmp_path: Path) -> None:
    """At batch 64, 256 channels and 8x8 positions the broadcast of every pair of channels is 1 GiB."""
    student = torch.randn(64, channels[0], 8, 8, requires_grad=True)
    batch = pair(student, torch.randn(64, channels[1], 8, 8))
    method = NST({"a": "x"})
    peak = peak_bytes(lambda: method(batch, 50.0).backward(), tmp_path)
    assert student.grad is not None
    assert student.nbytes < peak < LIMIT


def test_in_a_distiller() -> None:
    student, teacher = SmallNet(4), SmallNet(6)
    images = torch.randn(4, 1, 8, 8)
    distiller = Distiller(student, teacher, [NST(PAIRS)], example=images)
    maps: dict[str, Tensor] = {}
    for side, network in (("student", student), ("teacher", teacher)):
        for name in PAIRS:
            layer = network.get_submodule(name)
            layer.register_forward_hook(lambda m, i, out, key=f"{side}.{name}": maps.update({key: out}))
    losses = distiller(images)
    losses.loss.backward()
    assert student.first[0].weight.grad.abs().max() > 0
    assert all(p.grad is None for p in teacher.parameters())
    expected = sum(NST({"a": "x"})(pair(maps[f"student.{n}"], maps[f"teacher.{n}"]), 50.0) for n in PAIRS)
    torch.testing.assert_close(losses.terms["nst"], expected.detach())


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1, 1)], ids=["vector", "one position"])
def test_features_without_positions_are_refused(shape: tuple[int, ...]) -> None:
    features = torch.randn(shape)
    with pytest.raises(ValueError, match=r"pair 'a' -> 'x': NST compares maps .* at least two positions"):
        built(NST({"a": "x"}), pair(features, features))
