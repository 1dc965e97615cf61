"""What torch.compile has to know of a call and cannot say in its own terms, asked while it traces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidfast._torch import comptime, constant_while_traced

_last_is_inference = False


@torch.library.custom_op("vidfast::copied", mutates_args=(), schema="(Tensor x) -> Tensor")
def copied(x: Tensor) -> Tensor:
    """A copy, as an operator that no compiler makes again in backward from what it is a copy of."""
    return x.clone()


@copied.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def savable_in_graph(x: Tensor) -> Tensor:
    """x, or a copy of it in the graph where it was made under torch.inference_mode and comes in from outside.

    Autograd saves no such tensor for backward, and a compiled graph saves its inputs.
    """
    if x.requires_grad or not torch.is_grad_enabled():
        return x
    ask = comptime()
    if ask is None:
        return x
    ask(_look_at_x)
    return copied(x) if _is_inference() else x


def _look_at_x(trace: Any) -> None:
    """Called by the tracer in `savable_in_graph`: whether x comes from such a tensor. Anything unexpected is a no.

    What comes from one by a view is one too, and what comes by arithmetic is not: it is copied without need.
    """
    global _last_is_inference
    _last_is_inference = False
    try:
        waiting, seen = [trace.get_local("x").as_proxy().node], set[Any]()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            given = node.meta.get("grapharg")
            example = None if given is None else given.example
            if isinstance(example, Tensor) and example.is_inference():
                _last_is_inference = True
                return
            waiting += node.all_input_nodes
    except (
        Exception
    ):  # private to dynamo; where another version differs, torch says what it thinks of the tensor
        return


@constant_while_traced
def _is_inference() -> bool:
    return _last_is_inference


_last_is_constant = False


def weight_in_graph(weight: float, on_cpu: bool) -> tuple[float, Tensor | None, float | None]:
    """`weight` as three factors: an operator's float, an operator's tensor, and one of the loss outside of it.

    An operator's float is a constant of the graph, so a weight that changes must not be one: every value would be
    another graph. dynamo takes a number for a constant until it sees a second value. From then on, on the CPU, the
    weight is a tensor, which an operator reads without waiting and folds into its k, so that the incoming gradient is
    1; elsewhere the loss is multiplied outside. For a weight that is no constant there is no case of 1: dynamo makes
    every value a graph of its own once a float was not needed in one.

    Args:
        weight: Of the call.
        on_cpu: Whether its tensors are on the CPU. A scalar from there in a GPU's graph would rule CUDA graphs out.
    """
    if torch.compiler.is_dynamo_compiling():
        ask = comptime()
        if ask is None:
            return 1.0, None, weight
        ask(_look_at_weight)
        if not _is_constant():
            if on_cpu:
                # tensor(weight), full and a float argument would be a graph for every value
                return 1.0, torch.ones((), dtype=torch.float64, device="cpu") * weight, None
            return 1.0, None, weight
    return weight, None, None


def _look_at_weight(trace: Any) -> None:
    """Called by the tracer in `weight_in_graph`: whether weight is a constant of the graph, guarded as one."""
    global _last_is_constant
    try:
        _last_is_constant = bool(trace.get_local("weight").is_python_constant())
    except Exception:  # private to dynamo: what is taken for no constant is right, and slower
        _last_is_constant = False


@constant_while_traced
def _is_constant() -> bool:
    return _last_is_constant
