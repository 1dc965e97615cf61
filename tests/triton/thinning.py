"""A pytest plugin that keeps a part of a suite, for an interpreter that is a thousand times slower than a kernel.

VIDFAST_TEST_PER_FUNCTION  parametrisations kept of each test function, evenly spaced (0: all)
VIDFAST_TEST_SHARE         "i/n": of what is kept, the i-th of n shares (for n processes side by side)
"""

from __future__ import annotations

import os

import pytest


def kept(counts: list[int], most: int) -> list[list[int]]:
    """For each function with so many parametrisations, which of them: first and last, and evenly between."""
    if most < 1:
        return [list(range(n)) for n in counts]
    return [sorted({i * (n - 1) // max(min(n, most) - 1, 1) for i in range(min(n, most))}) for n in counts]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    most = int(os.environ.get("VIDFAST_TEST_PER_FUNCTION", "0"))
    index, shares = (int(x) for x in os.environ.get("VIDFAST_TEST_SHARE", "0/1").split("/"))
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.split("[")[0], []).append(item)
    groups = list(functions.values())
    chosen = [
        group[i]
        for group, which in zip(groups, kept([len(g) for g in groups], most), strict=True)
        for i in which
    ]
    share = {id(item) for item in chosen[index::shares]}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in share])
    items[:] = [item for item in items if id(item) in share]
