"""VID from a YAML file: torchdistill trains, vidfast computes the loss.

    python examples/torchdistill/train.py                         # about a minute on a laptop's CPU
    python examples/torchdistill/train.py --epochs 1 --steps 2    # to see that it runs

First the teacher learns the digits that scikit-learn brings, then the student learns from them and from the teacher.
`vid.yaml` says what and how; vidfast appears in it in three lines, which are marked. Nothing is downloaded.

Needs `pip install 'vidfast[train]' torchdistill`.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchdistill.common.main_util import import_dependencies, set_seed
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import get_training_box
from tqdm import tqdm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(name: str, model: nn.Module, box: Any, epochs: int | None, steps: int | None) -> None:
    """Trains as the box says, and prints the mean loss of each epoch and the model's test accuracy after it.

    Args:
        name: What is printed before the numbers.
        model: The network that is trained.
        box: torchdistill's training box or distillation box.
        epochs: In place of the YAML's number of epochs.
        steps: At most so many in each epoch.
    """
    count = len(box.train_data_loader) if steps is None else min(steps, len(box.train_data_loader))
    for epoch in range(epochs or box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        losses = []
        batches = islice(box.train_data_loader, count)
        for images, labels, extra in tqdm(batches, f"{name}, epoch {epoch + 1}", count, leave=False):
            loss = box.forward_process(images.to(DEVICE), labels.to(DEVICE), extra)
            box.post_forward_process(loss)
            losses.append(loss.detach())
        box.post_epoch_process()
        mean, right = torch.stack(losses).mean(), accuracy(model, box.val_data_loader)
        print(f"{name}, epoch {epoch + 1}: loss {mean:.4f}, test accuracy {right:.1%}")


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[Any]) -> float:
    """The share of the loader's images that the model classifies rightly, in eval mode."""
    model.eval()
    right = [
        model(images.to(DEVICE)).argmax(1).eq(labels.to(DEVICE)).float().cpu() for images, labels in loader
    ]
    return float(torch.cat(right).mean())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="VID from a YAML file, by torchdistill and vidfast")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("vid.yaml"), help="YAML file")
    parser.add_argument("--epochs", type=int, help="of teacher and student, in place of the YAML's")
    parser.add_argument("--steps", type=int, help="at most so many in each epoch")
    options = parser.parse_args()

    set_seed(0)
    config = load_yaml_file(options.config)
    import_dependencies(config["dependencies"])
    teacher, student = (config["models"][role].to(DEVICE) for role in ("teacher_model", "student_model"))
    where = {"device": DEVICE, "device_ids": None, "distributed": False, "lr_factor": 1}

    box = get_training_box(teacher, config["datasets"], config["train_teacher"], **where)
    train("teacher", teacher, box, options.epochs, options.steps)
    teacher.eval()  # torchdistill leaves it in the mode that it was in
    box = get_distillation_box(teacher, student, config["datasets"], config["train_student"], **where)
    train("student", student, box, options.epochs, options.steps)


if __name__ == "__main__":
    main()
