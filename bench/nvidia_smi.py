"""What nvidia-smi says. Needs nothing but the standard library: it is asked before anything is imported."""

from __future__ import annotations

import subprocess


def first_gpu(*names: str) -> dict[str, str]:
    """Properties of the first GPU, by nvidia-smi's names; {} where there is no GPU or not all of them are told."""
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in (done.stdout.splitlines() or [""])[0].split(",")]
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}
