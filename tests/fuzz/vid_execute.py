"""Runs a random call of VIDLoss and compares it with equation 5 on its regressor, in fp64.

Features and weights are multiples of powers of two, small enough that hidden activations are exact in fp32.
A ReLU then decides alike in fp32 and in fp64, and no bound has to excuse one that does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from cases import DTYPES
from execute import EXTREME
from guarded import plan
from paths import Leaves, RandomCall, run_call
from torch import Tensor
from vid_cases import INPUTS, VidCase, make_case

from vidfast import VIDLoss
from vidfast.head import kernel
from vidfast.head import plan as head_plan
from vidfast.vid import match_spatial

CLOSE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-5, torch.float64: 2e-5}


def _grid(random: np.random.Generator, n: int, most: int, step: float) -> np.ndarray:
    return random.integers(-most, most, n, endpoint=True) * step


class VidCall(RandomCall):
    """A call of VIDLoss, with gradients of s(tudent), a(lpha) and the weights 0, 1 and 2."""

    case: VidCase
    checkpointed = ("s",)
    repeatable = False  # torch's matrix products are not

    def __init__(self, case: VidCase) -> None:
        super().__init__(case)
        random = np.random.default_rng(case.seed)
        self.student = self._feature("student", random)
        self.teacher = self._feature("teacher", random)
        self.module = self._module(random)

    def _feature(self, name: str, random: np.random.Generator) -> Tensor:
        case = self.case
        mine = name == "student"
        channels = case.channels[0 if mine else 2]
        shape = (case.batch, channels, *(case.student_size if mine else case.teacher_size))
        where = plan(case.student_layout if mine else case.teacher_layout, shape, 1, self.rng)
        values = _grid(random, where.extent, 8, 0.25)
        if case.values == "nan":
            values[random.integers(0, where.extent)] = random.choice([np.nan, np.inf, -np.inf])
        dtype = DTYPES[case.student if mine else case.teacher]
        return self.memory.place(name, where, values, dtype, torch.device("cpu"))

    def _module(self, random: np.random.Generator) -> VIDLoss:
        case = self.case
        module = VIDLoss(
            *case.channels, eps=case.eps, init_pred_var=5 + case.eps, weight=case.weight,
            reduction=case.reduction, inplace=case.inplace,
        )  # fmt: skip
        with torch.no_grad():
            for i in (0, 2, 4):
                weight = module.regressor[i].weight
                weight.copy_(torch.from_numpy(_grid(random, weight.numel(), 8, 0.125)).view_as(weight))
            alpha = random.uniform(-3, 6, case.channels[2])
            if case.values == "extreme alpha":
                alpha = random.choice(EXTREME, case.channels[2])
            module.log_scale.copy_(torch.from_numpy(alpha))
        module.to(DTYPES[case.module])
        if case.weights_last:
            module.to(memory_format=torch.channels_last)
        for k, x in self._parameters(module).items():
            x.requires_grad_(k in case.wanted)
        return module

    @staticmethod
    def _parameters(module: VIDLoss) -> Leaves:
        weights = (module.regressor[i].weight for i in (0, 2, 4))
        return dict(zip(INPUTS[1:], (module.log_scale, *weights), strict=True))

    def leaves(self) -> Leaves:
        student = self.student.detach().requires_grad_("s" in self.case.wanted)
        return {"s": student, **self._parameters(self.module)}

    def run(self, x: Leaves) -> Tensor:
        with _cut_as(self.case):
            return self.module(x["s"], self.teacher)

    def for_inference(self, x: Leaves) -> Leaves:
        with torch.inference_mode():
            self.teacher = self.teacher.clone()
        return x

    def twin(self) -> RandomCall:
        return VidCall(replace(self.case, seed=self.case.seed + 10**9))

    def others(self) -> list[RandomCall]:
        seeds = [self.case.seed + n * 10**9 for n in (1, 2)]
        cut = {
            "arrangement": self.case.arrangement,
            "part": self.case.part,
        }  # which is patched for the whole process
        return [
            VidCall(replace(make_case(s), path="grad", hook="none", outputs="plain", **cut)) for s in seeds
        ]

    def g(self, value: float | None = None) -> float:
        return self.case.g if value is None else value

    def check(self, loss: Tensor, grads: Leaves, g: float) -> None:
        want, wanted, scale = self._formula(g)
        wide = "fp64" in (self.case.teacher, self.case.module)
        assert (loss.shape, loss.dtype) == ((), torch.float64 if wide else torch.float32)
        torch.testing.assert_close(
            loss.detach().double(), want, rtol=2e-5, atol=2e-5 * _finite_max(scale), equal_nan=True
        )
        given = self.leaves()
        for k, grad in grads.items():
            assert (grad.shape, grad.dtype) == (given[k].shape, given[k].dtype)
            if (
                grad.dtype is torch.float16
                and self.case.values == "extreme alpha"
                and wanted[k].isinf().any()
            ):
                continue  # what did not overflow is the difference of numbers that would
            rtol = CLOSE[grad.dtype]
            atol = rtol * _finite_max(wanted[k]) + (2e-5 * abs(g) * _finite_max(scale) if k == "a" else 0)
            torch.testing.assert_close(
                grad.double(), wanted[k].double(), rtol=rtol, atol=atol + torch.finfo(grad.dtype).tiny,
                equal_nan=True, msg=lambda text, k=k: f"gradient of {k!r}: {text}",
            )  # fmt: skip

    def _formula(self, g: float) -> tuple[Tensor, Leaves, Tensor]:
        """Loss and gradients in fp64, and the sum of the loss's terms' magnitudes."""
        case = self.case
        student = self.student.detach().clone().requires_grad_()
        parameters = {
            k: x.detach().double().requires_grad_() for k, x in self._parameters(self.module).items()
        }
        s, t = match_spatial(student, self.teacher.detach().clone())
        mean = s.to(DTYPES[case.module]).double()
        for k in "012":
            mean = torch.einsum(
                "oc,bc...->bo...", parameters[k].flatten(1), mean.relu() if k != "0" else mean
            )
        a = parameters["a"]
        v = (torch.logaddexp(a, torch.zeros_like(a)) + case.eps).view([1, -1] + [1] * (mean.dim() - 2))
        size, k = mean.numel(), case.weight
        k /= {"mean": size, "sum": 1, "batchmean": case.batch}[case.reduction]
        half = (mean - t.double()) ** 2 / (2 * v)
        loss = k * (0.5 * v.log() + half).sum()
        inputs = {"s": student, **parameters}
        found = torch.autograd.grad(loss, list(inputs.values()), torch.tensor(g, dtype=torch.float64))
        terms = abs(k) * (0.5 * v.log().abs() + half + 0.5 + half / v).sum()
        return loss.detach(), dict(zip(inputs, found, strict=True)), terms.detach()


def _finite_max(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


@contextmanager
def _cut_as(case: VidCase) -> Iterator[None]:
    """Within it, a head is computed as the case says."""
    values: dict[str, object] = {}
    chosen = mock.patch.object(kernel, "takes", kernel.takes)
    if case.arrangement == "kernel":
        chosen = mock.patch.object(
            kernel, "takes", lambda head: head.backend.has_head(head.module, len(head.stack.weights))
        )
    elif case.arrangement is not None:
        chosen = mock.patch.object(kernel, "takes", return_value=False)
        values["FEWEST_POSITIONS"] = 10**9 if case.arrangement == "rows" else 0
        values["MOST_CHANNELS"] = 0 if case.arrangement == "columns" else 10**9
    if case.part is not None:
        positions = int(np.prod([min(n) for n in zip(case.student_size, case.teacher_size, strict=True)]))
        most = 4 * case.part * max(case.channels) * max(positions, 1)
        values["PART_BYTES"] = dict.fromkeys(head_plan.PART_BYTES, most)
    with chosen, mock.patch.multiple(head_plan, **values) if values else mock.patch.dict({}):
        yield


def run_vid_case(case: VidCase) -> None:
    """Raises if anything at all is wrong with this case."""
    run_call(VidCall(case))
