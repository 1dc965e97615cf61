"""The programs in docs/distillation.md that show masks run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "distillation.md"


def test_what_the_page_shows_of_masks_runs() -> None:
    section = PAGE.read_text().split("\n## Masks")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 3
    torch.manual_seed(0)
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), scope)
