"""A small segmentation network learns from a larger one: VID on features and KD on pixels, without the borders.

    python examples/segmentation.py                                # a minute on a laptop's CPU
    python examples/segmentation.py --steps 2 --teacher-steps 2    # to see that it runs

The images are four of scikit-learn's digits on a canvas of 32 x 32 pixels. A pixel's label is the digit that it
belongs to, 0 is the background, and 255 the border between the two, which is not asked for: `mask=labels != 255` keeps
it out of the terms, `ignore_index=255` out of the labels' loss. The teacher's images are composed of 1047 digits, a
student's of three of each class. Nothing is downloaded.

Needs `pip install 'vidfast[train]'`.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from vidfast.distill import KD, VID, Distiller
from vidfast.distill.data import LabelledImages, load, samples_per_class

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLASSES, IGNORED, BATCH_SIZE, SIZE = 11, 255, 16, 32
DIGITS = load("digits")


def compose(
    digits: LabelledImages, generator: torch.Generator, count: int = BATCH_SIZE
) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 32, 32), a digit at a random place of each quarter, and the labels of their pixels."""
    images = torch.zeros(count, 1, SIZE, SIZE)
    labels = torch.zeros(count, SIZE, SIZE, dtype=torch.int64)
    chosen = torch.randint(len(digits), (count, 4), generator=generator)
    corners = torch.randint(5, (count, 4, 2), generator=generator)
    for i in range(count):
        pixels = DIGITS.normalisation.pixels(digits.inputs(chosen[i].tolist()))  # (4, 1, 8, 8), 0 to 1
        pixels = F.interpolate(pixels, size=(12, 12), mode="bilinear")[:, 0]
        for quarter in range(4):
            top, left = (16 * torch.tensor([quarter // 2, quarter % 2]) + corners[i, quarter]).tolist()
            where = (i, slice(top, top + 12), slice(left, left + 12))
            images[where[0], 0, where[1], where[2]] = pixels[quarter]
            labels[where][pixels[quarter] > 0.25] = IGNORED
            labels[where][pixels[quarter] > 0.5] = 1 + digits.labels[chosen[i, quarter]]
    return images.to(DEVICE), labels.to(DEVICE)


class Segmenter(nn.Module):
    """Images (B, 1, 32, 32) -> logits (B, 11, 32, 32); "early" gives half of that size, "late" a quarter."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def block(channels: int, outputs: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(channels, outputs, 3, stride, 1, bias=False)
            return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

        self.early = nn.Sequential(*block(1, width, 1), *block(width, width, 2))
        self.late = nn.Sequential(*block(width, 2 * width, 2), *block(2 * width, 2 * width, 1))
        self.together = nn.Sequential(*block(3 * width, 2 * width, 1))
        self.classify = nn.Conv2d(2 * width, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        early = self.early(images)
        late = F.interpolate(self.late(early), scale_factor=2, mode="bilinear")
        logits = self.classify(self.together(torch.cat([early, late], 1)))
        return F.interpolate(logits, scale_factor=2, mode="bilinear")


def train(title: str, distiller: Distiller, digits: LabelledImages, steps: int) -> None:
    """Trains the distiller's student, and prints its test result and the terms of the last step's loss.

    Args:
        title: What is printed before the numbers.
        distiller: The student with its terms; without terms it learns from the labels alone.
        digits: What the images are composed of.
        steps: The number of batches.
    """
    # Not student.parameters(): the terms' regressors and variances are trained too.
    optimizer = torch.optim.AdamW(distiller.parameter_groups(lr=1e-2, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    generator = torch.Generator().manual_seed(0)
    distiller.train()
    for _ in tqdm(range(steps), title, leave=False):
        images, labels = compose(digits, generator)
        # The mask is for the terms, which average it down to their features' sizes; the labels' loss has its own.
        losses = distiller(images, labels, mask=(labels != IGNORED) if distiller.terms else None)
        optimizer.zero_grad()
        losses.loss.backward()
        optimizer.step()
        schedule.step()
    terms = ", ".join(f"{name} {value:.3f}" for name, value in losses.terms.items())
    print(f"{title}: mean IoU {mean_iou(distiller.student):.1f} %, last losses: {terms}")


@torch.no_grad()
def mean_iou(network: nn.Module) -> float:
    """The intersection over union in percent on 100 test images, the mean over classes; borders do not count."""
    network.eval()
    images, labels = compose(DIGITS.test, torch.Generator().manual_seed(1), count=100)
    found, kept = network(images).argmax(1), labels != IGNORED
    pairs = CLASSES * labels[kept] + found[kept]
    confusion = torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES).float()
    shared = confusion.diag()
    return 100 * (shared / (confusion.sum(0) + confusion.sum(1) - shared)).mean().item()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Distillation of a segmentation network")
    parser.add_argument(
        "--steps", type=int, default=300, help="batches of each student (default: %(default)s)"
    )
    parser.add_argument(
        "--teacher-steps", type=int, default=400, help="of the teacher (default: %(default)s)"
    )
    options = parser.parse_args()

    torch.manual_seed(0)
    task_loss = nn.CrossEntropyLoss(ignore_index=IGNORED)
    teacher = Segmenter(width=24).to(DEVICE)
    train("teacher", Distiller(teacher, task_loss=task_loss), DIGITS.train, options.teacher_steps)

    few = samples_per_class(DIGITS.train, 3, seed=0)
    alone = Distiller(Segmenter(width=12).to(DEVICE), task_loss=task_loss)
    train("student alone", alone, few, options.steps)

    terms = [
        # In a training as short as this one, a simple regressor and a small first variance help.
        VID({"early": "early", "late": "late"}, regressor="linear", init_var=1.0),
        # At the default temperature, 4, this student learns more slowly than without KD.
        KD(temperature=1.0, ignore_index=IGNORED),
    ]
    example, _ = compose(few, torch.Generator().manual_seed(0))
    student = Segmenter(width=12).to(DEVICE)
    distiller = Distiller(student, teacher, terms, example=example, task_loss=task_loss)
    train("student with VID and KD", distiller, few, options.steps)


if __name__ == "__main__":
    main()
