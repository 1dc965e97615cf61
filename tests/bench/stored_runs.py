"""Rows of a stored run, made from chosen samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def stored_row(
    provider: str,
    seconds: Sequence[float],
    *,
    suite: str = "loss step",
    case: str = "8x4x2x2 float32",
    family: str | None = None,
    rounds: int | None = None,
    contended: bool = False,
    **facts: object,
) -> Row:
    families = {"eager": "eager", "torch.compile": "compile", "copy": "copy"}
    info: dict[str, object] = {
        "suite": suite,
        "case": case,
        "provider": provider,
        "family": family or families.get(provider, "vidfast"),
        "shape": [8, 4, 2, 2],
        "dtype": "float32",
        "layout": "contiguous",
        "elements": 128,
        "pass_bytes": 512,
        "incoming_gradient": 1.0,
        "bytes": 1536,
        "bytes_source": "algorithm",
        "gb_per_s": 1536 / sorted(seconds)[len(seconds) // 2] / 1e9,
        "share_of_copy": 0.5,
        "peak_extra_bytes": 512,
        "cold": True,
        "threads": 2,
        "case_rounds": rounds or len(seconds),
        "load": {"contended": contended, "neighbour_cores": 0.0},
    }
    return {"fullname": provider, "extra_info": info | facts, "stats": {"data": list(seconds)}}
