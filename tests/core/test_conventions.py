"""What people expect of a torch module: device, dtype, reset_parameters, numpy's numbers, shapes of alpha, replicas."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from bounds import check_results
from oracle import expected
from places import Place
from problems import BY_NAME, FP32
from torch import nn

import vidfast

MODULES: dict[str, Any] = {
    "GaussianNLL": lambda **options: vidfast.GaussianNLL(6, init_var=2.5, **options),
    "VIDLoss": lambda **options: vidfast.VIDLoss(5, 8, 6, init_pred_var=2.5, **options),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_device_and_dtype(name: str, dtype: torch.dtype) -> None:
    made = MODULES[name](dtype=dtype, device="cpu")
    assert {p.dtype for p in made.parameters()} == {dtype}
    assert {p.device.type for p in MODULES[name](device="meta").parameters()} == {"meta"}
    torch.testing.assert_close(made.variance, torch.full((6,), 2.5, dtype=dtype), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_the_default_dtype_and_device(name: str) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        made = MODULES[name]()
        assert {p.dtype for p in made.parameters()} == {torch.float64}
        loss = made(torch.randn(2, 6 if name == "GaussianNLL" else 5, 3), torch.randn(2, 6, 3))
        assert loss.dtype is torch.float64
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):
        assert {p.device.type for p in MODULES[name]().parameters()} == {"meta"}


@pytest.mark.parametrize("name", MODULES)
def test_from_the_meta_device(name: str) -> None:
    """As FSDP and Lightning do: to_empty, then reset_parameters of every module that has it."""
    made = MODULES[name](device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for p in made.parameters():
            p.fill_(7e18)
    for part in made.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    torch.testing.assert_close(made.variance.detach(), torch.full((6,), 2.5))
    assert all(p.abs().max() < 10 and p.requires_grad for p in made.parameters())


def test_reset_parameters_resets_its_own_alone() -> None:
    module = vidfast.VIDLoss(5, 8, 6)
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        module.log_scale.add_(1)
    module.reset_parameters()
    assert all(torch.equal(x, before[key]) for key, x in module.state_dict().items())


@pytest.mark.parametrize("number", [np.int64, np.int32, np.uint8, np.int16])
def test_numpys_integers(number: Any) -> None:
    nll = vidfast.GaussianNLL(number(6), channel_dim=number(1))
    assert type(nll.num_channels) is int
    assert type(nll.channel_dim) is int
    module = vidfast.VIDLoss(number(5), number(8), number(6))
    assert module.regressor[0].weight.shape == (8, 5, 1, 1)
    x = torch.randn(2, 6, 3)
    want = vidfast.gaussian_nll(x, x + 1, torch.zeros(6))
    assert vidfast.gaussian_nll(x, x + 1, torch.zeros(6), channel_dim=number(1)) == want


@pytest.mark.parametrize("number", [np.float32, np.float64, np.float16, np.int64])
def test_numpys_numbers(number: Any) -> None:
    nll = vidfast.GaussianNLL(6, weight=number(2), eps=number(1), init_var=number(3))
    assert [type(x) for x in (nll.weight, nll.eps, nll.init_var)] == [float] * 3
    x = torch.randn(2, 6, 3)
    assert vidfast.gaussian_nll(x, x + 1, nll.alpha, weight=number(2), eps=number(1)) == nll(x, x + 1)


@pytest.mark.parametrize("wrong", [True, np.bool_(True), 2.0, np.float32(2), "2", None, torch.tensor(2)])
def test_what_is_no_integer_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="num_channels must be an int"):
        vidfast.GaussianNLL(wrong)
    with pytest.raises(TypeError, match="num_mid_channel must be an int"):
        vidfast.VIDLoss(5, wrong, 6)
    with pytest.raises(TypeError, match="channel_dim must be an int"):
        vidfast.GaussianNLL(6, channel_dim=wrong)


SHAPED = {
    "(1, C, 1, 1)": ((4, 6, 5, 5), 1, (1, 6, 1, 1)),
    "(C, 1, 1)": ((4, 6, 5, 5), 1, (6, 1, 1)),
    "(1, C)": ((4, 6), 1, (1, 6)),
    "(1, 1, C)": ((4, 7, 6), -1, (1, 1, 6)),
    "(C, 1), first": ((6, 7), 0, (6, 1)),
}


@pytest.mark.parametrize("name", SHAPED)
def test_alpha_in_a_shape_that_broadcasts(backend: Place, name: str) -> None:
    shape, channel, alpha_shape = SHAPED[name]
    generator = torch.Generator().manual_seed(0)
    m, t, a = (torch.randn(s, generator=generator).to(backend.device) for s in (shape, shape, alpha_shape))
    want = expected(m.movedim(channel, 1), t.movedim(channel, 1), a.reshape(-1))
    for options in ({}, {"strategy": "two_pass"}):
        leaves = (m.clone().requires_grad_(), a.clone().requires_grad_())
        loss = backend.nll(leaves[0], t, leaves[1], channel_dim=channel, **options)
        grad_mean, grad_alpha = torch.autograd.grad(loss, leaves)
        assert grad_alpha.shape == alpha_shape
        check_results(
            want, loss, grad_mean.movedim(channel, 1), None, grad_alpha.reshape(-1), one_pass=not options
        )
    assert vidfast.gaussian_nll(m, t, a, channel_dim=channel, reduction="none").shape == shape


def test_one_variance_for_all_channels_and_for_groups(backend: Place) -> None:
    m, t, _ = BY_NAME["plane_49"].tensors(FP32, device=backend.device)
    channels = m.shape[1]
    for one, spread in (
        (torch.randn(1), lambda a: a.expand(channels)),
        (torch.randn(2), lambda a: a.repeat_interleave(channels // 2)),
    ):
        a = one.to(backend.device).requires_grad_()
        loss = backend.nll(m, t, spread(a))
        (grad,) = torch.autograd.grad(loss, a)
        want = expected(m, t, spread(a).detach())
        exact = torch.from_numpy(want.grad_alpha.astype("float64")).reshape(len(one), -1).sum(1)
        scale = float(want.alpha_scale.astype("float64").sum())
        assert float((grad.cpu().double() - exact).abs().max()) <= 2e-6 * scale
    with pytest.raises(ValueError, match=r"alpha must have shape \(24,\).*alpha\.expand\(C\)"):
        vidfast.GaussianNLL(1)(m.cpu(), t.cpu())


def test_the_names_of_the_public_vid_loss() -> None:
    module = vidfast.VIDLoss(5, 8, 6)
    s, t = torch.randn(2, 5, 3), torch.randn(2, 6, 3)
    assert torch.equal(module(input=s, target=t), module(s, t))


def replica_of(module: nn.Module) -> Any:
    """As torch.nn.parallel.replicate makes them, which refuses the CPU: parameters become plain attributes."""
    replicas = {part: part._replicate_for_data_parallel() for part in module.modules()}
    for part, replica in replicas.items():
        replica._former_parameters = {}
        for key, child in part._modules.items():
            if child is not None:
                setattr(replica, key, replicas[child])
        for key, parameter in part._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, parameter * 1)
                replica._former_parameters[key] = parameter
    return replicas[module]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [True, False])
def test_a_replica_of_data_parallel(inplace: bool, dtype: torch.dtype) -> None:
    module = vidfast.VIDLoss(5, 8, 6, inplace=inplace, dtype=dtype)
    s, t = torch.randn(2, 5, 3, 3), torch.randn(2, 6, 3, 3)  # the student's dtype is not the weights'
    want = torch.autograd.grad(module(s, t), list(module.parameters()))
    loss = replica_of(module)(s, t)
    loss.backward()
    assert torch.equal(loss.detach(), module(s, t).detach())
    for parameter, grad in zip(module.parameters(), want, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grad)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_regressor_without_parameters(inplace: bool) -> None:
    module = vidfast.VIDLoss(6, 8, 6, inplace=inplace)
    module.regressor = nn.Sequential()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        s, t = torch.randn(2, 6, 3, 3).to(dtype), torch.randn(2, 6, 3, 3)
        assert torch.equal(module(s, t), vidfast.gaussian_nll(s, t, module.log_scale))


LATER: list[tuple[str, Any, type[Exception]]] = [
    ("weight", float("nan"), ValueError),
    ("weight", float("inf"), ValueError),
    ("weight", 10**400, ValueError),
    ("weight", torch.ones(2), ValueError),
    ("weight", torch.tensor(2.0, requires_grad=True), ValueError),
    ("weight", "0.5", TypeError),
    ("weight", True, TypeError),
    ("eps", 0.0, ValueError),
    ("eps", -1.0, ValueError),
    ("reduction", "avg", ValueError),
    ("inplace", "no", TypeError),
    ("log_scale", nn.Parameter(torch.zeros(6, dtype=torch.int32), requires_grad=False), TypeError),
]


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(("name", "value", "error"), LATER, ids=str)
def test_what_is_set_later_is_checked_too(
    name: str, value: Any, error: type[Exception], hooked: bool
) -> None:

    def set_and_call(module: Any, channels: int) -> None:
        setattr(module, name, value)
        module(torch.randn(2, channels, 3, 3), torch.randn(2, 6, 3, 3))

    module = vidfast.VIDLoss(5, 8, 6)
    if hooked:
        module.regressor.register_forward_hook(lambda *_: None)
    with pytest.raises(error, match="alpha" if name == "log_scale" else name):
        set_and_call(module, 5)
    if name in ("weight", "eps", "reduction"):
        with pytest.raises(error, match=name):
            set_and_call(vidfast.GaussianNLL(6), 6)


@pytest.mark.parametrize("number", [3, np.float32(0.25), np.float64(0.25), np.int64(2)])
def test_a_weight_set_later_is_a_float(number: Any) -> None:
    for module in (vidfast.GaussianNLL(6), vidfast.VIDLoss(5, 8, 6)):
        module.weight = number
        assert type(module.weight) is float
        assert module.weight == float(number)


@pytest.mark.parametrize("key", ["alpha", "log_scale", "soft_plus_param"])
@pytest.mark.parametrize("shape", [(6,), (1, 6, 1, 1)])
def test_checkpoints_of_other_repositories(key: str, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    nll = vidfast.GaussianNLL(6)
    nll.load_state_dict({key: values})
    assert torch.equal(nll.alpha, values.reshape(6))
    with pytest.raises(RuntimeError, match="size mismatch"):
        nll.load_state_dict({key: torch.randn(5)})
    both = vidfast.GaussianNLL(6)
    both.load_state_dict({"alpha": values, "log_scale": values + 1}, strict=False)
    assert torch.equal(both.alpha, values.reshape(6))


REGRESSORS: list[tuple[Any, tuple[int, ...]]] = [
    (lambda: nn.Linear(5, 6), ()),
    (lambda: nn.Conv1d(5, 6, 3, padding=1), (7,)),
    (lambda: nn.Conv2d(5, 6, 3, padding=1), (4, 5)),
    (lambda: nn.Conv3d(5, 6, 3, padding=1), (3, 4, 5)),
    (lambda: nn.Conv2d(5, 6, 1), (7,)),
    (lambda: nn.Conv2d(5, 6, 1), ()),
    (lambda: nn.Sequential(nn.Conv2d(5, 6, 1), nn.BatchNorm2d(6)), (3, 4, 5)),
]


@pytest.mark.parametrize(("made", "spatial"), REGRESSORS)
def test_a_regressor_of_ones_own_gets_the_feature_that_it_takes(made: Any, spatial: tuple[int, ...]) -> None:
    module = vidfast.VIDLoss(5, 8, 6)
    module.regressor = made()
    s, t = torch.randn(2, 5, *spatial), torch.randn(2, 6, *spatial)
    first = next(module.regressor.modules())
    takes = nn.Conv2d in (type(first), *(type(part) for part in first.children()))
    fed = s.flatten(2).unsqueeze(-1) if takes and len(spatial) != 2 and spatial else s
    fed = s[:, :, None, None] if takes and not spatial else fed
    mean = module.regressor(fed).reshape(t.shape)
    torch.testing.assert_close(module(s, t), vidfast.gaussian_nll(mean, t, module.log_scale))


def test_meta_features_are_a_clear_error() -> None:
    module = vidfast.VIDLoss(5, 8, 6, device="meta")
    with pytest.raises(ValueError, match="must hold values"):
        module(torch.randn(2, 5, 3, device="meta"), torch.randn(2, 6, 3, device="meta"))


def test_a_first_parameter_of_integers_is_no_weight() -> None:
    module = vidfast.VIDLoss(5, 8, 6)
    module.regressor.register_parameter(
        "codes", nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    )
    module.regressor._parameters = {"codes": module.regressor._parameters["codes"]}
    loss = module(torch.randn(2, 5, 3, 3, dtype=torch.float64), torch.randn(2, 6, 3, 3))
    assert loss.dtype is torch.float32
