"""The programs in docs/layers.md run as they stand, one after the other; its table of names is what `places` reads."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from vidfast.distill import places

PAGE = Path(__file__).parents[2] / "docs" / "layers.md"


def test_what_the_page_shows_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 6
    scope: dict[str, object] = {}
    for block in blocks:
        torch.manual_seed(0)
        exec(compile(block, str(PAGE), "exec"), scope)


def test_its_names_are_those_that_the_library_takes_apart() -> None:
    section = PAGE.read_text().split("## Names of features")[1].split("## ")[0]
    names = [
        n
        for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
        for n in re.findall(r'`"(.*?)"`', row)
    ]
    assert len(names) == 9
    documented = {name for name in re.findall(r'"([^"]+)"', places.__doc__ or "") if name != "input"}
    assert set(names) - {"lstm[0]"} == documented - {"head.input"} | {"head.input"}
    modules = {"", "layer3", "lstm", "encoder", "head"}
    assert all(places.parse(name, modules).layer in modules for name in names)
