"""Runs a random call of gaussian_nll and holds every result to the oracle and the bounds of tests/core."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from bounds import (
    RELATIVE,
    accumulates_in,
    check_gradient,
    check_results,
    check_scalar,
    has_fractions,
    ulps_allowed,
)
from cases import DTYPES, Case, make_case
from guarded import ALWAYS_WALKED, REPEATING, Memory, Plan, plan
from oracle import Expected, Options, expected
from paths import Leaves, RandomCall, Refused, run_call
from places import Place
from torch import Tensor

from vidfast import gaussian_nll

NAMES = {"m": "mean", "t": "target", "a": "alpha"}
EXTREME = (1e4, -1e4, 700.0, -700.0, 88.0, -88.0, 20.0, -30.0, 0.0)


class _Enter(torch.autograd.Function):
    """The identity: a non-leaf that may be written, stored as x is, with sentinels around it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: Memory) -> Tensor:
        expanded = any(s == 0 and n > 1 for n, s in zip(x.shape, x.stride(), strict=True))
        strides = x.contiguous().stride() if expanded else x.stride()
        return memory.copy("mean", x, Plan(tuple(x.shape), strides, x.storage_offset() % 16))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, None


class NllCall(RandomCall):
    """A call of gaussian_nll on m(ean), t(arget) and a(lpha)."""

    case: Case
    checkpointed = ("m", "t", "a")

    def __init__(self, case: Case, place: Place) -> None:
        super().__init__(case)
        self.place = place
        self.options: dict[str, Any] = {
            "channel_dim": case.channel_dim,
            "eps": case.eps,
            "reduction": case.reduction,
            "full": case.full,
            "weight": case.weight,
        }
        if case.weight_on_device:
            self.options["weight"] = torch.tensor(case.weight, dtype=torch.float64, device=place.device)
        if case.mask != "none":
            self.options["mask"] = self._mask()
        self.mean, self.target, self.alpha = self._tensors()

    def _mask(self) -> Tensor:
        """About `selected` of the positions, in a shape that the call takes."""
        case, random = self.case, np.random.default_rng(self.case.seed + 1)
        shape = [n for d, n in enumerate(case.shape) if d != case.channel]
        if case.mask_shape == "sample":
            shape = [case.shape[0]]
        elif case.mask_shape in ("kept dimension", "broadcast"):
            shape = [1 if d == case.channel else n for d, n in enumerate(case.shape)]
        if case.mask_shape == "broadcast":
            shape = [n if random.uniform() < 0.6 else 1 for n in shape]
        chosen = random.uniform(size=shape) < case.selected
        # of few bits, so that no dtype rounds them
        values = np.round(random.uniform(0.25, 4, size=shape) * 32) / 32 if case.mask in DTYPES else 1
        found = torch.from_numpy(np.asarray(chosen * values))
        kinds = {"bool": torch.bool, "uint8": torch.uint8, "int64": torch.int64, **DTYPES}
        found = found.to(kinds[case.mask]).to(self.place.device)
        if case.mask_shape == "strided" and found.dim():
            wide = torch.ones(*found.shape, 2, dtype=found.dtype, device=found.device)
            wide[..., 0] = found
            found = wide[..., 0]
        return found

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        case, random = self.case, np.random.default_rng(self.case.seed)
        where = plan(case.mean_layout, case.shape, case.channel, self.rng)
        mean = self._activation("mean", where, case.mean, random)
        if case.aliased:
            target = mean.detach()
        else:
            where = plan(case.target_layout, case.shape, case.channel, self.rng)
            target = self._activation("target", where, case.target, random)
        return mean, target, self._alpha(random)

    def _activation(self, name: str, where: Plan, dtype: str, random: np.random.Generator) -> Tensor:
        values = random.standard_normal(where.extent)
        kind = self.case.values
        if kind in ("large", "tiny"):
            values *= {"large": 100.0, "tiny": 1e-3}[kind]
        elif kind == "equal":
            values[:] = 0.75  # mean and target alike: every residual is 0
        elif kind in ("inf", "nan"):
            bad = [np.inf, -np.inf] if kind == "inf" else [np.nan, np.inf]
            for at in random.integers(0, where.extent, size=1 + where.extent // 500):
                values[at] = random.choice(bad)
        return self.memory.place(name, where, values, DTYPES[dtype], self.place.device)

    def _alpha(self, random: np.random.Generator) -> Tensor:
        n = self.case.channels
        values = random.uniform(-3, 6, 4 * n + 16)
        if self.case.values == "extreme alpha":
            values = random.choice(EXTREME, 4 * n + 16)
        strides = {"sliced": 2, "column": 3, "expanded": 0}
        layout = self.case.alpha_layout
        where = Plan((n,), (strides.get(layout, 1),), self.rng.randrange(1, 8) if layout == "shifted" else 0)
        alpha = self.memory.place("alpha", where, values, DTYPES[self.case.alpha], self.place.device)
        return alpha.flip(0) if layout == "flipped" else alpha

    def want(self, g: float) -> Expected:
        case = self.case
        options = {**self.options, "reduction": "sum"} if case.reduction == "none" else self.options
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return expected(self.mean, self.target, self.alpha, g, Options(**options))

    def leaves(self) -> Leaves:
        given = {"m": self.mean, "t": self.target, "a": self.alpha}
        return {k: x.detach().requires_grad_(k in self.case.wanted) for k, x in given.items()}

    def run(self, x: Leaves) -> Tensor:
        case, m = self.case, x["m"]
        options = dict(self.options, strategy=case.strategy, inplace=case.inplace)
        if case.inplace and m.requires_grad and torch.is_grad_enabled():
            m = _Enter.apply(m, self.memory)
        try:
            if case.reduction == "none":
                return gaussian_nll(m, x["t"], x["a"], **options)
            loss = self.place.nll(m, x["t"], x["a"], **options)
            if m is not x["m"]:
                self._check_inplace(m.detach(), x["m"].detach())
            return loss
        except RuntimeError as error:
            # a checkpoint computes again with what the hook returned, which may have other strides
            again = case.hook != "none" and "checkpoint" in case.path
            if (
                case.inplace
                and "inplace=True" in str(error)
                and (again or case.mean_layout not in ALWAYS_WALKED)
            ):
                if not again:
                    self.memory.check(unwritten="mean")
                raise Refused from error
            raise

    def _check_inplace(self, now: Tensor, before: Tensor) -> None:
        """mean's memory holds d/d mean for g = 1, or what it held before where inplace is ignored."""
        if self.case.one_pass:
            fractional = has_fractions(self.options.get("mask"))
            ulps = ulps_allowed(now.dtype, False, now.device.type != "cpu", fractional)
            check_gradient("mean after inplace", now, self.want(1.0).grad_mean, ulps)
        else:
            torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)

    def for_inference(self, x: Leaves) -> Leaves:
        out = dict(x)
        with torch.inference_mode():
            for k, given in (("t", self.target), ("m", self.mean)):
                if k in self.case.wanted:
                    continue
                where = Plan(tuple(given.shape), given.stride(), given.storage_offset() % 16)
                repeats = self.case.mean_layout in REPEATING or self.case.target_layout in REPEATING
                out[k] = given.clone() if repeats else self.memory.copy("an inference tensor", given, where)
        return out

    def may_save(self, error: RuntimeError) -> bool:
        return "nference tensor" in str(error) and "m" in self.case.wanted and not self.case.one_pass

    def twin(self) -> RandomCall:
        return NllCall(replace(self.case, seed=self.case.seed + 10**9), self.place)

    def others(self) -> list[RandomCall]:
        seeds = [self.case.seed + n * 10**9 for n in (1, 2)]
        cases = [replace(make_case(s), path="grad", hook="none", outputs="plain") for s in seeds]
        return [NllCall(c, self.place) for c in cases if fits(c, self.place)]

    def g(self, value: float | None = None) -> float:
        dtype = accumulates_in(DTYPES[self.case.mean], DTYPES[self.case.target])
        return float(torch.tensor(self.case.g if value is None else value, dtype=dtype))

    def check(self, loss: Tensor, grads: Leaves, g: float) -> None:
        case, want = self.case, self.want(g)
        assert loss.dtype is accumulates_in(DTYPES[case.mean], DTYPES[case.target])
        given = {"m": self.mean, "t": self.target, "a": self.alpha}
        for k, grad in grads.items():
            assert (grad.dtype, grad.shape, grad.device) == (
                given[k].dtype,
                given[k].shape,
                given[k].device,
            ), f"d/d {NAMES[k]} has another dtype, shape or device"
        if case.reduction == "none":
            self._check_elements(loss, grads, want, g)
            return
        assert loss.shape == ()
        if case.path == "create_graph" and not case.one_pass:
            check_roughly(want, loss, grads, g)
            return
        check_results(
            want, loss, grads.get("m"), grads.get("t"), grads.get("a"),
            g=g, one_pass=case.one_pass, mask=self.options.get("mask"),
        )  # fmt: skip
        check_not_finite("loss", loss, want.loss)
        if "a" in grads:
            check_not_finite("d/d alpha", grads["a"], want.grad_alpha)

    def _check_elements(self, loss: Tensor, grads: Leaves, want: Expected, g: float) -> None:
        assert loss.shape == self.mean.shape
        total = loss.double().sum()
        np.testing.assert_allclose(total.item(), float(want.loss), rtol=0, atol=1e-4 * float(want.loss_scale))
        check_roughly(want, None, grads, g)


def check_roughly(want: Expected, loss: Tensor | None, grads: Leaves, g: float) -> None:
    """What plain PyTorch computed, in fp32 where the kernels use fp64: right, but not to the last place."""
    if loss is not None:
        check_scalar("loss", loss, want.loss, want.loss_scale, RELATIVE[loss.dtype])
    for k, exact in (("m", want.grad_mean), ("t", want.grad_target)):
        if k in grads:
            check_gradient(f"d/d {NAMES[k]}", grads[k], exact, 8, g, scaled=True)
    if "a" in grads:
        check_scalar("d/d alpha", grads["a"], want.grad_alpha, want.alpha_scale, 1e-4)


def check_not_finite(what: str, got: Tensor, want: np.ndarray) -> None:
    """inf and nan are where the oracle has them: the bounds allow any number at an infinite scale."""
    exact = torch.from_numpy(np.asarray(want).astype(np.float64)).to(got.dtype)
    value = got.detach().cpu()
    wrong = (value.isnan() != exact.isnan()) | (
        value.isinf() & ~exact.isinf() & (exact.abs() < 0.99 * _max(value))
    )
    wrong |= exact.isinf() & value.isfinite() & (value.abs() < 0.99 * _max(value))
    assert not wrong.any(), f"{what}: got {value[wrong]}, want {exact[wrong]}"


def _max(x: Tensor) -> float:
    return torch.finfo(x.dtype).max


def fits(case: Case, place: Place) -> bool:
    """Whether this place takes a problem of this size; see tests/core/conftest.py."""
    return place.limit is None or case.numel <= place.limit


def run_case(case: Case, place: Place) -> None:
    """Raises if anything at all is wrong with this case."""
    if fits(case, place):
        run_call(NllCall(case, place))
