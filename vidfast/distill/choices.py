"""The names that options may have, as types: a type checker finds a misspelt one before a run does."""

from __future__ import annotations

from typing import Literal

Reduction = Literal["mean", "batchmean", "sum"]
BackendName = Literal["auto", "reference", "cuda", "triton", "cpu"]

# Of TrainOptions.
Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["cosine", "steps", "constant"]
Precision = Literal["no", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda"]

# Of LwF and MIMKD.
LwFForm = Literal["mse", "softened"]
Critic = Literal["separable", "concat"]
