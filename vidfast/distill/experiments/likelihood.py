"""log q(t|s) over a part of a data set, by position: what figure 2 of the VID paper (Ahn et al., CVPR 2019) shows.

    log q(t_hw|s) = sum_c log q(t_chw|s),   in nats, with the Gaussian's -1/2 log(2 pi)

Its mean is the part of the lower bound of equation 3, I(t; s) >= H(t) + E[log q(t|s)], that depends on the
student: for one teacher's layer the difference between two students is the difference between their bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vidfast.nll import GaussianNLL, log_likelihood_map

from ..data.base import LabelledImages, Normalisation
from ..distiller import Distiller
from ..methods.base import Activations, Batch
from ..methods.vid import VID
from ..modes import eval_mode
from ..taps import Taps

# For every pair of layers: log q(t_hw|s), (B, H, W), and the teacher's activation t, (B, C, H, W).
Maps = Callable[[Tensor], list[tuple[Tensor, Tensor]]]

# Of white strokes on black: a position whose pixels are on average this bright, or this dark.
FOREGROUND, BACKGROUND = 0.5, 0.1


@dataclass(frozen=True)
class Reading:
    """log q of one pair of layers over a set of images, in nats per position unless said otherwise.

    channels, height, width: the teacher's layer. nats: the mean over images and positions. background,
    foreground: the means over dark and over bright positions, None where brightness says nothing.
    magnitude: the mean over images of the correlation, within an image, of log q with mean_c |t_chw|.
    maps, magnitudes: log q and mean_c |t_chw| of the images shown, (n, H, W) fp32.
    """

    pair: str
    channels: int
    height: int
    width: int
    nats: float
    background: float | None
    foreground: float | None
    magnitude: float
    maps: Tensor
    magnitudes: Tensor

    @property
    def positions(self) -> int:
        return self.height * self.width

    @property
    def per_element(self) -> float:
        """The mean over channels too."""
        return self.nats / self.channels

    def as_state(self) -> dict[str, Any]:
        return asdict(self)


class VIDMaps:
    """log q(t_hw|s) as a Distiller's VID term has it now, with the networks in eval mode and without gradients."""

    def __init__(self, distiller: Distiller, vid: VID) -> None:
        assert distiller.teacher is not None
        self.distiller, self.vid, self.network = distiller, vid, distiller.teacher
        self._student = Taps(distiller.student, vid.student_layers, role="student")
        self._teacher = Taps(distiller.teacher, vid.teacher_layers, role="teacher")

    def __call__(self, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
        device = next(self.distiller.parameters()).device
        inputs = inputs.to(device)
        with eval_mode(self.distiller), eval_mode(self.network), torch.no_grad():
            with self._student.recording() as of_student:
                logits = self.distiller.pick_logits(self.distiller.student(inputs))
                student = Activations(of_student(), logits)
            with self._teacher.recording() as of_teacher:
                logits = self.distiller.pick_teacher_logits(self.network(inputs))
                teacher = Activations(of_teacher(), logits)
            batch = Batch(inputs, None, student, teacher)
            found = []
            for index in range(len(self.vid.pairs)):
                s, t = self.vid.features(batch, index)
                nll = self.vid.likelihoods[index]
                assert isinstance(nll, GaussianNLL)
                mean = self.vid.predict(index, s, t)
                found.append((log_likelihood_map(mean, t, nll.alpha, eps=nll.eps), t))
            return found

    def remove(self) -> None:
        """Take what hooks there are off both networks."""
        self._student.remove()
        self._teacher.remove()


class MarginalMaps:
    """log q(t_hw) of a Gaussian that knows no student: each channel's mean and variance over some images.

    What is above it is what the student says about the teacher; a student that scores below it says nothing
    that q has learned to use. `floor` is the least variance.
    """

    def __init__(
        self, maps: Maps, images: LabelledImages, *, floor: float = 1e-5, batch_size: int = 250
    ) -> None:
        self.maps = maps
        sums: list[Tensor] = []
        counts: list[int] = []
        for indices in _pieces(len(images), batch_size):
            for i, (_, t) in enumerate(maps(images.inputs(indices))):
                wide = t.double()
                moments = torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))]).cpu()
                if i == len(sums):
                    sums.append(torch.zeros_like(moments))
                    counts.append(0)
                sums[i] += moments
                counts[i] += t.numel() // t.shape[1]
        self.means = [total[0] / count for total, count in zip(sums, counts, strict=True)]
        variances = [
            (total[1] / count - mean.square()).clamp(min=2 * floor)
            for total, count, mean in zip(sums, counts, self.means, strict=True)
        ]
        # softplus's inverse, in the form that does not overflow.
        self.alphas = [(v - floor) + torch.log(-torch.expm1(-(v - floor))) for v in variances]
        self.floor = floor

    def __call__(self, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
        found = []
        for (_, t), mean, alpha in zip(self.maps(inputs), self.means, self.alphas, strict=True):
            everywhere = mean.to(t)[:, None, None].expand_as(t)
            found.append((log_likelihood_map(everywhere, t, alpha.to(t.device), eps=self.floor), t))
        return found


def read(
    maps: Maps,
    pairs: Sequence[str],
    images: LabelledImages,
    shown: Sequence[int],
    *,
    bright: Normalisation | None = None,
    batch_size: int = 250,
) -> list[Reading]:
    """A reading for each pair of layers over all the images.

    pairs: their names. shown: the images whose maps are kept. bright: gives the pixels of inputs whose
    brightness tells foreground from background; None where it does not.
    """
    tallies = [_Tally() for _ in pairs]
    for indices in _pieces(len(images), batch_size):
        inputs = images.inputs(indices)
        brightness = None if bright is None else bright.pixels(inputs).mean(1)
        for tally, (log_q, t) in zip(tallies, maps(inputs), strict=True):
            tally.add(log_q, t, brightness)
    examples = maps(images.inputs(list(shown)))
    return [
        tally.reading(pair, log_q, t)
        for pair, tally, (log_q, t) in zip(pairs, tallies, examples, strict=True)
    ]


class _Tally:
    """Sums over images and positions, in fp64."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)  # all positions, dark ones, bright ones
        self.counts = torch.zeros(3, dtype=torch.float64)
        self.correlations: list[Tensor] = []

    def add(self, log_q: Tensor, t: Tensor, brightness: Tensor | None) -> None:
        values = log_q.double().cpu()
        parts = [torch.ones_like(values, dtype=torch.bool)]
        if brightness is not None:
            height, width = values.shape[1:]
            pooled = F.adaptive_avg_pool2d(brightness[:, None], (height, width))[:, 0].cpu()
            parts += [pooled <= BACKGROUND, pooled >= FOREGROUND]
        for i, part in enumerate(parts):
            self.sums[i] += values[part].sum()
            self.counts[i] += part.sum()
        self.correlations.append(correlation(values, magnitude(t).double().cpu()))

    def reading(self, pair: str, log_q: Tensor, t: Tensor) -> Reading:
        everywhere, dark, bright = (
            None if not count else float(total / count)
            for total, count in zip(self.sums, self.counts, strict=True)
        )
        assert everywhere is not None
        correlations = torch.cat(self.correlations)
        return Reading(
            pair=pair,
            channels=t.shape[1],
            height=t.shape[2],
            width=t.shape[3],
            nats=everywhere,
            background=dark,
            foreground=bright,
            magnitude=float(correlations[correlations.isfinite()].mean()),
            maps=log_q.float().cpu().contiguous(),
            magnitudes=magnitude(t).float().cpu().contiguous(),
        )


def magnitude(t: Tensor) -> Tensor:
    """mean_c |t_chw|, (B, H, W), of an activation (B, C, H, W)."""
    return t.abs().mean(1)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation over the positions of each image, (B,), of maps (B, H, W); nan where one is flat."""
    a, b = a.flatten(1), b.flatten(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()


def _pieces(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
