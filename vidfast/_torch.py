"""Private names of torch, each with what stands in for it where the installed torch has no such name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_module: Any = torch.nn.modules.module
# torch 2.7 and later.
_has_any_global_hook: Callable[[], object] | None = getattr(_module, "_has_any_global_hook", None)
_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


def any_global_hook() -> bool:
    """Whether a hook for all modules is registered: `torch.nn.modules.module.register_module_*_hook`."""
    if _has_any_global_hook is not None:
        return bool(_has_any_global_hook())
    return any(getattr(_module, name) for name in _GLOBAL_HOOKS)
