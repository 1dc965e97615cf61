"""Networks as distillation repositories write them: features in tuples, in dicts, and by forward(x, is_feat=True).

    python examples/features_and_tuples.py              # half a minute on a laptop's CPU
    python examples/features_and_tuples.py --steps 2    # to see that it runs

Three small networks, each written in another manner, and each the student of the next one:

    PairNet     its layers return (output, the same before the ReLU)          tap "layer2[0]" or "layer2[1]"
    FeatNet     forward(x, is_feat=True) returns (features, logits)           tap "feat.1" of FeatureNetwork(network)
    DictNet     returns (logits, {"feats": [...]})                            tap "[1][feats][1]", logits="[0]"

The teachers learn from scikit-learn's 1047 digits and their labels, a student alone from five digits of each class.
With its teacher it also learns from all others, which need no labels. Nothing is downloaded.

Needs `pip install 'vidfast[train]'`.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

from vidfast.distill import KD, VID, Distiller, FeatureNetwork
from vidfast.distill.data import LabelledImages, load, samples_per_class

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DIGITS = load("digits")  # 8 x 8 pixels, grey
BATCH_SIZE = 64


class Layer(nn.Module):
    """Convolution, BatchNorm and ReLU; returns what comes out and what went into the ReLU."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        before = self.norm(self.convolution(x))
        return before.relu(), before


class PairNet(nn.Module):
    """Three layers that return pairs; the network itself returns its logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1 = Layer(1, width, stride=1)
        self.layer2 = Layer(width, 2 * width, stride=2)
        self.layer3 = Layer(2 * width, 4 * width, stride=2)
        self.classify = nn.Linear(4 * width, 10)

    def features(self, images: Tensor) -> list[Tensor]:
        x, found = images, []
        for layer in (self.layer1, self.layer2, self.layer3):
            x, _ = layer(x)
            found.append(x)
        return [*found, x.mean((2, 3))]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.features(images)[-1])
        return logits


class FeatNet(PairNet):
    """Returns its features when it is asked to; the last of them, the pooled one, is no layer's output."""

    def forward(self, images: Tensor, is_feat: bool = False) -> Any:
        features = self.features(images)
        logits = self.classify(features[-1])
        return (features, logits) if is_feat else logits


class DictNet(PairNet):
    """Always returns its features, behind the logits."""

    def forward(self, images: Tensor) -> Any:
        features = self.features(images)
        return self.classify(features[-1]), {"feats": features}


# How the logits are found in what a network returns, as Distiller(..., logits=) takes it; None: they are the output.
LOGITS = {PairNet: None, FeatureNetwork: None, DictNet: "[0]"}


def make(kind: type[PairNet], width: int) -> nn.Module:
    """The network, in a FeatureNetwork if its features must be asked for."""
    network = kind(width).to(DEVICE)
    return FeatureNetwork(network, example=DIGITS.train.example().to(DEVICE)) if kind is FeatNet else network


def train(title: str, distiller: Distiller, images: LabelledImages, steps: int) -> None:
    """Trains the distiller's student, and prints its test accuracy and the terms of the last step's loss."""
    # Not student.parameters(): the terms' regressors and variances are trained too.
    optimizer = torch.optim.AdamW(distiller.parameter_groups(lr=1e-2, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    sampler = RandomSampler(images, replacement=True, num_samples=BATCH_SIZE * steps)
    generator = torch.Generator().manual_seed(0)
    distiller.train()
    for inputs, labels in tqdm(DataLoader(images, BATCH_SIZE, sampler=sampler), title, leave=False):
        losses = distiller(DIGITS.augment(inputs, generator).to(DEVICE), labels.to(DEVICE))
        optimizer.zero_grad()
        losses.loss.backward()
        optimizer.step()
        schedule.step()
    terms = ", ".join(f"{name} {value:.3f}" for name, value in losses.terms.items())
    print(f"{title}: test accuracy {accuracy(distiller):.1f} %, last losses: {terms}")


@torch.no_grad()
def accuracy(distiller: Distiller) -> float:
    """The percentage of test images that the student classifies rightly."""
    images = DIGITS.test.inputs(range(len(DIGITS.test))).to(DEVICE)
    logits = distiller.pick_logits(distiller.student.eval()(images))
    return 100 * logits.argmax(1).eq(DIGITS.test.labels.to(DEVICE)).float().mean().item()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Taps on features in tuples, dicts and lists")
    parser.add_argument(
        "--steps", type=int, default=200, help="batches for each network (default: %(default)s)"
    )
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    few, example = samples_per_class(DIGITS.train, 5, seed=0), DIGITS.train.example().to(DEVICE)
    # -100 is the label that cross_entropy ignores: these images are for the terms alone.
    count = len(DIGITS.train)
    unlabelled = DIGITS.train.subset(torch.arange(count), labels=torch.full((count,), -100))
    for student_kind, teacher_kind, pairs in (
        (PairNet, FeatNet, {"layer2[0]": "feat.1", "layer3[1]": "feat.2"}),
        (FeatNet, DictNet, {"feat.1": "[1][feats][1]", "feat.3": "[1][feats][3]"}),
        (DictNet, PairNet, {"[1][feats][1]": "layer2[0]", "[1][feats][2]": "layer3[0]"}),
    ):
        student, alone, teacher = make(student_kind, 8), make(student_kind, 8), make(teacher_kind, 16)
        of_student, of_teacher = LOGITS[type(student)], LOGITS[type(teacher)]
        names = f"{student_kind.__name__} from {teacher_kind.__name__}"
        train(f"{names}, teacher", Distiller(teacher, logits=of_teacher), DIGITS.train, steps)
        train(f"{names}, student alone", Distiller(alone, logits=of_student), few, steps)
        # In a training as short as this one, a simple regressor and a small first variance help.
        terms = [VID(pairs, regressor="linear", init_var=1.0), KD()]
        # A pair, as student and teacher have their logits in different places.
        distiller = Distiller(student, teacher, terms, example=example, logits=(of_student, of_teacher))
        train(f"{names}, student with VID and KD", distiller, few.joined(unlabelled), steps)


if __name__ == "__main__":
    main()
