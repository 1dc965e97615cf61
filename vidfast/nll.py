"""The Gaussian negative log-likelihood with one learned variance per channel: function and module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor, nn

from vidfast import autograd, backends, dispatch, ops, reference
from vidfast.arguments import (
    BackendName,
    Reduction,
    Strategy,
    as_weight,
    check_channel_dim,
    check_initial_variance,
    check_options,
    check_size,
    check_tensors,
    inverse_softplus,
    number_of,
)
from vidfast.backends.plain import reference_nll
from vidfast.recall import KERNELS, OPERATOR, settled


def gaussian_nll(
    mean: Tensor,
    target: Tensor,
    alpha: Tensor,
    *,
    channel_dim: SupportsIndex = 1,
    eps: float = 1e-5,
    reduction: Reduction = "mean",
    full: bool = False,
    weight: float | Tensor = 1.0,
    inplace: bool = False,
    strategy: Strategy = "auto",
    backend: BackendName = "auto",
    mask: Tensor | None = None,
) -> Tensor:
    """-log q(t|s) of equation 5 (Ahn et al., CVPR 2019), fused: `sum log sigma_c + (t - mean)^2 / (2 sigma_c^2)`.

    sigma_c^2 = softplus(alpha_c) + eps is one variance for each channel. The loss may be negative. Where there is
    nothing to score (no element), "sum" is 0, "mean" is NaN (0 with a mask) and every gradient is 0, as in torch's own
    losses.

    Args:
        mean: mu(s), any shape with the C channels in `channel_dim`; fp16, bf16, fp32 or fp64.
        target: t, the teacher's activation: mean's shape and device, any of these dtypes. One that was made under
            torch.inference_mode is copied where it has to be kept for backward (two_pass).
        alpha: (C,), any of these dtypes; read in fp64. (1, C, 1, 1) is taken too. One variance for all channels is
            `alpha.expand(C)`, one for each group of n is `alpha.repeat_interleave(n)`.
        channel_dim: Which dimension of mean and target is the channels.
        eps: The smallest variance.
        reduction: "mean" over all elements, "sum", "batchmean" (the sum over dimension 0's size: equation 5
            averaged over the batch), or "none" (per element, by the reference).
        full: Adds the constant 1/2 log(2 pi) per element.
        weight: A factor of the loss. It belongs in here rather than outside: `backward()` then arrives with
            a gradient of 1, for which the one-pass strategy has nothing left to do. Compiled, its first change
            makes a second graph, and no later one does. A number, or a tensor of one element on mean's device, which
            is read there and not waited for: 1 over a number of tokens that was summed over all processes, say.
        inplace: d/d mean is written over `mean` where the strategy is one_pass and mean requires grad, else
            it is ignored. Code that reads mean *after* this call reads a gradient, and autograd cannot know: use it
            only on an activation that nothing else reads, such as the output of your own last convolution. A
            producer that saved its output for backward (ReLU, sigmoid, softmax) raises there.
        strategy: "one_pass" computes d/d mean together with the loss; "two_pass" in backward, and supports
            gradients of target and second derivatives; "auto" is one_pass, but two_pass for fp16 (whose loss
            scaler's factor must come before rounding) and where target requires grad.
        backend: "auto", "reference" (plain PyTorch), or a back end by name; see :func:`vidfast.info`.
        mask: A weight w_p of 0 or more for each position (a pixel, a token, a sample), the same for all channels: bool,
            integers as tokenizers give them, or any floating dtype, without gradient. Its shape is mean's without the
            channels, or mean's with 1 in their place, where any other size may be 1 too, or (B,), a weight a sample.
            "sum" is then sum_p w_p sum_c nll, "mean" that over C sum_p w_p, "batchmean" over B, "none" w_p nll. Where
            w_p is 0, mean and target are not used, NaN or not, and their gradients are 0. Where nothing is selected
            the loss is 0, and so is every gradient. A negative weight is an error on the CPU and not looked for on a
            GPU.

    Returns:
        A scalar, fp64 if mean or target is, else fp32; mean's shape for reduction="none".

    Raises:
        TypeError, ValueError: An argument is not as above; the text says what was wanted and what came.
        RuntimeError: The back end asked for cannot run, or `inplace` would destroy what other code still uses.
    """
    options = (channel_dim, eps, reduction, full, inplace, strategy, backend)
    alpha, found = settled(mean, target, alpha, options, weight, dispatch.choose_way, mask)
    if found.way == KERNELS:
        return autograd.run_strategy(mean, target, alpha, found)
    if found.way == OPERATOR:
        return ops.call_operator(mean, target, alpha, found.call, found.weights)
    return reference_nll(mean, target, alpha, found.call, found.weights)


def log_likelihood_map(
    mean: Tensor, target: Tensor, alpha: Tensor, *, channel_dim: SupportsIndex = 1, eps: float = 1e-5
) -> Tensor:
    """log q(t_hw|s) = sum_c log q(t_chw|s), with its -1/2 log(2 pi): the heat maps of figure 2 (Ahn et al.).

    Args:
        mean: (B, C, H, W), or any shape with C channels in `channel_dim`.
        target: mean's shape and device.
        alpha: (C,), as in :func:`gaussian_nll`.
        channel_dim: Which dimension is the channels.
        eps: The smallest variance.

    Returns:
        mean's shape without the channel dimension, in nats; fp64 if mean or target is, else fp32.

    Raises:
        TypeError, ValueError: As :func:`gaussian_nll`.
    """
    channel, alpha = check_tensors(mean, target, alpha, channel_dim)
    eps, _ = check_options(eps)
    return reference.log_likelihood_map(mean, target, alpha, channel_dim=channel, eps=eps)


def adopt_variances(
    state_dict: dict[str, Any], prefix: str, name: str, others: Sequence[str], own: Tensor
) -> None:
    """Makes the variances of another repository's checkpoint fit: of another name, or stored as (1, C, 1, 1).

    Args:
        state_dict: Of the checkpoint; changed.
        prefix: Of the module in it.
        name: What the parameter is called here.
        others: What it is called elsewhere.
        own: The parameter, (C,).
    """
    key = prefix + name
    for other in others:
        if key not in state_dict and prefix + other in state_dict:
            state_dict[key] = state_dict.pop(prefix + other)
    saved = state_dict.get(key)
    if isinstance(saved, Tensor) and saved.shape != own.shape and saved.numel() == own.numel():
        state_dict[key] = saved.reshape(own.shape)


class Weighted(nn.Module):
    """A loss whose factor is checked when it is set."""

    _weight: float | Tensor

    @property
    def weight(self) -> float | Tensor:
        """A factor of the loss, to be set at any time: a number, or a tensor of one element on the activations' device.

        Compiled, a number's first change makes a second graph. A tensor stays where it is: it is no buffer, which
        `.to()` would move and `state_dict()` hold.
        """
        return self._weight

    @weight.setter
    def weight(self, value: float | Tensor) -> None:
        self._weight = as_weight(value)


class GaussianNLL(Weighted):
    """:func:`gaussian_nll` that owns its `alpha`: -log q(t|s) with a learned variance for each channel.

    The other arguments are those of :func:`gaussian_nll`. Give `alpha` to the optimizer, without weight decay.

    Args:
        num_channels: C, the target's channels.
        init_var: softplus(alpha) + eps at the start, for every channel.
        device: Where `alpha` is made; None: torch's default.
        dtype: Of `alpha`; None: torch's default.

    Raises:
        TypeError: A number or flag is something else.
        ValueError: num_channels < 1, init_var <= eps, or an unknown name.
    """

    alpha: nn.Parameter

    def __init__(
        self,
        num_channels: SupportsIndex,
        *,
        channel_dim: SupportsIndex = 1,
        init_var: float = 5.0,
        eps: float = 1e-5,
        reduction: Reduction = "mean",
        full: bool = False,
        weight: float | Tensor = 1.0,
        inplace: bool = False,
        strategy: Strategy = "auto",
        backend: BackendName = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_channels = check_size("num_channels", num_channels)
        self.eps, _ = check_options(eps, reduction, number_of(weight), strategy, full, inplace)
        self._weight = as_weight(weight)
        self.channel_dim = check_channel_dim(channel_dim)
        backends.check_name(backend)
        self.init_var = check_initial_variance("init_var", init_var, self.eps)
        self.reduction: Reduction = reduction
        self.full = full
        self.inplace = inplace
        self.strategy: Strategy = strategy
        self.backend: BackendName = backend
        self.alpha = nn.Parameter(torch.empty(self.num_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets every variance to `init_var`."""
        with torch.no_grad():
            self.alpha.fill_(inverse_softplus(self.init_var - self.eps))

    @property
    def variance(self) -> Tensor:
        """(C,) softplus(alpha) + eps, in alpha's dtype; differentiable."""
        return reference.variance(self.alpha, self.eps)

    if TYPE_CHECKING:  # nn.Module's own is Any

        def __call__(self, mean: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
            """The loss; see `forward`."""
            ...

    def forward(self, mean: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss; see :func:`gaussian_nll`, `mask` among it."""
        return gaussian_nll(
            mean,
            target,
            self.alpha,
            channel_dim=self.channel_dim,
            eps=self.eps,
            reduction=self.reduction,
            full=self.full,
            weight=self.weight,
            inplace=self.inplace,
            strategy=self.strategy,
            backend=self.backend,
            mask=mask,
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        adopt_variances(state_dict, prefix, "alpha", ("log_scale", "soft_plus_param"), self.alpha)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """What `repr` shows in brackets."""
        return (
            f"{self.num_channels}, channel_dim={self.channel_dim}, init_var={self.init_var}, eps={self.eps}, "
            f"reduction={self.reduction!r}, full={self.full}, weight={self.weight}, inplace={self.inplace}, "
            f"strategy={self.strategy!r}, backend={self.backend!r}"
        )
