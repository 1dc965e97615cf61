"""VIDLoss as a formula: equation 5 (Ahn et al., CVPR 2019) on a regressor of 1x1 convolutions, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vidfast import VIDLoss


def small_module(seed: int) -> VIDLoss:
    """5 channels to 6 by way of 8, with a variance of its own for each channel."""
    torch.manual_seed(seed)
    m = VIDLoss(5, 8, 6)
    with torch.no_grad():
        m.log_scale.copy_(torch.linspace(-2, 3, 6))
    return m


def formula(module: VIDLoss, student: Tensor, teacher: Tensor) -> Tensor:
    """Equation 5 in fp64 with the module's own weights, per element and averaged; differentiable."""

    def mix(x: Tensor, w: Tensor) -> Tensor:  # a 1x1 convolution is a matrix over the channels
        return torch.einsum("oc,bc...->bo...", w.double().flatten(1), x)

    size = tuple(min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True))
    pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
    s, t = student.double(), teacher.detach().double()
    s = s if s.shape[2:] == size else pool[len(size)](s, size)
    t = t if t.shape[2:] == size else pool[len(size)](t, size)
    weights = [module.regressor[i].weight for i in (0, 2, 4)]
    mean = mix(mix(mix(s, weights[0]).relu(), weights[1]).relu(), weights[2])
    v = torch.log1p(module.log_scale.double().exp()) + module.eps
    v = v.view([1, -1] + [1] * len(size))
    return module.weight * (0.5 * (v.log() + (t - mean) ** 2 / v)).mean()


def check(module: VIDLoss, student: Tensor, teacher: Tensor, rtol: float = 2e-5) -> None:
    student = student.detach().requires_grad_()
    teacher = teacher.detach().requires_grad_()
    inputs = [student, *module.parameters()]
    want = formula(module, student, teacher)
    wanted = torch.autograd.grad(want, inputs)
    loss = module(student, teacher)
    assert loss.shape == ()
    got = torch.autograd.grad(loss, [*inputs, teacher], allow_unused=True)
    assert got[-1] is None, "a gradient reached the teacher"
    torch.testing.assert_close(loss.double(), want, rtol=rtol, atol=rtol)
    for x, y in zip(got, wanted, strict=False):
        torch.testing.assert_close(x.double(), y.double(), rtol=rtol, atol=rtol * y.abs().max().item())
