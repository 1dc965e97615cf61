"""Infomax: the student's layers keep the information of the input (Ahn et al., CVPR 2019, section 2.2).

VID with t = x, the input itself, in place of a teacher's layer:

    -log q(x|s) = sum_c,h,w  log sigma_c + (x_chw - mu_chw(s))^2 / (2 sigma_c^2) + constant,

summed over the student's layers named; mu is a decoder from the layer to the input's resolution. No teacher is
needed and no labels are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vidfast.arguments import BackendName, ScalarReduction
from vidfast.nll import GaussianNLL

from ..kinds import UNKNOWN
from ..layouts import Side, check_channel_dim, said, side_of
from ..regressors import Regressor, make, resolve, takes_last
from ..tokens import Tokens, resolve_tokens
from ..weighting import Factor, fed, fitted
from .base import METHODS, Batch
from .pairs import place
from .variational import GaussianMethod


def pick_input(inputs: Any, which: int | str | None) -> Tensor:
    """The one tensor of a network's inputs that `which` names: nothing for a tensor or a lone input, an int
    for a tuple, a key for a mapping.

    Raises ValueError where `which` does not fit the inputs, TypeError unless it picks a floating tensor.
    """
    if isinstance(inputs, Mapping):
        known: list[Any] = list(inputs)
    elif isinstance(inputs, (tuple, list)):
        known = list(range(len(inputs)))
    else:
        known = [None]
    if which is None and len(known) == 1:
        which = known[0]
    if which not in known:
        raise ValueError(
            f"wanted which= to pick one of the inputs, {known}, got {which!r}"
            if known != [None]
            else f"wanted no which= for inputs that are one {type(inputs).__name__}, got {which!r}"
        )
    picked = inputs if which is None else inputs[which]
    if not isinstance(picked, Tensor) or not picked.is_floating_point():
        what = picked.dtype if isinstance(picked, Tensor) else type(picked).__name__
        raise TypeError(f"wanted a floating-point Tensor as the input to predict, got {what}")
    return picked


def _shape(x: Tensor) -> tuple[int, ...] | None:
    """The (height, width) of an input that is a batch of images."""
    return tuple(x.shape[2:]) if x.dim() == 4 else None


@METHODS.register("infomax")
class Infomax(GaussianMethod):
    """The sum over layers of the Gaussian negative log-likelihood of the input, through the fused kernel.

    layers: a layer of the student, or several.
    which: for networks of several inputs, the position (tuple) or key (mapping) of the one to predict.
    regressor: a registered name or a function (layer_shape, input_shape) -> nn.Module that reaches the input's
        resolution: "upsampled" (two 1x1 convolutions, then linear interpolation; the default, ours),
        "transposed" for vectors, or a decoder of your own, which will predict more of the input.
    channel_dim, tokens: where the layers' channels are, and what tokens become, as for every `PairedMethod`: a vision
        transformer's tokens are a map with tokens="grid". The regressor gets (B, C, *positions).
    init_var: the variance of every channel at the start, above eps. eps: the variance's floor.
    reduction: "mean" (over all elements), "batchmean" (the paper's) or "sum".
    alpha_lr: alpha's learning rate as a multiple of the others'. alpha takes no weight decay.
    backend: as for `vidfast.gaussian_nll`.

    The input is (B, C, *spatial) and predicted as the network gets it, normalised and augmented.

    Raises ValueError for options out of range or features that cannot reach the input, TypeError for an input
    that is no floating-point tensor.
    """

    default_name: ClassVar[str] = "infomax"
    needs_teacher: ClassVar[bool] = False
    takes_mask: ClassVar[bool] = True

    def __init__(
        self,
        layers: str | Sequence[str],
        *,
        which: int | str | None = None,
        regressor: str | Regressor = "upsampled",
        channel_dim: int | None = None,
        tokens: Tokens = None,
        init_var: float = 5.0,
        eps: float = 1e-5,
        reduction: ScalarReduction = "mean",
        alpha_lr: float = 1.0,
        backend: BackendName = "auto",
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            init_var=init_var,
            eps=eps,
            reduction=reduction,
            alpha_lr=alpha_lr,
            backend=backend,
            weight=weight,
            name=name,
        )
        if isinstance(layers, str):
            layers = (layers,)
        if not isinstance(layers, Sequence) or not all(isinstance(layer, str) for layer in layers):
            raise TypeError(f"wanted names of the student's layers, got {layers!r}")
        if not layers:
            raise ValueError("wanted at least one layer of the student, got none")
        self.student_layers = tuple(layers)
        self.which = which
        self.channel_dim = check_channel_dim(channel_dim)
        self.tokens = resolve_tokens(tokens)
        if isinstance(self.channel_dim, tuple):
            raise ValueError(
                f"wanted channel_dim 1, -1 or None, of the student's layers, got {channel_dim!r}"
            )
        self.regressor = resolve(regressor)
        self._sides: list[Side] = []
        self.regressors = nn.ModuleList()
        self.likelihoods = nn.ModuleList()

    def build(self, batch: Batch) -> None:
        x = pick_input(batch.inputs, self.which)
        if x.dim() < 2:
            raise ValueError(f"wanted an input (batch, channels, ...), got {tuple(x.shape)}")
        assert not isinstance(self.channel_dim, tuple)
        regressors: list[nn.Module] = []
        likelihoods: list[nn.Module] = []
        sides: list[Side] = []
        for layer in self.student_layers:
            student, kind = batch.student.taps[layer], batch.student.kinds.get(layer, UNKNOWN)
            try:
                sides.append(side_of("student", layer, student, kind, self.channel_dim, self.tokens))
                fits = self.tokens is not None or takes_last(self.regressor)
                if student.dim() == 3 and x.dim() == 4 and not fits:
                    raise ValueError(
                        f"wanted a map for an input {tuple(x.shape)}, got tokens {tuple(student.shape)}: give "
                        "tokens='grid', which makes a map of them"
                    )
                student = sides[-1].channels_first(student, _shape(x))
                regressors.append(place(make(self.regressor, student.shape, x.shape), student))
            except ValueError as error:
                raise ValueError(f"student layer {layer!r} -> input: {error}") from None
            likelihoods.append(self.make_likelihood(x.shape[1]).to(student.device))
        self._sides = sides
        self.regressors, self.likelihoods = nn.ModuleList(regressors), nn.ModuleList(likelihoods)

    def forward(self, batch: Batch, factor: Factor) -> Tensor:
        x = pick_input(batch.inputs, self.which).detach()
        losses = []
        layers = zip(self.student_layers, self._sides, self.regressors, self.likelihoods, strict=True)
        for layer, side, regressor, nll in layers:
            mask = batch.mask
            try:
                student = side.channels_first(batch.student.taps[layer], _shape(x))
                if mask is not None:
                    student, mask = fed(student, x, mask), fitted(mask, x)
                losses.append(self.gaussian_nll(regressor, nll, student, x, factor, mask))
            except ValueError as error:
                raise ValueError(f"student layer {layer!r} -> input: {error}") from None
        total: Tensor = sum(losses[1:], losses[0])
        return total

    def variances(self) -> dict[str, Tensor]:
        """The learned variance of each of the input's channels, (C,), by layer."""
        gaussians = [nll for nll in self.likelihoods if isinstance(nll, GaussianNLL)]
        return {
            layer: nll.variance.detach() for layer, nll in zip(self.student_layers, gaussians, strict=True)
        }

    def extra_repr(self) -> str:
        given = said(self.channel_dim, self.tokens)
        return f"{', '.join(self.student_layers)} -> input; {super().extra_repr()}{given}"
