"""VID with other distributions q(t|s), which its paper names and leaves aside (Ahn et al., CVPR 2019, sec. 2.1).

    HeteroscedasticVID   Gaussian, whose variance too is predicted from the student
    StudentTVID          Student's t: heavy tails
    MixtureVID           a mixture of K Gaussians (Bishop's mixture density network)

The first is computed by `vidfast.heteroscedastic_nll`'s kernel. The others are plain PyTorch, computed in fp32 (fp64
for fp64 features): expect several times VID's memory and time. All leave out the constant 1/2 log(2 pi) per element,
as VID does, and in the limit named at each class their value is VID's.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from vidfast import reference
from vidfast.arguments import BackendName, ScalarReduction, inverse_softplus
from vidfast.backends import check_name
from vidfast.heteroscedastic.call import heteroscedastic_nll
from vidfast.layers import last_layer

from ..layouts import ChannelDim
from ..regressors import Regressor
from ..tokens import Tokens
from ..weighting import Factor, selected
from .base import METHODS
from .pairs import Pairs, wide
from .variational import VariationalPairs


def _along(x: Tensor, channel_dim: int, dims: int) -> Tensor:
    """x of shape (..., C) broadcast over features of `dims` dimensions with C in `channel_dim`."""
    return x if channel_dim == -1 else x.reshape(*x.shape, *[1] * (dims - 2))


class ChannelScale(nn.Module):
    """softplus(alpha) + eps for each channel, which starts at `start`; alpha (C,) or (K, C), fp32."""

    def __init__(self, shape: tuple[int, ...], start: float, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.alpha = nn.Parameter(torch.full(shape, inverse_softplus(start - eps), dtype=torch.float32))

    def variance(self, like: Tensor) -> Tensor:
        """alpha's shape, in the dtype of `like`."""
        return reference.variance(self.alpha, self.eps, like.dtype)


@METHODS.register("vid_heteroscedastic")
class HeteroscedasticVID(VariationalPairs):
    """VID whose variance depends on the student at every position.

        -log q(t|s) = sum_chw log sigma_chw(s) + (t_chw - mu_chw(s))^2 / (2 sigma_chw(s)^2),
        sigma_chw(s)^2 = softplus(alpha_c + a_chw(s)) + eps

    mu and a are two heads, the two halves of the output of one regressor of 2 C channels; hidden widths given
    as multiples of the output's double with it. The head a starts at exactly 0 (its weights are zeroed where
    the regressor ends in a convolution or linear layer), so training starts as VID's does, and a head that
    stays constant is VID. alpha_c as the head's bias is ours, so that `init_var` means what it means for VID.

    The paper: "it gave unstable training with ignorable improvements". Use it to see for yourself, with a small
    learning rate or clipped gradients and a larger `eps`: the gradient of mu grows like 1 / sigma^2.

    The options are VID's.
    """

    default_name: ClassVar[str] = "vid_heteroscedastic"
    takes_mask: ClassVar[bool] = True
    outputs = 2

    def __init__(
        self,
        pairs: Pairs,
        *,
        regressor: str | Regressor = "conv3",
        init_var: float = 5.0,
        eps: float = 1e-5,
        reduction: ScalarReduction = "mean",
        channel_dim: ChannelDim = None,
        tokens: Tokens = None,
        alpha_lr: float = 1.0,
        backend: BackendName = "auto",
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            pairs,
            regressor=regressor,
            init_var=init_var,
            eps=eps,
            reduction=reduction,
            channel_dim=channel_dim,
            tokens=tokens,
            alpha_lr=alpha_lr,
            weight=weight,
            name=name,
        )
        check_name(backend)
        self.backend = backend

    def make_likelihood(self, channels: int, channel_dim: int = 1) -> ChannelScale:
        return ChannelScale((channels,), self.init_var, self.eps)

    def prepare_regressor(self, regressor: nn.Module, channels: int) -> None:
        last = last_layer(regressor)
        with torch.no_grad():
            if isinstance(last, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                last.weight[channels:] = 0
            elif isinstance(last, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
                last.weight[:, channels:] = 0
            else:
                return
            if last.bias is not None:
                last.bias[channels:] = 0

    def pair_loss(
        self, index: int, student: Tensor, teacher: Tensor, factor: Factor, mask: Tensor | None = None
    ) -> Tensor:
        scale = self.likelihoods[index]
        assert isinstance(scale, ChannelScale)
        dim = self.dim(index)
        student, teacher = selected(student, teacher, mask, dim)
        mean, head = self.predict(index, student, teacher).chunk(2, dim)
        return heteroscedastic_nll(
            mean,
            teacher,
            _along(scale.alpha, dim, mean.dim()) + head,
            eps=scale.eps,
            channel_dim=dim,
            reduction=self.reduction,
            weight=factor.to(teacher.device) if isinstance(factor, Tensor) else factor,
            mask=mask,
            backend=self.backend,
        )


def _gamma_ratio(half: Tensor) -> Tensor:
    """1/2 log x - log(Gamma(x + 1/2) / Gamma(x)) for x > 0, which goes to 0 like 1 / (8 x).

    The difference of lgammas cancels for large x, so the asymptotic series takes over where its error is below
    fp64's: the first term left out is 17 / (14336 x^7).
    """
    small, large = half.clamp(max=100.0), half.clamp(min=100.0)
    exact = 0.5 * small.log() - torch.lgamma(small + 0.5) + torch.lgamma(small)
    inverse = 1 / large
    series = inverse / 8 - inverse.pow(3) / 192 + inverse.pow(5) / 640
    return torch.where(half < 100.0, exact, series)


class StudentTScale(ChannelScale):
    """Scale and degrees of freedom of Student's t for each channel; beta is None where nu is fixed."""

    def __init__(self, channels: int, init_var: float, eps: float, nu: float, learn_nu: bool) -> None:
        # A t variable of scale tau has the variance tau^2 nu / (nu - 2).
        start = init_var * (1 - 2 / nu)
        if start <= eps:
            raise ValueError(
                f"wanted init_var * (1 - 2 / nu), the squared scale at the start, above eps={eps}, got {start}"
            )
        super().__init__((channels,), start, eps)
        self.start_nu = nu
        self.start_ratio = float(_gamma_ratio(torch.tensor(nu / 2, dtype=torch.float64)))
        self.beta: nn.Parameter | None = None
        if learn_nu:
            self.beta = nn.Parameter(
                torch.full((channels,), inverse_softplus(nu - 2 - eps), dtype=torch.float32)
            )

    def nu(self) -> tuple[Tensor | float, Tensor | float]:
        """nu, above 2, and its normalising constant: (C,) each, or numbers where nu is fixed."""
        if self.beta is None:
            return self.start_nu, self.start_ratio
        # fp64, wherever the device has it, for the lgammas
        dtype = torch.float32 if self.beta.device.type == "mps" else torch.float64
        nu = 2 + reference.variance(self.beta, self.eps, dtype)
        return nu, _gamma_ratio(nu / 2)


@METHODS.register("vid_student_t")
class StudentTVID(VariationalPairs):
    """VID with Student's t distribution of location mu(s) and a scale for each channel: outliers count less.

        -log q(t|s) = sum_chw log tau_c + (nu + 1)/2 log(1 + (t_chw - mu_chw(s))^2 / (nu tau_c^2))
                      + 1/2 log(nu / 2) - log( Gamma((nu + 1)/2) / Gamma(nu / 2) ),
        tau_c^2 = softplus(alpha_c) + eps

    nu: the degrees of freedom, above 2 so that the variance tau^2 nu / (nu - 2) is finite. nu -> infinity is
        VID. The default, 5, is ours.
    learn_nu: learn it, one for each channel, as 2 + softplus(beta_c) + eps; beta is grouped with alpha.
    init_var: the variance, not tau^2, at the start. eps: the floor of tau^2.

    The other options are VID's; `backend` does not apply.
    """

    default_name: ClassVar[str] = "vid_student_t"
    takes_mask: ClassVar[bool] = True

    def __init__(
        self,
        pairs: Pairs,
        *,
        nu: float = 5.0,
        learn_nu: bool = False,
        regressor: str | Regressor = "conv3",
        init_var: float = 5.0,
        eps: float = 1e-5,
        reduction: ScalarReduction = "mean",
        channel_dim: ChannelDim = None,
        tokens: Tokens = None,
        alpha_lr: float = 1.0,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            pairs,
            regressor=regressor,
            init_var=init_var,
            eps=eps,
            reduction=reduction,
            channel_dim=channel_dim,
            tokens=tokens,
            alpha_lr=alpha_lr,
            weight=weight,
            name=name,
        )
        if not 2 + eps < nu < math.inf:
            raise ValueError(f"wanted finite degrees of freedom nu above 2 + eps, got nu={nu}, eps={eps}")
        self.nu, self.learn_nu = float(nu), bool(learn_nu)
        self.make_likelihood(1)  # says now what would be wrong when it is built

    def make_likelihood(self, channels: int, channel_dim: int = 1) -> StudentTScale:
        return StudentTScale(channels, self.init_var, self.eps, self.nu, self.learn_nu)

    def pair_loss(
        self, index: int, student: Tensor, teacher: Tensor, factor: Factor, mask: Tensor | None = None
    ) -> Tensor:
        scale = self.likelihoods[index]
        assert isinstance(scale, StudentTScale)
        student, teacher = selected(student, teacher, mask, self.dim(index))
        mean = wide(self.predict(index, student, teacher))
        residual = wide(teacher) - mean
        nu, ratio = scale.nu()
        squared = scale.variance(residual)
        half, nu_squared, constant = (
            _along(x.to(residual.dtype), self.dim(index), mean.dim()) if isinstance(x, Tensor) else x
            for x in ((nu + 1) / 2, nu * squared, 0.5 * squared.log() + ratio)
        )
        return self.reduce(constant + half * torch.log1p(residual.square() / nu_squared), factor, mask)

    def variances(self) -> dict[str, Tensor]:
        """The learned variance tau^2 nu / (nu - 2) per channel, (C,), by "student layer -> teacher layer"."""
        scales = [scale for scale in self.likelihoods if isinstance(scale, StudentTScale)]
        return {
            name: (scale.variance(scale.alpha) / (1 - 2 / scale.nu()[0])).to(scale.alpha.dtype).detach()
            for name, scale in zip(self.pair_names(), scales, strict=True)
        }

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nu={self.nu:g}{' at the start' if self.learn_nu else ''}"


class MixtureScale(ChannelScale):
    """Variances (K, C) and mixture weights (K, C), the softmax over K of logits that start equal."""

    def __init__(self, components: int, channels: int, init_var: float, eps: float) -> None:
        super().__init__((components, channels), init_var, eps)
        self.logits = nn.Parameter(torch.zeros(components, channels))


@METHODS.register("vid_mixture")
class MixtureVID(VariationalPairs):
    """VID with a mixture of K Gaussians for every activation (Bishop 1994): several values may be plausible.

        -log q(t|s) = - sum_chw log sum_k pi_kc exp( -log sigma_kc - (t_chw - mu_kchw(s))^2 / (2 sigma_kc^2) ),
        sigma_kc^2 = softplus(alpha_kc) + eps,    pi_c = softmax(logits_c)

    components: K, 3 by default (ours). The regressor gives all K means, K C channels; hidden widths given as
        multiples of the output's grow with it. Component k is channels k C to (k + 1) C. K = 1 is VID.
    init_var: of every component. The components differ at the start by the regressor's random weights alone.

    Weights and variances are learned per channel and do not depend on the student; that is ours, and nearest
    to VID. The other options are VID's; `backend` does not apply.
    """

    default_name: ClassVar[str] = "vid_mixture"
    takes_mask: ClassVar[bool] = True

    def __init__(
        self,
        pairs: Pairs,
        *,
        components: int = 3,
        regressor: str | Regressor = "conv3",
        init_var: float = 5.0,
        eps: float = 1e-5,
        reduction: ScalarReduction = "mean",
        channel_dim: ChannelDim = None,
        tokens: Tokens = None,
        alpha_lr: float = 1.0,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            pairs,
            regressor=regressor,
            init_var=init_var,
            eps=eps,
            reduction=reduction,
            channel_dim=channel_dim,
            tokens=tokens,
            alpha_lr=alpha_lr,
            weight=weight,
            name=name,
        )
        if isinstance(components, bool) or not isinstance(components, int) or components < 1:
            raise ValueError(f"wanted an int of 1 or more as components, got {components!r}")
        self.outputs = components

    def make_likelihood(self, channels: int, channel_dim: int = 1) -> MixtureScale:
        return MixtureScale(self.outputs, channels, self.init_var, self.eps)

    def pair_loss(
        self, index: int, student: Tensor, teacher: Tensor, factor: Factor, mask: Tensor | None = None
    ) -> Tensor:
        scale = self.likelihoods[index]
        assert isinstance(scale, MixtureScale)
        components, channels = scale.alpha.shape
        student, teacher = selected(student, teacher, mask, self.dim(index))
        output = wide(self.predict(index, student, teacher))
        across = 1 if self.dim(index) == 1 else output.dim() - 1
        means = output.reshape(*output.shape[:across], components, channels, *output.shape[across + 1 :])
        residual = wide(teacher).unsqueeze(across) - means
        variance = scale.variance(residual)
        constant = torch.log_softmax(scale.logits.to(residual.dtype), 0) - 0.5 * variance.log()
        constant, double_variance = (
            _along(x.to(residual.dtype), self.dim(index), teacher.dim()) for x in (constant, 2 * variance)
        )
        log_density = torch.logsumexp(constant - residual.square() / double_variance, dim=across)
        return self.reduce(-log_density, factor, mask)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, components={self.outputs}"
