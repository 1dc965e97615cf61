"""The names that options may have, as types: a type checker finds a misspelt one before a run does.

Those of the loss itself are in `vidfast.arguments`.
"""

from __future__ import annotations

from typing import Literal

# Of TrainOptions.
Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["cosine", "steps", "constant"]
Precision = Literal["no", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda"]

# Of LwF and MIMKD.
LwFForm = Literal["mse", "softened"]
Critic = Literal["separable", "concat"]
