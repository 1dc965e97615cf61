"""What torch.compile has to know of a call and cannot say in its own terms, asked while it traces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Methods whose result is a view of the tensor, or may be: one of an inference tensor is an inference tensor.
_VIEWS = (
    *(
        "contiguous",
        "detach",
        "expand",
        "flatten",
        "movedim",
        "narrow",
        "permute",
        "reshape",
        "squeeze",
        "to",
    ),
    *("transpose", "unflatten", "unsqueeze", "view", "view_as"),
)
_last_is_inference = False


@torch.library.custom_op("vidfast::copied", mutates_args=(), schema="(Tensor x) -> Tensor")
def copied(x: Tensor) -> Tensor:
    """A copy, as an operator that no compiler makes again in backward from what it is a copy of."""
    return x.clone()


@copied.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def savable(x: Tensor) -> Tensor:
    """x, or a copy of it in the graph where it was made under torch.inference_mode and comes in from outside.

    Autograd saves no such tensor for backward, and a compiled graph saves its inputs.
    """
    if x.requires_grad or not torch.is_grad_enabled():
        return x
    from torch._dynamo.comptime import comptime

    comptime(_look_at_x)
    return copied(x) if _is_inference() else x


def _look_at_x(trace: Any) -> None:
    """Called by the tracer in `savable`: whether the real tensor behind x is one. Anything unexpected is a no."""
    global _last_is_inference
    _last_is_inference = False
    try:
        node = trace.get_local("x").as_proxy().node
        while node.op == "call_method" and node.target in _VIEWS:
            node = node.args[0]
        given = node.meta.get("grapharg")
        example = None if given is None else given.example
        _last_is_inference = isinstance(example, Tensor) and example.is_inference()
    except (
        Exception
    ):  # private to dynamo, and another version's may differ: then torch says what it thinks of it
        return


def _is_inference() -> bool:
    return _last_is_inference


# See `in_transform` in vidfast._torch.
_is_inference._dynamo_marked_constant = True  # type: ignore[attr-defined]
