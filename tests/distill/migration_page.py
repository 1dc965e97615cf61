"""The programs in docs/migration.md, and the loss that all the repositories there share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import torch
from torch import Tensor, nn

import vidfast
from vidfast import distill

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"


def programs(section: str) -> list[str]:
    """Those of the section with this heading, in order."""
    text = PAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    found = re.findall(r"^( *)```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [dedent(program) for _, program in found]


def scope_of(**names: Any) -> dict[str, Any]:
    """What every program may use, and these names."""
    public = {name: getattr(distill, name) for name in distill.__all__}
    return {**public, "VIDLoss": vidfast.VIDLoss, "torch": torch, "nn": nn, **names}


def run(program: str, scope: dict[str, Any]) -> dict[str, Any]:
    """The scope, after the program ran in it."""
    exec(compile(program, str(PAGE), "exec"), scope)
    return scope


def regressor(fan_in: int, hidden: int, fan_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for widths in ((fan_in, hidden), (hidden, hidden), (hidden, fan_out)):
        layers += [nn.Conv2d(*widths, 1, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def their_loss(mean: Tensor, target: Tensor, parameter: Tensor, eps: float = 1e-5) -> Tensor:
    variance = (torch.log(1.0 + torch.exp(parameter)) + eps).view(1, -1, 1, 1)
    return (0.5 * ((mean - target) ** 2 / variance + torch.log(variance))).mean()


def their_kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The divergence without the square of the temperature, averaged over the batch."""
    log_s, p_t = (student / temperature).log_softmax(1), (teacher / temperature).softmax(1)
    return nn.functional.kl_div(log_s, p_t, reduction="sum") / len(student)


def renamed_terms(losses: Mapping[int, vidfast.VIDLoss]) -> dict[str, Tensor]:
    """What VIDLosses learned, by the names of a Distiller's VID."""
    renamed = {}
    for pair, loss in losses.items():
        for key, value in loss.state_dict().items():
            if key.startswith("regressor."):
                renamed[f"terms.vid.regressors.{pair}.{key.removeprefix('regressor.')}"] = value
            else:
                renamed[f"terms.vid.likelihoods.{pair}.{key}"] = value
    return renamed
