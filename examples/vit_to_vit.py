"""A vision transformer learns from a larger one with other patches: VID on blocks, VID-LP and KD on the logits.

    python examples/vit_to_vit.py                                # a minute on a laptop's CPU
    python examples/vit_to_vit.py --steps 2 --teacher-steps 2    # to see that it runs

The teacher cuts an image into 3 x 3 patches, the student into 2 x 2, with a class token before them. So no token of the
one has a counterpart in the other, and `tokens="grid"` makes maps of the patches, which have: the larger map is
average-pooled to the smaller one's size. Where timm's networks have their channels need not be said.

The teacher learns from scikit-learn's 1047 digits and their labels, a student alone from five digits of each class.
With the teacher it also learns from all others, which need no labels. Nothing is downloaded.

Needs `pip install 'vidfast[train]' timm`.
"""

from __future__ import annotations

import argparse

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

from vidfast.distill import KD, VID, VIDLP, Distiller
from vidfast.distill.data import LabelledImages, load, samples_per_class

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DIGITS = load("digits")  # 8 x 8 pixels, grey
SIZE, BATCH_SIZE = 12, 64


def make_vit(patch_size: int, embed_dim: int, depth: int) -> nn.Module:
    """timm's ViT, small and with random weights; your own is `timm.create_model(name, pretrained=True)`."""
    sizes = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": 4}
    name = "vit_tiny_patch16_224"
    return timm.create_model(name, pretrained=False, img_size=SIZE, in_chans=1, num_classes=10, **sizes).to(
        DEVICE
    )


def prepare(images: Tensor) -> Tensor:
    """Digits (B, 1, 8, 8) in the networks' size."""
    return F.interpolate(images, size=(SIZE, SIZE), mode="bilinear").to(DEVICE)


def train(title: str, distiller: Distiller, images: LabelledImages, steps: int) -> None:
    """Trains the distiller's student, and prints its test accuracy and the terms of the last step's loss.

    Args:
        title: What is printed before the numbers.
        distiller: The student with its terms; without terms it learns from the labels alone.
        images: What it learns from, with labels.
        steps: The number of batches.
    """
    # Not student.parameters(): the terms' regressors and variances are trained too.
    optimizer = torch.optim.AdamW(distiller.parameter_groups(lr=1e-3, weight_decay=0.05))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    sampler = RandomSampler(images, replacement=True, num_samples=BATCH_SIZE * steps)
    distiller.train()
    for inputs, labels in tqdm(DataLoader(images, BATCH_SIZE, sampler=sampler), title, leave=False):
        losses = distiller(prepare(inputs), labels.to(DEVICE))
        optimizer.zero_grad()
        losses.loss.backward()
        optimizer.step()
        schedule.step()
    terms = ", ".join(f"{name} {value:.3f}" for name, value in losses.terms.items())
    print(f"{title}: test accuracy {accuracy(distiller.student):.1f} %, last losses: {terms}")


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    """The percentage of test images that the network classifies rightly."""
    network.eval()
    found = network(prepare(DIGITS.test.inputs(range(len(DIGITS.test))))).argmax(1)
    return 100 * found.eq(DIGITS.test.labels.to(DEVICE)).float().mean().item()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Distillation from one ViT to another")
    parser.add_argument(
        "--steps", type=int, default=300, help="batches of each student (default: %(default)s)"
    )
    parser.add_argument(
        "--teacher-steps", type=int, default=500, help="of the teacher (default: %(default)s)"
    )
    options = parser.parse_args()

    torch.manual_seed(0)
    teacher = make_vit(patch_size=4, embed_dim=64, depth=3)
    train("teacher", Distiller(teacher), DIGITS.train, options.teacher_steps)

    few = samples_per_class(DIGITS.train, 5, seed=0)
    train("student alone", Distiller(make_vit(patch_size=6, embed_dim=32, depth=2)), few, options.steps)

    # -100 is the label that cross_entropy ignores: these images are for the terms alone.
    count = len(DIGITS.train)
    unlabelled = DIGITS.train.subset(torch.arange(count), labels=torch.full((count,), -100))
    terms = [
        # In a training as short as this one, a simple regressor and a small first variance help.
        VID(
            {"blocks.0": "blocks.0", "blocks.1": "blocks.2"}, tokens="grid", regressor="linear", init_var=1.0
        ),
        VIDLP(
            "head.input", init_var=1.0
        ),  # what the classifier is called with: the student's pooled features
        KD(),
    ]
    student = make_vit(patch_size=6, embed_dim=32, depth=2)
    # The example's feature shapes tell how large the regressors must be.
    distiller = Distiller(student, teacher, terms, example=prepare(DIGITS.train.example()))
    train("student with VID, VID-LP and KD", distiller, few.joined(unlabelled), options.steps)


if __name__ == "__main__":
    main()
