"""VIDLoss against the formula (equation 5 on a regressor of 1x1 convolutions), and its checkpoints."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from bounds import RELATIVE, check_scalar
from oracle import Options, by_hand
from problems import BF16, DTYPES, FP16, FP32, FP64, short
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from vid_formula import check, formula, small_module

import vidfast
from vidfast import VIDLoss

SPATIAL = {
    "square": (8, 8),
    "wide": (4, 9),
    "tall": (11, 3),
    "one position": (1, 1),
    "1-D": (13,),
    "3-D": (3, 4, 5),
    "vectors": (),
}


@pytest.fixture
def module() -> VIDLoss:
    return small_module(3)


@pytest.mark.parametrize("spatial", SPATIAL.values(), ids=SPATIAL.keys())
def test_is_the_formula(module: VIDLoss, spatial: tuple[int, ...]) -> None:
    check(module, torch.randn(4, 5, *spatial), torch.randn(4, 6, *spatial))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((8, 8), (4, 4)), ((4, 4), (8, 8)), ((7, 7), (3, 3)), ((8, 4), (4, 8)), ((4, 9), (4, 3)), ((5, 6), (3, 6)),
        ((10,), (4,)), ((4,), (10,)), ((4, 2, 6), (2, 4, 3)), ((8, 8), (1, 1)), ((1, 5), (5, 1)),
    ],
    ids=str,
)  # fmt: skip
def test_pools_to_the_smaller_along_every_axis(
    module: VIDLoss, student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    check(module, torch.randn(4, 5, *student), torch.randn(4, 6, *teacher))


@pytest.mark.parametrize("channels_last", [(True, False), (False, True), (True, True)], ids=str)
def test_channels_last(module: VIDLoss, channels_last: tuple[bool, bool]) -> None:
    s, t = torch.randn(4, 5, 7, 6), torch.randn(4, 6, 7, 6)
    if channels_last[0]:
        s = s.to(memory_format=torch.channels_last)
    if channels_last[1]:
        t = t.to(memory_format=torch.channels_last)
    check(module, s, t)


@pytest.mark.parametrize("teacher", DTYPES, ids=short)
@pytest.mark.parametrize("student", DTYPES, ids=short)
def test_mixed_dtypes(module: VIDLoss, student: torch.dtype, teacher: torch.dtype) -> None:
    """The regressor works in its own dtype; gradients return in the student's."""
    s, t = torch.randn(4, 5, 3, 4).to(student), torch.randn(4, 6, 3, 4).to(teacher)
    rtol = {FP16: 1e-3, BF16: 8e-3}.get(student, 2e-5)
    check(module, s, t, rtol)
    loss = module(s, t)
    # the student is cast to the regressor's fp32, so only the teacher's dtype makes the loss fp64
    assert loss.dtype == (FP64 if teacher is FP64 else FP32)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP64], ids=short)
def test_module_in_another_dtype(module: VIDLoss, dtype: torch.dtype) -> None:
    module = module.to(dtype)
    s, t = torch.randn(4, 5, 3, 4), torch.randn(4, 6, 3, 4)
    check(module, s, t, {BF16: 3e-2, FP16: 4e-3, FP64: 1e-6}[dtype])


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=short)
def test_autocast(module: VIDLoss, dtype: torch.dtype) -> None:
    s, t = torch.randn(4, 5, 6, 6, requires_grad=True), torch.randn(4, 6, 6, 6)
    plain = copy.deepcopy(module)
    plain.backend = "reference"
    results = []
    for m in (module, plain):
        with torch.autocast("cpu", dtype=dtype):
            loss = m(s, t)
        assert loss.dtype == FP32
        results.append((loss, *torch.autograd.grad(loss, [s, *m.parameters()])))
    want = formula(module, s, t)
    wanted = (want, *torch.autograd.grad(want, [s, *module.parameters()]))
    for fused, reference, exact in zip(*results, wanted, strict=True):
        assert fused.dtype == FP32
        # the convolutions round to 16 bits, and a ReLU whose input is nearly zero may switch: in the norm
        assert (fused.double() - exact).norm() <= {BF16: 0.15, FP16: 0.02}[dtype] * exact.norm()
        # beside the same 16-bit convolutions, the loss itself adds one rounding
        assert (fused - reference).norm() <= {BF16: 4e-3, FP16: 1e-3}[dtype] * reference.norm()


def test_fp64_features_of_an_fp64_module_are_exact(module: VIDLoss) -> None:
    module = module.double()
    s, t = torch.randn(4, 5, 3, 3, dtype=FP64), torch.randn(4, 6, 3, 3, dtype=FP64)
    with torch.no_grad():
        mean = module.regressor(s)
        want = by_hand(mean, t, module.log_scale, 1.0, Options())
        check_scalar("loss", module(s, t), want.loss, want.loss_scale, RELATIVE[FP64])


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_reduction_weight_eps(reduction: str) -> None:
    module = VIDLoss(5, 8, 6, 2.0, 1e-2, weight=0.25, reduction=reduction)
    s, t = torch.randn(4, 5, 3, 3), torch.randn(4, 6, 3, 3)
    factor = {"mean": 1, "sum": 4 * 6 * 9, "batchmean": 6 * 9}[reduction]
    torch.testing.assert_close(module(s, t).double(), formula(module, s, t) * factor, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.variance, torch.full((6,), 2.0), rtol=1e-6, atol=0)


def test_initial_state() -> None:
    module = VIDLoss(5, 8, 6)
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {
        "log_scale": (6,),
        "regressor.0.weight": (8, 5, 1, 1),
        "regressor.2.weight": (8, 8, 1, 1),
        "regressor.4.weight": (6, 8, 1, 1),
    }
    torch.testing.assert_close(module.variance, torch.full((6,), 5.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        module.log_scale.detach(), torch.full((6,), math.log(math.expm1(5 - 1e-5))), rtol=1e-6, atol=0
    )
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("key", ["log_scale", "soft_plus_param", "alpha"])
@pytest.mark.parametrize("shape", [(6,), (1, 6, 1, 1)], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_checkpoints(module: VIDLoss, key: str, shape: tuple[int, ...], nested: bool) -> None:
    state: dict[str, Any] = {
        f"regressor.{i}.weight": module.regressor[i].weight.detach().clone() for i in (0, 2, 4)
    }
    state[key] = module.log_scale.detach().clone().view(shape)
    other: torch.nn.Module = VIDLoss(5, 8, 6)
    if nested:
        state = {f"0.{k}": v for k, v in state.items()}
        other = torch.nn.Sequential(other)
    names = set(state)
    assert other.load_state_dict(state, strict=True) == ([], [])
    assert set(state) == names, "the caller's dictionary was changed"
    loaded = other[0] if nested else other  # type: ignore[index]
    s, t = torch.randn(4, 5, 3, 3), torch.randn(4, 6, 3, 3)
    assert torch.equal(loaded(s, t), module(s, t))


def test_wrong_checkpoints_are_refused(module: VIDLoss) -> None:
    state = module.state_dict()
    for change in ({"log_scale": torch.zeros(7)}, {"regressor.0.weight": torch.zeros(8, 4, 1, 1)}):
        with pytest.raises(RuntimeError, match="size mismatch"):
            VIDLoss(5, 8, 6).load_state_dict({**state, **change})
    with pytest.raises(RuntimeError, match="Missing key"):
        VIDLoss(5, 8, 6).load_state_dict({k: v for k, v in state.items() if k != "log_scale"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        VIDLoss(5, 8, 6).load_state_dict({**state, "beta": torch.zeros(6)})


def test_copies(module: VIDLoss) -> None:
    s, t = torch.randn(4, 5, 3, 3), torch.randn(4, 6, 3, 3)
    module(s.requires_grad_(), t).backward()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(s, t), module(s, t))
        assert other.log_scale is not module.log_scale


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        ((4, 4, 3, 3), (4, 6, 3, 3), ["student", "5", "(4, 4, 3, 3)"]),
        ((4, 5, 3, 3), (4, 5, 3, 3), ["teacher", "6", "(4, 5, 3, 3)"]),
        ((4, 5, 3, 3), (3, 6, 3, 3), ["(4, 5, 3, 3)", "(3, 6, 3, 3)"]),
        ((4, 5, 3, 3), (4, 6, 9), ["(4, 5, 3, 3)", "(4, 6, 9)"]),
        ((4, 5, 3, 3), (4, 6), ["(4, 5, 3, 3)", "(4, 6)"]),
        ((5,), (6,), ["(5,)"]),
        ((0, 5, 3, 3), (0, 5, 3, 3), ["teacher", "6", "(0, 5, 3, 3)"]),
    ],
    ids=str,
)
def test_features_that_do_not_fit(
    module: VIDLoss, student: tuple[int, ...], teacher: tuple[int, ...], words: list[str]
) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        module(torch.randn(student), torch.randn(teacher))
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [torch.ones(4, 5, 3, 3, dtype=torch.int64), torch.ones(4, 5, 3, 3, dtype=torch.complex64), None],
    ids=["int", "complex", "None"],
)
def test_features_of_the_wrong_kind(module: VIDLoss, bad: Any) -> None:
    with pytest.raises(TypeError, match="student"):
        module(bad, torch.randn(4, 6, 3, 3))


def test_runs_in_place_without_touching_the_features(
    module: VIDLoss, monkeypatch: pytest.MonkeyPatch
) -> None:
    s, t = torch.randn(4, 5, 3, 3, requires_grad=True), torch.randn(4, 6, 3, 3)
    before = s.detach().clone(), t.clone()
    seen: list[Tensor] = []

    def spy(mean: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(mean)
        return vidfast.gaussian_nll(mean, *args, **options)

    # neither a hook nor another method of a layer: those turn inplace off
    monkeypatch.setattr(vidfast.regressor, "gaussian_nll", spy)
    monkeypatch.setattr(vidfast.regressor, "head_nll", lambda *_, **__: None)
    module(s, t).backward()
    assert torch.equal(s.detach(), before[0])
    assert torch.equal(t, before[1])
    mean = torch.nn.Sequential(*list(module.regressor)[:4])(s)
    mean = F.conv2d(mean, module.regressor[4].weight)
    assert not torch.equal(seen[0].detach(), mean.detach()), (
        "VIDLoss owns mean and should not allocate its gradient"
    )


@pytest.mark.parametrize("inplace", [True, False])
def test_what_may_be_written_over_is_told_to_both(
    module: VIDLoss, monkeypatch: pytest.MonkeyPatch, inplace: bool
) -> None:
    told: list[bool] = []
    regress = vidfast.regressor.regress

    def regressed(*args: Any, **options: Any) -> Tensor:
        told.append(options["inplace"])
        return regress(*args, **options)

    def spy(*args: Any, **options: Any) -> Tensor:
        told.append(options["inplace"])
        return vidfast.gaussian_nll(*args, **options)

    monkeypatch.setattr(vidfast.regressor, "regress", regressed)
    monkeypatch.setattr(vidfast.regressor, "gaussian_nll", spy)
    monkeypatch.setattr(vidfast.regressor, "head_nll", lambda *_, **__: None)
    module.inplace = inplace
    module(torch.randn(4, 5, 3, 3), torch.randn(4, 6, 3, 3))
    assert told == [inplace, inplace]


@pytest.mark.parametrize("axes", [(), (7,), (2, 3, 2)])
def test_other_axes_than_two_where_both_are_apart(
    module: VIDLoss, monkeypatch: pytest.MonkeyPatch, axes: tuple[int, ...]
) -> None:
    """What every GPU does: features of any number of axes come to the convolutions as maps."""
    s, t = torch.randn(4, 5, *axes), torch.randn(4, 6, *axes)
    together = module(s, t)
    monkeypatch.setattr(vidfast.regressor, "head_nll", lambda *_, **__: None)
    torch.testing.assert_close(module(s, t), together)


@pytest.mark.parametrize("where", ["regressor", "regressor.4", "inplace=False"])
def test_an_output_that_somebody_keeps_stays(module: VIDLoss, where: str) -> None:
    s, t = torch.randn(4, 5, 3, 3, requires_grad=True), torch.randn(4, 6, 3, 3)
    seen: list[Tensor] = []
    if where == "inplace=False":
        module.inplace = False
        convolve = module.regressor[4].forward
        module.regressor[4].forward = lambda x: seen.append(convolve(x)) or seen[-1]
    else:
        module.get_submodule(where).register_forward_hook(lambda _m, _i, out: seen.append(out))
    module(s, t).backward()
    fresh = F.conv2d(torch.nn.Sequential(*list(module.regressor)[:4])(s), module.regressor[4].weight)
    torch.testing.assert_close(seen[0].detach(), fresh.detach())


def test_a_regressor_of_your_own(module: VIDLoss) -> None:
    module.regressor = torch.nn.Conv2d(5, 6, 1)
    module(torch.randn(4, 5, 3, 3), torch.randn(4, 6, 3, 3)).backward()
    assert module.regressor.weight.grad is not None


@pytest.mark.parametrize("double", ["student", "module", "teacher"])
@pytest.mark.parametrize("autocast", [False, True])
def test_fp64_anywhere(module: VIDLoss, double: str, autocast: bool) -> None:
    """autocast leaves fp64 alone, so a convolution of fp64 and bf16 has to be avoided by us."""
    s, t = torch.randn(4, 5, 3, 3), torch.randn(4, 6, 3, 3)
    s, t = (s.double() if double == "student" else s), (t.double() if double == "teacher" else t)
    module = module.double() if double == "module" else module
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = module(s, t)
    loss.backward()
    assert torch.isfinite(loss)


def test_frozen_parts(module: VIDLoss) -> None:
    s, t = torch.randn(4, 5, 3, 3, requires_grad=True), torch.randn(4, 6, 3, 3)
    (want,) = torch.autograd.grad(formula(module, s, t), s)
    module.requires_grad_(False)
    (got,) = torch.autograd.grad(module(s, t), s)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    module.log_scale.requires_grad_(True)
    module(s.detach(), t).backward()
    assert module.log_scale.grad is not None
    assert torch.isfinite(module(s.detach(), t.detach()))


def test_under_no_grad(module: VIDLoss) -> None:
    s, t = torch.randn(4, 5, 3, 3), torch.randn(4, 6, 3, 3)
    want = module(s, t).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(module(s, t), want)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(module: VIDLoss, use_reentrant: bool) -> None:
    s, t = torch.randn(4, 5, 3, 3, requires_grad=True), torch.randn(4, 6, 3, 3)
    want = torch.autograd.grad(module(s, t), [s, *module.parameters()])
    checkpoint(module, s, t, use_reentrant=use_reentrant).backward()
    for x, y in zip([s, *module.parameters()], want, strict=True):
        assert torch.equal(x.grad, y)


def test_one_step_lowers_the_loss(module: VIDLoss) -> None:
    s, t = torch.randn(16, 5, 4, 4), torch.randn(16, 6, 4, 4)
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = module(s, t)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("part", [0, 1, 4])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_see_what_they_would_see_of_any_module(module: VIDLoss, kind: str, part: int) -> None:
    s, t = torch.randn(4, 5, 3, 3, requires_grad=True), torch.randn(4, 6, 3, 3)
    want = torch.autograd.grad(module(s, t), [s, *module.parameters()])
    seen: list[Tensor] = []

    def hook(_module: torch.nn.Module, first: tuple[Tensor, ...], *_: object) -> None:
        seen.append(first[0])

    getattr(module.regressor[part], f"register_{kind}_hook")(hook)
    got = torch.autograd.grad(module(s, t), [s, *module.parameters()])
    assert len(seen) == 1
    assert torch.isfinite(seen[0]).all()
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-8)
    if kind.startswith("forward"):
        alone = torch.nn.Sequential(*list(module.regressor)[:part])(s)
        torch.testing.assert_close(seen[0], alone, msg="what went in was written over")
